"""What a checkpoint holds is checked before any of it is used: types, shapes, and sizes.

A file may be damaged, of another program, or made up. Each check raises ValueError with the path
and the entry.
"""

import torch

from util.averages import FURTHER
from util.plain import is_count, is_number

KINDS = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8}
KINDS |= {torch.int8, torch.int16, torch.int32, torch.int64}
OWN = ("params", "fused", "foreach")  # of an optimizer's group, which have checks or no effect
MOMENTS = "step exp_avg exp_avg_sq"  # AdamW's state of a parameter
SLACK = 2**26  # bytes that a tensor may claim beyond its storage, as one that repeats a row does


def expect(fits, path, entry, value, expected):
    """Raises ValueError unless something fits. entry: where it is in the file."""
    if not fits:
        shown = repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
        raise ValueError(f"{path}: {entry} is {shown[:60]}, expected {expected}")


def check_tensors(content, path):
    """Raises ValueError for tensors that would need far more memory than there is in the file."""
    todo, seen = [content], set()
    while todo:
        each = todo.pop()
        if isinstance(each, torch.Tensor):
            _check_tensor(each, path)
        elif isinstance(each, dict | list | tuple) and id(each) not in seen:
            seen.add(id(each))
            todo += each.values() if isinstance(each, dict) else each


def _check_tensor(value, path):
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_nested
    plain = plain and value.dtype in KINDS
    shown = f"{value.dtype} {value.layout} on {value.device}"
    expect(plain, path, "a tensor", shown, "a dense one of real numbers")
    size = value.numel() * value.element_size()
    if size > value.untyped_storage().nbytes() + SLACK:
        raise ValueError(
            f"{path}: a tensor of shape {tuple(value.shape)}, of which only "
            f"{value.untyped_storage().nbytes()} bytes are in the file"
        )


def check_checkpoint(content, path):
    """Raises ValueError unless the entries of a checkpoint are of their types.

    The configuration is checked by models.checkpoint_config, which knows what it means.
    """
    if missing := {"model", "model_ema", "args", "config"} - content.keys():
        raise ValueError(f"{path}: a checkpoint without its entry {min(missing)!r}")
    for part in ("model", "model_ema"):
        _check_weights(content[part], path, part)
    _check_plain(content["args"], path, "args")
    _check_plain(content.get("record") or {}, path, "record")
    config = content["config"]
    expect(config is None or isinstance(config, dict), path, "config", config, "a dict")
    if "optimizer" in content:
        expect(is_count(content.get("epoch"), -1), path, "epoch", content.get("epoch"), "a number")
        _check_optimizer(content["optimizer"], path)
    scaler = content.get("scaler") or {}
    fits = isinstance(scaler, dict) and all(map(is_number, scaler.values()))
    expect(fits, path, "scaler", scaler, "numbers by name")
    parts = content.get("parts", {})
    fits = isinstance(parts, dict) and all(isinstance(part, dict) for part in parts.values())
    fits = fits and all(isinstance(name, str) for name in parts)
    expect(fits, path, "parts", parts, "states by name")
    for name in filter(FURTHER.fullmatch, parts):
        _check_weights(parts[name], path, name)
    if "place" in content:
        _check_place(content["place"], path)


def _check_plain(values, path, part):
    expect(isinstance(values, dict), path, part, values, "values by name")
    for name, value in values.items():
        fits = isinstance(name, str) and _is_plain(value)
        expect(fits, path, f"{part} {name!s:.40}", value, "plain data with a name")


def _is_plain(value):
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | bool | int | float)


def _check_weights(weights, path, part):
    expect(isinstance(weights, dict) and weights, path, part, weights, "weights by name")
    for name, value in weights.items():
        fits = isinstance(name, str) and isinstance(value, torch.Tensor)
        expect(fits, path, f"{part} {name!s:.40}", value, "a tensor with a name")


def _check_optimizer(state, path):
    fits = isinstance(state, dict) and isinstance(state.get("state"), dict)
    fits = fits and isinstance(state.get("param_groups"), list)
    expect(fits, path, "optimizer", state, "a state and param_groups")
    for number, values in state["state"].items():
        entry = f"optimizer's state {number!s:.20}"
        expect(is_count(number) and isinstance(values, dict), path, entry, values, "of a parameter")
        for name, value in values.items():
            fits = isinstance(value, torch.Tensor | bool) or is_number(value)
            expect(fits, path, f"{entry} {name!s:.20}", value, "a tensor")
    for group in state["param_groups"]:
        expect(isinstance(group, dict), path, "optimizer's group", group, "a dict")
        numbers = group.get("params")
        fits = isinstance(numbers, list) and all(map(is_count, numbers))
        expect(fits, path, "optimizer's group's params", numbers, "numbers of parameters")


def check_optimizer_fits(state, optimizer, path):
    """Raises ValueError unless a state is one of an optimizer like this one."""
    groups = optimizer.param_groups
    counts = [len(group["params"]) for group in groups]
    theirs = [len(group["params"]) for group in state["param_groups"]]
    expect(theirs == counts, path, "optimizer's groups", str(theirs), f"of sizes {counts}")
    for ours, group in zip(groups, state["param_groups"], strict=True):
        for name, value in ours.items():
            fits = name in OWN or _alike(value, group.get(name, value))
            entry = f"optimizer's {name}"
            expect(fits, path, entry, group.get(name), f"a value such as {value}")
        for parameter, number in zip(ours["params"], group["params"], strict=True):
            _check_moments(state["state"].get(number), ours, parameter, number, path)


def _check_moments(values, group, parameter, number, path):
    if values is None:
        return
    for name in (name for name, value in values.items() if isinstance(value, bool)):
        entry, own = f"optimizer's {name} of parameter {number}", group.get(name)
        expect(values[name] is own, path, entry, values[name], f"{own}, as its group has")
    for name in group.get("holds", MOMENTS).split():
        value, shape = values.get(name), () if name == "step" else tuple(parameter.shape)
        found = tuple(value.shape) if isinstance(value, torch.Tensor) else None
        fits = found == shape or (name == "step" and is_number(value))
        fits = fits and (found is None or value.is_floating_point())
        entry = f"optimizer's {name} of parameter {number}"
        expect(fits, path, entry, found, f"a tensor of shape {shape}")


def _alike(ours, theirs):
    """Whether a value of an optimizer's group is of the kind of ours."""
    if isinstance(ours, tuple):
        fits = isinstance(theirs, tuple | list) and len(theirs) == len(ours)
        return fits and all(map(is_number, theirs))
    if type(ours) in (int, float):
        return is_number(theirs)
    return type(theirs) is type(ours) and theirs == ours  # such as amsgrad, which needs more state


def _check_place(place, path):
    fits = isinstance(place, dict) and is_count(place.get("batch"))
    fits = fits and is_count(place.get("images"), 1)
    expect(fits, path, "place", place, "batch and images")
    draws, size = place.get("draws"), torch.get_rng_state().shape
    expect(isinstance(draws, list) and draws, path, "place's draws", draws, "one a process")
    for states in draws:
        fits = states is None or isinstance(states, dict)
        expect(fits, path, "place's draws", states, "states by name")
        for name in ("default", "step_generator", "generator") if states else ():
            value = states.get(name)
            fits = isinstance(value, torch.Tensor) and value.dtype == torch.uint8
            fits = fits and value.ndim == 1 and (name == "generator" or value.shape == size)
            expect(fits, path, f"place's {name}", value, "the state of a generator")
