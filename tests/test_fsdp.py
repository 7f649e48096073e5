"""Sharded training gives what DDP gives, in memory and in files. Run: pytest tests/test_fsdp.py

Everything is the same bit by bit on the processor where this was written, but for the gradient
norm, whose sum is in another order, and what follows from clipping by it; and for AdamW's fused
kernel, which on a CPU rounds the last numbers of a tensor, here of a part, in another way.
"""

import json

import numpy as np
import pytest
import torch
from cli import ROOT
from PIL import Image
from test_train import FAST, torchrun
from two_fsdp import CASES

import main_mar
from util.checkpoint import LAST, load_checkpoint, weights_in
from util.run import fsdp

QUICK = ("accumulated", "fp16")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # of weights that 12 steps of 1e-3 have moved


def run(*arguments):
    """Run two_fsdp.py in two processes."""
    status, output = torchrun(ROOT / "tests" / "two_fsdp.py", *arguments)
    if "cannot shard on CPUs" in output:
        pytest.skip(f"torch {torch.__version__} shards nothing on a CPU")
    assert status == 0, output
    return output


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder with results of QUICK cases."""
    folder = tmp_path_factory.mktemp("quick")
    run("compare", folder, *QUICK)
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """The folder with results of all other cases."""
    folder = tmp_path_factory.mktemp("others")
    run("compare", folder, *set(CASES) - set(QUICK))
    return folder


def check_same(one, other):
    """The same entries in the same order, and close tensors, in nested dicts and lists."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            check_same(a, b)
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, **CLOSE)
        assert one.untyped_storage().size() == other.untyped_storage().size()  # in the file
    else:
        assert one == other


def check_case(folder, case):
    """What two_fsdp.compare wrote with DDP and sharded."""
    plain, sharded = (
        (load_checkpoint(folder / f"{case}-{x}.pth"), torch.load(folder / f"{case}-{x}-rest.pth"))
        for x in (False, True)
    )
    check_same(plain[0], sharded[0])
    steps = 6 if case == "accumulated" else 12
    assert len(plain[1]["lines"]) == len(sharded[1]["lines"]) == steps
    for one, other in zip(plain[1]["lines"], sharded[1]["lines"], strict=True):
        assert one == pytest.approx(other, rel=1e-5, nan_ok=True) and "grad_norm" in one
    for name, held in weights_in(sharded[0]).items():
        check_same(dict(sharded[1][name]), dict(held))
    return sharded


@pytest.mark.slow
@pytest.mark.parametrize("case", QUICK)
def test_sharded_training_is_the_same(quick, case):
    """Losses, gradient norms, weights, EMA, moments; networks to sample from hold whole weights."""
    check_case(quick, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", set(CASES) - set(QUICK))
def test_more_sharded_training_is_the_same(others, case):
    """With clipping, autocast, checkpointing; of causal models, DiT and another head."""
    check_case(others, case)


def test_the_scaler_skips_the_same_steps(quick):
    """Infinite gradients in one part alone are known to all processes."""
    checkpoint, rest = check_case(quick, "fp16")
    skipped = sum(not np.isfinite(line["grad_norm"]) for line in rest["lines"])
    assert 0 < skipped < 12 and checkpoint["scaler"]["scale"] == 2.0 ** (21 - skipped)


@pytest.mark.slow
def test_inside_the_processes(tmp_path):
    """Accumulated gradients wait for the last batch; a value of one part stops all from saving."""
    output = run("check", tmp_path)
    assert output.count("not finite: model_ema z_proj.bias") == 2, output
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_runs_resume_each_other(tmp_path):
    """Sharded, not sharded, and alone, from within an epoch; their files and grids are the same."""
    run("resume", tmp_path, *FAST, "--eval_freq", "1")
    folders = [tmp_path / name for name in ("ddp", "fsdp", "ddp-fsdp", "fsdp-ddp")]
    expected, *others = (load_checkpoint(folder / LAST) for folder in folders)
    for other in others:
        for entry in ("model", "model_ema", "optimizer", "epoch"):
            check_same(expected[entry], other[entry])
    for folder in folders[1:]:
        for name in ("epoch0002_ema.png", "epoch0002_raw.png"):
            one, other = (np.array(Image.open(x / "samples" / name)) for x in (folders[0], folder))
            assert np.abs(one.astype(int) - other).max() <= 1
    lines = [json.loads(line) for line in (tmp_path / "fsdp" / "log.jsonl").open()]
    assert len([line for line in lines if "loss" in line]) == 2
    alone = ["--epochs", "3", "--resume", str(tmp_path / "fsdp")]
    main_mar.main([*FAST, *alone, "--output_dir", str(tmp_path / "fsdp")])
    assert load_checkpoint(tmp_path / "fsdp" / LAST)["epoch"] == 2


def test_one_process_has_nothing_to_shard(capsys):
    """It is told so."""
    model = torch.nn.Linear(2, 2)
    fsdp.shard(model)
    assert "--fsdp has no effect" in capsys.readouterr().out
    assert type(model) is torch.nn.Linear


def test_parts_of_what_does_not_fit():
    """State of other shapes goes on to the checks that name it."""
    value = torch.zeros(3)
    assert fsdp._part(value, torch.zeros(2)) is value and fsdp._part(7, torch.zeros(2)) == 7
    assert fsdp._part(value, None) is value
