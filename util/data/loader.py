"""Loaders: shuffled batches for training, and a single pass in order."""

import os
from functools import partial
from itertools import islice

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from util.dist import local_world_size, rank, world_size
from util.rng import drawing_from, epoch_seed
from util.run import stop


class Loader:
    """Shuffled batches of this process's part of a data set, reshuffled each epoch.

    batch_size: images per process. An incomplete last batch is dropped. A data set whose
    `__getitems__` returns complete batches has a `collate` that leaves them unchanged. What a data
    set draws at random from torch's default generator, such as flips, depends on (seed, epoch) and
    the indices of the batch alone. A data set that can `keep` decoded images in memory does so.
    Attributes: `steps`, batches per epoch; `images`, the size of the data set; `dataset`.
    """

    def __init__(self, dataset, batch_size, num_workers, seed, pin_memory=False):
        self.dataset, self.batch_size = dataset, batch_size
        self.sampler = _SeededSampler(dataset, seed)
        if len(self.sampler) < batch_size:
            raise ValueError(
                f"batch_size {batch_size} on {world_size()} process(es): the data set has only "
                f"{len(dataset)} images; pass a smaller --batch_size"
            )
        if hasattr(dataset, "keep"):
            dataset.keep()  # before workers are forked, which share this memory
        workers = _fitting(num_workers)
        self.batches = DataLoader(
            _Seeded(dataset),
            batch_size=batch_size,
            sampler=self.sampler,
            num_workers=workers,
            pin_memory=pin_memory,
            drop_last=True,
            collate_fn=getattr(dataset, "collate", None),
            persistent_workers=workers > 0,
            worker_init_fn=stop.in_worker,
            generator=torch.Generator(),  # of the workers' seeds, which nothing depends on
        )
        self.steps, self.images = len(self.batches), len(dataset)

    def epoch(self, n, start=0):
        """The batches (x, labels) of epoch n, from batch `start` on, an iterable.

        The order depends on (seed, n).
        """
        self.sampler.begin(n, start * self.batch_size)
        return self.batches

    def close(self):
        """End the loader's processes, which otherwise live as long as this object."""
        iterator, self.batches._iterator = self.batches._iterator, None
        if hasattr(iterator, "_shutdown_workers"):  # torch has no public way
            iterator._shutdown_workers()

    def indices(self, n, batch):
        """Indices in the data set of the images of a batch of epoch n."""
        self.sampler.begin(n, batch * self.batch_size)
        return [index for _, index in islice(self.sampler, self.batch_size)]


class FirstBatches:
    """The first `steps` batches of a loader, as a loader; fewer if it has fewer."""

    def __init__(self, loader, steps):
        self.loader, self.steps = loader, min(steps, loader.steps)
        self.images = loader.images

    def epoch(self, n):
        """These batches of epoch n."""
        return islice(self.loader.epoch(n), self.steps)


class _SeededSampler(DistributedSampler):
    """Pairs (seed, index) of an epoch."""

    def __init__(self, dataset, seed):
        super().__init__(dataset, world_size(), rank(), shuffle=True, seed=seed)
        self.start = 0

    def begin(self, epoch, start):
        """The next iteration is that of an epoch, from its image `start` on."""
        self.set_epoch(epoch)
        self.start = start

    def __iter__(self):
        base = epoch_seed(self.seed, self.epoch, 4, rank=0)
        # torch's CPU generator uses 32 bits only
        pairs = (((base + index) % 2**32, index) for index in super().__iter__())
        return islice(pairs, self.start, None)


class _Seeded(Dataset):
    """A data set of which batches of (seed, index) are taken; the first seed is that of the batch.

    What is random in a batch is then the same, whichever worker loads it, and whatever before.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitems__(self, pairs):
        indices = [index for _, index in pairs]
        with drawing_from(pairs[0][0]):
            if hasattr(self.dataset, "__getitems__"):
                return self.dataset.__getitems__(indices)
            return [self.dataset[index] for index in indices]


def open_loader(dataset, batch_size, num_workers, seed, pin_memory=False):
    """The training loader of a data set: `training_loader` if it has one, else a Loader."""
    make = getattr(dataset, "training_loader", partial(Loader, dataset))
    return make(batch_size, num_workers, seed, pin_memory)


def evenly(dataset, most):
    """A data set, or at most so many of its images, spread evenly. most: None for all."""
    count = min(most or len(dataset), len(dataset))
    return Subset(dataset, [i * len(dataset) // count for i in range(count)])


def plain_loader(dataset, batch_size, num_workers):
    """A loader of the whole data set once, in order."""
    return _once(dataset, num_workers, batch_size=batch_size)


def batch_loader(dataset, batches, num_workers):
    """A loader of the given batches, lists of indices, in order."""
    return _once(dataset, num_workers, batch_sampler=batches)


def _once(dataset, num_workers, **batches):
    workers = _fitting(num_workers)
    more = {"worker_init_fn": stop.in_worker, "collate_fn": getattr(dataset, "collate", None)}
    return DataLoader(dataset, num_workers=workers, **more, **batches)


def _fitting(num_workers):
    """At most this process's part of the cores of its machine, and one if there are fewer: the
    published default of 10 would slow down a laptop, and 8 processes of one machine."""
    return min(num_workers, max(1, _allowed_cores() // local_world_size()))


def _allowed_cores():
    """The cores that this process may use, of which containers and Slurm may allow only some."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
