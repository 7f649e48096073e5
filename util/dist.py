"""Helpers for one or several processes; everything also works without torch.distributed."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = timedelta(minutes=60)


def init(device, dist_on_itp=False, dist_url="env://"):
    """Join the other processes, if a launcher such as torchrun started any.

    device: "cuda", "cpu" or "auto" (cuda if available). Returns this process's device. dist_on_itp:
    the launcher is Open MPI. Raises ValueError for a device that does not exist, and if the other
    processes cannot be reached.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if dist_on_itp:
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
    if dist_on_itp and names[1] not in os.environ:
        raise ValueError(f"--dist_on_itp: expected Open MPI to have set {names[1]}; it has not")
    rank, world, local = (int(os.environ.get(name, 0)) for name in names)
    device = _pick(device)
    if device.type == "cuda":
        if device.index is not None and world > 1:
            raise ValueError(f"--device {device}: with {world} processes, expected cuda or auto")
        count = torch.cuda.device_count()
        local = 0 if count == 1 else local  # if each process sees only one GPU
        if device.index is None and local >= count:
            raise ValueError(f"process {local} of this machine: expected at most {count}, its GPUs")
        device = torch.device("cuda", local if device.index is None else device.index)
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        cuda = device.type == "cuda"
        try:
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                dist_url,
                TIMEOUT,
                world,
                rank,
                device_id=device if cuda else None,
            )
            Agreement.group = dist.new_group(backend="gloo") if cuda else None
        except (ValueError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise ValueError(
                f"--dist_url {dist_url}: process {rank} of {world} cannot join others ({reason})"
            ) from error
    return device


def _pick(name):
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: expected cuda, cpu or auto") from None
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"--device {name}: expected cuda, cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: no such device here; expected cpu or auto")
    return device


def wrap(model, device):
    """The model in DistributedDataParallel; itself if it is sharded, or one process holds it."""
    if world_size() == 1 or is_sharded(model):
        return model
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
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return rank() == 0


def barrier():
    if dist.is_initialized():
        dist.barrier()


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


def wait():
    """Like `barrier`, where a process may come much later than the others."""
    barrier()


def broadcast(value):
    """The value of rank 0, on every process."""
    if not dist.is_initialized():
        return value
    values = [value if is_main() else None]
    dist.broadcast_object_list(values)
    return values[0]


def gather(value):
    """The values of all processes, ordered by rank; None except on rank 0."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return values


def all_gather(value):
    """The values of all processes, ordered by rank, on every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def print0(*args, **kwargs):
    """Print on rank 0 only, without buffering."""
    if is_main():
        print(*args, **kwargs, flush=True)
