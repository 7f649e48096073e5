"""Devices, cores and interfaces of a process. Run: python -m pytest tests/test_device.py

No Apple GPU is needed: its presence is pretended, and the CPU stands for it.
"""

import os
import socket
import sys

import pytest
import torch

from util import dist
from util.data import loader
from util.precision import float64_device, pick_precision
from util.run import device, network
from util.run.launch import Launch

CPU = torch.device("cpu")


@pytest.fixture
def apple(monkeypatch):
    """A machine with an Apple GPU, which computes as the CPU does; returns where it was used."""
    used, results = [], device._results

    def run(function, where):
        used.append(where.type)
        return results(function, CPU)

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(device, "_results", run)
    return used


def test_mps_is_used_where_it_is(apple):
    """After its numbers were compared; `auto` does not choose it, and it computes in float32."""
    assert dist.init("mps") == torch.device("mps")
    assert apple == ["cpu", "mps"] * len(device.CHECKS)
    assert dist.init("auto").type != "mps"
    assert pick_precision("auto", torch.device("mps")) == "fp32"
    assert float64_device("mps") == CPU and float64_device(CPU) == CPU


@pytest.mark.parametrize("wrong", [2e-3, float("nan")])
def test_mps_with_other_numbers_is_refused(apple, monkeypatch, wrong):
    """A gradient that is off, or not a number."""
    run = device._results

    def spoil(function, where):
        results = run(function, where)
        if where.type == "mps" and function is device._head:
            results[2] = results[2] + wrong * results[2].abs().max()
        return results

    monkeypatch.setattr(device, "_results", spoil)
    message = "--device mps: the head differs from the CPU's by .* expected at most 0.001; use --d"
    with pytest.raises(ValueError, match=message):
        dist.init("mps")


def test_mps_that_is_not_there(monkeypatch):
    """The line names what is; several processes do not share one."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for count, there in ((0, "cpu or auto"), (2, "cuda, cpu or auto")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)  # noqa: B023 (not kept)
        with pytest.raises(
            ValueError, match=f"--device mps: no such device here; expected {there}"
        ):
            device.pick("mps", 0, 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match="--device mps: with 2 processes, expected cuda or auto"):
        device.pick("mps", 0, 2)


def test_checks_have_gradients_and_their_numbers_vary():
    """Each compares a result and the gradients of what it uses, none of which is constant."""
    for function in device.CHECKS.values():
        results = device._results(function, CPU)
        assert len(results) >= 3 and all(x.std() > 0.01 for x in results)
    device.check_numbers(CPU)


# ---- cores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "cores", "processes", "workers"),
    [(10, 64, 8, 8), (4, 64, 8, 4), (10, 2, 1, 2), (10, 2, 8, 1), (0, 64, 1, 0)],
)
def test_workers_fit_the_cores(monkeypatch, wanted, cores, processes, workers):
    """Of this process's part of its machine; one at least, if any are wanted."""
    monkeypatch.setattr(loader, "_allowed_cores", lambda: cores)
    monkeypatch.setattr(dist._Here, "launch", Launch(world=processes, local_world=processes))
    assert loader._fitting(wanted) == workers


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux")
def test_cores_that_are_not_allowed_do_not_count(monkeypatch):
    """taskset and Slurm restrict them; without either function, all count."""
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 6})
    assert loader._allowed_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert loader._allowed_cores() == 7


def test_processes_of_this_machine(monkeypatch):
    """As the launcher says; one without a launcher."""
    assert dist.local_world_size() == 1
    monkeypatch.setattr(dist._Here, "launch", Launch(world=8, local_world=4))
    assert dist.local_world_size() == 4


# ---- interfaces ----------------------------------------------------------------------------------


@pytest.fixture
def own_name(monkeypatch):
    """A function that says what this machine's name means."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(network, "interface_of", lambda address: f"to {address}")

    def mean(address, towards):
        monkeypatch.setattr(network, "_address_of", lambda name: address)
        monkeypatch.setattr(network, "own_address", towards.get)

    yield mean
    os.environ.pop("GLOO_SOCKET_IFNAME", None)


@pytest.mark.parametrize(
    ("name", "towards", "chosen"),
    [
        ("10.0.0.5", {"head": "10.0.0.5"}, None),  # gloo finds it by itself
        ("127.0.1.1", {"head": "10.0.0.5"}, "to 10.0.0.5"),
        (None, {"head": "10.0.0.5"}, "to 10.0.0.5"),
        # process 0 itself
        ("127.0.1.1", {"head": "127.0.1.1", network.NOWHERE: "10.0.0.4"}, "to 10.0.0.4"),
        ("127.0.1.1", {}, None),
    ],
)
def test_gloo_is_not_left_to_the_loopback(own_name, name, towards, chosen):
    """If this machine's own name means that."""
    own_name(name, towards)
    network.choose_interface("head")
    assert os.environ.get("GLOO_SOCKET_IFNAME") == chosen


def test_a_chosen_interface_stays(own_name, monkeypatch):
    own_name("127.0.1.1", {"head": "10.0.0.5"})
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    network.choose_interface("head")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux")
def test_interfaces_by_address():
    """The loopback is known, and what nobody has is not."""
    assert network.own_address("127.0.0.1") == "127.0.0.1"
    assert network.own_address("no.such.host.invalid") is None
    assert network.interface_of("127.0.0.1") in dict(map(reversed, socket.if_nameindex()))
    assert network.interface_of("203.0.113.9") is None
