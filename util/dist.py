"""Helpers for one or several processes; everything also works without torch.distributed."""

import os
import re
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from util.files import HOST, first_line
from util.run.device import pick
from util.run.heartbeat import Heartbeat, Lost, StoreGone, meet, patiently
from util.run.launch import Launch, understand
from util.run.network import choose_interface

JOINING = 300.0  # seconds that the others may need to start, at least
LOST = re.compile(r"gloo/|Connection (closed|reset) by peer|Broken pipe|Timed out waiting")


class _Here:
    """What this process knows of the others."""

    launch, heartbeat = Launch(), None


def init(
    device,
    dist_on_itp=False,
    dist_url="env://",
    timeout=5.0,
    world_size=None,
    local_rank=None,
):
    """Join the other processes, if a launcher such as torchrun started any.

    device: "cuda", "mps", "cpu" or "auto" (cuda if available). Returns this process's device.
    dist_on_itp: the launcher is Open MPI. timeout: minutes after which a collective, in which a
    process is missing, is an error. world_size, local_rank: what must agree with the launcher (see
    `launch.understand`). Raises ValueError for a device that does not exist, for a launcher that is
    not understood, and if the other processes cannot be reached.
    """
    launch = understand(mpi=dist_on_itp, world_size=world_size, local_rank=local_rank)
    if launch.note and launch.rank == 0:
        print(launch.note, flush=True)
    device = pick(device, launch.local, launch.world)
    if launch.world > 1 and not dist.is_initialized():
        try:
            patiently(lambda: _join(launch, launch.url(dist_url), device, 60 * timeout))
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"--dist_url {launch.url(dist_url)}: process {launch.rank} of {launch.world} "
                f"cannot join others ({_first_line(error)})"
            ) from error
    _Here.launch = launch
    return device


def _join(launch, url, device, seconds):
    """Start torch.distributed and the heartbeat. Keys of the store start with a name of this
    attempt, because torchrun keeps its store, and dead processes' addresses, over restarts."""
    rank, world, patience = launch.rank, launch.world, max(seconds, JOINING)

    def connect():
        return next(dist.rendezvous(url, rank, world, timeout=timedelta(seconds=patience)))[0]

    store = connect()
    name = meet(store, rank, world, patience)
    own = store if isinstance(store, dist.FileStore) else connect()
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    own = dist.PrefixStore(f"{name}/heartbeat", own)
    if launch.local_world < world:
        choose_interface(launch.address or os.environ.get("MASTER_ADDR"))
    _Here.heartbeat = Heartbeat(own, rank, world, seconds, hosts)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)  # of this thread
    timeout = timedelta(seconds=seconds)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore(name, store),
        timeout=timeout,
        world_size=world,
        rank=rank,
        device_id=device if on_gpu else None,
    )
    Agreement.group = dist.new_group(backend="gloo", timeout=timeout) if on_gpu else None


def wrap(model, device):
    """The model in DistributedDataParallel; itself if it is sharded, or one process holds it."""
    if world_size() == 1 or is_sharded(model):
        return model
    wait()  # for processes that are still reading files
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids)


def unwrap(model):
    """The model inside the result of `wrap`."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def is_sharded(model):
    """Whether each process holds a part of the model only (see util.run.fsdp)."""
    return hasattr(model, "set_requires_gradient_sync")


def whole(tensor):
    """A sharded tensor as a whole one, on all processes, which must call this; others unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_part(tensor):
    """What this process holds of a sharded tensor; others unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def cleanup():
    """Leave the process group, so that no process waits for one that has exited."""
    if _Here.heartbeat:
        _Here.heartbeat.close()
        _Here.heartbeat = None
    if dist.is_initialized():
        dist.destroy_process_group()


def lost(error):
    """One line if the error says that another process, or the way to it, is lost; else None."""
    if isinstance(error, Lost | dist.DistError) or (
        isinstance(error, RuntimeError) and world_size() > 1 and LOST.search(str(error))
    ):
        where = f"process {rank()} of {world_size()}, on {HOST}"
        return f"{where}: lost another process ({_first_line(error)})"
    return None


def _first_line(error):
    line = first_line(error)
    return re.sub(r"\[\S*/\S+:\d+\] ", "", line).split(". ")[0]


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size():
    """The number of processes on this machine."""
    return _Here.launch.local_world


def is_main():
    return rank() == 0


def barrier():
    """Return when all processes have called this. One that comes much later than the others, from
    work of its own, is waited for as long as it lives. Raises Lost, which `lost` puts in a line."""
    wait()
    if dist.is_initialized():  # even so: the store may have gone for some of the processes only
        dist.barrier()


def wait():
    """Like `barrier`, before a collective of torch.distributed, which has a timeout.

    Returns whether all have come: where torchrun has ended, and its store with it, there is no
    patience, but the processes can still save what they have.
    """
    try:
        if _Here.heartbeat:
            _Here.heartbeat.wait()
        return _Here.heartbeat is not None
    except StoreGone:
        return False


def all_reduce(tensor, op="sum"):
    """Reduce in place over all processes ("sum", "min", "max") and return the tensor."""
    if dist.is_initialized():
        ops = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}
        dist.all_reduce(tensor, ops[op])
    return tensor


class Agreement:
    """What any process wishes, known to all one call later, so that no step waits for it.

    Called with as many wishes (bools) by all processes in step; returns, for each, whether any
    process had it at the call before, or with only one process, now. On the CPU: a GPU is not
    waited for.
    """

    group = None  # of the CPUs; None: the default one

    def __init__(self):
        self.pending = None

    def __call__(self, *wishes):
        if not dist.is_initialized():
            return list(wishes)
        found = self.close() or [False] * len(wishes)
        told = torch.tensor(wishes, dtype=torch.int32)
        work = dist.all_reduce(told, dist.ReduceOp.MAX, group=self.group, async_op=True)
        self.pending = told, work
        return found

    def close(self):
        """Wait for the last call; returns its answer, or None if there was none."""
        if self.pending is None:
            return None
        told, work = self.pending
        work.wait()
        self.pending = None
        return told.bool().tolist()


# ---- of Python's objects: processes may come late, as to `wait` ----------------------------------


def broadcast(value):
    """The value of rank 0, on every process."""
    if not dist.is_initialized():
        return value
    wait()
    values = [value if is_main() else None]
    dist.broadcast_object_list(values)
    return values[0]


def gather(value):
    """The values of all processes, ordered by rank; None except on rank 0."""
    if not dist.is_initialized():
        return [value]
    wait()
    values = [None] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return values


def all_gather(value):
    """The values of all processes, ordered by rank, on every process."""
    if not dist.is_initialized():
        return [value]
    wait()
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def print0(*args, **kwargs):
    """Print on rank 0 only, without buffering."""
    if is_main():
        print(*args, **kwargs, flush=True)
