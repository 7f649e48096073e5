"""Many small batches are one large one, and fp16 with its scaler trains.

Run: python -m pytest tests/test_accumulation.py
"""

import json
import shlex

import pytest
import torch
from cli import ROOT
from sharing import CPU, Batches, Log, share_draws, step
from test_fixtures import FIXTURES, TINY
from test_train import equal, torchrun

import engine_mar
import main_mar
from models.mar import mar_tiny
from models.tokenizer import PixelTokenizer
from util import rng
from util.checkpoint import LAST, TrainState, load_checkpoint
from util.ema import EMA


@pytest.fixture
def shared(monkeypatch):
    """Draws that do not depend on the batch."""
    monkeypatch.setattr(rng, "_draw", rng._draw)
    share_draws()


def check_same(one, other):
    """The same loss and gradient, within the rounding of sums in another order."""
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[1] == pytest.approx(other[1], rel=1e-5) and one[1] > 0.01
    for name, gradient in one[2].items():
        scale = other[2][name].abs().max().item()
        # a weight of about 0.1 minus its gradient, in float32
        torch.testing.assert_close(gradient, other[2][name], atol=1e-5 * scale + 1e-7, rtol=1e-4)


@pytest.mark.parametrize("batches", [2, 4])
def test_accumulated_batches_equal_one(shared, batches):
    """The loss and every gradient are those of all images at once, not of the last ones."""
    whole, parts = step(1), step(batches)
    check_same(parts, whole)
    assert sum(gradient.abs().max() > 0 for gradient in whole[2].values()) > 50


@pytest.mark.slow
def test_two_processes_equal_one(shared, tmp_path):
    """Of half the images each, whole or in two batches."""
    status, output = torchrun(ROOT / "tests" / "sharing.py", tmp_path, "1", "2")
    assert status == 0, output
    whole = step(1)
    for batches in (1, 2):
        check_same(torch.load(tmp_path / f"{batches}.pth", weights_only=True), whole)


# ---- fp16 ----------------------------------------------------------------------------------------


def test_fp16_trains_and_resumes(tmp_path):
    """Losses are finite; the scaler's state, in the checkpoint, is taken up again."""
    flags = f"{TINY} --tokenizer kl --vae_path {FIXTURES}/kl.ckpt --img_size 16 --class_num 2"
    flags += f" --use_cached --cached_path {FIXTURES}/cache-shards --batch_size 3"
    flags += f" --save_last_freq 1 --precision fp16 --output_dir {tmp_path} --resume {tmp_path}"
    main_mar.main(shlex.split(f"{flags} --epochs 4"))
    first = load_checkpoint(tmp_path / LAST)
    assert all(value.dtype == torch.float32 for value in first["model"].values())
    scaler, steps = first["scaler"], 2 * 4  # batches
    taken = {int(s["step"]) for s in first["optimizer"]["state"].values()}.pop()
    assert taken > 0 and scaler["scale"] == 2.0 ** (16 - (steps - taken))  # halved if skipped
    main_mar.main(shlex.split(f"{flags} --epochs 5"))
    second = load_checkpoint(tmp_path / LAST)["scaler"]
    assert second == {**scaler, "_growth_tracker": scaler["_growth_tracker"] + 2}
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").open()]
    assert len(losses) == 5 and all(0 < loss < 3 for loss in losses)


def parts(scale):
    """(model, optimizer, scaler, ema) to train in fp16."""
    torch.manual_seed(0)
    model = mar_tiny(img_size=8, vae_stride=1, patch_size=2, vae_embed_dim=1, class_num=10,
                     buffer_size=4, diffloss_d=1, diffloss_w=32)  # fmt: skip
    optimizer = torch.optim.AdamW(engine_mar.parameter_groups(model, 0.02), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return model, EMA(model, 0.9), optimizer, scaler


def train(model, ema, optimizer, scaler, batches=3):
    """An epoch in fp16; returns its metrics."""
    log = Log()
    how = {"learning_rate": lambda epoch: 1e-3, "device": CPU, "precision": "fp16"}
    engine_mar.train_one_epoch(
        model, PixelTokenizer(1), Batches(batches), optimizer, scaler, ema, 0, logger=log, **how
    )
    return log.metrics


def test_a_step_that_overflows_is_skipped():
    """A scale at which gradients are infinite leaves weights and moments as they are, and is
    halved; it is no reason to stop."""
    model, ema, optimizer, scaler = parts(2.0**120)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    metrics = train(model, ema, optimizer, scaler)
    assert equal(model.state_dict(), before) and not optimizer.state
    assert scaler.get_scale() == 2.0**117
    assert torch.isfinite(torch.tensor(metrics["loss"]))
    model, ema, optimizer, scaler = parts(2.0**10)
    train(model, ema, optimizer, scaler)
    assert not equal(model.state_dict(), before) and scaler.get_scale() == 2.0**10


def test_the_scaler_is_saved_and_restored(tmp_path):
    """By TrainState, with what it counts."""
    model, ema, optimizer, scaler = parts(2.0**10)
    train(model, ema, optimizer, scaler)
    TrainState(model, ema, optimizer, scaler, 1).save(tmp_path / LAST, None, {})
    other = parts(2.0**16)
    state = TrainState(*other)
    state.load(load_checkpoint(tmp_path / LAST), tmp_path / LAST)
    assert state.epoch == 1
    assert other[3].state_dict() == scaler.state_dict()
    assert other[3].state_dict()["scale"] == 2.0**10
    assert other[3].state_dict()["_growth_tracker"] == 3
