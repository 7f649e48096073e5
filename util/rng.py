"""Random draws whose source is an argument.

`generator` is None (torch's default), a torch.Generator, or a sequence of them, one per entry of
the first dimension: entry i then depends on generator i alone, not on the rest of the batch.
Numbers are drawn on the generator's device and then moved.
"""

from collections.abc import Sequence

import numpy as np
import torch

from util import dist


def randn(shape, generator=None, device=None):
    """Standard normal numbers of this shape, float32."""
    return _draw(torch.randn, shape, generator, device)


def rand(shape, generator=None, device=None):
    """Uniform numbers in [0, 1) of this shape, float32."""
    return _draw(torch.rand, shape, generator, device)


def image_generators(seed, indices):
    """A generator for each image index: a function of (seed, index) alone."""
    # torch's CPU generator uses 32 bits only; an offset keeps the images of one seed distinct
    base = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return [torch.Generator().manual_seed((base + index) % 2**32) for index in indices]


def epoch_seed(seed, epoch, stream, rank=None):
    """A seed for sequence number `stream` of random draws in an epoch of a process.

    rank: rank of the process (default: this one).
    """
    keys = [seed, epoch, dist.rank() if rank is None else rank, stream]
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0])


def _draw(function, shape, generator, device):
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(
                f"{len(generator)} generators for a batch of {shape[0]}: expected one each"
            )
        draws = torch.stack([function(shape[1:], generator=g, device=g.device) for g in generator])
        if draws.device.type != "cpu" or torch.device(device or "cpu").type == "cpu":
            return draws.to(device)
        # from page-locked memory, so that the next draws overlap with work on the device
        return draws.pin_memory().to(device, non_blocking=True)
    source = device if generator is None else generator.device
    return function(shape, generator=generator, device=source).to(device)
