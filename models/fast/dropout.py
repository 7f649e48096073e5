"""Dropout whose masks cost less to draw on a CPU."""

import torch
from torch import nn


class Dropout(nn.Dropout):
    """nn.Dropout, on a CPU with a mask from `drop`."""

    def forward(self, x):
        if self.training and 0 < self.p < 1 and usable(x):
            return x * drop(x, self.p)
        return super().forward(x)


def usable(x):
    """Whether `drop` is for this tensor: on a CPU, where nothing compiles or transforms it."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def drop(like, rate):
    """Factors of dropout, of the shape of `like`: 0 with probability `rate`, else 1 / (1 − rate).

    From 16 random bits each, so that the rate is met up to 1 / 131,072. Torch takes 64, and with
    them a seventh of a training step.
    """
    bits = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    numbers = bits.view(torch.int16)[: like.numel()]  # even from −32,768 to 32,767
    end = min(round((1 - rate) * 2**16) - 2**15, 2**15 - 1)
    return numbers.lt_(end).to(like.dtype).mul_(1 / (1 - rate)).view(like.shape)
