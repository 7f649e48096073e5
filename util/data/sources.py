"""Which pictures latents are of: a picture's size in bytes, its time and its CRC32.

A row of three int64 per image, all -1 where unknown. A data set whose images are files says which
by a method `path(index)`.
"""

import os
import zlib

import numpy as np
import torch
from torch.utils.data import Dataset

UNKNOWN = (-1, -1, -1)


class Pictures:
    """The sources of a data set's images as they are now."""

    def __init__(self, dataset):
        self.path = getattr(dataset, "path", None)

    def source(self, index):
        """The (size, time in ns, CRC32) of an image; UNKNOWN if it is no file."""
        return _read(self.path(index)) if self.path else UNKNOWN

    def is_same(self, index, source, written):
        """Whether an image still is the picture that latents are of.

        source: what was recorded of it. Where that is UNKNOWN, the picture must be older than the
        latents, written at the time `written`, in ns. A picture with another time is read.
        """
        if not self.path:
            return True
        size, time, crc = map(int, source)
        found = os.stat(self.path(index))
        if size < 0:
            return found.st_mtime_ns <= written
        if found.st_size != size:
            return False
        return found.st_mtime_ns == time or _read(self.path(index))[2] == crc

    def holds(self, index, source):
        """Whether a picture has the size and CRC32 of a source; None if either is unknown."""
        if not self.path or source[0] < 0:
            return None
        size, _, crc = _read(self.path(index))
        return (size, crc) == (int(source[0]), int(source[2]))


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


def _read(path):
    with open(path, "rb") as file:
        status, crc = os.fstat(file.fileno()), 0
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return status.st_size, status.st_mtime_ns, crc
