"""Random draws whose source is an argument.

`generator` is None (torch's own), one torch.Generator, or a sequence of them, one for each entry of
the first dimension: then entry i depends on generator i alone, not on what it is batched with.
Numbers are drawn where the generator lives and then moved.
"""

from collections.abc import Sequence

import numpy as np
import torch


def randn(shape, generator=None, device=None):
    """Standard normal numbers of this shape, float32."""
    return _draw(torch.randn, shape, generator, device)


def rand(shape, generator=None, device=None):
    """Uniform numbers in [0, 1) of this shape, float32."""
    return _draw(torch.rand, shape, generator, device)


def image_generators(seed, indices):
    """A generator for each image index: a function of (seed, index) alone."""
    # torch's CPU generator heeds 32 bits only; an offset keeps the images of one seed apart
    base = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return [torch.Generator().manual_seed((base + index) % 2**32) for index in indices]


def _draw(function, shape, generator, device):
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(
                f"{len(generator)} generators for a batch of {shape[0]}: expected one each"
            )
        draws = torch.stack([function(shape[1:], generator=g, device=g.device) for g in generator])
        if draws.device.type != "cpu" or torch.device(device or "cpu").type == "cpu":
            return draws.to(device)
        # from page-locked memory, so that the next draws are made while the device works
        return draws.pin_memory().to(device, non_blocking=True)
    source = device if generator is None else generator.device
    return function(shape, generator=generator, device=source).to(device)
