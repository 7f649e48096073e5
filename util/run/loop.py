"""The loops over batches and epochs, shared by the training of MARs and of tokenizers."""

from contextlib import nullcontext
from functools import partial

import torch

from util import dist
from util.meter import Meter
from util.run import stop


class Work:
    """One kind of training, as the loop over batches calls it.

    A subclass has `batch` and `step`, and `metrics` if there are any.

    Attributes: `optimizers`, whose learning rates the loop sets, those of the first one being
    reported; `scaler`, a torch.amp.GradScaler; `largest`, the largest |latent| so far, a tensor.
    """

    def __init__(self, optimizers, scaler, device):
        self.optimizers, self.scaler, self.device = optimizers, scaler, device
        self.largest = torch.zeros((), device=device)

    def batch(self, batch, labels, source, first, last):
        """Add the gradients of a batch to those held; returns (loss, latents (N, …) or images).

        batch, labels: on this device. source: the EpochDraws. first: whether it is the first batch
        of this process in the epoch. last: whether it is the last one before `step`.
        """
        raise NotImplementedError

    def step(self):
        """Take an optimizer step; returns the norm of the gradient before clipping, a tensor."""
        raise NotImplementedError

    def metrics(self):
        """Further metrics since the last call, name -> float. A collective call."""
        return {}


def run_epoch(
    work,
    loader,
    epoch,
    source,
    *,
    learning_rate,
    accum_iter=1,
    logger=None,
    progress=None,
    log_every=20,
    start=0,
    draws=None,
    after_step=None,
):
    """Train on every batch of an epoch; returns the largest |latent| seen, a float.

    work: a Work. source: the EpochDraws of the epoch. The other arguments are those of
    `engine_mar.train_one_epoch`. Raises FloatingPointError, on all processes, for a loss that is
    not finite.
    """
    meter = Meter(work.device, accum_iter, start)
    steps = loader.steps // accum_iter
    names = partial(names_of_images, loader, epoch)

    def log(batches):
        meter.check(epoch, names)
        metrics = meter.pop(epoch, norm, work.optimizers[0].param_groups[0]["lr"])
        metrics |= work.metrics()
        if logger:
            step = epoch * steps + batches // accum_iter
            logger.scalars(metrics, step, epoch=epoch + batches / loader.steps)

    if draws:
        source.load_state_dict(draws)
    batches = loader.epoch(epoch, start) if start else loader.epoch(epoch)
    for i, (batch, labels) in enumerate(meter.waiting.timed(batches), start):
        if i == steps * accum_iter:  # too few left for a full step
            break
        if i % accum_iter == 0:
            set_rate(work.optimizers, learning_rate(epoch + i / loader.steps))
        batch, labels = (x.to(work.device, non_blocking=True) for x in (batch, labels))
        last = (i + 1) % accum_iter == 0
        meter.add(*work.batch(batch, labels, source, i == start, last))
        if not last:
            continue

        norm = work.step()
        if not work.scaler.is_enabled():  # a scaler skips such steps itself
            meter.note_gradient(norm)
        due = (i + 1) // accum_iter % min(log_every, steps) == 0
        if due:
            log(i + 1)
        if progress:
            progress.update(1, meter.note)
        if after_step:
            try:
                after_step(i + 1, source, work.largest)
            except stop.Stopped:
                if not due:
                    log(i + 1)
                raise
            except FloatingPointError:  # not saved; the loss that led to it says more
                meter.check(epoch, names)
                raise
    meter.check(epoch, names)
    return dist.all_reduce(work.largest, "max").item()


def unsynchronized(model):
    """A context without gradient synchronization, to accumulate gradients over batches."""
    if dist.is_sharded(model):
        from util.run import fsdp

        return fsdp.unsynchronized(model)
    return nullcontext() if model is dist.unwrap(model) else model.no_sync()


def set_rate(optimizers, rate):
    """Set the learning rate of all groups of optimizers."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def names_of_images(loader, epoch, batch):
    """Index and name of each image of a batch, if the loader and its data set know them."""
    if not hasattr(loader, "indices"):
        return []
    name = getattr(loader.dataset, "name", lambda index: "")
    return [f"{i} {name(i)}".strip() for i in loader.indices(epoch, batch)]


def run_epochs(saver, run_epoch, follow, epochs):
    """Run all remaining epochs; after each one is saved, call `follow(optimizer steps done)`."""
    state = saver.state
    for epoch in range(state.epoch, epochs):
        saver.note_range(run_epoch(epoch=epoch, start=state.batch, draws=state.draws))
        saver.end_epoch(epochs)
        try:
            follow(saver.step)
        except stop.Stopped as request:
            saver.stop_within(request)
