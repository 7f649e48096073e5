"""A folder is one run's at a time. Run: python -m pytest tests/test_lock.py"""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import types

import pytest
from cli import ROOT

from util.files import HOST
from util.run import lock

HOLD = """
import sys
from util.run import lock
lock.agent = lambda: "there:1"
with lock.folder(sys.argv[1], "--output_dir") as last:
    lock.sign(sys.argv[1])
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder."""
    run = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(run, cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused(tmp_path, holder):
    """One line with folder, host and process; who holds it goes on holding it."""
    by = rf"process {holder.pid} on {re.escape(HOST)}, since \d{{4}}-"
    said = rf"--output_dir {tmp_path}: in use by another run \({by}"
    for _ in range(2):
        with pytest.raises(ValueError, match=said), lock.folder(tmp_path, "--output_dir"):
            pytest.fail("it is another's")


def test_a_dead_run_holds_nothing(tmp_path, holder):
    """After a kill the folder is free at once; the next run learns whose it was."""
    holder.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
    holder.wait()
    with lock.folder(tmp_path, "--output_dir") as last:
        assert (last["pid"], last["host"], last["agents"]) == (holder.pid, HOST, ["there:1"])
        # not opened here, where closing it would let the lock go
        code = "import pathlib, sys; print(pathlib.Path(sys.argv[1]).read_text())"
        run = [sys.executable, "-c", code, str(tmp_path / lock.NAME)]
        content = json.loads(subprocess.run(run, capture_output=True, text=True).stdout)
    assert content["pid"] == os.getpid() and content["agents"] == ["there:1"]
    assert last["started"] <= content["started"]


def test_a_restart_knows_its_own(tmp_path, monkeypatch):
    """By the agent that started both, from when the first had signed; a shell is no agent."""
    found = []

    def attempt(agent, sign=True):
        monkeypatch.setattr(lock, "agent", lambda: agent)
        with lock.folder(tmp_path, "--output_dir") as last:
            found.append(lock.is_own(last))
            if sign:
                lock.sign(tmp_path)

    attempt("")  # a shell
    attempt("")
    attempt("here:2", sign=False)  # died before it had looked for another's files
    attempt("here:2")
    attempt("here:2", sign=False)
    attempt("here:2")
    attempt("here:3")
    assert found == [False, False, False, False, True, True, False]


@pytest.mark.slow
def test_one_run_after_the_other(tmp_path):
    """A process may hold a folder again, but not twice at once, nor let it go by asking."""
    for _ in range(2):
        with lock.folder(tmp_path, "--output_dir"):
            said = f"in use by another run .process {os.getpid()} on"
            with pytest.raises(ValueError, match=said), lock.folder(tmp_path, "--output_dir"):
                pytest.fail("it is held")
            assert try_elsewhere(tmp_path).startswith("error: ")
    assert try_elsewhere(tmp_path) == "held"
    with pytest.raises(KeyError), lock.folder(tmp_path, "--output_dir"):
        raise KeyError
    assert try_elsewhere(tmp_path) == "held"


def try_elsewhere(folder):
    """What another process says that wants the folder."""
    code = HOLD.replace("import sys\n", "import sys\nfrom util.flags import run\n", 1)
    code = code.replace("with lock", "def main(argv):\n  with lock").replace("\n    ", "\n      ")
    done = subprocess.run(
        [sys.executable, "-c", code + "run(main)", str(folder)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return (done.stdout + done.stderr).strip()


def test_a_restarted_run_waits_for_its_own(tmp_path, holder, monkeypatch):
    """torchrun's next attempt may come before the last one's end; it waits."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    naps = []
    monkeypatch.setattr(lock.time, "sleep", lambda s: naps.append(s) or holder.kill())
    with lock.folder(tmp_path, "--output_dir"):
        assert naps


def test_what_is_there_may_be_damaged(tmp_path):
    """The lock is the system's; the text is only said."""
    for text in (b"", b"{", b"[1]", b'{"pid": 1}', b"\xff" * 9):
        (tmp_path / lock.NAME).write_bytes(text)
        with lock.folder(tmp_path, "--output_dir") as last:
            assert last == ({"pid": 1} if b"pid" in text else {})
    assert "in use by another run (unknown)" in lock._refusal(tmp_path, "x", {"pid": 1})


def test_a_folder_that_cannot_be_written(tmp_path):
    """One line, not a traceback."""
    (tmp_path / lock.NAME).mkdir()
    said = f"--cached_path {tmp_path}: run.lock cannot be written there"
    with pytest.raises(ValueError, match=said), lock.folder(tmp_path, "--cached_path"):
        pass


@pytest.mark.skipif(lock.fcntl is None, reason="POSIX")
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    """The run goes on, and says so."""

    def lockf(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", lockf)
    with lock.folder(tmp_path, "--output_dir"):
        pass
    assert "run.lock cannot be locked (No locks available)" in capsys.readouterr().out


@pytest.mark.skipif(lock.fcntl is None, reason="POSIX")
def test_windows_by_construction(tmp_path, monkeypatch):
    """Without fcntl a byte beyond the text is locked, so that others can read the text."""
    fcntl, places = lock.fcntl, []

    def locking(number, how, count):
        places.append((os.lseek(number, 0, os.SEEK_CUR), how, count))
        fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB, count, 0, os.SEEK_CUR)

    monkeypatch.setattr(lock, "fcntl", None)
    fake = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
    monkeypatch.setitem(sys.modules, "msvcrt", fake)
    with lock.folder(tmp_path, "--output_dir"):
        assert places == [(lock.PLACE, 2, 1)]
        assert try_elsewhere(tmp_path).startswith("error: --output_dir")
    assert (tmp_path / lock.NAME).stat().st_size < 1000


TWO = """
import sys
import torch.distributed as dist
from util.run import lock
folder, store, rank = sys.argv[1:]
dist.init_process_group("gloo", f"file://{store}", rank=int(rank), world_size=2)
try:
    with lock.folder(folder, "--output_dir") as last:
        print("held", sorted(last))
except ValueError as error:
    print(error)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_all_processes_are_refused(tmp_path):
    """Each of two raises the same line, or holds the folder and knows the last run."""
    answers = {}
    with lock.folder(tmp_path, "--output_dir"):
        lock.sign(tmp_path)
        answers["refused"] = both(tmp_path, "1")
    answers["free"] = both(tmp_path, "2")
    assert answers["refused"][0] == answers["refused"][1]
    assert f"in use by another run (process {os.getpid()} on" in answers["refused"][1]
    assert answers["free"] == ["held ['agents', 'host', 'pid', 'started']"] * 2


def both(folder, name):
    """What each of two processes says."""
    run = [sys.executable, "-c", TWO, str(folder), str(folder / name)]
    how = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True}
    two = [subprocess.Popen([*run, str(rank)], **how) for rank in range(2)]
    return [process.communicate(timeout=300)[0].strip() for process in two]
