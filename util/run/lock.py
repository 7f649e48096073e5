"""A folder is one run's at a time: a lock that no dead process can hold.

The system keeps it for an open file, `run.lock`, and lets it go with the process. The file stays;
it says in JSON whose the folder is or was. Nothing else may open it in the process that holds it:
by POSIX, closing it would let the lock go.
"""

import errno
import json
import os
import time
from contextlib import contextmanager
from pathlib import Path

from util import dist
from util.dist import print0
from util.files import HOST, expecting_room
from util.run.launch import agent, attempt

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = "run.lock"
PLACE = 1 << 30  # the byte to lock: none of the text, which others can so read on Windows, too
HELD = (errno.EACCES, errno.EAGAIN)
PATIENCE = 20  # seconds that a restarted run waits for its own processes to be gone

_held = {}  # real path -> (file, content) of this process, which could lock its own again


@contextmanager
def folder(path, what):
    """Hold a folder for this run. A collective call; rank 0 holds the lock.

    what: flag that names the folder, for the message. Yields, on every process, what the folder's
    last run wrote (`host`, `pid`, `started`, and `agents` if it came to `sign`), {} if there was
    none. Raises ValueError, on every process, if another process holds the folder.
    """
    file, problem, last = None, None, {}
    if dist.is_main():
        file, problem, last = _take(Path(path), what)
    problem, last = dist.broadcast((problem, last))
    try:
        if problem:
            raise ValueError(problem)
        yield last
    finally:
        if file:
            file.close()
            del _held[os.path.realpath(Path(path) / NAME)]


def sign(path):
    """Write down who started the run, so that a restart of it knows that what is there is its own.

    A collective call, in a block that holds the folder; before the first output, after a check that
    nobody else's is there.
    """
    agents = dist.all_gather(agent())
    if dist.is_main():
        file, ours = _held[os.path.realpath(Path(path) / NAME)]
        _write(file, {**ours, "agents": sorted({*agents} - {""})})


def is_own(last):
    """Whether the run that wrote `last` was an earlier attempt of this one, restarted by torchrun.

    One of its agents is still there. A collective call.
    """
    agents, known = {*dist.all_gather(agent())} - {""}, last.get("agents")
    return isinstance(known, list) and not agents.isdisjoint(map(str, known))


def _take(path, what):
    """(open file or None, why it cannot be had or None, what the last run wrote)."""
    real = os.path.realpath(path / NAME)
    if real in _held:
        return None, _refusal(path, what, _held[real][1]), {}
    try:
        file = os.fdopen(os.open(real, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        last = _read(file)
        if not _locked(file, real):
            file.close()
            return None, _refusal(path, what, last), {}
        ours = {"host": HOST, "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        with expecting_room(real):
            kept = {"agents": last["agents"]} if "agents" in last else {}
            _write(file, {**ours, **kept})  # until `sign`, what is there is still the last run's
    except (OSError, ValueError) as error:
        return None, f"{what} {path}: {NAME} cannot be written there ({error})", {}
    _held[real] = file, ours
    return file, None, last


def _write(file, content):
    file.seek(0)
    file.truncate()
    file.write(json.dumps(content).encode())


def _refusal(path, what, holder):
    known = {"pid", "host", "started"} <= set(holder)
    by = "process {pid} on {host}, since {started}".format(**holder) if known else "unknown"
    return f"{what} {path}: in use by another run ({by}); end it, or name another folder"


def _read(file):
    """The content of the lock's file; {} if it cannot be read."""
    try:
        file.seek(0)
        return dict(json.loads(file.read(1 << 20)))
    except (OSError, ValueError, TypeError):
        return {}


def _locked(file, path):
    """Lock an open file; whether that worked. A restarted run waits for its dead processes."""
    end = time.monotonic() + (PATIENCE if attempt() else 0)
    while True:
        try:
            _lock(file)
            return True
        except OSError as error:
            if error.errno not in HELD:  # a file system that has no locks
                print0(f"NOTE: {path} cannot be locked ({error.strerror}): start no second run")
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.2)


def _lock(file):
    """Raises OSError if another process holds the lock."""
    if fcntl:  # of the process: a loader's worker that outlives it does not hold it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, PLACE)
        return
    import msvcrt

    file.seek(PLACE)
    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
