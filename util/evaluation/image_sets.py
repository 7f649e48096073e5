"""Sets of images to evaluate: from a data set, a folder, or an .npz.

Each yields (uint8 (H, W, 3), label), like generated images; the label is -1 if unknown.
"""

import zipfile
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from util.data import open_data
from util.data.folder import read_image
from util.files import check_zip
from util.images import to_uint8


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
        self.img_size = img_size or read_image(self.paths[0]).size[0]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = read_image(self.paths[index])
        if image.size != (self.img_size, self.img_size):
            raise ValueError(
                f"{self.paths[index]}: {image.width}×{image.height} pixels, expected "
                f"{self.img_size}×{self.img_size}: all images of one size"
            )
        return np.array(image), -1


class Array(Dataset):
    """The `arr_0` (N, H, W, 3) uint8 of an .npz: (uint8 (H, W, 3), -1)."""

    def __init__(self, path, img_size):
        self.images = _mapped(path, "arr_0")
        shape = self.images.shape
        side = img_size or (shape[1] if len(shape) == 4 else "side")
        if shape[1:] != (side, side, 3) or self.images.dtype != np.uint8:
            raise ValueError(
                f"{path}: arr_0 is {self.images.dtype} {shape}, expected uint8 "
                f"(N, {side}, {side}, 3)"
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
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: not a readable .npz ({error})") from error
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
        info = archive.getinfo(f"{name}.npy")
        np.lib.format.read_magic(member)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        header = member.tell()
    if info.compress_type != zipfile.ZIP_STORED or fortran:
        return np.load(path)[name]
    with open(path, "rb") as file:  # after a local header, which states its length
        file.seek(info.header_offset + 26)
        lengths = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
    return np.memmap(path, dtype, "r", info.header_offset + 30 + lengths + header, shape)


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
    """The arrays of an .npz by name, with None for arr_0. Raises ValueError."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        file = np.load(path)
        return {name: None if name == "arr_0" else file[name] for name in file.files}
    except Exception as error:
        raise ValueError(f"{path}: not a readable .npz ({error})") from error
