"""Tensors to images: uint8 arrays, PNGs, grids and .npz files, all written atomically."""

import io
import math
import zipfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from util.files import replacing
from util.sizes import sides

MAX_GRID = 1024  # images
GAP = (80, 110, 170)  # color between the images of a grid: neither black nor white

UNKNOWN = (110, 120, 140)  # color of unknown tokens


def to_uint8(images):
    """Images (N, C, H, W), clipped to [-1, 1], as a NumPy array uint8 (N, H, W, 3)."""
    images = torch.nan_to_num(images.float(), nan=-1.0).clamp(-1, 1)
    images = ((images + 1) * 127.5).round().to(torch.uint8)
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    return images.permute(0, 2, 3, 1).cpu().numpy()


def hide_unknown(images, mask):
    """Images uint8 (N, H, W, 3), with the tokens in gray where a mask (N, h, w) is above 0."""
    hidden, (height, width) = mask.cpu().numpy() > 0, images.shape[1:3]
    hidden = hidden.repeat(height // hidden.shape[1], 1).repeat(width // hidden.shape[2], 2)
    return np.where(hidden[..., None], np.uint8(UNKNOWN), images)


def grid(images, columns=None, padding=2, min_side=0):
    """Images uint8 (N, H, W, 3) side by side: (H', W', 3).

    columns: number of columns; if not given, the grid is nearly square. min_side: smaller images
    are enlarged by an integer factor, so that 8×8 ones can be seen.
    """
    zoom = max(1, -(-min_side // min(images.shape[1:3])))
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


def animation(frames, seconds=0.25):
    """Images uint8 (H, W, 3) of one size as the bytes of an animated PNG, which repeats.

    seconds: how long each is shown; the last, four times as long. Browsers and notebooks show it
    as they do any PNG.
    """
    first, *rest = map(Image.fromarray, frames)
    times = [round(1000 * seconds)] * len(rest) + [round(4000 * seconds)]
    file = io.BytesIO()
    first.save(file, "PNG", save_all=True, append_images=rest, duration=times, loop=0)
    return file.getvalue()


def save_image(path, image, text=None):
    """Write an image uint8 (H, W, 3) in the format given by the suffix of the path.

    text: key -> text to write beside it into a PNG, see util.provenance.
    """
    more = {"pnginfo": _chunks(text)} if text else {}
    with replacing(path) as beside:
        kind = Image.registered_extensions()[Path(path).suffix]
        Image.fromarray(image).save(beside, kind, **more)


def _chunks(text):
    """Key -> text as the text chunks of a PNG."""
    chunks = PngInfo()
    for key, value in text.items():
        chunks.add_itxt(key, value)
    return chunks


def read_png(path, img_size):
    """The image in a PNG, uint8 (H, W, 3); None if it is missing, damaged or of another kind."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()  # all checksums
        with Image.open(path, formats=["PNG"]) as image:
            fits = image.size == sides(img_size)[::-1] and image.mode == "RGB"
            return np.asarray(image) if fits else None
    except Exception:  # PIL can raise nearly anything for a damaged file
        return None


class GridWriter:
    """Writes all images to one PNG, class by class; or image number `only` alone, as it is."""

    bytes = 0  # needed on disk: few
    text = None  # function that returns the text of the PNG, see util.outputs

    def __init__(self, path, labels, columns=None, only=None):
        self.path, self.columns, self.only, self.images = path, columns, only, []
        shown = list(dict.fromkeys(labels))  # classes in the order of their first label
        self.order = sorted(range(len(labels)), key=lambda i: shown.index(labels[i]))

    def add(self, indices, images):
        self.images.extend(images)

    def __enter__(self):
        return self

    def __exit__(self, kind, *rest):
        if kind is None:
            save_image(self.path, *self._whole())

    def _whole(self):
        """The image to write, and its text."""
        count, text = range(len(self.images)), self.text or (lambda *_, **more: None)
        if self.only is not None:
            return self.images[self.only], text(count, self.only)
        images = grid(np.stack(self.images)[self.order], self.columns, min_side=64)
        return images, text(count, columns=self.columns)


class NpzWriter:
    """Writes one .npz with `arr_0` (N, H, W, 3) uint8, the format of ADM's evaluator.

    Written incrementally: 50,000 images of 256 pixels are 9.8 GB.
    """

    def __init__(self, path, count, img_size):
        self.path, self.count, self.file = path, count, None
        self.bytes = 3 * count * math.prod(sides(img_size))

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
        self.beside = self.opened.enter_context(replacing(self.path, self.bytes))
        return self

    def __exit__(self, *error):
        return self.opened.__exit__(*error)
