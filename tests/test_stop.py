"""Runs that are stopped resume as if they had not been. Run: python -m pytest tests/test_stop.py"""

import os
import shlex
import signal

import pytest
import torch
from conftest import write_images
from test_fixtures import FIXTURES, TINY

import main_mar
from util.checkpoint import LAST, load_checkpoint
from util.flags import run
from util.run import stop
from util.run.saver import Saver

BOTH = f"{TINY} --ema_rate 0.9 --attn_dropout 0.1 --epochs 2 --eval_freq 99"
KL = f"--tokenizer kl --vae_path {FIXTURES}/kl.ckpt --img_size 16 --class_num 2 --batch_size 1"
CACHED = f"{BOTH} {KL} --use_cached --cached_path {FIXTURES}/cache"
WAYS = {
    "digits": f"{BOTH} --preset digits --batch_size 250 --model mar_tiny --epochs 2",
    "accumulation": f"{BOTH} --preset digits --batch_size 125 --accum_iter 2 --model mar_tiny",
    "images": f"{BOTH} {KL} --data_path {{images}} --num_workers 2",
    "cached images": f"{CACHED}-images --num_workers 2",
    "shards": f"{CACHED}-shards",
    "shards, workers": f"{CACHED}-shards --num_workers 2",
    "accumulated shards": f"{CACHED}-shards --accum_iter 2 --mask_ratio_per_rank",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), ("a", "b"))


def signalled(step, number=signal.SIGTERM):
    """`Saver.after_step` that receives a signal at an optimizer step of the run."""
    after_step = Saver.after_step

    def wrapped(saver, batch, *rest):
        saver.state.batch = batch
        if saver.step == step:
            os.kill(os.getpid(), number)
        after_step(saver, batch, *rest)

    return wrapped


def train(flags, folder):
    run(main_mar.main, [*shlex.split(flags), "--output_dir", str(folder)])
    return load_checkpoint(folder / LAST)


def assert_same(one, other):
    """Weights, averages and all that the optimizer holds, bit by bit."""
    for part in ("model", "model_ema"):
        assert all(torch.equal(one[part][name], value) for name, value in other[part].items())
    for number, state in other["optimizer"]["state"].items():
        assert all(torch.equal(one["optimizer"]["state"][number][k], v) for k, v in state.items())


@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_run_resumes_within_the_epoch(way, images, tmp_path, monkeypatch, capsys):
    """With its status; resumed it is the uninterrupted run, in weights and in the log."""
    flags = WAYS[way].format(images=images)
    whole = train(flags, tmp_path / "whole")
    steps = {int(state["step"]) for state in whole["optimizer"]["state"].values()}.pop()
    place = steps // 2 + 2 if steps > 4 else steps // 2 + 1  # in the second epoch
    monkeypatch.setattr(Saver, "after_step", signalled(place))
    folder = tmp_path / "stopped"
    with pytest.raises(SystemExit) as ended:
        train(flags, folder)
    assert ended.value.code == stop.STATUS == 75
    assert f"call again with --resume {folder}" in capsys.readouterr().err
    monkeypatch.undo()
    stopped = load_checkpoint(folder / LAST)
    assert stopped["epoch"] == 0 and stopped["place"]["batch"] > 0
    assert_same(train(f"{flags} --resume {folder}", folder), whole)
