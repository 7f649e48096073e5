"""What a launcher says in the environment: torchrun, Slurm's srun, Open MPI, MPICH, or nobody.

Imports neither torch nor numpy.
"""

import os
import re
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

from util.files import HOST

LOWEST_PORT, PORTS = 10_000, 20_000  # of addresses that are derived: below the ephemeral ones
TORCHRUN = "torchrun --nproc_per_node={} {}"


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together; one process by default.

    local, local_world: rank and number among those of this machine. address, port: where the
    processes meet; None leaves that to --dist_url. note: a line about what was understood.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1
    launcher: str = ""
    address: str | None = None
    port: int | None = None
    note: str = ""

    def url(self, given):
        """The URL of the rendezvous; `given` unless that is env:// and the launcher knows more."""
        known = given == "env://" and self.address is not None
        return f"tcp://{self.address}:{self.port}" if known else given


def understand(environ=os.environ, *, mpi=False, world_size=None, local_rank=None):
    """The Launch that the environment describes.

    mpi: the launcher must be Open MPI (--dist_on_itp). world_size, local_rank: what flags claim; 1
    and -1, the published defaults, claim nothing. Raises ValueError for variables or flags that
    contradict each other, naming the command to use.
    """
    found = _open_mpi(environ) if mpi else _launcher(environ)
    _agree("--world_size", world_size, found.world, (None, 1), found)
    _agree("--local_rank", local_rank, found.local, (None, -1), found)
    return found


def attempt():
    """How often torchrun has restarted the processes of this machine on its own account; 0 at
    first. Machines may disagree: a healthy one's processes are restarted without being counted."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def agent():
    """ "host:pid:start" of the torchrun that started this process and may restart it; "" without.

    start: its time where the system tells, as a container's first process always has the same pid.
    """
    if not _by_torchrun(os.environ):
        return ""
    parent = os.getppid()
    try:
        start = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        start = ""
    return f"{HOST}:{parent}:{start}"


def _launcher(environ):
    if _by_torchrun(environ):
        return _torchrun(environ)
    if "OMPI_COMM_WORLD_SIZE" in environ:
        found = _open_mpi(environ)
    elif "SLURM_STEP_ID" in environ or "SLURM_STEPID" in environ:
        found = _slurm(environ)
    elif "PMI_SIZE" in environ:
        found = _mpich(environ)
    else:
        return _torchrun(environ) if _stated(environ) else _alone(environ)
    return _confirmed(environ, found) if _stated(environ) else found


def _by_torchrun(environ):
    return "TORCHELASTIC_RUN_ID" in environ


def _stated(environ):
    return "RANK" in environ or "WORLD_SIZE" in environ


def _agree(flag, claimed, found, unset, launch):
    if claimed in (*unset, found):
        return
    by = f"{launch.launcher} says {found}" if launch.launcher else "there is no launcher"
    count = claimed if flag == "--world_size" else launch.world
    raise ValueError(f"{flag} {claimed}: {by}; {_advice(count)}")


def _advice(count):
    return f"expected {TORCHRUN.format(count, _script())} …, which sets all of this"


def _script():
    name = os.path.basename(sys.argv[0])
    return name if name.endswith(".py") and name != "__main__.py" else "main_mar.py"


# ---- the launchers -------------------------------------------------------------------------------


def _torchrun(environ):
    """torchrun, or RANK and WORLD_SIZE set by hand."""
    world = _integer(environ, "WORLD_SIZE", 1)
    rank = _integer(environ, "RANK", world, default=0 if world == 1 else None)
    _check_rank("RANK", rank, "WORLD_SIZE", world)
    local = _integer(environ, "LOCAL_RANK", world, default=0)
    local_world = _integer(environ, "LOCAL_WORLD_SIZE", world, default=1)
    return Launch(rank, world, local, local_world, "torchrun")


def _alone(environ):
    """One process, perhaps in the shell of a Slurm allocation, which is no task of srun."""
    tasks = environ.get("SLURM_NTASKS", "1")
    note = "" if tasks == "1" else (
        f"one process: SLURM_NTASKS is {tasks}, but this is no task of srun; for {tasks} "
        f"processes: srun python {_script()} …"
    )  # fmt: skip
    return Launch(local=_integer(environ, "LOCAL_RANK", 1, default=0), note=note)


def _open_mpi(environ):
    names = [f"OMPI_COMM_WORLD_{n}" for n in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
    if names[1] not in environ:
        raise ValueError(f"--dist_on_itp: expected Open MPI to have set {names[1]}; it has not")
    job = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid")
    return _mpi(environ, "Open MPI", names, job)


def _mpich(environ):
    """MPICH and Intel MPI."""
    names = ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"]
    return _mpi(environ, "MPICH", names, environ.get("PMI_JOBID"))


def _mpi(environ, launcher, names, job):
    """An MPI launcher. names: its variables of rank, world, local rank and local world."""
    count = int(environ[names[1]]) if environ[names[1]].isdigit() else 1
    rank, world = (_integer(environ, name, count) for name in names[:2])
    _check_rank(names[0], rank, names[1], world)
    local = _integer(environ, names[2], world, default=rank)
    local_world = _integer(environ, names[3], world, default=world)
    here = names[3] in environ and local_world == world
    address = environ.get("MASTER_ADDR") or ("127.0.0.1" if here else None)
    if address is None and world > 1:
        raise ValueError(
            f"{launcher} started {world} processes, and MASTER_ADDR is not set; pass it on (Open "
            f"MPI: mpirun -x MASTER_ADDR=HOST, the machine of process 0), or {_advice(world)}"
        )
    port = _integer(environ, "MASTER_PORT", world, default=_port(job or launcher))
    return _described(Launch(rank, world, local, local_world, launcher, address, port))


def _slurm(environ):
    """A task of srun. A shell that is a step of its own, as in salloc, has one task."""
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    if environ.get(tasks, "1") == "1":
        return _alone(environ) if environ.get("SLURM_PROCID", "0") == "0" else _no_tasks(environ)
    world = _integer(environ, tasks, 1)
    rank, local = (_integer(environ, name, world) for name in ("SLURM_PROCID", "SLURM_LOCALID"))
    _check_rank("SLURM_PROCID", rank, tasks, world)
    hosts = next(filter(None, map(environ.get, NODELISTS)), "")
    address = environ.get("MASTER_ADDR") or _meeting_host(hosts, world)
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID"))
    port = _port(f"{environ.get('SLURM_JOB_ID')}.{step}")
    port = _integer(environ, "MASTER_PORT", world, default=port)
    return _described(
        Launch(rank, world, local, _tasks_here(environ, world), "Slurm", address, port)
    )


NODELISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")


def _no_tasks(environ):
    raise ValueError(
        f"SLURM_PROCID {environ['SLURM_PROCID']}: expected the number of tasks in "
        f"SLURM_STEP_NUM_TASKS; {_advice('N')}"
    )


def _meeting_host(text, world):
    """The address of process 0: the first host, or this one if there is no other."""
    hosts = expand_hosts(text)
    if not hosts:
        raise ValueError(
            f"Slurm started {world} tasks, and neither MASTER_ADDR nor SLURM_STEP_NODELIST is set; "
            + _advice(world)
        )
    return hosts[0] if len(hosts) > 1 else "127.0.0.1"


def _tasks_here(environ, world):
    """The number of tasks on this node, from a list such as 2(x3),1, one entry a node."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    counts = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(number)] * int(times or 1)
    node = _integer(environ, "SLURM_NODEID", world, default=0)
    return counts[node] if node < len(counts) else world


def _confirmed(environ, found):
    """What a launcher says, where RANK or WORLD_SIZE are set too. Raises ValueError if a variable
    would make several processes take themselves for the same one."""
    stated = {"RANK": found.rank, "WORLD_SIZE": found.world}
    stated = {name: value for name, value in stated.items() if name in environ}
    if all(environ[name] == str(value) for name, value in stated.items()):
        return found
    both = len(stated) == 2 and environ["WORLD_SIZE"].isdigit()
    if both and int(environ["WORLD_SIZE"]) > found.world:
        return _torchrun(environ)  # a launcher of its own in each task
    said = ", ".join(f"{name} is {environ[name]}" for name in stated)
    raise ValueError(
        f"{said}, and {found.launcher or 'the launcher'} says process {found.rank} of "
        f"{found.world}; unset these, or {_advice(found.world)}"
    )


# ---- values --------------------------------------------------------------------------------------


def _integer(environ, name, count, default=None):
    """The integer in a variable; the default if it is absent. count: for the advice."""
    text = environ.get(name, default)
    if text is None or not re.fullmatch(r"\d+", str(text)):
        state = "not set" if text is None else text
        raise ValueError(f"{name} is {state}: expected an integer; {_advice(count)}")
    return int(text)


def _check_rank(name, rank, of, world):
    if rank >= world:
        raise ValueError(f"{name} is {rank}, {of} is {world}: expected less; {_advice(world)}")


def _port(text):
    """A port that all processes derive from the name of their job."""
    return LOWEST_PORT + zlib.crc32(str(text).encode()) % PORTS


def _described(launch):
    where = f"meeting at {launch.address}:{launch.port}"
    return Launch(
        **{**vars(launch), "note": f"{launch.world} processes by {launch.launcher}, {where}"}
    )


def expand_hosts(text):
    """The hosts of Slurm's short form: "a[1-2,07],b" to ["a1", "a2", "a07", "b"]."""
    hosts = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        hosts += _expand(part)
    return hosts


def _expand(part):
    head, bracket, rest = part.partition("[")
    if not bracket:
        return [part]
    inside, _, tail = rest.partition("]")
    return [f"{head}{n}{end}" for n in _numbers(inside) for end in _expand(tail)]


def _numbers(text):
    """The numbers, with leading zeros, of "01-03,07"."""
    for span in text.split(","):
        low, _, high = span.partition("-")
        for number in range(int(low), int(high or low) + 1):
            yield str(number).zfill(len(low))
