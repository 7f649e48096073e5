"""The center crop of ADM (Dhariwal and Nichol 2021), on which published FIDs depend."""

import numpy as np
from PIL import Image


def center_crop_arr(image, size):
    """The central `size`×`size` pixels of a PIL image whose shorter side is scaled to `size`.

    Box filters halve the image while its shorter side is at least twice `size`, then a bicubic one
    finishes: no aliasing, and no dependence on the resampling of a single library call.
    """
    while min(image.size) >= 2 * size:
        image = image.resize([side // 2 for side in image.size], Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    top, left = ((side - size) // 2 for side in (image.height, image.width))
    return Image.fromarray(np.asarray(image)[top : top + size, left : left + size])
