"""Which pictures latents are of: a picture's size in bytes, its time and its CRC32.

A row of three int64 per image, all -1 where unknown. A data set that knows them has the methods
`stat(index)`, for (size, time in ns), and `crc(index)`.
"""

import zlib
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from util.data import labels_of

UNKNOWN = (-1, -1, -1)
THREADS = 16  # a file system on a network answers slowly, but many at once


class Pictures:
    """The sources of a data set's images as they are now."""

    def __init__(self, dataset):
        self.dataset = dataset if hasattr(dataset, "stat") else None

    def source(self, index):
        """The (size, time in ns, CRC32) of an image; UNKNOWN if it is no file."""
        if self.dataset is None:
            return UNKNOWN
        return *self.dataset.stat(index), self.dataset.crc(index)

    def is_same(self, index, source, written):
        """Whether an image still is the picture that latents are of.

        source: what was recorded of it. Where that is UNKNOWN, the picture must be older than the
        latents, written at the time `written`, in ns. A picture with another time is read.
        """
        if self.dataset is None:
            return True
        size, time, crc = map(int, source)
        size_now, time_now = self.dataset.stat(index)
        if size < 0:
            return time_now <= written
        if size_now != size:
            return False
        return time_now == time or self.dataset.crc(index) == crc

    def holds(self, index, source):
        """Whether a picture has the size and CRC32 of a source; None if either is unknown."""
        if self.dataset is None or source[0] < 0:
            return None
        size, _, crc = self.source(index)
        return (size, crc) == (int(source[0]), int(source[2]))


def find_exchanged(cache, root):
    """(name of a picture below `root`, the class of the latents of that picture) or None.

    It looks at one picture of each class, and finds out whether class folders changed their names.
    """
    crcs, labels = cache.crcs, np.asarray(labels_of(cache))
    if crcs is None:
        return None
    names = cache.names() if hasattr(cache, "names") else None
    first = np.unique(labels, return_index=True)[1].tolist()
    first = {index: names[index] if names else cache.name(index) for index in first}
    paths = [Path(root, name) for name in first.values()]
    with ThreadPool(THREADS) as pool:
        found = pool.map(_crc, paths)
    for (index, name), crc in zip(first.items(), found, strict=True):
        others = labels[(crcs == crc) & (labels != labels[index])] if crc != crcs[index] else []
        if crc is not None and len(others):
            return name, cache.classes[others[0]]
    return None


def _crc(path):
    try:
        return zlib.crc32(path.read_bytes())
    except OSError:  # not there, or not for us
        return None


class Recorded:
    """The sources (N, 3) that another cache recorded, in place of the pictures."""

    def __init__(self, sources):
        self.sources = sources

    def source(self, index):
        """See Pictures."""
        return self.sources[index]

    def is_same(self, index, source, written):
        """See Pictures; what is unknown to one of the caches is not compared."""
        ours = self.sources[index]
        return ours[0] < 0 or source[0] < 0 or np.array_equal(ours, source)


class Sourced(Dataset):
    """(image, source (3,) int64) of each image of a data set."""

    def __init__(self, dataset):
        self.dataset, self.pictures = dataset, Pictures(dataset)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        source = self.pictures.source(index)  # before reading: an edit in between is noticed
        return self.dataset[index][0], torch.tensor(source)
