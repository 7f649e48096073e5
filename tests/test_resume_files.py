"""Checkpoints found, or not, to resume a run. Run: python -m pytest tests/test_resume_files.py"""

import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from cli import ROOT, complain
from conftest import write_images
from test_train import FAST

import main_mar
from util import processor
from util.checkpoint import LAST, load_checkpoint
from util.run.resume import earlier_intact, is_damaged

QUICK = [*FAST, "--batch_size", "512", "--epochs", "1"]
DAMAGED = "the checksum of .* inside does not fit"


def train(folder, *flags):
    main_mar.main([*QUICK, "--output_dir", str(folder), *map(str, flags)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a run that saved after each of its two steps."""
    folder = tmp_path_factory.mktemp("made")
    train(folder, "--save_steps", "1")
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(made, tmp_path / "run")


def damage(path):
    """Flip the bits of a byte in the middle of the largest entry of a file."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content[largest.header_offset + largest.file_size // 2 + 200] ^= 255
    path.write_bytes(content)
    return path


# ---- damaged files -------------------------------------------------------------------------------


def test_of_a_folder_the_newest_intact_checkpoint_is_resumed(run, capsys):
    """A flipped bit in the last one is said; that file is kept, and not what is saved over."""
    last = damage(run / LAST)
    broken = last.read_bytes()
    train(run, "--save_steps", "1", "--resume", run)
    said = capsys.readouterr().out
    earlier = run / "checkpoint-step00000001.pth"
    assert re.search(rf"NOTE: {re.escape(str(last))}: .*{DAMAGED}.*; resuming {earlier}, an", said)
    assert f"resumed {earlier}: 0 epochs are done, and 1 batches" in said
    assert (run / "checkpoint-last-before1.pth").read_bytes() == broken
    assert load_checkpoint(last)["epoch"] == 0


def test_a_damaged_file_that_was_named_is_refused(run, capsys):
    """The line names the newest that is intact; nothing is changed."""
    (run / "checkpoint-epoch0001.pth").write_bytes(b"")
    last = damage(run / LAST)
    line = complain(capsys, main_mar.main, *QUICK, "--output_dir", run / "out", "--resume", last)
    assert re.search(f"{DAMAGED}.*; .*/checkpoint-step00000001.pth is intact", line)
    assert is_damaged(last) and earlier_intact(last).name == "checkpoint-step00000001.pth"


def test_where_nothing_is_intact_the_last_one_is_named(run, capsys):
    """And no new run begins."""
    for path in run.glob("*.pth"):
        damage(path)
    line = complain(capsys, main_mar.main, *QUICK, "--output_dir", run, "--resume", run)
    assert f"error: {run / LAST}: cannot be read" in line and re.search(DAMAGED, line)


def test_what_is_whole_but_no_checkpoint_is_refused(run, capsys):
    """It is not passed over for an earlier one."""
    torch.save({"weights": {}}, run / LAST)
    line = complain(capsys, main_mar.main, *QUICK, "--output_dir", run, "--resume", run)
    assert "expected an entry 'model', found weights" in line


# ---- the record, from a run to the next ----------------------------------------------------------


def test_a_run_called_again_says_nothing_but_what_was_changed(run, capsys):
    """Its checkpoint has a record; a resumed run saves its own."""
    held = load_checkpoint(run / LAST)["record"]
    assert held["classes"] == [*map(str, range(10))] and held["images"] == 1437
    assert (held["processes"], held["total_batch"], held["precision"]) == (1, 512, "fp32")
    assert held["products"][0] == processor.name()
    train(run, "--save_steps", "1", "--resume", run)
    assert "not as before" not in capsys.readouterr().out
    train(run, "--save_steps", "1", "--resume", run, "--epochs", "2", "--batch_size", "256")
    said = "--batch_size 256 (was 512), --epochs 2 (was 1), images per step 256 (was 512)"
    assert f"NOTE: not as before: {said}\n" in capsys.readouterr().out
    assert load_checkpoint(run / LAST)["record"] == {**held, "total_batch": 256}


def test_classes_in_another_order_are_refused(tmp_path, capsys):
    """Class folders exchanged between two runs; then resumed all the same."""
    data = write_images(tmp_path / "data", size=(16, 16))
    flags = f"--data_path {data} --tokenizer kl --vae_path {ROOT}/tests/fixtures/kl.ckpt".split()
    flags += ["--img_size", "16", "--class_num", "2", "--batch_size", "4", "--num_workers", "0"]
    out = ["--output_dir", str(tmp_path / "out"), "--resume", str(tmp_path / "out")]
    main_mar.main([*FAST[2:], *flags, "--model", "mar_tiny", *out, "--epochs", "1"])
    before = (tmp_path / "out" / LAST).read_bytes()
    (data / "train" / "cat").rename(data / "train" / "wolf")
    line = complain(capsys, main_mar.main, *FAST[2:], *flags, *out)
    assert "other classes: class 0 is dog (was cat); to resume" in line
    assert (tmp_path / "out" / LAST).read_bytes() == before
    main_mar.main([*FAST[2:], *flags, *out, "--resume_anyway"])
    assert "NOTE: resumed although this may spoil the run: other cl" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "out" / LAST)["record"]["classes"] == ["dog", "wolf"]


# ---- nodes without a common disk -----------------------------------------------------------------


def two_nodes(*flags):
    """(exit status, lines of errors) of two processes that torchrun did not start."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    common |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("two_nodes.py")), *map(str, flags)]
    nodes = [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    errors = [node.communicate(timeout=300)[1] for node in nodes]
    found = [[line for line in text.splitlines() if "error: " in line] for text in errors]
    return [node.returncode for node in nodes], found


@pytest.mark.parametrize("second", ["none", pytest.param("other", marks=pytest.mark.slow)])
def test_nodes_that_find_different_checkpoints_end(run, tmp_path, second):
    """Both say who found what: of one that has none, and of one that has an earlier one."""
    shutil.copytree(run, tmp_path / "node0")
    (tmp_path / "node1").mkdir()
    if second == "other":
        shutil.copy(run / "checkpoint-step00000001.pth", tmp_path / "node1" / LAST)
    folder = tmp_path / "nodeNODE"
    status, errors = two_nodes(*QUICK, "--output_dir", folder, "--resume", folder)
    assert status == [2, 2]
    first = rf"rank 0 on \S+: {tmp_path}/node0/{LAST}, 1 epochs, 2 steps, sha256 [0-9a-f]{{12}}"
    held = rf"{tmp_path}/node1/{LAST}, 0 epochs, 1 steps, sha256 [0-9a-f]{{12}}"
    held = {"none": "no checkpoint", "other": held}[second]
    for lines in errors:
        (line,) = lines
        expected = rf"error: --resume: expected the same on all processes; {first}; rank 1 on \S+: "
        assert re.fullmatch(expected + held + r"( \(process \d of 2\))?", line), line


@pytest.mark.slow
def test_nodes_with_the_same_checkpoint_resume(run, tmp_path):
    """Each its own copy."""
    for node in "01":
        shutil.copytree(run, tmp_path / f"node{node}")
    folder = tmp_path / "nodeNODE"
    more = ("--epochs", "2", "--batch_size", "256")
    status, errors = two_nodes(*QUICK, *more, "--output_dir", folder, "--resume", folder)
    assert status == [0, 0], errors
    assert load_checkpoint(tmp_path / "node0" / LAST)["epoch"] == 1


@pytest.mark.slow
def test_a_damaged_copy_on_one_node_ends_both(run, tmp_path):
    """What rank 1 could not read is in the line of rank 0, which could."""
    for node in "01":
        shutil.copytree(run, tmp_path / f"node{node}")
        (tmp_path / f"node{node}" / "checkpoint-step00000001.pth").unlink()
    damage(tmp_path / "node1" / LAST)
    folder = tmp_path / "nodeNODE"
    status, errors = two_nodes(*QUICK, "--output_dir", folder, "--resume", folder)
    assert status == [2, 2]
    assert all(re.search(f"; rank 1 on .*{DAMAGED}", line) for (line,) in errors)


@pytest.mark.slow
def test_nodes_with_other_flags_or_data_end(tmp_path):
    """The flag is named; so is what differs in the data."""
    status, errors = two_nodes(*QUICK, "--output_dir", tmp_path / "a", "--seed", "NODE")
    assert status == [2, 2]
    assert all(
        re.search(r"--seed: .* rank 0 on \S+: 0; rank 1 on \S+: 1( |$)", e) for (e,) in errors
    )
    for node, count in enumerate((4, 5)):
        write_images(tmp_path / f"data{node}", count=count, size=(16, 16))
    flags = f"--data_path {tmp_path}/dataNODE --tokenizer kl --img_size 16 --class_num 2"
    flags += f" --vae_path {ROOT}/tests/fixtures/kl.ckpt --model mar_tiny --batch_size 2"
    flags += f" --num_workers 0 --output_dir {tmp_path}/b --device cpu --diffloss_w 32"
    status, errors = two_nodes(*flags.split())
    assert status == [2, 2]
    line = r"images: .* rank 0 on \S+: 8; rank 1 on \S+: 10( |$)"
    assert all(re.search(line, e) for (e,) in errors), errors
