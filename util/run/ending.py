"""How a script ends that does not end well: in one line, and with a status that says how.

Imports neither torch nor numpy.
"""

import os
import re
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass

from util.run import last_words, stop

TURN = 2  # seconds after the first process of a machine, in which a launcher ends the others

# flag -> what to do with it when memory is short, for scripts that have it
FOR_MEMORY = {
    "--batch_size": "a smaller --batch_size",
    "--accum_iter": "--accum_iter, which makes up for it",
    "--grad_checkpointing": "--grad_checkpointing",
    "--precision": "--precision bf16",
    "--eval_bsz": "when sampling, a smaller --eval_bsz",
}
FOR_MAIN_MEMORY = {
    "--num_workers": "a smaller --num_workers",
    "--batch_size": "a smaller --batch_size",
    "--eval_bsz": "when sampling, a smaller --eval_bsz",
}
_SHORT = re.compile(r"out of memory|ALLOC_FAILED|DefaultCPUAllocator|not enough memory", re.I)
_MAIN = re.compile(r"DefaultCPUAllocator|not enough memory|std::bad_alloc|bad allocation", re.I)
_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) ([^.\n]*)")

_flags = set()  # of the script


def note_flags(flags):
    """Remember the flags of this script, for advice."""
    _flags.clear()
    _flags.update(flags)


@dataclass(frozen=True)
class Ending:
    """What to print, and the exit status. by_all: every process ends so, and in step."""

    line: str
    status: int
    by_all: bool = False


def explain(error):
    """The Ending of an error; None for one that is a fault of ours and needs its traceback."""
    text = str(error).strip()
    if isinstance(error, stop.Stopped):
        return Ending(f"stopped: {text}", stop.STATUS, by_all=True)
    if isinstance(error, KeyboardInterrupt):
        return Ending("interrupted", 130, by_all=True)
    if isinstance(error, FloatingPointError):
        return Ending(f"stopped: {text}", 1, by_all=True)
    if isinstance(error, BrokenPipeError):
        return Ending("stopped: nobody reads the output any more (broken pipe)", 1)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _SHORT.search(text)):
        return Ending(f"error: {_of_memory(error, text)}", 2)
    if isinstance(error, RuntimeError) and (worker := _WORKER.search(text)):
        how = _WORKER.search(str(error.__cause__))  # which says more
        return Ending(f"error: {_of_worker((how or worker)[1])}", 1)
    if isinstance(error, ValueError | OSError):
        # errors from loader workers carry a traceback in the message; the last line matters
        line = (text.splitlines() or [type(error).__name__])[-1]
        return Ending(f"error: {line.removeprefix('ValueError: ')}", 2)
    if isinstance(error, RuntimeError) and (line := _lost(error)):
        return Ending(f"stopped: {line}", 1)
    return None


def _of_memory(error, text):
    on_gpu = not isinstance(error, MemoryError) and not _MAIN.search(text)
    asked = re.search(r"(tried to|unable to) allocate ([\d.]+ \w+)", text, re.I)
    asked = f", for {asked[2]} more" if asked else ""
    held = re.search(r"total capacity of ([\d.]+ \w+)", text)
    held = f" of {held[1]}" if held else ""
    return f"out of {'GPU ' if on_gpu else ''}memory{held}{asked}{_advice(on_gpu)}"


def _advice(on_gpu):
    known = FOR_MEMORY if on_gpu else FOR_MAIN_MEMORY
    fitting = [advice for flag, advice in known.items() if flag in _flags]
    return f"; what helps: {', '.join(fitting)}" if fitting else ""


def _of_worker(how):
    what = f"a loader's worker died: it {how.strip()}"
    if "Bus error" in how:
        return f"{what}, as /dev/shm is too small; --num_workers 0 needs none of it"
    return (
        f"{what}, perhaps for want of memory; a smaller --num_workers needs less, and 0 starts none"
    )


def _dist():
    """The module util.dist if it was imported; otherwise there are no other processes yet."""
    return sys.modules.get("util.dist")


def _lost(error):
    return _dist() and hasattr(_dist(), "lost") and _dist().lost(error)


# ---- ending --------------------------------------------------------------------------------------


def end(error):
    """End this process for an error that reached the script. Returns only if it is to be raised."""
    ending = explain(error)
    if ending is None:
        trace = "".join(traceback.format_exception(error)).rstrip()
        last_words.write(trace)
        if last_words.place()[2] > 1:
            _say(trace, 1)
            _exit(1)
        return
    last_words.write(ending.line)
    if isinstance(error, BrokenPipeError):
        _close_output()
    if ending.by_all:
        if not last_words.place()[1]:
            print(ending.line, file=sys.stderr, flush=True)
        if not isinstance(error, KeyboardInterrupt):
            leave_group()
        sys.exit(ending.status)
    fail(ending.line, ending.status)


def fail(line, status=2):
    """Print one line to standard error and exit."""
    _say(line, status)
    if _dist() and _dist().world_size() > 1:
        # others may be waiting for this process: exit at once, and the launcher stops them
        _exit(status)
    sys.exit(status)


def leave_group():
    """Leave the group of processes, if there is one."""
    if _dist():
        _dist().cleanup()


def _say(text, status):
    """Print to standard error; what all processes of a machine say is said once.

    The first one does; the launcher then ends the others, which say it if that does not happen.
    """
    rank, local, world = last_words.place()
    if local:
        if hasattr(signal, "SIGTERM"):
            signal.signal(signal.SIGTERM, lambda *_: os._exit(status))
        time.sleep(TURN)
        text = f"{text} (process {rank} of {world})"
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _exit(status):
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


def _close_output():
    """Let nothing be written to a broken pipe when Python ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
