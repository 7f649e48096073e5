"""Requests to stop: a scheduler's signal, Ctrl-C, or the end of the launcher.

In a block `with stop.deferred()` a request is only noted. Loops that all processes take in step
call `check`, or use an Agreement, and end in the same place: they raise Stopped, after which there
is something to resume. Elsewhere a request ends the process at once.

Imports neither torch nor numpy.
"""

import os
import signal
import threading
import time
from contextlib import contextmanager, suppress

from util.run import last_words

STATUS = 75  # EX_TEMPFAIL of sysexits.h: no failure, the same command is to be called again
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")  # Slurm and torchrun, Slurm's --signal, Ctrl-C
LINGERING = 60  # seconds of a loader's process after SIGTERM
AGAIN = 2  # seconds; torchrun passes a Ctrl-C on to processes that have received it already


class Stopped(Exception):
    """All processes stopped where they can resume; the message says why, and how to go on."""


class _Requests:
    def __init__(self):
        self.reason, self.since, self.deferring = None, 0.0, False
        self.pid, self.terminated, self.resumes = os.getpid(), False, False
        # without a launcher, a parent may end first: a shell, after nohup
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def receive(self, number, frame):
        name = signal.Signals(number).name
        if os.getpid() != self.pid:
            self.receive_in_worker(name)
            return
        if not self.deferring:
            if name == "SIGINT":
                raise KeyboardInterrupt
            status = STATUS if self.resumes else 128 + number
            _end_at_once(f"stopped: {name}, before there was anything to save", status)
        if self.reason is None:
            self.reason, self.since = name, time.monotonic()
            _say(1, f"{name}: stopping at the next step, to resume there")
        elif name == "SIGINT" and time.monotonic() - self.since > AGAIN:
            raise KeyboardInterrupt

    def receive_in_worker(self, name):
        """Its batches are still needed when a launcher signals all processes. A second SIGTERM, or
        some time, ends it: its parent does not wait."""
        if name == "SIGTERM" and self.terminated:
            os._exit(STATUS)
        if name == "SIGTERM":
            self.terminated = True
            if hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_REAL, LINGERING)


def _say(descriptor, text):
    """Print in a signal handler, where `print` raises an error if the signal interrupted one."""
    with suppress(OSError):
        os.write(descriptor, f"{text}\n".encode())


def _end_at_once(text, status):
    try:
        _say(2, text)
        last_words.write(text)
    finally:
        os._exit(status)


_requests = _Requests()


def in_worker(number):
    """Let a loader's process outlive signals that all receive. Its `worker_init_fn`."""
    _requests.pid = None
    _receive()


def listen(resumes=False):
    """Receive the signals from now on. For scripts; other threads receive none.

    resumes: whether the script, called again, goes on where it was stopped.
    """
    _requests.pid, _requests.resumes = os.getpid(), resumes
    _receive()


def _receive():
    main = threading.current_thread() is threading.main_thread()
    for name in SIGNALS:
        if main and hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), _requests.receive)


@contextmanager
def deferred():
    """Note requests instead of ending at once."""
    before, _requests.deferring = _requests.deferring, True
    try:
        yield
    finally:
        _requests.deferring = before
        if not before:
            _requests.reason = None


def deferring():
    """Whether requests are only noted now."""
    return _requests.deferring


def reason():
    """Why this process was asked to stop, as text, or None."""
    if _requests.reason is None and _requests.parent not in (None, os.getppid()):
        _requests.reason = "the launcher has ended"
    return _requests.reason


def check():
    """Raises Stopped, on all processes, if any was asked to stop. A collective call."""
    from util import dist

    reasons = [r for r in dist.all_gather(reason()) if r]
    if reasons:
        raise Stopped(reasons[0])
