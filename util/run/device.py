"""The device of a process, and whether it computes what the CPU does."""

import torch
from torch.nn import functional as F

TOLERANCE = 1e-3  # of the largest |value| of a result; sums in another order differ by about 1e-6


def pick(name, local, world):
    """The torch.device of a process, made the current one.

    name: "cuda", "mps", "cpu" or "auto". local: rank on this machine. world: number of processes.
    Raises ValueError for a device that does not exist or whose numbers are wrong.
    """
    device = _device(name)
    if device.type == "cpu":
        return device
    if world > 1 and (device.index is not None or device.type == "mps"):
        raise ValueError(f"--device {name}: with {world} processes, expected cuda or auto")
    if device.type == "mps":
        check_numbers(device)
        return device
    count = torch.cuda.device_count()
    local = 0 if count == 1 else local  # if each process sees only one GPU
    if device.index is None and local >= count:
        raise ValueError(f"process {local} of this machine: expected at most {count}, its GPUs")
    device = torch.device("cuda", local if device.index is None else device.index)
    torch.cuda.set_device(device)
    return device


def _device(name):
    """The device that is meant, without an index if none was given."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cuda", "mps", "cpu"):
        raise ValueError(f"--device {name}: expected cuda, mps, cpu or auto")
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= there.get(device.type, 1):
        raise ValueError(f"--device {name}: no such device here; expected {_others(there)}")
    return device


def _others(there):
    return ", ".join([*(name for name, count in there.items() if count), "cpu or auto"])


def check_numbers(device):
    """Compare attention, the network of the head and convolutions, forward and backward, with the
    CPU. Raises ValueError where they differ by more than TOLERANCE."""
    for name, function in CHECKS.items():
        here, there = _results(function, torch.device("cpu")), _results(function, device)
        error = max(map(_difference, there, here))
        if not error <= TOLERANCE:
            raise ValueError(
                f"--device {device}: {name} differs from the CPU's by {error:.1g} of the largest "
                f"value, expected at most {TOLERANCE:g}; use --device cpu, or another torch"
            )


def _results(function, device):
    """A function's result and its gradients, on the CPU."""
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 8, 16, generator=draw) for _ in range(3)]
    inputs = [x.to(device).requires_grad_() for x in inputs]
    result = function(*inputs)
    weights = torch.linspace(-1, 1, result.numel(), device=device).reshape(result.shape)
    gradients = torch.autograd.grad((result * weights).sum(), inputs, allow_unused=True)
    return [x.detach().cpu() for x in (result, *gradients) if x is not None]


def _difference(x, expected):
    return ((x - expected).abs().max() / expected.abs().max()).nan_to_num(float("inf")).item()


def _attention(q, k, v):
    """Two heads of width 8, the second half of the keys hidden from the first query."""
    q, k, v = (x.unflatten(2, (2, 8)).transpose(1, 2) for x in (q, k, v))
    hidden = torch.zeros(8, 8, dtype=torch.bool, device=q.device)
    hidden[0, 4:] = True
    return F.scaled_dot_product_attention(q, k, v, ~hidden).transpose(1, 2).flatten(2)


def _head(x, shift, scale):
    """A residual block with adaptive normalization."""
    modulated = F.layer_norm(x, (16,)) * (1 + scale) + shift
    return x + F.silu(modulated @ scale.mT) @ shift


def _convolution(x, weight, other):
    """As in tokenizers: group normalization, and a resized result."""
    images = F.group_norm(x.unflatten(2, (4, 4)), 4)
    kernel = weight.reshape(2, 8, 16)[:, :, :9].unflatten(2, (3, 3))
    return F.interpolate(F.conv2d(images, kernel, padding=1), scale_factor=2.0, mode="nearest")


CHECKS = {"attention": _attention, "the head": _head, "a convolution": _convolution}
