"""The numerical precision of networks."""

from contextlib import contextmanager, nullcontext

import torch

from util import processor
from util.dist import print0

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # the others compute in float32
# instruction sets of util.processor, of which a CPU needs one to be fast in them
NEEDED = {
    "bf16": ("AMX-BF16", "AVX512-BF16", "BF16"),
    "fp16": ("AMX-FP16", "AVX512-FP16", "FP16"),
}


def pick_precision(name, device):
    """The precision in util.flags.PRECISIONS that "auto" stands for on this device; else `name`.

    Also sets for the process where float32 products may use TF32. Linear layers: for tf32 only.
    Convolutions, as in tokenizers and Inception: unless fp32 is chosen; this is the default of
    torch, and so of the published code. Prints a note if the CPU may only emulate it.
    """
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name != "fp32"
    if device.type == "cpu" and name in NEEDED and not has_instructions(name):
        print0(
            f"NOTE: --precision {name} is slower than fp32 on a CPU without instructions for it: "
            f"none of {', '.join(NEEDED[name])} was found"
        )
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def has_instructions(name):
    """Whether this machine's CPU is known to have instructions for products in bf16 or fp16."""
    return not set(NEEDED[name]).isdisjoint(processor.instructions())


def autocast(device, precision):
    """The autocast context of a precision."""
    dtype = DTYPES.get(precision)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def autocast_steps(steps, device, precision):
    """The items of a generator, each computed with autocast, which does not last between them: it
    is a thread's own, and any thread may ask for the next."""
    while True:
        with autocast(device, precision):
            found = next(steps, None)
        if found is None:
            return
        yield found


def float64_device(device):
    """The device for sums in float64 of what is on `device`: the same, or the CPU for Apple's GPUs,
    which have no float64."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


@contextmanager
def full_precision(kind):
    """A context without autocast and TF32 on this kind of device: products in full precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(kind, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
