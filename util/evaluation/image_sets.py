"""Sets of images to evaluate: from a data set, a folder, or an .npz.

Each yields (uint8 (H, W, 3), label), like generated images; the label is -1 if unknown.
"""

import math
import zipfile
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from util import dist
from util.data import open_data
from util.data.crop import center_crop_arr
from util.data.listing import pictures_below
from util.data.pictures import read_picture, resolved, size_of
from util.data.settings import PLAIN
from util.dist import print0
from util.files import check_zip, first_line
from util.images import to_uint8
from util.sizes import sides

THREADS = 4  # that read sizes of images


class RealImages(Dataset):
    """The images of a data set in the format of generated ones: (uint8 (H, W, 3), label).

    source: its path, as in --data_path. reading: a util.data.settings.Reading; images are never
    mirrored. `description` identifies the images, `classes` are the names of their classes.
    """

    def __init__(self, source, split, img_size, reading=PLAIN):
        self.dataset = open_data(source, split, img_size, reading.but(flip=False))

    @property
    def description(self):
        return self.dataset.description

    @property
    def classes(self):
        return self.dataset.classes

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, label = self.dataset[index]
        return to_uint8(image.unsqueeze(0))[0], int(label)


class Folder(Dataset):
    """All images below a folder, in the order of their names: (uint8 (H, W, 3), -1).

    img_size: those of another size are cropped to it like the data, which is said; None: all have
    the size of the first. Raises ValueError for other sizes then. A collective call.
    """

    def __init__(self, path, img_size=None, reading=PLAIN):
        paths, left_out = pictures_below(path)
        self.paths = sorted(paths)
        if not self.paths:
            raise ValueError(f"{path}: expected images there, found none")
        if left_out:
            print0(left_out)
        self.reading = resolved(reading.but(channels=3), (), self.paths)
        found = _sizes(self.paths, self.reading)  # (height, width) each
        self.sides = sides(img_size) if img_size else found[0]
        others = [i for i, size in enumerate(found) if size != self.sides]
        if others and not img_size:
            raise ValueError(_differing(self.paths, found, others[0]))
        if others:
            print0(
                f"{path}: {len(others)} of {len(found)} images are not {_sized(self.sides)}, such "
                f"as {_named(self.paths, found, others[0])}: they are cropped like the data"
            )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = read_picture(self.paths[index], self.reading)
        if (image.height, image.width) != self.sides:
            image = center_crop_arr(image, self.sides)
        return np.array(image.convert("RGB")), -1


def _sizes(paths, reading):
    """(height, width) of each image, read by all processes. Raises ValueError."""
    with ThreadPool(THREADS) as pool:
        size = partial(_size, reading=reading)
        mine = pool.map(size, paths[dist.rank() :: dist.world_size()], chunksize=16)
    parts = dist.all_gather(mine)
    found = [parts[i % len(parts)][i // len(parts)] for i in range(len(paths))]
    if problem := next((size for size in found if isinstance(size, str)), None):
        raise ValueError(problem)
    return found


def _size(path, reading):
    """(height, width) of an image, or what is wrong with it."""
    try:
        return size_of(path, reading)
    except ValueError as error:
        return str(error)


def _differing(paths, found, other):
    return (
        f"{_named(paths, found, 0)}, but {_named(paths, found, other)}: expected images of one "
        "size, or --img_size to crop them to"
    )


def _named(paths, found, index):
    return f"{paths[index]} of {_sized(found[index])} pixels"


def _sized(size):
    return "×".join(map(str, size))  # height first


class Array(Dataset):
    """The `arr_0` (N, H, W, 3) uint8 of an .npz: (uint8 (H, W, 3), -1).

    Loader workers that are spawned are sent where the array is in the file, not the array.
    """

    def __init__(self, path, img_size=None):
        self.images, self.opened = _mapped(path, "arr_0")
        if not self.opened:
            self.workers = 0  # each would be sent all of it
        shape = self.images.shape
        height, width = sides(img_size) if img_size else (*shape[1:], "H", "W")[:2]
        if shape[1:] != (height, width, 3) or self.images.dtype != np.uint8:
            raise ValueError(
                f"{path}: arr_0 is {self.images.dtype} {shape}, expected uint8 "
                f"(N, {height}, {width}, 3)"
            )
        if not len(self.images):
            raise ValueError(f"{path}: arr_0 holds no images")

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return np.array(self.images[index]), -1

    def __getstate__(self):
        return {"opened": self.opened}

    def __setstate__(self, state):
        self.opened = state["opened"]
        self.images = self.opened()


def _mapped(path, name):
    """(array of an .npz, how to map it again); memory-mapped, as it may have 10 GB.

    A compressed array is read whole, and is not mapped: (array, None).
    """
    try:
        check_zip(path)  # a memory map would not notice damage
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{name}.npy")
            shape, fortran, dtype, header = _header(archive, info)
            if info.compress_type != zipfile.ZIP_STORED or fortran or dtype.hasobject:
                return _read(archive, info), None
        with open(path, "rb") as file:  # after a local header, which states its length
            file.seek(info.header_offset + 26)
            lengths = [int.from_bytes(file.read(2), "little") for _ in range(2)]
        start = info.header_offset + 30 + sum(lengths) + header
        opened = partial(np.memmap, Path(path).absolute(), dtype, "r", start, shape)
        return opened(), opened
    except Exception as error:  # a damaged file can raise nearly anything
        raise _unreadable(path, error) from error


def open_images(path, img_size=None, reading=PLAIN):
    """The images of a folder or of an .npz. Raises ValueError. A collective call."""
    path = Path(path)
    if path.is_dir():
        return Folder(path, img_size, reading)
    if path.suffix != ".npz":
        raise ValueError(f"{path}: expected a folder of images or an .npz")
    if "arr_0" not in (found := open_npz(path)):
        raise ValueError(f"{path}: expected images in arr_0, found {', '.join(found)}")
    return Array(path, img_size)


def open_npz(path):
    """The arrays of an .npz by name, with None for arr_0. Raises ValueError, also for damage."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            infos = {i.filename.removesuffix(".npy"): i for i in archive.infolist()}
            return {n: None if n == "arr_0" else _read(archive, i) for n, i in infos.items()}
    except Exception as error:  # a damaged file can raise nearly anything
        raise _unreadable(path, error) from error


def _read(archive, info):
    """An array of an open .npz; zipfile verifies its checksum. Raises nearly anything."""
    shape, _, dtype, header = _header(archive, info)
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or size > info.file_size - header:  # before it is allocated
        raise ValueError(f"{info.filename} cannot be of shape {shape}")
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _header(archive, info):
    """(shape, whether in Fortran's order, dtype, bytes of the header) of an array."""
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read = {(1, 0): np.lib.format.read_array_header_1_0}
        read[2, 0] = np.lib.format.read_array_header_2_0
        return *read[version](member), member.tell()


def _unreadable(path, error):
    return ValueError(f"{path}: not a readable .npz ({first_line(error)})")
