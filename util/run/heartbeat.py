"""Processes that wait for one another for as long as they live, however long one is busy.

A collective of torch.distributed ends with an error once a process is later than its timeout. Here
a thread of each process counts up in the store where they met. Who waits watches these counts: a
process whose count moves is busy, one whose count stands still for the timeout is lost.
"""

import atexit
import os
import threading
import time
from pathlib import Path
from uuid import uuid4

from util.files import HOST, first_line, is_alive

SLOWEST = 10.0  # seconds between two beats, and between two looks at the others'
SOONEST, LATEST = 0.001, 0.5  # seconds between two looks at whether all have come
DEAD = 1.0  # seconds between two looks at whether processes of this machine are there
LEAVING = 10.0  # seconds for which the process that holds the store waits for the others to end


class Lost(RuntimeError):
    """Another process, or the store where the processes met, has gone."""


class StoreGone(Lost):
    """The store has gone, such as with torchrun; the processes may still reach one another."""


def meet(store, rank, world, seconds):
    """A name that only the processes alive now share, whatever dead ones have left in the store.

    torchrun keeps its store when it restarts processes, and counts restarts per machine. So each
    process writes a name of its own, process 0 answers every one that it finds with its name, and
    only who is alive reads the answer. Raises ValueError after so many seconds.
    """
    name, until = uuid4().hex, time.monotonic() + seconds
    store.set(f"here/{rank}", name)
    answered = {}
    while (missing := _missing(store, rank, name, range(1, world), answered)) is not None:
        if time.monotonic() > until:
            raise ValueError(f"process {missing} did not come within {seconds:.0f} s")
        time.sleep(0.02)
    if rank == 0:
        return name
    answer = store.get(f"answer/{name}").decode()
    store.set(f"joined/{answer}/{name}", "")
    return answer


def _missing(store, rank, name, others, answered):
    """A process that is still waited for, or None."""
    if rank > 0:
        return None if store.check([f"answer/{name}"]) else 0
    missing = None
    for other in others:
        found = store.get(f"here/{other}").decode() if store.check([f"here/{other}"]) else None
        if found != answered.get(other):
            store.set(f"answer/{found}", name)
            answered[other] = found
        if not store.check([f"joined/{name}/{found}"]):
            missing = other
    return missing


def _machine():
    """What only processes that see one another's ids have in common; "" where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def patiently(function):
    """The result of a function that may block outside Python; signals are received meanwhile."""
    results = []

    def call():
        try:
            results.append((function(), None))
        except BaseException as error:  # raised below, in the thread that waits
            results.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    result, error = results[0]
    if error:
        raise error
    return result


class Heartbeat:
    """The thread of a process, from its construction until `close`.

    store: of this thread alone. timeout: seconds. hosts_store: whether the store ends with this
    process. Ages are counted in looks of at most a beat each, so that processes that were all
    suspended together do not take one another for lost.
    """

    def __init__(self, store, rank, world, timeout, hosts_store=False):
        self.store, self.rank, self.world, self.timeout = store, rank, world, timeout
        self.hosts_store, self.lingers, self.beat = hosts_store, False, min(SLOWEST, timeout / 8)
        self.waits = self.arrived = self.count = 0  # waits: calls; arrived: those that have ended
        self.error, self.closing, self.answered = None, False, 0
        self.wake = threading.Condition()
        self._forget()
        store.set(f"host/{rank}", HOST)
        store.set(f"process/{rank}", f"{_machine()} {os.getpid()}")
        self._count_up()  # there before anybody looks at it
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.thread.start()
        atexit.register(self.end)  # a thread in the store must not meet a dying interpreter

    def wait(self):
        """Return when all processes have called this as often. Raises Lost."""
        with self.wake:
            self.waits += 1
            self.wake.notify_all()
        silent, seen, since = 0.0, self.answered, time.monotonic()
        while self.arrived < self.waits:
            if self.error:
                raise self.error
            with self.wake:
                self.wake.wait(0.2)  # short, so that a signal is noticed
            now = time.monotonic()
            silent = 0.0 if self.answered != seen else silent + min(now - since, self.beat)
            seen, since = self.answered, now
            if silent > self.timeout:
                raise Lost(f"the machine where the processes met is silent for {silent:.0f} s")

    def close(self):
        """End the thread; the process that holds the store stays until all have come to this."""
        self.lingers = self.hosts_store
        self.end()

    def end(self):
        """End the thread."""
        atexit.unregister(self.end)
        with self.wake:
            self.closing = True
            self.wake.notify_all()
        self.thread.join(LEAVING + 2 if self.lingers else 2)

    # ---- in the thread ---------------------------------------------------------------------------

    def _run(self):
        try:
            while not self.closing:
                self._count_up()
                self._await_others() if self.arrived < self.waits else self._rest()
            self._leave()
        except Exception as error:  # the store is gone: an error only for who waits
            reason = first_line(error)
            with self.wake:
                gone = StoreGone(f"the store where the processes met is gone ({reason})")
                self.error = self.error or gone
                self.wake.notify_all()

    def _rest(self):
        with self.wake:
            if not self.closing and self.arrived == self.waits:
                self.wake.wait(self.beat)

    def _count_up(self):
        self.count += 1
        self.store.set(f"beat/{self.rank}", str(self.count))
        self.answered += 1

    def _await_others(self):
        """Arrive, and look until all have; beat and watch the others' beats meanwhile."""
        key = f"wait/{self.arrived + 1}"
        since = looked = sought = time.monotonic()
        there = self.store.add(key, 1)
        while there < self.world and not self.closing:
            waited = time.monotonic() - since
            time.sleep(min(max(SOONEST, waited / 20), LATEST, self.beat))
            now = time.monotonic()
            if (passed := now - looked) >= self.beat:
                self._count_up()
                self._watch(passed)
                looked = time.monotonic()
            if now - sought >= DEAD:
                self._seek_dead(key)
                sought = time.monotonic()
            there = self.store.add(key, 0)
            self.answered += 1
        with self.wake:
            self.arrived += 1
            self._forget()
            self.wake.notify_all()

    def _forget(self):
        self.beats, self.ages = [None] * self.world, [0.0] * self.world

    def _watch(self, passed):
        """Add the seconds that passed to the ages of beats that have not changed. Raises Lost."""
        beats = self.store.multi_get([f"beat/{rank}" for rank in range(self.world)])
        for rank, beat in enumerate(beats):
            same = beat == self.beats[rank]
            self.ages[rank] = self.ages[rank] + min(passed, 2 * self.beat) if same else 0.0
        self.beats = beats
        age = max(self.ages)
        if age > self.timeout:
            self._lose(self.ages.index(age), f"is silent for {age:.0f} s")

    def _seek_dead(self, key):
        """Raises Lost if a process of this machine has ended: sooner than its silence tells.

        key: that of the wait; who ended may have come to it before.
        """
        names = [
            name for rank in range(self.world) if self.store.check([name := f"process/{rank}"])
        ]
        for name, found in zip(names, self.store.multi_get(names), strict=True):
            machine, pid = found.decode().split(" ")
            dead = machine and machine == _machine() and not is_alive(int(pid))
            if dead and self.store.add(key, 0) < self.world:
                self._lose(int(name.removeprefix("process/")), "has ended")

    def _lose(self, rank, how):
        host = self.store.get(f"host/{rank}").decode()
        with self.wake:
            self.error = Lost(f"process {rank} of {self.world}, on {host}, {how}")
        raise self.error

    def _leave(self):
        here = self.store.add("left", 1)
        until = time.monotonic() + LEAVING
        while self.lingers and here < self.world and time.monotonic() < until:
            time.sleep(0.02)
            here = self.store.add("left", 0)
