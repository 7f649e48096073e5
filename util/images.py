"""Tensors to images: uint8 arrays, grids, folders and .npz files, all written atomically."""

import math
import zipfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from util.files import make_folder, replacing

MAX_GRID = 1024  # images
GAP = (80, 110, 170)  # color between the images of a grid: neither black nor white


def to_uint8(images):
    """Images (N, C, H, W), clipped to [-1, 1], as a NumPy array uint8 (N, H, W, 3)."""
    images = torch.nan_to_num(images.float(), nan=-1.0).clamp(-1, 1)
    images = ((images + 1) * 127.5).round().to(torch.uint8)
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    return images.permute(0, 2, 3, 1).cpu().numpy()


def grid(images, columns=None, padding=2, min_side=0):
    """Images uint8 (N, H, W, 3) side by side: (H', W', 3).

    columns: number of columns; if not given, the grid is nearly square. min_side: smaller images
    are enlarged by an integer factor, so that 8×8 ones can be seen.
    """
    zoom = max(1, -(-min_side // images.shape[1]))
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    height, width = height + padding, width + padding
    canvas = np.empty((rows * height + padding, columns * width + padding, channels), np.uint8)
    canvas[:] = GAP
    for i, image in enumerate(images):
        top, left = i // columns * height + padding, i % columns * width + padding
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas


def save_image(path, image):
    """Write an image uint8 (H, W, 3) in the format given by the suffix of the path."""
    with replacing(path) as beside:
        Image.fromarray(image).save(beside, Image.registered_extensions()[Path(path).suffix])


class GridWriter:
    """Writes all images to one PNG, class by class."""

    per_process = False

    def __init__(self, path, labels, columns=None):
        self.path, self.columns, self.images = path, columns, []
        shown = list(dict.fromkeys(labels))  # classes in the order of their first label
        self.order = sorted(range(len(labels)), key=lambda i: shown.index(labels[i]))

    def add(self, indices, images):
        self.images.extend(images)

    def __enter__(self):
        return self

    def __exit__(self, kind, *rest):
        if kind is None:
            images = np.stack(self.images)[self.order]
            save_image(self.path, grid(images, self.columns, min_side=64))


class FolderWriter:
    """Writes each image to a PNG named by its index. Each process adds its own images."""

    per_process = True

    def __init__(self, path):
        self.path = Path(path)

    def add(self, indices, images):
        for index, image in zip(indices, images, strict=True):
            save_image(self.path / f"{index:06d}.png", image)


class NpzWriter:
    """Writes one .npz with `arr_0` (N, H, W, 3) uint8, the format of ADM's evaluator.

    Written incrementally: 50,000 images of 256 pixels are 9.8 GB.
    """

    per_process = False

    def __init__(self, path, count):
        self.path, self.count, self.file = path, count, None

    def add(self, indices, images):
        if self.file is None:
            archive = self.opened.enter_context(zipfile.ZipFile(self.beside, "w"))
            self.file = archive.open("arr_0.npy", "w", force_zip64=True)
            self.opened.enter_context(self.file)
            header = {"descr": "|u1", "fortran_order": False}
            header["shape"] = (self.count, *images.shape[1:])
            np.lib.format.write_array_header_1_0(self.file, header)
        self.file.write(np.ascontiguousarray(images).tobytes())

    def __enter__(self):
        self.opened = ExitStack()
        self.beside = self.opened.enter_context(replacing(self.path))
        return self

    def __exit__(self, *error):
        return self.opened.__exit__(*error)


def open_writers(paths, labels, columns=None):
    """Writers of one image per label: context managers with `add(indices, images)`.

    .png is a grid, .npz one file, any other name a folder of PNGs. columns: columns of the grid.
    Raises ValueError for a grid of too many images, and for a folder that holds other PNGs.
    """
    writers = []
    for path in map(Path, paths):
        make_folder(path.parent, "--out")
        others = set(Image.registered_extensions()) - {".png"}
        if path.is_file() != path.exists() and path.suffix in (".png", ".npz"):
            raise ValueError(f"--out {path}: is a folder, expected a name for a file")
        if path.suffix.lower() in others or path.suffix in (".PNG", ".NPZ") or path == Path():
            raise ValueError(f"--out {path}: expected a name in .png or .npz, or a folder")
        if path.suffix == ".png" and len(labels) > MAX_GRID:
            raise ValueError(
                f"--out {path}: a grid of {len(labels)} images, expected at most {MAX_GRID}; "
                "name a folder or an .npz"
            )
        if path.suffix == ".png":
            writers.append(GridWriter(path, labels, columns))
        elif path.suffix == ".npz":
            writers.append(NpzWriter(path, len(labels)))
        else:
            make_folder(path, "--out")
            ours = {f"{i:06d}.png" for i in range(len(labels))}
            others = [p.name for p in path.glob("*.png") if p.name not in ours]
            if others:
                raise ValueError(
                    f"--out {path}: holds {len(others)} other images, such as {others[0]}, which "
                    "would be measured with these; expected an empty folder"
                )
            writers.append(FolderWriter(path))
    return writers
