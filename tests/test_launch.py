"""What launchers say. Run: python -m pytest tests/test_launch.py

Neither Slurm nor an MPI is needed: tests set the variables, from Slurm's and Open MPI's manuals.
"""

import os
import shlex
import socket
import subprocess
import sys

import pytest
from cli import DIGITS, ROOT, complain

import main_mar
from util.run import launch
from util.run.launch import Launch, expand_hosts, understand

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
}
ALLOCATION = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_NODELIST": "gpu[07-08]"}
BATCH = {**ALLOCATION, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
TASK = {
    **ALLOCATION,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "3,1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "1234",
}
MPICH = {
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
    "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "2",
    "MASTER_PORT": "1234",
}


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


def place(found):
    return found.rank, found.world, found.local, found.local_world


@pytest.mark.parametrize(
    ("environ", "expected", "address"),
    [
        ({}, (0, 1, 0, 1), None),
        (TORCHRUN, (3, 4, 1, 2), None),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 0, 1), None),
        ({"WORLD_SIZE": "1"}, (0, 1, 0, 1), None),
        (TASK, (3, 4, 0, 1), "gpu07"),
        ({**TASK, "MASTER_ADDR": "other"}, (3, 4, 0, 1), "other"),
        ({**TASK, "SLURM_STEP_NODELIST": "gpu07"}, (3, 4, 0, 1), "127.0.0.1"),
        ({**TASK, "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, (3, 4, 0, 2), "gpu07"),
        (without(TASK, "SLURM_STEP_NODELIST"), (3, 4, 0, 1), "gpu07"),
        (OPEN_MPI, (3, 4, 1, 2), "head"),
        (MPICH, (1, 2, 1, 2), "127.0.0.1"),
        # an Open MPI whose daemons srun started, and torchrun as a task of srun
        ({**TASK, **OPEN_MPI}, (3, 4, 1, 2), "head"),
        ({**TASK, **TORCHRUN, "WORLD_SIZE": "16"}, (3, 16, 1, 2), None),
        # variables for torch set by hand beside Slurm's
        ({**TASK, "RANK": "3", "WORLD_SIZE": "4"}, (3, 4, 0, 1), "gpu07"),
        ({**TASK, "WORLD_SIZE": "4"}, (3, 4, 0, 1), "gpu07"),
        ({**TASK, "RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "5"}, (5, 16, 5, 1), None),
    ],
)
def test_a_launcher_is_understood(environ, expected, address):
    """Rank, world, local rank and local world; where there is one, the host of process 0."""
    found = understand(environ)
    assert (place(found), found.address) == (expected, address)


@pytest.mark.parametrize(
    "environ",
    [
        BATCH,
        ALLOCATION,  # the shell of salloc
        {**BATCH, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},  # salloc as a step
        {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"},
    ],
)
def test_a_shell_of_an_allocation_is_one_process(environ):
    """It says so: an `srun` may have been forgotten."""
    found = understand(environ)
    assert place(found) == (0, 1, 0, 1)
    assert "SLURM_NTASKS is 4, but this is no task of srun; for 4 processes: srun" in found.note
    assert not understand({**environ, "SLURM_NTASKS": "1"}).note


def test_what_was_understood_is_said():
    assert understand({**TASK, "MASTER_PORT": "99"}).note == (
        "4 processes by Slurm, meeting at gpu07:99"
    )
    assert not understand(TORCHRUN).note


@pytest.mark.parametrize(
    ("environ", "flags", "message"),
    [
        ({}, {"world_size": 4}, "--world_size 4: there is no launcher; expected torchrun --nproc"),
        (TORCHRUN, {"world_size": 8}, "--world_size 8: torchrun says 4; expected torchrun"),
        (TASK, {"local_rank": 2}, "--local_rank 2: Slurm says 0"),
        ({}, {"mpi": True}, "--dist_on_itp: expected Open MPI to have set OMPI_COMM_WORLD_SIZE"),
        (without(TORCHRUN, "RANK"), {}, "RANK is not set: expected an integer"),
        (without(TORCHRUN, "WORLD_SIZE"), {}, "WORLD_SIZE is not set"),
        ({**TORCHRUN, "RANK": "x"}, {}, "RANK is x: expected an integer; expected torchrun"),
        ({**TORCHRUN, "RANK": "4"}, {}, "RANK is 4, WORLD_SIZE is 4: expected less"),
        ({**TASK, "SLURM_PROCID": "4"}, {}, "SLURM_PROCID is 4, SLURM_STEP_NUM_TASKS is 4"),
        ({**TASK, "SLURM_STEP_NUM_TASKS": "1"}, {}, "SLURM_PROCID 3: expected the number of tasks"),
        (without(TASK, "SLURM_PROCID"), {}, "SLURM_PROCID is not set"),
        (
            without(TASK, "SLURM_STEP_NODELIST", "SLURM_NODELIST"),
            {},
            "neither MASTER_ADDR nor SLURM_STEP_NODELIST is set",
        ),
        # four tasks that would each take themselves for the only process
        (
            {**TASK, "RANK": "0", "WORLD_SIZE": "1"},
            {},
            "RANK is 0, WORLD_SIZE is 1, and Slurm says process 3 of 4; unset these, or expected",
        ),
        ({**OPEN_MPI, "WORLD_SIZE": "2"}, {}, "WORLD_SIZE is 2, and Open MPI says process 3 of 4"),
        (without(OPEN_MPI, "MASTER_ADDR"), {}, "MASTER_ADDR is not set; pass it on (Open MPI: mp"),
    ],
)
def test_what_contradicts_is_refused(environ, flags, message):
    """With the torchrun line to use."""
    with pytest.raises(ValueError) as error:
        understand(environ, **flags)
    assert message in str(error.value)
    assert "torchrun --nproc_per_node=" in str(error.value) or flags.get("mpi")


@pytest.mark.parametrize(
    ("environ", "flags"),
    [
        ({}, {"world_size": 1, "local_rank": -1}),  # the published defaults
        (TORCHRUN, {"world_size": 1, "local_rank": -1}),
        (TORCHRUN, {"world_size": 4, "local_rank": 1}),
        (OPEN_MPI, {"mpi": True, "world_size": 4}),
    ],
)
def test_flags_that_agree_are_accepted(environ, flags):
    assert understand(environ, **flags) == understand(environ)


def test_ports_are_those_of_a_job():
    """All tasks derive the same; steps and jobs differ; below the ephemeral ports."""
    port = understand(TASK).port
    assert port == understand({**TASK, "SLURM_PROCID": "0"}).port
    assert len({port, understand({**TASK, "SLURM_STEP_ID": "1"}).port,
                understand({**TASK, "SLURM_JOB_ID": "78"}).port}) == 3  # fmt: skip
    assert all(10_000 <= launch._port(i) < 30_000 for i in range(1000))


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("node[01-03,07]", ["node01", "node02", "node03", "node07"]),
        ("a[1-2,07],b,c9", ["a1", "a2", "a07", "b", "c9"]),
        ("r[1-2]n[8-10]", ["r1n8", "r1n9", "r1n10", "r2n8", "r2n9", "r2n10"]),
        ("gpu[098-101].x.org", ["gpu098.x.org", "gpu099.x.org", "gpu100.x.org", "gpu101.x.org"]),
        ("", []),
    ],
)
def test_hosts_in_short_form(text, hosts):
    assert expand_hosts(text) == hosts


def test_attempt_and_agent(monkeypatch):
    """Which restart this is, and the launcher that may restart it again."""
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert (launch.attempt(), launch.agent()) == (0, "")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert launch.attempt() == 2
    assert launch.agent().startswith(f"{socket.gethostname()}:{os.getppid()}:")


def test_url():
    """--dist_url is used where it says more than the launcher."""
    found = Launch(address="head", port=5)
    assert found.url("env://") == "tcp://head:5"
    assert found.url("file:///x") == "file:///x"
    assert Launch().url("env://") == "env://"


def test_a_world_without_launcher(capsys, tmp_path):
    """As a script says it."""
    flags = (*DIGITS, "--output_dir", tmp_path, "--world_size", "4")
    line = complain(capsys, main_mar.main, *flags)
    assert "--world_size 4: there is no launcher; expected torchrun --nproc_per_node=4" in line


# ---- several processes, started by a loop --------------------------------------------------------

REDUCE = """
import torch
from util import dist
from util.run import launch
dist.init("cpu")
total = dist.all_reduce(torch.tensor([dist.rank() + 1.0])).item()
print("total", total, dist.rank(), dist.world_size(), dist.local_world_size())
dist.cleanup()
"""


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def plain_environment(**more):
    """Ours without any launcher's variables."""
    ours = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM_", "OMPI_", "TORCHE"))}
    ours["PYTHONUNBUFFERED"] = ""  # lines are written whole, among those of other processes
    return {**ours, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


SRUN = """for i in 0 1 2; do SLURM_JOB_ID=1 SLURM_STEP_ID=0 SLURM_NTASKS=3 SLURM_STEP_NUM_TASKS=3 \
SLURM_NODEID=0 SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_STEP_NODELIST=localhost \
SLURM_STEP_TASKS_PER_NODE=3 {} & done; wait"""
MPIRUN = """for i in 0 1 2; do OMPI_COMM_WORLD_RANK=$i OMPI_COMM_WORLD_SIZE=3 \
OMPI_COMM_WORLD_LOCAL_RANK=$i OMPI_COMM_WORLD_LOCAL_SIZE=3 {} & done; wait"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
@pytest.mark.parametrize(
    ("loop", "by"), [(SRUN, "Slurm"), pytest.param(MPIRUN, "Open MPI", marks=pytest.mark.slow)]
)
def test_processes_of_a_loop_meet(loop, by):
    """They reduce a tensor, and one of them says what was understood."""
    port = free_port()
    command = loop.format(shlex.join([sys.executable, "-c", REDUCE]))
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=ROOT,
        env=plain_environment(MASTER_PORT=str(port)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = sorted(done.stdout.splitlines())
    assert lines == [f"3 processes by {by}, meeting at 127.0.0.1:{port}"] + [
        f"total 6.0 {i} 3 3" for i in range(3)
    ], done.stderr
