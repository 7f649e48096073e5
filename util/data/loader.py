"""Loaders: shuffled batches for training, and a single pass in order."""

import os
from functools import partial

from torch.utils.data import DataLoader, DistributedSampler

from util.dist import rank, world_size


class Loader:
    """Shuffled batches of this process's part of a data set, reshuffled each epoch.

    batch_size: images per process. An incomplete last batch is dropped. A data set whose
    `__getitems__` returns complete batches has a `collate` that leaves them unchanged. Attributes:
    `steps`, batches per epoch; `images`, the size of the data set.
    """

    def __init__(self, dataset, batch_size, num_workers, seed, pin_memory=False):
        sampler = DistributedSampler(dataset, world_size(), rank(), shuffle=True, seed=seed)
        if len(sampler) < batch_size:
            raise ValueError(
                f"batch_size {batch_size} on {world_size()} process(es): the data set has only "
                f"{len(dataset)} images; pass a smaller --batch_size"
            )
        self.batches = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=_fitting(num_workers),
            pin_memory=pin_memory,
            drop_last=True,
            collate_fn=getattr(dataset, "collate", None),
        )
        self.steps, self.images = len(self.batches), len(dataset)

    def epoch(self, n):
        """The batches (x, labels) of epoch n, an iterable; the order depends on (seed, n)."""
        self.batches.sampler.set_epoch(n)
        return self.batches


def open_loader(dataset, batch_size, num_workers, seed, pin_memory=False):
    """The training loader of a data set: `training_loader` if it has one, else a Loader."""
    make = getattr(dataset, "training_loader", partial(Loader, dataset))
    return make(batch_size, num_workers, seed, pin_memory)


def plain_loader(dataset, batch_size, num_workers):
    """A loader of the whole data set once, in order."""
    return DataLoader(dataset, batch_size, num_workers=_fitting(num_workers))


def batch_loader(dataset, batches, num_workers):
    """A loader of the given batches, lists of indices, in order."""
    return DataLoader(dataset, batch_sampler=batches, num_workers=_fitting(num_workers))


def _fitting(num_workers):
    """At most one worker per core: the published default of 10 would slow down a laptop."""
    return min(num_workers, os.cpu_count() or 1)
