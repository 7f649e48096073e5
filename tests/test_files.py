"""Files are written whole or not at all, with room for them. Run: pytest tests/test_files.py"""

import errno
import gc
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from util import files
from util.files import HOST, check_room, free_bytes, remove_leftovers, replacing

Usage = namedtuple("Usage", "total used free")
DRAW = np.random.default_rng(0)


def dead_pid():
    """The process id of a process that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


# ---- room ----------------------------------------------------------------------------------------


def test_too_little_room_is_known_before(monkeypatch, tmp_path):
    """One line with path, needed and free; nothing is written, the old file stays."""
    path = tmp_path / "a.pth"
    path.write_text("old")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10**10, 9 * 10**9, 10**9))
    said = r"a\.pth: not written, for want of room: 1\.5 GB needed, 1 GB free \(No space left on"
    with pytest.raises(ValueError, match=said), replacing(path, 1_500_000_000):
        pytest.fail("there is no room")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.pth"]
    with replacing(path, 10**9) as beside:
        beside.write_text("new")
    assert path.read_text() == "new"


def test_room_where_a_folder_will_be(monkeypatch, tmp_path):
    """The nearest folder that exists is asked; none that cannot answer stops a run."""
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda p: asked.append(p) or Usage(3, 2, 1))
    assert free_bytes(tmp_path / "a" / "b" / "c") == 1 and asked == [tmp_path]
    monkeypatch.setattr(shutil, "disk_usage", lambda p: (_ for _ in ()).throw(OSError()))
    check_room(tmp_path, 10**18)


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EFBIG"])
def test_errors_of_a_full_disk(tmp_path, name):
    """A quota and a limit on files are want of room, too, and the old file stays."""
    path, number = tmp_path / "a", getattr(errno, name)
    path.write_text("old")
    said = rf"a: not written.*free \({os.strerror(number)}\)"
    with pytest.raises(ValueError, match=said) as got, replacing(path) as beside:
        beside.write_text("half")
        raise OSError(number, os.strerror(number))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]
    assert "\n" not in str(got.value)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), RuntimeError("x"), KeyError("y")])
def test_other_errors_stay(tmp_path, error):
    """What a full disk does not explain is raised as it is."""
    with pytest.raises(type(error)) as got, replacing(tmp_path / "a") as beside:
        beside.write_text("half")
        raise error
    assert got.value is error and not os.listdir(tmp_path)


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A folder on a file system of 300 kB, with a file `old` of each kind there."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def in_a_file(write):
    """A writer to a path, of one to an open file."""

    def to_path(path):
        with open(path, "wb") as file:
            write(file)

    return to_path


LARGE = torch.randn(200_000)
WRITERS = {
    "torch": lambda path: torch.save({"a": LARGE}, path),
    "torch, small parts": lambda path: torch.save(list(LARGE.view(200, -1).clone()), path),
    "torch, open file": in_a_file(lambda file: torch.save({"a": LARGE}, file)),
    "safetensors": lambda path: save_file({"a": LARGE}, path),
    "npy": in_a_file(lambda file: np.save(file, LARGE.numpy())),
    "npz": in_a_file(lambda file: np.savez(file, a=LARGE.numpy())),
    "png": lambda path: Image.fromarray(
        DRAW.integers(0, 256, (512, 512, 3), dtype=np.uint8)
    ).save(path, "PNG"),
    "text": lambda path: path.write_text("a" * 400_000),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITERS)
def test_a_disk_that_is_full(small_disk, kind):
    """Whichever library writes: one line, the old file stays, and the room is free again."""
    path = small_disk / "a"
    path.write_text("old")
    free = free_bytes(path)
    said = r"a: not written, for want of room: what is needed is not known, 30. kB free \("
    with pytest.raises(ValueError, match=said) as got, replacing(path, durable=True) as beside:
        WRITERS[kind](beside)
    assert "\n" not in str(got.value)
    assert path.read_text() == "old" and os.listdir(small_disk) == ["a"]
    del got  # torch's open file is among the local variables of its traceback
    gc.collect()
    assert free_bytes(path) == free


def test_small_files_fit(small_disk):
    """The same disk takes what it has room for."""
    with replacing(small_disk / "b", 4_000, durable=True) as beside:
        torch.save(torch.zeros(500), beside)
    assert torch.load(small_disk / "b", weights_only=True).shape == (500,)
    (small_disk / "b").unlink()


# ---- to the disk ---------------------------------------------------------------------------------


def test_durable_files_are_synced(monkeypatch, tmp_path):
    """Before the name is given: by a handle that may write, as Windows wants; then the name."""
    synced, path = [], tmp_path / "a"

    def fsync(number):
        if not path.exists():
            os.write(number, b"y")  # EBADF if the handle may only read
        synced.append("name" if path.exists() else "content")

    monkeypatch.setattr(os, "fsync", fsync)
    with replacing(path) as beside:
        beside.write_text("x")
    assert not synced
    path.unlink()
    with replacing(path, durable=True) as beside:
        beside.write_text("x")
    assert synced == (["content", "name"] if os.name == "posix" else ["content"])
    assert path.read_text() == "y"


# ---- leftovers -----------------------------------------------------------------------------------


def part(folder, name, writer, age=0):
    """A file that a writer left."""
    path = folder / f".{name}.{writer}.part"
    path.write_text("half")
    os.utime(path, (time.time() - age, time.time() - age))
    return path.name


@pytest.mark.skipif(os.name != "posix", reason="asks for processes")
def test_leftovers_of_dead_writers_go(tmp_path):
    """Of this host those that ended, elsewhere those that are silent; not those that write."""
    dead, hour, day = dead_pid(), files.QUIET + 60, files.STUCK + 60
    kept = {
        part(tmp_path, "alive", f"{os.getppid()}@{HOST}"),
        part(tmp_path, "old-alive.pth", os.getppid()),
        part(tmp_path, "slow", f"{os.getppid()}@{HOST}", hour),
        part(tmp_path, "elsewhere", f"{dead}@{HOST}x"),
        "a.part", ".b.part", ".notes.txt",
    }  # fmt: skip
    for name in ("a.part", ".b.part", ".notes.txt"):
        (tmp_path / name).touch()
    part(tmp_path, "dead", f"{dead}@{HOST}")
    part(tmp_path, "reused", f"{os.getpid()}@{HOST}")
    part(tmp_path, "other's-now", f"{os.getppid()}@{HOST}", day)
    part(tmp_path, "elsewhere-silent", f"1@{HOST}x", hour)
    part(tmp_path, "old.pth", dead, hour)
    with replacing(tmp_path / "now") as beside:
        beside.write_text("half")
        assert beside.name == f".now.{os.getpid()}@{HOST}.part"
        assert remove_leftovers(tmp_path) == 5
        assert {p.name for p in tmp_path.iterdir()} == kept | {beside.name}
    assert (tmp_path / "now").is_file() and socket.gethostname() == HOST


def test_leftovers_in_folders_below(tmp_path):
    """Only if asked for; a folder that is not there has none."""
    (tmp_path / "class").mkdir()
    part(tmp_path / "class", "a.npz", f"{dead_pid()}@{HOST}", files.STUCK + 60)
    assert remove_leftovers(tmp_path) == remove_leftovers(tmp_path / "none") == 0
    assert remove_leftovers(tmp_path, recursive=True) == 1


KILLED = """
import os, sys, time
from util.files import replacing
with replacing(sys.argv[1]) as beside:
    beside.write_text("half")
    os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(os.name != "posix", reason="kills")
def test_a_killed_writer_is_recognised(tmp_path):
    """Its name says who it was."""
    run = [sys.executable, "-c", KILLED, str(tmp_path / "a.pth")]
    subprocess.run(run, cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    (left,) = os.listdir(tmp_path)
    assert re.fullmatch(rf"\.a\.pth\.\d+@{re.escape(HOST)}\.part", left)
    assert remove_leftovers(tmp_path) == 1 and not os.listdir(tmp_path)
