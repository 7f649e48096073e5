"""The last words of each of several processes, in a file of its own in the run's output folder.

A launcher ends all processes when one fails, and mixes what they print. These files tell them
apart: how each one failed or was stopped, with time and machine; the stack of one that crashed in a
library; and one that says no more than that it started was killed. They go when a run ends well.
"""

import faulthandler
import os
import time
from contextlib import suppress
from pathlib import Path

from util.files import HOST
from util.run.launch import attempt, understand


def place(environ=os.environ):
    """(rank, rank on this machine, number of processes), as the launcher says."""
    try:
        found = understand(environ)
    except ValueError:  # which util.dist.init will say
        return 0, 0, 1
    return found.rank, found.local, found.world


_open = None  # the file of this process


def set_folder(folder, script):
    """Begin this process's file in `folder`, if there are several processes.

    script: its name, as several scripts may have one folder. Call it when the folder is this run's:
    the files of an earlier run of the script go, but not those of attempts that torchrun restarted.
    """
    global _open
    none()
    rank, _, world = place()
    if world == 1:
        return
    again = attempt() > 0
    with suppress(OSError):  # a disk that is full has no room for words either
        if rank == 0 and not again:
            _remove(folder, script, world)
        path = Path(folder) / _name(script, f"{rank:05d}")
        _open = path.open("a" if again else "w", encoding="utf-8")
        faulthandler.enable(_open, all_threads=False)
        write(f"started, process {rank} of {world}, {os.getpid()} on {HOST}")


def _remove(folder, script, world):
    """Delete the files of an earlier run that had more processes than `world`."""
    known = {_name(script, f"{rank:05d}") for rank in range(world)}
    for path in Path(folder).glob(_name(script, "*")):
        if path.name not in known:
            path.unlink(missing_ok=True)


def _name(script, rank):
    return f"last_words.{script}.rank{rank}.txt"


def write(text):
    """Add words to this process's file, if it has one."""
    with suppress(OSError):
        if _open:
            _open.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text.rstrip()}\n")
            _open.flush()


def none():
    """The run ended well: there are no last words."""
    global _open
    if _open:
        faulthandler.disable()
        with suppress(OSError):
            _open.close()
            Path(_open.name).unlink()
        _open = None
