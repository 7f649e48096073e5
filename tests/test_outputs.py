"""A stopped run of sampling resumes, with the same result. Run: python -m pytest tests/test_outputs.py

Stopped by a signal or killed, at any batch: folder, .npz, grid and metrics are those of a run that
was never stopped, bit by bit.
"""

import json
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
from cli import ROOT, complain, read_lines
from PIL import Image
from test_train import torchrun

import main_mar
import sample
from util.flags import run
from util.images import read_png
from util.outputs import RECORD, Outputs
from util.run import stop

BATCHES = 6  # of 5 images, of which the last has fewer
FLAGS = "--device cpu --labels 0-8 --per_class 3 --batch_size 5 --num_iter 2".split()
KILLED = """
import os, sys
import sample
from util.flags import run
from util.outputs import Outputs
keep, left = Outputs.keep, int(sys.argv[1])
def kept(outputs, indices, images):
    global left
    keep(outputs, indices, images)
    left -= len(indices) > 0
    if not left:
        os.kill(os.getpid(), 9)
Outputs.keep = kept
run(sample.main, sys.argv[2:])
"""


@pytest.fixture(autouse=True)
def signals():
    """The handlers of signals are put back."""
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.fixture
def stop_after(monkeypatch):
    """Function of a number of batches: SIGTERM arrives while the last of them is kept."""
    keep = Outputs.keep

    def stop_after(batches):
        kept = []

        def wrapped(outputs, indices, images):
            keep(outputs, indices, images)
            kept.append(indices)
            if len(kept) == batches:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Outputs, "keep", wrapped)

    yield stop_after
    monkeypatch.undo()


def call(ckpt, *flags):
    """Run sample.py; returns its exit status."""
    try:
        run(sample.main, ["--ckpt", str(ckpt), *FLAGS, *map(str, flags)])
    except SystemExit as ended:
        return ended.code
    return 0


def content(folder):
    """Name -> bytes of all files below a folder, but for the lock and what says when."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def outputs_of(folder, kind):
    """The flags of each kind of output in a folder."""
    kinds = {
        "folder": ["--out", folder / "images"],
        "npz": ["--out", folder / "all.npz"],
        "grid": ["--out", folder / "grid.png"],
        "all": ["--out", folder / "grid.png", folder / "images", folder / "all.npz"],
    }
    return kinds[kind]


@pytest.fixture(scope="module")
def whole(ckpt, tmp_path_factory):
    """A folder of all outputs of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert call(ckpt, *outputs_of(folder, "all")) == 0
    return folder


@pytest.mark.parametrize("kind", ["folder", "npz", "grid", "all"])
def test_stopped_anywhere_and_resumed(kind, ckpt, whole, tmp_path, stop_after, capsys, monkeypatch):
    """By SIGTERM, twice: status 75, a line that says how many there are; then the same bytes."""
    first = random.randrange(1, BATCHES - 1)
    stop_after(first)
    assert call(ckpt, *outputs_of(tmp_path, kind)) == stop.STATUS
    line = f"stopped: SIGTERM; {5 * first} of 27 images are there, the same command resumes"
    assert line in capsys.readouterr().err
    stop_after(BATCHES - 1)
    assert call(ckpt, *outputs_of(tmp_path, kind)) == stop.STATUS
    assert "25 of 27 images are there" in capsys.readouterr().err
    monkeypatch.undo()
    assert call(ckpt, *outputs_of(tmp_path, kind)) == 0
    found = content(tmp_path)
    expected = content(whole)
    assert found == {name: expected[name] for name in found}
    assert len(found) == {"folder": 28, "npz": 1, "grid": 1, "all": 30}[kind]


def test_only_missing_batches_are_sampled(ckpt, whole, tmp_path, stop_after, monkeypatch, capsys):
    """Whole ones: the images of a batch of which one is missing or damaged are all sampled again."""
    import engine_mar

    flags = outputs_of(tmp_path, "folder")
    assert call(ckpt, *flags) == 0
    images = tmp_path / "images"
    (images / "000006.png").unlink()
    png = bytearray((images / "000012.png").read_bytes())
    png[len(png) // 2] ^= 1
    (images / "000012.png").write_bytes(png)
    (images / "000026.png").write_bytes((whole / "images" / "000026.png").read_bytes()[:-9])
    Image.new("RGB", (9, 9)).save(images / "000021.png")
    sampled, draw = [], engine_mar.sample_latents
    monkeypatch.setattr(
        engine_mar, "sample_latents", lambda m, labels, *a: sampled.append(labels) or draw(m, labels, *a)
    )  # fmt: skip
    assert call(ckpt, *flags) == 0
    labels = [i % 9 for i in range(27)]
    assert sampled == [labels[5:10], labels[10:15], labels[20:25], labels[25:]]
    assert content(images) == content(whole / "images")
    assert "26 of 27 images are there: resuming" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_killed(kind, ckpt, whole, tmp_path):
    """By SIGKILL: what it was writing goes, what it had written is used."""
    flags = ["--ckpt", ckpt, *FLAGS, *outputs_of(tmp_path, kind)]
    command = [sys.executable, "-c", KILLED, "3", *map(str, flags)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "all.npz").exists()
    assert call(ckpt, *flags[2 + len(FLAGS) :]) == 0
    found, expected = content(tmp_path), content(whole)
    assert found == {name: expected[name] for name in found}
    assert len(found) == {"folder": 28, "npz": 1}[kind]
