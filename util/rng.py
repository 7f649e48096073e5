"""Random draws whose source is an argument.

`generator` is None (torch's default), a torch.Generator, or a sequence of them, one per entry of
the first dimension: entry i then depends on generator i alone, not on the rest of the batch.
Numbers are drawn on the generator's device and then moved.
"""

from collections.abc import Sequence
from contextlib import contextmanager

import numpy as np
import torch

from util import dist


def randn(shape, generator=None, device=None):
    """Standard normal numbers of this shape, float32."""
    return _draw(torch.randn, shape, generator, device)


def rand(shape, generator=None, device=None):
    """Uniform numbers in [0, 1) of this shape, float32."""
    return _draw(torch.rand, shape, generator, device)


def generator_of(generator, rows, bsz):
    """The generator of some entries of a batch of bsz, given that of all. rows: their indices."""
    if not isinstance(generator, Sequence):
        return generator
    _check_count(generator, bsz)
    return [generator[i] for i in rows]


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


class EpochDraws:
    """All random draws of an epoch of training on this process, functions of (seed, epoch, rank).

    `generator`, on the device: latents, timesteps, noise. `step_generator`, on the CPU: what a step
    has once, the same on all processes if `shared`. Dropout uses torch's default generators, which
    are seeded here. `state_dict` and `load_state_dict` serve a checkpoint within the epoch. start:
    batches of the epoch that were done without their state having been kept.
    """

    def __init__(self, seed, epoch, device, shared=True, start=0):
        first = 1000 * start  # other streams than those of the epoch's beginning
        torch.manual_seed(epoch_seed(seed, epoch, first))
        torch.empty((), dtype=torch.int64).random_()  # a loader drew its workers' seed here
        self.generator = torch.Generator(device).manual_seed(epoch_seed(seed, epoch, first + 1))
        rank = 0 if shared else dist.rank()
        step_seed = epoch_seed(seed, epoch, first + 3, rank)
        self.step_generator = torch.Generator().manual_seed(step_seed)
        self.device = device

    def state_dict(self):
        """States of the generators, name -> uint8 tensor on the CPU."""
        states = {"default": torch.get_rng_state(), "generator": self.generator.get_state()}
        states["step_generator"] = self.step_generator.get_state()
        if self.device.type != "cpu":
            states["device"] = torch.get_device_module(self.device).get_rng_state()
        return states

    def load_state_dict(self, states):
        """Restore `state_dict`, also that of another kind of device, as far as there is one."""
        torch.set_rng_state(states["default"])
        self.step_generator.set_state(states["step_generator"])
        if self.device.type != "cpu" and "device" in states:
            torch.get_device_module(self.device).set_rng_state(states["device"])
        if len(states["generator"]) == len(self.generator.get_state()):
            self.generator.set_state(states["generator"])


@contextmanager
def drawing_from(seed):
    """Torch's default CPU generator begins with `seed` in this block, and is restored after it."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def _check_count(generators, bsz):
    if len(generators) != bsz:
        raise ValueError(f"{len(generators)} generators for a batch of {bsz}: expected one each")


def _draw(function, shape, generator, device):
    if isinstance(generator, Sequence):
        _check_count(generator, shape[0])
        draws = torch.stack([function(shape[1:], generator=g, device=g.device) for g in generator])
        if draws.device.type != "cpu" or torch.device(device or "cpu").type == "cpu":
            return draws.to(device)
        # from page-locked memory, so that the next draws overlap with work on the device
        return draws.pin_memory().to(device, non_blocking=True)
    source = device if generator is None else generator.device
    return function(shape, generator=generator, device=source).to(device)
