"""Processes that meet and wait for one another. Run: python -m pytest tests/test_heartbeat.py

Threads stand for processes here; test_lost_processes has real ones.
"""

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed
from cli import ROOT
from test_launch import free_port, plain_environment

from util import dist
from util.run.heartbeat import Heartbeat, Lost, _machine, meet, patiently

TIMEOUT = 1.5  # seconds, of the heartbeats of threads


def together(*functions):
    """The results of functions that are called at the same time."""
    with ThreadPoolExecutor() as pool:
        return [future.result(60) for future in [pool.submit(f) for f in functions]]


def test_only_who_is_alive_meets():
    """In a store that still holds all that processes of an attempt before have left."""
    store, names = torch.distributed.HashStore(), []
    for _ in range(3):
        found = together(
            lambda: meet(store, 0, 3, 60),
            lambda: meet(store, 1, 3, 60),
            lambda: time.sleep(0.3) or meet(store, 2, 3, 60),
        )
        assert len(set(found)) == 1
        names.append(found[0])
    assert len(set(names)) == 3


def test_a_process_that_died_on_the_way_is_replaced():
    """One that was answered, and one that answered."""
    store = torch.distributed.HashStore()
    for rank in (1, 0):  # alone: the other never comes
        with pytest.raises(ValueError, match="process . did not come within 0 s"):
            meet(store, rank, 2, 0.2)
    first, second = together(
        lambda: meet(store, 0, 2, 60), lambda: time.sleep(0.3) or meet(store, 1, 2, 60)
    )
    assert first == second


@pytest.fixture
def hearts():
    """A function that makes the heartbeats of two processes."""
    made = []

    def make(stores=None, world=2):
        stores = stores or [torch.distributed.HashStore()] * world
        made.extend(Heartbeat(stores[rank], rank, world, TIMEOUT) for rank in range(world))
        return made

    yield make
    for heart in made:
        heart.end()


def test_waiting_is_a_barrier(hearts):
    """None returns before all have come, as often as it is called."""
    came = []

    def call(heart):
        for i in range(5):
            time.sleep(0.02 * heart.rank)
            came.append((i, heart.rank))
            heart.wait()
            assert sum(1 for turn, _ in came if turn == i) == 3

    together(*(lambda heart=heart: call(heart) for heart in hearts(world=3)))


@pytest.mark.slow
def test_a_busy_process_is_waited_for(hearts):
    """Longer than the timeout, in which a collective would end."""
    one, two = hearts()
    together(one.wait, lambda: time.sleep(2 * TIMEOUT) or two.wait())


def test_a_silent_process_is_named(hearts):
    """By its rank and host."""
    one, two = hearts()
    two.end()
    with pytest.raises(Lost, match=r"process 1 of 2, on \S+, is silent for \d+ s"):
        one.wait()
    assert "process 0 of 1, on " in dist.lost(Lost("x"))


@pytest.mark.skipif(not _machine(), reason="Linux")
@pytest.mark.parametrize("came", [False, True])
def test_a_dead_process_of_this_machine_is_noticed_at_once(hearts, came, monkeypatch):
    """Long before its silence tells; one that had come to the wait before is not missed."""
    monkeypatch.setattr("util.run.heartbeat.DEAD", 0.05)
    store = torch.distributed.HashStore()
    one, _ = hearts([store] * 2)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    store.set("process/1", f"{_machine()} {ended.pid}")
    if came:
        store.add("wait/1", 1)
        one.wait()
        return
    start = time.monotonic()
    with pytest.raises(Lost, match=r"process 1 of 2, on \S+, has ended"):
        one.wait()
    assert time.monotonic() - start < TIMEOUT


class Deaf:
    """A store that can stop answering, or end."""

    def __init__(self, store):
        self.store, self.cut, self.dead = store, threading.Event(), False

    def __getattr__(self, name):
        if self.cut.is_set():
            if self.dead:
                raise torch.distributed.DistNetworkError("Connection reset by peer\nframe #0")
            time.sleep(4 * TIMEOUT)
        return getattr(self.store, name)


@pytest.mark.parametrize(
    ("dead", "message"),
    [(False, "processes met is silent for"), (True, "is gone .Connection reset by peer.$")],
)
def test_a_store_that_does_not_answer(hearts, dead, message):
    """Its machine may be gone, or the link to it."""
    store = torch.distributed.HashStore()
    deaf = Deaf(store)
    one, _ = hearts([deaf, store])
    deaf.dead = dead
    deaf.cut.set()
    with pytest.raises(Lost, match=message):
        one.wait()


def test_processes_that_were_suspended_together(hearts, monkeypatch):
    """A clock that jumps, as after a laptop's sleep, makes nobody lost."""
    one, two = hearts()
    jump, real = [0], time.monotonic
    monkeypatch.setattr("util.run.heartbeat.time.monotonic", lambda: real() + jump[0])

    def sleep():
        time.sleep(TIMEOUT / 2)
        jump[0] = 3600
        time.sleep(TIMEOUT / 2)
        two.wait()

    together(one.wait, sleep)


def test_no_thread_remains(hearts):
    """After the end, nor in a run of one process."""
    one, two = hearts()
    together(one.wait, two.wait)
    together(one.close, two.close)
    assert not one.thread.is_alive() and not two.thread.is_alive()
    before = threading.enumerate()
    dist.init("cpu")
    dist.wait()
    assert threading.enumerate() == before


def test_who_holds_the_store_ends_last():
    """Others may still look into it."""
    store, order = torch.distributed.HashStore(), []
    one, two = Heartbeat(store, 0, 2, TIMEOUT, hosts_store=True), Heartbeat(store, 1, 2, TIMEOUT)
    together(
        lambda: one.close() or order.append(0),
        lambda: time.sleep(0.5) or two.close() or order.append(1),
    )
    assert order == [1, 0] or not two.thread.is_alive()
    assert store.add("left", 0) == 2


def test_patiently():
    """Results and errors come from the thread."""
    assert patiently(lambda: threading.current_thread()) is not threading.main_thread()
    with pytest.raises(ValueError, match="no"):
        patiently(lambda: int("no"))


def test_all_meet_in_a_barrier_though_the_store_is_gone_for_some(monkeypatch):
    """So that no process is alone in it."""
    met = []
    monkeypatch.setattr(dist.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.dist, "barrier", lambda: met.append(1))
    for there in (True, False):
        monkeypatch.setattr(dist, "wait", lambda there=there: there)
        dist.barrier()
    assert len(met) == 2


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "[/x/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer "
            "[10.0.0.2]:345. This is typically caused by",
            "lost another process (Connection closed by peer [10.0.0.2]:345)",
        ),
        (
            "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting "
            "5000ms for recv operation to complete",
            "lost another process (Timed out waiting 5000ms for recv operation to complete)",
        ),
        ("mat1 and mat2 shapes cannot be multiplied", None),
    ],
)
def test_what_counts_as_lost(monkeypatch, text, line):
    """An error of gloo, without its traceback; no other, and none with one process."""
    assert dist.lost(RuntimeError(text)) is None
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    found = dist.lost(RuntimeError(text))
    assert (found is None) if line is None else found.endswith(line)
    assert dist.lost(torch.distributed.DistBackendError("NCCL error")).endswith("(NCCL error)")


# ---- real processes ------------------------------------------------------------------------------


def start(what, idle=2):
    """Two processes of waiting.py, without torchrun, which would end one after the other."""
    port = str(free_port())
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "tests/waiting.py", what, str(idle)],
            cwd=ROOT,
            env=plain_environment(RANK=str(rank), **launch),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["busy", "objects", "c"])
def test_busy_processes_are_waited_for(what):
    """One that sleeps, and one whose C code keeps the GIL for most of the timeout."""
    for process in start(what):
        out, err = process.communicate(timeout=300)
        assert (process.returncode, out, err) == (0, "met\nwaited\n", "")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGSTOP")
@pytest.mark.parametrize(
    ("number", "rank", "messages"),
    [
        ("SIGKILL", 1, ["process 1 of 2, on ", " has ended"]),
        ("SIGSTOP", 1, ["process 1 of 2, on ", " is silent for "]),
        ("SIGKILL", 0, ["lost another process ("]),  # by gloo, as the store is gone
        ("SIGSTOP", 0, ["the machine where the processes met is silent for"]),
    ],
)
def test_lost_processes(number, rank, messages):
    """The one that waits ends with one line that says which; process 0 holds the store."""
    processes = start("idle", rank)
    assert [p.stdout.readline() for p in processes] == ["met\n"] * 2
    time.sleep(2)
    processes[rank].send_signal(getattr(signal, number))
    if number == "SIGKILL":
        processes[rank].wait()  # as its launcher would
    other = processes[1 - rank]
    out, err = other.communicate(timeout=300)
    processes[rank].kill()
    lines = err.strip().splitlines()
    assert other.returncode == 1 and not out
    assert lines[-1].startswith(f"stopped: process {1 - rank} of 2, on ")
    assert all(message in lines[-1] for message in messages)
    assert len(lines) == 1, err


@pytest.mark.slow
def test_a_collective_has_the_timeout():
    """Who is late to it, without `wait` before, ends all: one line each."""
    processes = start("late")
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 1
        assert "lost another process (" in err and len(err.strip().splitlines()) == 1
