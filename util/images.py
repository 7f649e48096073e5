"""Images out of tensors: bytes, grids, folders and .npz files, each written beside and renamed."""

import math
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from util.files import replacing

MAX_GRID = 1024  # images


def to_uint8(images):
    """Images (N, C, H, W) in [-1, 1], clipped, to bytes (N, H, W, 3): a NumPy array."""
    images = torch.nan_to_num(images.float(), nan=-1.0).clamp(-1, 1)
    images = ((images + 1) * 127.5).round().to(torch.uint8)
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    return images.permute(0, 2, 3, 1).cpu().numpy()


def grid(images, columns=None, padding=2, min_side=0):
    """Bytes (N, H, W, 3) side by side: (H', W', 3).

    columns: the nearest square if not given. min_side: images smaller than this are enlarged by
    whole pixels, so that 8×8 ones can be seen.
    """
    zoom = max(1, -(-min_side // images.shape[1]))
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    height, width = height + padding, width + padding
    canvas = np.full((rows * height + padding, columns * width + padding, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * height + padding, i % columns * width + padding
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas


def save_image(path, image):
    """Write bytes (H, W, 3) as the format that the name ends in."""
    with replacing(path) as beside:
        Image.fromarray(image).save(beside, Image.registered_extensions()[Path(path).suffix])


class GridWriter:
    """All images in one PNG."""

    per_process = False

    def __init__(self, path, columns=None):
        self.path, self.columns, self.images = path, columns, []

    def add(self, indices, images):
        self.images.extend(images)

    def close(self):
        save_image(self.path, grid(np.stack(self.images), self.columns, min_side=64))


class FolderWriter:
    """A PNG for each image, named by its index. Each process adds its own."""

    per_process = True

    def __init__(self, path):
        self.path = Path(path)

    def add(self, indices, images):
        for index, image in zip(indices, images, strict=True):
            save_image(self.path / f"{index:06d}.png", image)


class NpzWriter:
    """One .npz with `arr_0` (N, H, W, 3) uint8, the form that ADM's evaluator takes.

    Written as the images come: 50,000 of 256 pixels are 9.8 GB.
    """

    per_process = False

    def __init__(self, path, count):
        self.path, self.count, self.file = path, count, None

    def add(self, indices, images):
        if self.file is None:
            self._replacing = replacing(self.path)
            self._archive = zipfile.ZipFile(self._replacing.__enter__(), "w")
            self.file = self._archive.open("arr_0.npy", "w", force_zip64=True)
            header = {"descr": "|u1", "fortran_order": False}
            header["shape"] = (self.count, *images.shape[1:])
            np.lib.format.write_array_header_1_0(self.file, header)
        self.file.write(np.ascontiguousarray(images).tobytes())

    def close(self):
        self.file.close()
        self._archive.close()
        self._replacing.__exit__(None, None, None)


def open_writers(paths, count, columns=None):
    """Writers of `count` images: .png is a grid, .npz one file, any other name a folder of PNGs.

    columns: of the grid. Raises ValueError for a grid of too many images.
    """
    writers = []
    for path in map(Path, paths):
        if path.suffix == ".png" and count > MAX_GRID:
            raise ValueError(
                f"--out {path}: a grid of {count} images, expected at most {MAX_GRID}; "
                "name a folder or an .npz"
            )
        if path.suffix == ".png":
            writers.append(GridWriter(path, columns))
        else:
            writers.append(NpzWriter(path, count) if path.suffix == ".npz" else FolderWriter(path))
    return writers
