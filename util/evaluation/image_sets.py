"""Sets of images to evaluate: from a data set, a folder, or an .npz.

Each yields (uint8 (H, W, 3), label), like generated images; the label is -1 if unknown.
"""

import math
import zipfile
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from util.data import open_data
from util.data.pictures import read_picture
from util.data.settings import PLAIN
from util.files import check_zip, first_line
from util.images import to_uint8
from util.sizes import sides


class RealImages(Dataset):
    """The images of a data set in the format of generated ones: (uint8 (H, W, 3), label).

    source: its path, as in --data_path. `description` identifies the images.
    """

    def __init__(self, source, split, img_size):
        self.dataset = open_data(source, split, img_size)

    @property
    def description(self):
        return self.dataset.description

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, label = self.dataset[index]
        return to_uint8(image.unsqueeze(0))[0], int(label)


class Folder(Dataset):
    """All images below a folder, in the order of their names: (uint8 (H, W, 3), -1)."""

    def __init__(self, path, img_size):
        self.paths = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
        if not self.paths:
            raise ValueError(f"{path}: expected images there, found none")
        self.sides = sides(img_size or read_picture(self.paths[0], PLAIN).size[::-1])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = read_picture(self.paths[index], PLAIN)
        if (image.height, image.width) != self.sides:
            raise ValueError(
                f"{self.paths[index]}: {image.height}×{image.width} pixels, expected "
                f"{self.sides[0]}×{self.sides[1]} (height×width): all images of one size"
            )
        return np.array(image), -1


class Array(Dataset):
    """The `arr_0` (N, H, W, 3) uint8 of an .npz: (uint8 (H, W, 3), -1)."""

    def __init__(self, path, img_size):
        self.images = _mapped(path, "arr_0")
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


def _mapped(path, name):
    """An array of an .npz, memory-mapped unless compressed, as it may have 10 GB."""
    try:
        check_zip(path)  # a memory map would not notice damage
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{name}.npy")
            shape, fortran, dtype, header = _header(archive, info)
            if info.compress_type != zipfile.ZIP_STORED or fortran or dtype.hasobject:
                return _read(archive, info)
        with open(path, "rb") as file:  # after a local header, which states its length
            file.seek(info.header_offset + 26)
            lengths = [int.from_bytes(file.read(2), "little") for _ in range(2)]
        return np.memmap(path, dtype, "r", info.header_offset + 30 + sum(lengths) + header, shape)
    except Exception as error:  # a damaged file can raise nearly anything
        raise _unreadable(path, error) from error


def open_images(path, img_size=None):
    """The images of a folder or of an .npz. Raises ValueError."""
    path = Path(path)
    if path.is_dir():
        return Folder(path, img_size)
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
