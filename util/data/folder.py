"""Data sets of pictures that a Listing names: folders, and the base of other places."""

import copy
import hashlib
import math
import os
import zlib
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path

import torch
from torch.utils.data import Dataset

from util.data.checked import UNKNOWN, check_pictures, read_crcs
from util.data.crop import center_crop_arr
from util.data.kept import KEPT, Kept
from util.data.listing import list_data
from util.data.pictures import described, probe, read_picture, resolved, to_pixels, to_range
from util.dist import local_world_size, print0
from util.sizes import plain, shown


def open_folder(path, split, img_size, reading):
    """Open the images of a split of `path`, for a row of DATASETS."""
    listing = list_data(path, split, reading.label_file)
    for sentence in listing.sentences():
        say_once(sentence)
    return ImageFolder(listing, img_size, reading)


@cache
def say_once(sentence):
    """Print a sentence on data that a script may open several times."""
    print0(sentence)


class PictureSet(Dataset):
    """The pictures of a util.data.listing.Listing, center-cropped to img_size: (image, label).

    reading: how pictures are read, a util.data.settings.Reading, with `flip` mirrored at random;
    the attribute is the one that is resolved. `targets` are the labels. `crcs` are CRC32s of the
    pictures' files, (N,), once they are known. A subclass has

    where(index)  what messages call a picture
    source(index) its file, as of util.data.pictures.read_picture
    stat(index)   (size in bytes, time in ns) of the file; (-1, -1) if there is none
    read(index)   the bytes of the file
    """

    crcs = kept = None

    def __init__(self, listing, img_size, reading):
        self.listing, self.img_size = listing, plain(img_size)
        self.reading = resolved(reading, listing.classes, Sources(self))

    @property
    def root(self):
        return self.listing.root

    @property
    def classes(self):
        return self.listing.classes

    @property
    def targets(self):
        return self.listing.labels

    def follow(self, classes):
        """Take another order of the same classes."""
        self.listing.follow(classes)
        self.crcs = self.kept = None

    @property
    def flip(self):
        """Whether images are mirrored at random."""
        return self.reading.flip

    def unflipped(self):
        """The same images, none of them mirrored."""
        plain = copy.copy(self)
        plain.reading = self.reading.but(flip=False)
        return plain

    @property
    def channels(self):
        return self.reading.channels

    def take_channels(self, channels):
        """Read pictures with so many channels, 1 or 3."""
        self.reading, self.kept = self.reading.but(channels=channels), None

    def keep(self, limit=KEPT):
        """Keep decoded crops in memory if all take at most `limit` bytes on this machine."""
        shape = self.pixels(0).shape
        fits = len(self) * math.prod(shape) * local_world_size() <= limit
        self.kept = Kept(len(self), shape) if fits else None

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        pixels = self.pixels(index)
        if self.reading.flip and torch.rand(1) < 0.5:
            pixels = pixels.flip(-1)
        return to_range(pixels), self.targets[index]

    def pixels(self, index):
        """The crop of a picture, uint8 (C, H, W)."""
        pixels = self.kept and self.kept.get(index)
        if pixels is None:
            picture = read_picture(self.source(index), self.reading)
            pixels = to_pixels(center_crop_arr(picture, self.img_size))
            if self.kept:
                self.kept.put(index, pixels)
        return pixels

    def name(self, index):
        """The name of an image in a cache, class/name.ext."""
        return self.listing.name(index)

    def names(self):
        """The names of all images, a list."""
        return [self.name(i) for i in range(len(self))]

    def crc(self, index):
        """The CRC32 of the file of a picture."""
        return zlib.crc32(self.read(index))

    @cached_property
    def description(self):
        """A hash of names, labels and content of the pictures, and the crop. A collective call."""
        crcs = (read_crcs(self) if self.crcs is None else self.crcs).tolist()
        rows = zip(self.listing.paths, self.targets, crcs, strict=True)
        text = "\n".join(f"{path} {label} {crc}" for path, label, crc in rows)
        crop = f"ADM centre crop {shown(self.img_size)}"
        return f"{hashlib.sha256(os.fsencode(text)).hexdigest()} {crop}{described(self.reading)}"

    def check(self, workers, record):
        """Find out whether the pictures are whole; see `check_pictures`."""
        check_pictures(self, workers, record)

    def smallest_side(self, looked_at=200):
        """The shorter side of the smallest of some pictures, spread over all. Raises ValueError."""
        some = Sources(self)[:: len(self) // looked_at + 1]
        sizes = [size for source in some if (size := probe(source, self.reading).size)]
        if not sizes:
            raise ValueError(f"{self.root}: none of {len(some)} pictures can be read")
        return min(map(min, sizes))


class Sources(Sequence):
    """The sources of a PictureSet, each found when it is asked for."""

    def __init__(self, dataset, indices=None):
        self.dataset = dataset
        self.indices = range(len(dataset)) if indices is None else indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return Sources(self.dataset, self.indices[i])
        return self.dataset.source(self.indices[i])


class ImageFolder(PictureSet):
    """The pictures in a folder, below `root`."""

    def where(self, index):
        """The path of an image."""
        return os.path.join(self.root, self.listing.paths[index])

    source = where

    @property
    def samples(self):
        """Pairs (path, label) of all images."""
        return [(self.where(i), label) for i, label in enumerate(self.targets)]

    def stat(self, index):
        """(size, time) of a file; (-1, -1) if there is none."""
        try:
            status = os.stat(self.where(index))
        except OSError:  # reading it will fail with a message
            return UNKNOWN, UNKNOWN
        return status.st_size, status.st_mtime_ns

    def read(self, index):
        """The bytes of a file."""
        return Path(self.where(index)).read_bytes()
