"""Stopped sampling resumes, with the same result. Run: python -m pytest tests/test_outputs.py

Stopped by a signal or killed, at any batch: folder, .npz, grid and metrics are those of a run that
was never stopped, bit by bit.
"""

import json
import os
import random
import shlex
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
FLAGS = shlex.split("--device cpu --labels 0-8 --per_class 3 --batch_size 5 --num_iter 2")
STOPPED = ROOT / "tests" / "stopped_sampling.py"


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
    """Whole ones: all images of a batch of which one is missing or damaged are sampled again."""
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

    def drawn(model, labels, *rest):
        sampled.append(labels)
        return draw(model, labels, *rest)

    monkeypatch.setattr(engine_mar, "sample_latents", drawn)
    assert call(ckpt, *flags) == 0
    labels = [i % 9 for i in range(27)]
    assert sampled == [labels[5:10], labels[10:15], labels[20:25], labels[25:]]
    assert content(images) == content(whole / "images")
    assert "26 of 27 images are there: resuming" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_killed(kind, ckpt, whole, tmp_path):
    """By SIGKILL: what it was writing goes, what it had written is used."""
    flags = ["--ckpt", ckpt, *FLAGS, *outputs_of(tmp_path, kind)]
    command = [sys.executable, STOPPED, "SIGKILL", "0", "3", *map(str, flags)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "all.npz").exists()
    assert call(ckpt, *flags[2 + len(FLAGS) :]) == 0
    found, expected = content(tmp_path), content(whole)
    assert found == {name: expected[name] for name in found}
    assert len(found) == {"folder": 28, "npz": 1}[kind]


def record_of(folder):
    """The last line of results.jsonl, without what says when and how fast."""
    record = read_lines(folder / "results.jsonl")[-1]
    return {name: record[name] for name in record if name not in ("time", "seconds_per_image")}


@pytest.mark.parametrize("script", ["sample", pytest.param("main_mar", marks=pytest.mark.slow)])
def test_metrics_of_a_resumed_run(script, ckpt, tmp_path, stop_after, monkeypatch):
    """All numbers and settings are those of a run that was never stopped; speed is apart."""

    def evaluate(name):
        flags = ["--reference", "digits", "--stats_dir", tmp_path / "stats"]
        flags += ["--out", tmp_path / name / "images", "--output_dir", tmp_path / name]
        if script == "sample":
            return call(ckpt, *flags)
        flags += shlex.split("--preset digits --device cpu --evaluate --num_images 27 --eval_bsz 5")
        flags += ["--num_iter", 2, "--resume", ckpt]
        try:
            run(main_mar.main, [str(flag) for flag in flags])
        except SystemExit as ended:
            return ended.code
        return 0

    assert evaluate("whole") == 0
    stop_after(random.randrange(1, BATCHES))
    assert evaluate("stopped") == stop.STATUS
    assert not (tmp_path / "stopped" / "results.jsonl").exists()
    monkeypatch.undo()
    assert evaluate("stopped") == 0
    assert content(tmp_path / "stopped" / "images") == content(tmp_path / "whole" / "images")
    assert record_of(tmp_path / "stopped") == record_of(tmp_path / "whole")
    assert evaluate("stopped") == 0  # nothing is left to sample
    assert record_of(tmp_path / "stopped") == record_of(tmp_path / "whole")
    times = ["seconds_per_image" in line for line in read_lines(tmp_path / "stopped/results.jsonl")]
    assert times == [True, False]


@pytest.mark.slow
def test_a_stopped_sweep(ckpt, tmp_path, stop_after, monkeypatch, capsys):
    """Stops within a point; the points before are not evaluated again."""
    flags = ["--reference", "digits", "--stats_dir", tmp_path, "--output_dir", tmp_path]
    flags += ["--metrics", "pixel_distance", "--sweep", "cfg=1,2,3"]
    stop_after(BATCHES + 2)
    assert call(ckpt, *flags) == stop.STATUS
    line = "stopped: SIGTERM, 1 of 3 points are evaluated; images are kept with --out only"
    assert line in capsys.readouterr().err
    monkeypatch.undo()
    assert call(ckpt, *flags) == 0
    assert [line["cfg"] for line in read_lines(tmp_path / "results.jsonl")] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_two_processes(name, ckpt, whole, tmp_path):
    """One of two is stopped, or killed: all outputs and metrics are those of two that were not;
    images and files also those of one process, which can resume the work of two."""

    def call_two(folder, name="SIGTERM", batches=0):
        flags = ["--ckpt", ckpt, *FLAGS, *outputs_of(folder, "all"), "--output_dir", folder]
        flags += ["--reference", "digits", "--stats_dir", tmp_path / "stats"]
        return torchrun(STOPPED, name, 1, batches, *flags)

    status, output = call_two(tmp_path / "never")
    assert status == 0, output
    record = record_of(tmp_path / "never")
    for folder in (tmp_path / "two", tmp_path / "one"):
        status, output = call_two(folder, name, 2)
        assert status != 0 and not (folder / "all.npz").exists()
        if name == "SIGTERM":
            assert "stopped: SIGTERM; 20 of 27 images are there" in output
    status, output = call_two(tmp_path / "two")
    assert status == 0 and "of 27 images are there: resuming" in output, output
    assert record_of(tmp_path / "two") == record
    assert call(ckpt, *outputs_of(tmp_path / "one", "all")) == 0
    for folder in ("never", "two", "one"):
        found, expected = content(tmp_path / folder), content(whole)
        assert {name: found.get(name) for name in expected} == expected


# ---- what is refused -----------------------------------------------------------------------------


CHANGES = {
    "cfg 2.0 (was 1.5)": "--cfg 2",
    "seed 3 (was 1)": "--seed 3",
    "weights raw (was ema), weights_sha256": "--weights raw",
    "images 36 (was 27), labels_sha256": "--per_class 4",
    "labels_sha256": "--labels 1-9",
    "batch_size 7 (was 5)": "--batch_size 7",
    "precision tf32 (was fp32)": "--precision tf32",
    "tokenizer_shift 0.5 (was 0.0)": "--vae_shift 0.5",
    "temperature 0.9 (was 1.0)": "--temperature 0.9",
}


@pytest.fixture
def stopped(ckpt, tmp_path, stop_after, monkeypatch):
    """A folder with outputs of a run that was stopped after two batches."""
    stop_after(2)
    for kind in ("folder", "npz", "grid"):
        assert call(ckpt, *outputs_of(tmp_path, kind)) == stop.STATUS
        stop_after(2)
    monkeypatch.undo()
    return tmp_path


def refused(capsys, ckpt, *flags):
    capsys.readouterr()
    return complain(capsys, sample.main, "--ckpt", ckpt, *FLAGS, *flags)


def test_other_settings_are_refused(ckpt, stopped, capsys):
    """One line: what was and is now, and what to do; the images stay."""
    before = content(stopped)
    for change, flags in CHANGES.items():
        line = refused(capsys, ckpt, *outputs_of(stopped, "folder"), *flags.split())
        told = f"error: --out {stopped}/images: holds 10 images of other settings: {change}"
        assert line.startswith(told), line
        assert line.endswith("expected those settings, or an empty folder")
    line = refused(capsys, ckpt, *outputs_of(stopped, "npz"), "--cfg", "2")
    assert f"{stopped}/all.npz" in line and "cfg 2.0 (was 1.5)" in line
    assert f"or another name, or {stopped}/.all.npz.parts deleted" in line
    assert content(stopped) == before


def test_a_stopped_grid_makes_way(ckpt, stopped, capsys):
    """Its few images are deleted, and it is said, where settings change: somebody experiments."""
    assert call(ckpt, *outputs_of(stopped, "grid"), "--cfg", "2") == 0
    assert "cfg 2.0 (was 1.5)" in capsys.readouterr().out
    assert (stopped / "grid.png").is_file() and not (stopped / ".grid.png.parts").exists()


def test_images_of_unknown_origin_are_refused(ckpt, whole, tmp_path, capsys):
    """PNGs without a record, as earlier versions wrote them, or with one that cannot be read."""
    images = tmp_path / "images"
    images.mkdir()
    (images / "000003.png").write_bytes((whole / "images" / "000003.png").read_bytes())
    flags = outputs_of(tmp_path, "folder")
    told = "what its 1 images depend on is not known (sampling.json: {}); expected an empty folder"
    assert told.format("missing") in refused(capsys, ckpt, *flags)
    for text in (
        "",
        "[1]",
        "{}",
        '{"settings": 3}',
        "[" * 100_000,
        "\udc80\x00",
        '{"settings": {"cfg":',
    ):
        (images / RECORD).write_bytes(text.encode(errors="surrogateescape"))
        assert "what its 1 images depend on is not known" in refused(capsys, ckpt, *flags)
    (images / RECORD).write_text('{"settings": {}}')
    assert "weights ema (was None)" in refused(capsys, ckpt, *flags)
    (images / "000003.png").unlink()
    assert call(ckpt, *flags) == 0  # with no image there is nothing to lose
    assert content(images) == content(whole / "images")


def test_other_names_are_refused(ckpt, stopped, capsys):
    """They would be measured with the images of this run."""
    (stopped / "images" / "other.png").touch()
    line = refused(capsys, ckpt, *outputs_of(stopped, "folder"))
    assert "holds 1 other images, such as other.png" in line


def test_another_machine_is_noted(ckpt, stopped, capsys):
    """Another torch or device may round otherwise: said, not refused."""
    path = stopped / "images" / RECORD
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "machine": {"torch": "1.13", "device": "cpu"}}))
    assert call(ckpt, *outputs_of(stopped, "folder")) == 0
    assert "(was 1.13)" in capsys.readouterr().out
    assert json.loads(path.read_text())["settings"] == record["settings"]


def test_a_folder_in_use_is_refused(ckpt, stopped, capsys):
    """By another run, which samples the same images."""
    from util.run import lock

    with lock.folder(stopped / "images", "--out"):
        assert "in use by another run" in refused(capsys, ckpt, *outputs_of(stopped, "folder"))
    assert call(ckpt, *outputs_of(stopped, "folder")) == 0


def test_room_is_compared_first(ckpt, tmp_path, capsys, monkeypatch):
    """With what the .npz and its parts need, before anything is sampled; nothing is left."""
    monkeypatch.setattr("util.files.free_bytes", lambda path: 1000)
    line = refused(capsys, ckpt, *outputs_of(tmp_path, "npz"))
    assert "10.4 kB needed, 1 kB free" in line  # twice 27 images of 8×8 pixels
    assert not list(tmp_path.iterdir())


def test_a_damaged_png_is_none(tmp_path):
    """Whatever bit is flipped, and wherever the file ends, or the image as it was."""
    draw = np.random.default_rng(0)
    image = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(image).save(path)
    whole = path.read_bytes()
    assert np.array_equal(read_png(path, 8), image) and read_png(path, 9) is None
    none = 0
    for bit in draw.choice(8 * len(whole), 300, replace=False):
        png = bytearray(whole)
        png[bit // 8] ^= 1 << bit % 8
        path.write_bytes(png)
        found = read_png(path, 8)
        none += found is None
        assert found is None or np.array_equal(found, image)
    assert none > 280
    for end in range(0, len(whole) - 12, 7):  # the last chunk holds nothing
        path.write_bytes(whole[:end])
        assert read_png(path, 8) is None
    Image.new("L", (8, 8)).save(path)
    assert read_png(path, 8) is None


@pytest.mark.parametrize("name", ["a" * 250 + ".png", "a" * 250 + ".npz", "a" * 256, "file/a"])
def test_a_place_that_cannot_be_written(ckpt, tmp_path, capsys, monkeypatch, name):
    """Noticed before an image is sampled, beside an output that can; the line names what was
    given, no temporary file."""
    (tmp_path / "file").touch()
    monkeypatch.setattr("engine_mar.sample_latents", None)
    line = refused(capsys, ckpt, "--out", tmp_path / "images", tmp_path / name)
    assert line.startswith(f"error: --out {tmp_path / name}: ") and line.endswith(")")
    assert ".part" not in line
