"""Image folders, one folder per class. Damaged images are detected before training."""

import hashlib
from collections import Counter
from functools import cached_property, partial
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path

from torchvision import datasets, transforms

from util.data.crop import center_crop_arr
from util.data.pictures import (
    described,
    probe,
    read_picture,
    resolved,
    sentences,
    to_tensor,
    warned,
)
from util.data.settings import PLAIN
from util.dist import all_gather, broadcast, is_main, print0, rank, world_size
from util.files import first_few, replacing
from util.logger import Progress
from util.sizes import plain, shown, sides


def open_folder(path, split, img_size, reading):
    """Open the images of `path`/`split`, for a row of DATASETS."""
    return ImageFolder(Path(path) / split, img_size, reading.flip, reading)


class ImageFolder(datasets.ImageFolder):
    """Images of `root`/class/name, center-cropped to img_size and, with `flip`, flipped at random.

    reading: how pictures are read; the attribute is the one that is resolved. Raises ValueError if
    there is no such folder or a class has no image.
    """

    def __init__(self, root, img_size, flip=True, reading=PLAIN):
        steps = [partial(center_crop_arr, size=img_size)]
        steps += [transforms.RandomHorizontalFlip()] if flip else []
        try:
            super().__init__(str(root), transforms.Compose([*steps, to_tensor]), loader=self._read)
        except FileNotFoundError as error:
            raise ValueError(
                f"{root}: expected a folder of images for each class. {error}"
            ) from None
        self.img_size = plain(img_size)
        self.reading = resolved(reading, self.classes, [path for path, _ in self.samples])

    def _read(self, path):
        return read_picture(path, self.reading)

    @property
    def channels(self):
        return self.reading.channels

    def take_channels(self, channels):
        """Read pictures with so many channels, 1 or 3."""
        self.reading = self.reading.but(channels=channels)

    def name(self, index):
        """The path of an image below the root, class/name.ext."""
        return Path(self.samples[index][0]).relative_to(self.root).as_posix()

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


def smallest_side(root, looked_at=200):
    """The shorter side of the smallest of some pictures, spread over the ImageFolder at `root`.

    Raises ValueError as ImageFolder does, and if none of them can be read.
    """
    dataset = ImageFolder(root, img_size=1)
    some = dataset.samples[:: len(dataset) // looked_at + 1]
    sizes = [size for path, _ in some if (size := probe(path, dataset.reading).size)]
    if not sizes:
        raise ValueError(f"{root}: none of {len(some)} pictures can be read")
    return min(map(min, sizes))


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
