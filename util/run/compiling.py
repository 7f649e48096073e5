"""--compile: what it takes and what it gains, said before training begins."""

import math
import time
from contextlib import contextmanager

import torch

from util.dist import print0
from util.precision import autocast

ROUNDS = 3  # of which the fastest counts
PASSES = 2  # each with another mask ratio; those that come later may compile more


def compile_model(model, batch_size, device, precision, batches):
    """Compile what a model compiles for training, and print from which batch on that pays.

    The passes for it leave model and random numbers as they were. batch_size: images of a batch.
    batches: how many the run has left.
    """
    inputs = model, batch_size, device, precision
    with torch.random.fork_rng([]), _drawing_anew(device):
        before = _seconds_before(*inputs)
        for module, dynamic in model.to_compile():
            module.compile(dynamic=dynamic)
        start = PASSES * _seconds(*inputs)
        after = min(_seconds(*inputs) for _ in range(ROUNDS))
    print0(verdict(start, before, after, batches))


def verdict(start, before, after, batches):
    """A line on what compiling took, and seconds of a batch before and after it."""
    line = f"compiled in {start:.1f} s so far: forward and backward of a batch take {after:.3g} s"
    if before == math.inf:
        return f"{line}, and more memory than there is without --compile"
    line += f", {before:.3g} s before"
    enough = start / (before - after) if after < before else math.inf
    if enough > batches:
        known = f"pays after {enough:.0f} batches" if enough < math.inf else "gains nothing"
        return f"NOTE: {line}. It {known}, and this run has {batches} batches: leave out --compile"
    return f"{line}, which pays after {enough:.0f} of the run's {batches} batches"


def _seconds_before(model, *inputs):
    """Those of a pass that is not compiled; infinity where it takes more memory than there is."""
    try:
        return min(_seconds(model, *inputs) for _ in range(1 + ROUNDS))
    except torch.OutOfMemoryError:
        model.statistics()
        model.zero_grad(set_to_none=True)
        return math.inf


def _seconds(model, batch_size, device, precision):
    """Mean seconds of a forward and backward pass."""
    sides = model.seq_h * model.patch_size, model.seq_w * model.patch_size
    latents = torch.zeros(batch_size, model.vae_embed_dim, *sides, device=device)
    labels = torch.zeros(batch_size, dtype=torch.long, device=device)
    model.train()
    _wait(device)
    begin = time.perf_counter()
    for seed in range(PASSES):
        generators = torch.Generator(device).manual_seed(seed), torch.Generator().manual_seed(seed)
        with autocast(device, precision):
            loss = model(latents, labels, *generators)
        loss.backward()
    _wait(device)
    model.statistics()  # which counted these
    model.zero_grad(set_to_none=True)
    return (time.perf_counter() - begin) / PASSES


@contextmanager
def _drawing_anew(device):
    """Restores a device's default generator."""
    if device.type == "cpu":
        yield
        return
    module = torch.get_device_module(device)
    before = module.get_rng_state()
    try:
        yield
    finally:
        module.set_rng_state(before)


def _wait(device):
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
