"""Fully sharded data parallelism (--fsdp): each process holds a part of every weight.

Gradients, the optimizer's moments and the EMA are sharded like the weights they belong to. While a
unit of the model computes, its weights are whole on every process. Files hold whole tensors: a
checkpoint is the same file with and without.
"""

import copy
import warnings
from contextlib import contextmanager
from functools import partial

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from util import dist


def shard(*models):
    """Shard models in place, over all processes; their names and shapes stay.

    They then load whole state dicts, of which each process takes its part. Raises ValueError where
    torch cannot do this.
    """
    if dist.world_size() == 1:
        dist.print0("NOTE: --fsdp has no effect: one process holds everything")
        return
    shard_over_all(*models)


def shard_over_all(*models):
    """`shard` over however many processes there are, be it one."""
    kind = next(models[0].parameters()).device.type
    if kind == "cpu" and not _works_on_cpus():
        raise ValueError(f"--fsdp: torch {torch.__version__} cannot shard on CPUs; expected 2.14")
    # nothing here changes the result of a block in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(kind, (dist.world_size(),))
    for model in models:
        assert not list(model.buffers()), "buffers are not sharded"
        model.unsharded = partial(copy.deepcopy, _without_weights(model))
        for unit in model.to_shard():
            fully_shard(unit, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.register_load_state_dict_pre_hook(_take_weights)


def _works_on_cpus():
    """Before 2.7 torch raises in the first step; later ones added gradients where it averages."""
    if not hasattr(torch.cpu.Stream, "record_event"):
        return False
    average = getattr(distributed, "reduce_scatter_single", distributed.reduce_scatter_tensor)
    mean, ones = torch.zeros(1), torch.ones(dist.world_size())
    average(mean, ones, distributed.ReduceOp.AVG)
    return mean.item() == 1


def _without_weights(model):
    """A copy on the meta device."""
    empty = {id(p): torch.nn.Parameter(p.to("meta")) for p in model.parameters()}
    return copy.deepcopy(model, empty)


def accept_whole(optimizer):
    """Let an optimizer, of a sharded model too, load whole state dicts."""
    optimizer.register_load_state_dict_pre_hook(_take_moments)


@contextmanager
def unsynchronized(model):
    """A context in which gradients are added up on each process. They are whole, not sharded."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def gathered(state):
    """A copy of nested dicts and lists, their sharded tensors whole and on the CPU in rank 0.

    Sharded tensors are None on the other processes, all of which must call this. One is whole at a
    time, so that devices need no room for all.
    """
    if isinstance(state, dict):
        result = copy.copy(state)  # an OrderedDict with attributes
        for key in result:
            result[key] = gathered(state[key])
        return result
    if isinstance(state, list):
        return [gathered(value) for value in state]
    if not isinstance(state, DTensor):
        return state
    whole = state.full_tensor()  # perhaps a view of more
    return whole.to("cpu", copy=True) if dist.is_main() else None


@torch.no_grad()
def whole(model):
    """A copy of a sharded model with whole weights, in evaluation mode, to sample from.

    It takes the memory of all weights. All processes must call this.
    """
    result = model.unsharded().eval().to_empty(device=next(model.parameters()).device)
    weights = model.state_dict()
    for name, value in result.state_dict().items():
        value.copy_(weights[name].full_tensor())
    return result


def _take_weights(model, state, *_):
    for name, parameter in model.named_parameters():
        if name in state:
            state[name] = _part(state[name], parameter)


def _take_moments(optimizer, state):
    own = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    moments = {
        number: {name: _part(value, own.get(number)) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}


@torch.no_grad()
def _part(value, like):
    """`value` sharded like the tensor `like`, if it is one of its shape; else as it is."""
    if isinstance(value, DTensor) or getattr(value, "shape", ()) != getattr(like, "shape", None):
        return value
    part = torch.empty_like(like)
    rows = value.chunk(dist.world_size())
    if dist.rank() < len(rows):
        part.to_local().copy_(rows[dist.rank()])
    return part
