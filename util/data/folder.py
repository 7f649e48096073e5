"""Image folders, one folder per class. Damaged images are detected before training."""

import hashlib
from functools import cached_property, partial
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path

from PIL import Image
from torchvision import datasets, transforms

from util.data.crop import center_crop_arr
from util.dist import all_gather, broadcast, is_main, print0, rank, world_size
from util.files import first_few, replacing
from util.logger import Progress
from util.sizes import plain, shown, sides


def open_folder(path, split, img_size, reading):
    """Open the images of `path`/`split`, for a row of DATASETS."""
    return ImageFolder(Path(path) / split, img_size, reading.flip)


def read_image(path):
    """The image at `path` in RGB, a PIL image. Raises ValueError that names the path."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # PIL can raise nearly anything for a damaged file
        raise ValueError(f"{path}: not a readable image ({error})") from error


def to_tensor(image):
    """A PIL image as a tensor (3, H, W) in [-1, 1]."""
    return transforms.functional.to_tensor(image) * 2 - 1


class ImageFolder(datasets.ImageFolder):
    """Images of `root`/class/name, center-cropped to img_size and, with `flip`, flipped at random.

    Raises ValueError if there is no such folder or a class has no image.
    """

    channels = 3

    def __init__(self, root, img_size, flip=True):
        steps = [partial(center_crop_arr, size=img_size)]
        steps += [transforms.RandomHorizontalFlip()] if flip else []
        try:
            super().__init__(str(root), transforms.Compose([*steps, to_tensor]), loader=read_image)
        except FileNotFoundError as error:
            raise ValueError(
                f"{root}: expected a folder of images for each class. {error}"
            ) from None
        self.img_size = plain(img_size)

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
        return f"{listed} ADM centre crop {shown(self.img_size)}"

    def check(self, workers, record):
        """Read every image once; see `check_images`."""
        check_images(self, workers, record)


def check_images(dataset, workers=4, record=None):
    """Read every image of an ImageFolder once, divided among the processes. Raises ValueError.

    workers: number of threads. record: file that records which images were found intact; None for
    none. Images smaller than img_size are enlarged by the crop, as in the published code; this is
    reported once.
    """
    digest = listing(dataset, workers) if record and is_main() else ""
    known = bool(digest) and Path(record).is_file() and Path(record).read_text() == digest
    if any(all_gather(known)):
        return
    damaged, small = _read_all(dataset, workers)
    if damaged:
        raise ValueError(
            f"{dataset.root}: {len(damaged)} unreadable or truncated images: {first_few(damaged)}; "
            "repair or delete them"
        )
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
    """(messages about damaged images, sizes of images below img_size), from all processes."""
    paths = [path for path, _ in dataset.samples[rank() :: world_size()]]
    height, width = sides(dataset.img_size)
    progress, damaged, small = Progress(len(paths), "checking images", "img"), [], []
    with ThreadPool(max(1, workers)) as pool:
        for path, size, problem in pool.imap_unordered(_probe, paths, chunksize=16):
            if problem:
                damaged.append(f"{path} ({problem})")
            elif size[0] < width or size[1] < height:
                small.append(size)
            progress.update()
    progress.close()
    damaged, small = (list(chain.from_iterable(all_gather(x))) for x in (damaged, small))
    return sorted(damaged), small


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


def _probe(path):
    """(path, size, problem or None). JPEGs are decoded at 1/8, which still detects truncation."""
    try:
        with Image.open(path) as image:
            size = image.size
            image.draft("RGB", (1, 1))
            image.load()
        return path, size, None
    except Exception as error:
        return path, None, str(error).replace(f" {path!r}", "").splitlines()[0]
