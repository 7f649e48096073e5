"""How cost grows, and the laws beside it. Run: python -m pytest tests/test_growth.py"""

import json
import math
import subprocess
import sys

import pytest
import torch
from cli import ROOT
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import growth, growth_figures, growth_paper, kv_cache, laws
from models.fast import products
from models.mar import mar_tiny

SMALLEST = "--model mar_tiny --sides 1 2 --batch_sizes 1 2 --steps 2 3 --num_iter 1 --batch_size 1"
SMALLEST += " --num_sampling_steps 2 --rounds 1 --device cpu --out"


def computed(call):
    """FLOPs of the matrix products of a call."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.fixture
def by_torch(monkeypatch):
    """Products that are counted."""
    monkeypatch.setattr(products, "mode", "torch")


def test_flops_by_the_shapes(by_torch):
    """They are those that training and sampling compute, within 2%: a few embeddings are left
    out."""
    model = mar_tiny(img_size=6, vae_stride=1, num_sampling_steps="6", diffusion_batch_mul=2)
    latents, labels = torch.randn(2, 16, 6, 6), torch.zeros(2, dtype=int)
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 0, 0)]
    masked = math.ceil(model.sample_mask_ratio(seeds[0]) * model.seq_len)
    found = computed(lambda: model(latents, labels, *seeds[1:]).backward())
    assert 2 * laws.training_flops(model, masked) == pytest.approx(found, rel=0.02)
    model.eval()
    found = computed(lambda: model.sample_tokens(2, num_iter=3, cfg=2.0))
    assert 2 * sum(laws.sampling_flops(model, 3, 6)) == pytest.approx(found, rel=0.02)


def test_flops_of_a_causal_model(by_torch):
    """They are those of sampling with the cache."""
    model = kv_cache.build(4, 32, 8)
    found = computed(lambda: kv_cache.sample(model, 2))
    assert 2 * laws.cached_flops(model) == pytest.approx(found, rel=0.02)


def test_constants_are_found():
    """Those of a law that holds; of noise none is negative."""
    steps = [10, 100, 1000]
    constants, law = laws.fit([[1, n] for n in steps], [0.5 + 0.02 * n for n in steps])
    assert constants == pytest.approx([0.5, 0.02]) and law == pytest.approx([0.7, 2.5, 20.5])
    constants, _ = laws.fit([[1, n] for n in steps], [0.1, 2.0, 30.0])
    assert constants[0] == 0 < constants[1]


def test_on_paper():
    """One GPU is as measured and sends nothing; with more a step is never shorter."""
    assert growth_paper.step_seconds(1, 1, True) == pytest.approx(0.2209)
    assert growth_paper.bytes_sent(10, 2) == 40 and growth_paper.bytes_sent(10, 2, True) == 60
    assert growth_paper.bytes_held(10, 4, True) == 50
    for name, way in growth_paper.WAYS.items():
        times = [growth_paper.step_seconds(n, *way) for n in growth_paper.COUNTS]
        assert times == sorted(times), name
        assert growth_paper.step_seconds(128, *way, hidden=True) < times[-1], name


def test_all_figures(tmp_path, capsys):
    """Each is written, with the numbers in it as a table and a file."""
    growth.main([*SMALLEST.split(), str(tmp_path), "--processes", "1"])
    out = capsys.readouterr().out
    for name in growth.FIGURES:
        with Image.open(tmp_path / f"growth_{name}.png") as image:
            assert image.width > 500 and len(image.convert("RGB").getcolors(1 << 16)) > 50
        panels = json.loads((tmp_path / f"growth_{name}.json").read_text())
        for curve in (curve for panel in panels for curve in panel["curves"]):
            assert all(value > 0 for value in curve["law"] + curve.get("measured", []))
    assert "| tokens | training | law |" in out and "## Diffusion steps" in out
    assert "GFLOP/s" in out and "ms per call" in out and "| 128 | 3.79 |" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num_iter 5", "--num_iter 5: expected at most 1, the tokens"),
        ("--sides 0", "0: expected an integer, at least 1"),
        ("--figures token", "invalid choice: 'token'"),
        ("--model ar_tiny", "invalid choice: 'ar_tiny'"),
    ],
)
def test_wrong_flags(tmp_path, capsys, flags, message):
    """One line says what was expected, before anything is measured."""
    with pytest.raises((SystemExit, ValueError)) as error:
        growth.main([*SMALLEST.split(), str(tmp_path / "out"), *flags.split()])
    assert message in f"{error.value} {capsys.readouterr()}"
    assert not (tmp_path / "out").exists()


def test_a_failing_job_is_an_error(monkeypatch):
    """The first error of its processes is the message."""
    args = growth.get_parser().parse_args([*SMALLEST.split(), "out", "--device", "cuda:99"])
    failed = subprocess.CompletedProcess([], 1, "", "W1 wait\nerror: --device cuda:99: none\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match="--processes 2: error: --device cuda:99: none"):
        growth_figures.launch(args, 2)


@pytest.mark.slow
def test_two_processes(tmp_path, capsys):
    """They train together, and an all-reduce by itself takes some time."""
    growth.main([*SMALLEST.split(), str(tmp_path), "--figures", "processes"])
    assert "2 processes: each sends " in capsys.readouterr().out
    measured, _ = json.loads((tmp_path / "growth_processes.json").read_text())
    assert measured["curves"][0]["x"] == [1, 2]
    together, alone = (curve["law"][1] for curve in measured["curves"])
    assert together < alone


def test_flags_need_no_torch():
    """--help answers at once."""
    code = "import benchmarks.growth, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n"
