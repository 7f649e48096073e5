"""Functions of timesteps, of which there are fewer than rows in training."""

import torch
from torch.nn import functional as F

from diffusion.schedule import TRAIN_STEPS


def of_distinct(function, t):
    """function(t) of timesteps t (...), on a CPU computed once for each that occurs: (..., W)."""
    if (
        t.device.type != "cpu"  # elsewhere counting them would wait for the device
        or t.numel() <= TRAIN_STEPS
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
    ):
        return function(t)
    distinct, places = t.unique(return_inverse=True)
    return F.embedding(places, function(distinct))
