"""The number types that networks compute in."""

from contextlib import contextmanager, nullcontext

import torch

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": None, "fp32": None}


def pick_precision(name, device):
    """The precision (a key of PRECISIONS) that "auto" means on this device; others are themselves.

    Sets for the process what float32 may be made of. Linear layers: TF32 for tf32 alone.
    Convolutions, as of tokenizers and Inception: TF32 unless fp32 is asked for, which is torch's
    default, and so the published code's.
    """
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name != "fp32"
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(device, precision):
    """The autocast of a precision."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


@contextmanager
def full_precision(kind):
    """Products in the type of their factors on this kind of device, neither autocast nor TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(kind, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
