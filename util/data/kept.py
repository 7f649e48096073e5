"""Crops of pictures that stay in memory, so that a picture is decoded once, not in every epoch."""

import mmap

import torch

KEPT = 1 << 30  # bytes that the crops of a data set may take on a machine


class Kept:
    """Crops uint8 of one shape, by index: memory that a process shares with those it forks.

    Any of them may put a crop there for all; memory is taken as it fills. Anonymous memory, because
    torch's shared tensors are files in /dev/shm, of which containers have little and where a full
    disk kills a process. A process that is spawned instead gets none, and decodes for itself.
    """

    def __init__(self, count, shape):
        self.size = count, *shape
        flags, crops = mmap.mmap(-1, count), mmap.mmap(-1, torch.Size(self.size).numel())
        self.there = torch.frombuffer(flags, dtype=torch.uint8)
        self.crops = torch.frombuffer(crops, dtype=torch.uint8).view(self.size)

    def __reduce__(self):
        return type(None), ()

    def get(self, index):
        """The crop of an index; None if it is not there."""
        return self.crops[index] if self.there[index] else None

    def put(self, index, crop):
        """Keep a crop. Two processes may do so at once, with the same bytes."""
        self.crops[index] = crop
        self.there[index] = 1  # last, as others may look at any time
