"""Folders of images. Damaged images are detected before training."""

import hashlib
import os
from collections import Counter
from functools import cache, cached_property, partial
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path

from torch.utils.data import Dataset
from torchvision import transforms

from util.data.crop import center_crop_arr
from util.data.listing import list_data
from util.data.pictures import (
    described,
    probe,
    read_picture,
    resolved,
    sentences,
    to_tensor,
    warned,
)
from util.dist import all_gather, broadcast, is_main, print0, rank, world_size
from util.files import first_few, replacing
from util.logger import Progress
from util.sizes import plain, shown, sides


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


class ImageFolder(Dataset):
    """The pictures of a util.data.listing.Listing, center-cropped to img_size: (image, label).

    reading: how pictures are read, a util.data.settings.Reading, with `flip` mirrored at random;
    the attribute is the one that is resolved. `samples` are pairs (path, label), below `root`;
    `targets` are the labels.
    """

    def __init__(self, listing, img_size, reading):
        self.listing, self.img_size = listing, plain(img_size)
        steps = [partial(center_crop_arr, size=img_size)]
        steps += [transforms.RandomHorizontalFlip()] if reading.flip else []
        self.transform = transforms.Compose([*steps, to_tensor])
        self._take_listing()
        self.reading = resolved(reading, self.classes, [path for path, _ in self.samples])

    def _take_listing(self):
        listing = self.listing
        self.root, self.classes, self.targets = listing.root, listing.classes, listing.labels
        paths = [os.path.join(self.root, path) for path in listing.paths]
        self.samples = list(zip(paths, self.targets, strict=True))

    def follow(self, classes):
        """Take another order of the same classes."""
        self.listing.follow(classes)
        self._take_listing()

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        return self.transform(read_picture(path, self.reading)), label

    @property
    def channels(self):
        return self.reading.channels

    def take_channels(self, channels):
        """Read pictures with so many channels, 1 or 3."""
        self.reading = self.reading.but(channels=channels)

    def name(self, index):
        """The name of an image in a cache, class/name.ext."""
        return self.listing.name(index)

    def path(self, index):
        """The file of an image."""
        return self.samples[index][0]

    @cached_property
    def description(self):
        """A hash of the files with their sizes and times, and the crop. A collective call."""
        listed = broadcast(listing(self) if is_main() else None)
        crop = f"ADM centre crop {shown(self.img_size)}"
        return f"{listed} {crop}{described(self.reading)}"

    def check(self, workers, record):
        """Read every image once; see `check_images`."""
        check_images(self, workers, record)


def check_images(dataset, workers=4, record=None):
    """Read every image of an ImageFolder once, divided among the processes. Raises ValueError.

    workers: number of threads. record: file that records which images were found intact; None for
    none. Images smaller than img_size are enlarged by the crop, as in the published code; this is
    reported once.
    """
    digest = listing(dataset, workers) + described(dataset.reading) if record and is_main() else ""
    known = bool(digest) and Path(record).is_file() and Path(record).read_text() == digest
    if any(all_gather(known)):
        return
    damaged, small, counts, warnings = _read_all(dataset, workers)
    if damaged:
        raise ValueError(
            f"{dataset.root}: {len(damaged)} unreadable or truncated images: {first_few(damaged)}; "
            "repair or delete them"
        )
    for line in sentences(counts, len(dataset), dataset.reading):
        print0(f"{dataset.root}: {line}")
    if warnings:
        print0(f"{dataset.root}: warnings about {len(warnings)} pictures: {first_few(warnings)}")
    if small:
        width, height = min(small, key=min)
        print0(
            f"{dataset.root}: {len(small)} of {len(dataset)} images are smaller than "
            f"--img_size {shown(dataset.img_size)} (the smallest is {height}×{width}, height "
            "first) and will be enlarged"
        )
    if digest:
        with replacing(record) as beside:
            beside.write_text(digest)


def _read_all(dataset, workers):
    """(messages about damaged images, sizes of images below img_size, a Counter of
    util.data.pictures.KINDS, warnings), from all processes."""
    paths = [path for path, _ in dataset.samples[rank() :: world_size()]]
    height, width = sides(dataset.img_size)
    progress, damaged, small = Progress(len(paths), "checking images", "img"), [], []
    look, kinds = partial(probe, reading=dataset.reading), []
    with ThreadPool(max(1, workers)) as pool, warned() as warnings:
        for found in pool.imap_unordered(look, paths, chunksize=16):
            if found.problem:
                damaged.append(found.problem)
            elif found.size[0] < width or found.size[1] < height:
                small.append(found.size)
            kinds += found.kinds
            progress.update()
    progress.close()
    lists = (damaged, small, kinds, warnings)
    damaged, small, kinds, warnings = (list(chain.from_iterable(all_gather(x))) for x in lists)
    return sorted(damaged), small, Counter(kinds), sorted(warnings)


def listing(dataset, workers=4):
    """A hash of img_size and of the files of an ImageFolder: their paths, sizes and times."""

    def line(sample):
        try:
            status = Path(sample[0]).stat()
        except OSError:  # reading it will fail with a message
            return f"{sample[0]} missing"
        return f"{sample[0]} {status.st_size} {status.st_mtime_ns}"

    with ThreadPool(max(1, workers)) as pool:
        lines = "\n".join(pool.imap(line, dataset.samples, chunksize=256))
    return hashlib.sha256(f"{dataset.img_size}\n{lines}".encode()).hexdigest()
