"""Which pictures latents are of: a picture's size in bytes, its time and its CRC32.

A row of three int64 per image, all -1 where unknown. A data set whose images are files says which
by a method `path(index)`.
"""

import os
import zlib

import torch
from torch.utils.data import Dataset

UNKNOWN = (-1, -1, -1)


class Sourced(Dataset):
    """(image, source (3,) int64) of each image of a data set."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        source = source_of(self.dataset, index)  # before reading: an edit in between is noticed
        return self.dataset[index][0], torch.tensor(source)


def source_of(dataset, index):
    """The (size, time in ns, CRC32) of an image of a data set; UNKNOWN if it is no file."""
    return _read(dataset.path(index)) if hasattr(dataset, "path") else UNKNOWN


def is_same(dataset, index, source, written):
    """Whether an image still is the picture that its latents are of.

    source: what was recorded of it; where UNKNOWN, the picture must be older than the latents,
    written at the time `written`, in ns. A picture with another time is read.
    """
    if not hasattr(dataset, "path"):
        return True
    path, (size, time, crc) = dataset.path(index), map(int, source)
    found = os.stat(path)
    if size < 0:
        return found.st_mtime_ns <= written
    return found.st_size == size and (found.st_mtime_ns == time or _read(path)[2] == crc)


def holds(dataset, index, source):
    """Whether a picture has the size and the CRC32 of a source; None if either is unknown."""
    if not hasattr(dataset, "path") or source[0] < 0:
        return None
    size, _, crc = _read(dataset.path(index))
    return (size, crc) == (int(source[0]), int(source[2]))


def _read(path):
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        crc = 0
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return status.st_size, status.st_mtime_ns, crc
