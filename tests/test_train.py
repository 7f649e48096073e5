"""The training loop, alone and in two processes. Run: python -m pytest tests/test_train.py"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rule import GOLDEN

import main_mar
import sample
from util.checkpoint import LAST, load_checkpoint
from util.ema import EMA
from util.lr_sched import learning_rate
from util.recipe import Recipe

ROOT = Path(__file__).parent.parent
FAST = [
    *("--preset", "digits", "--device", "cpu", "--batch_size", "128", "--warmup_epochs", "1"),
    *("--diffloss_d", "1", "--diffloss_w", "32", "--num_sampling_steps", "5", "--num_iter", "2"),
    *("--diffusion_batch_mul", "1", "--epochs", "2", "--eval_freq", "99", "--save_last_freq", "1"),
]


def train(folder, *flags):
    """Train on the digits for two short epochs; returns the checkpoint."""
    main_mar.main([*FAST, "--output_dir", str(folder), *flags])
    return load_checkpoint(folder / LAST)


def equal(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (name, values)
        for name, values in json.loads((GOLDEN / "optimisation.json").read_text()).items()
        if name.startswith("lr_")
    ],
)
def test_learning_rate_is_the_published(schedule, expected):
    """Warm-up, constant and cosine, at fractional epochs."""
    for epoch, lr in expected.items():
        rate = learning_rate(
            float(epoch),
            lr=8e-4,
            min_lr=1e-5,
            warmup_epochs=100,
            epochs=400,
            schedule=schedule.removeprefix("lr_"),
        )
        assert rate == pytest.approx(lr, rel=1e-9)


def test_ema_follows():
    """It starts at the weights and keeps `rate` of itself; it is a copy, not the model."""
    model = torch.nn.Linear(2, 1)
    ema = EMA(model, 0.9)
    before = model.weight.clone()
    with torch.no_grad():
        model.weight += 1
    assert torch.equal(ema.module.weight, before)
    ema.update(model)
    torch.testing.assert_close(ema.module.weight.detach(), before.detach() + 0.1)
    with pytest.raises(ValueError, match="ema_rate 1.0"):
        EMA(model, 1.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, checkpoint) of an uninterrupted run of two epochs."""
    folder = tmp_path_factory.mktemp("run")
    return folder, train(folder)


def test_a_run_leaves_what_there_is_to_look_at(run):
    """Checkpoint, metrics by name, TensorBoard, and images of EMA and raw weights."""
    folder, checkpoint = run
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert {"step", "epoch", "loss", "grad_norm", "lr"} <= set(lines[0])
    assert {"images_per_s", "data_wait"} <= set(lines[0])
    assert {f"loss_t{q * 250}-{q * 250 + 249}" for q in range(4)} <= set(lines[0])
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert list(folder.glob("events.out.tfevents*"))
    assert {p.name for p in (folder / "samples").iterdir()} == {
        "epoch0002_ema.png",
        "epoch0002_raw.png",
    }
    assert checkpoint["epoch"] == 1
    assert checkpoint["config"]["latent_range"] == 1.0
    assert not equal(checkpoint["model"], checkpoint["model_ema"])


def test_resumed_run_equals_the_uninterrupted_one(run, tmp_path, monkeypatch):
    """Stopped after the first epoch and resumed, it ends with the very same weights."""
    _, expected = run
    monkeypatch.setattr(Recipe, "rate", stopping_after(1))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / LAST)["epoch"] == 0
    resumed = train(tmp_path, "--resume", str(tmp_path))
    assert resumed["epoch"] == 1
    for part in ("model", "model_ema"):
        assert equal(resumed[part], expected[part]), part


def test_another_run_in_the_same_folder_is_kept(run, tmp_path, capsys):
    """Unless it is resumed: then its checkpoint is replaced. Two kept ones do not meet."""
    shutil.copy(run[0] / LAST, tmp_path / LAST)
    train(tmp_path, "--epochs", "1", "--seed", "2")
    first = tmp_path / "checkpoint-last-before1.pth"
    assert f"it is now {first.name}" in capsys.readouterr().out
    assert equal(load_checkpoint(first)["model"], run[1]["model"])
    train(tmp_path, "--seed", "2", "--resume", str(tmp_path))
    assert "it is now" not in capsys.readouterr().out
    train(tmp_path, "--epochs", "3", "--resume", str(first))
    assert "it is now checkpoint-last-before2.pth" in capsys.readouterr().out
    assert equal(load_checkpoint(first)["model"], run[1]["model"])


def stopping_after(epochs):
    """A learning rate that stops the run when so many epochs are done."""

    rate = Recipe.rate

    def stopping(recipe, epoch):
        if epoch >= epochs:
            raise KeyboardInterrupt
        return rate(recipe, epoch)

    return stopping


def test_gradient_accumulation_takes_whole_steps(tmp_path):
    """11 batches by threes are 3 optimizer steps per epoch; the learning rate knows."""
    checkpoint = train(tmp_path, "--accum_iter", "3")
    steps = {int(s["step"]) for s in checkpoint["optimizer"]["state"].values()}
    assert steps == {6}


def test_bf16_and_checkpointing_train(tmp_path):
    """bf16 autocast, with blocks computed again, still learns; weights stay float32."""
    checkpoint = train(tmp_path, "--precision", "bf16", "--grad_checkpointing", "--no_vlb")
    assert all(v.dtype == torch.float32 for v in checkpoint["model"].values())
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["loss"] < json.loads(lines[0])["loss"]


def test_what_does_not_fit_a_short_run_is_reported(run, capsys, tmp_path):
    """One line each for warm-up and EMA, with values that would fit."""
    train(tmp_path, "--warmup_epochs", "100", "--ema_rate", "0.9999")
    output = capsys.readouterr().out
    assert "--warmup_epochs 1 would fit" in output
    assert "the EMA remembers 10000 steps, the run has 22; --ema_rate 0.5455 would fit" in output


def test_diverged_samples_are_reported(run, capsys, tmp_path):
    """A model hardly trained, started at t = 999, does not draw black images in silence."""
    folder, _ = run
    flags = ["--ckpt", str(folder / LAST), "--device", "cpu", "--per_class", "1"]
    sample.main([*flags, "--max_timestep", "999", "--out", str(tmp_path / "a.png")])
    said = "sampling diverged. Start the reverse process lower with --max_timestep 950"
    assert said in capsys.readouterr().out


def torchrun(script, *arguments, processes=2):
    """Run a script in several processes on the CPU; returns (exit status, output)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", f"--nproc_per_node={processes}", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout


def test_two_processes_end_with_equal_weights(tmp_path):
    """Real torchrun: ranks see different images and noise, and keep the same model and EMA."""
    script = ROOT / "tests" / "two_processes.py"
    status, output = torchrun(script, "dump", *FAST, "--output_dir", tmp_path)
    assert status == 0, output
    ranks = [torch.load(tmp_path / f"rank{r}.pth", weights_only=True) for r in (0, 1)]
    for part in ("model", "ema"):
        assert equal(ranks[0][part], ranks[1][part])
    assert equal(ranks[0]["model"], load_checkpoint(tmp_path / LAST)["model"])
    assert ranks[0]["loss"] != ranks[1]["loss"]


@pytest.mark.slow
def test_non_finite_loss_stops_every_process(tmp_path):
    """A NaN on rank 1 stops both ranks with its epoch, step and rank; no checkpoint is written."""
    script = ROOT / "tests" / "two_processes.py"
    status, output = torchrun(script, "nan", *FAST, "--output_dir", tmp_path)
    assert status != 0
    assert output.count("is not finite at epoch 0, step 3, rank 1") == 2, output
    assert not (tmp_path / LAST).exists()


@pytest.mark.parametrize("processes", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_sampling_does_not_depend_on_batches_or_processes(run, tmp_path, processes):
    """The same seed gives the same images, 3 at a time in one or two processes or all at once."""
    folder, _ = run
    flags = ["--ckpt", folder / LAST, "--device", "cpu", "--per_class", "1", "--seed", "5"]
    sample.main([*map(str, flags), "--out", str(tmp_path / "all.npz")])
    out = [tmp_path / "some.npz", tmp_path / "folder"]
    status, output = torchrun(
        ROOT / "sample.py", *flags, "--batch_size", "3", "--out", *out, processes=processes
    )
    assert status == 0, output
    all_at_once, some = (np.load(tmp_path / f"{n}.npz")["arr_0"] for n in ("all", "some"))
    assert all_at_once.shape == (10, 8, 8, 3)
    # a grey level is 1/127.5: rounding may move one pixel by one
    assert np.abs(all_at_once.astype(int) - some).max() <= 1
    assert len(list((tmp_path / "folder").glob("*.png"))) == 10
