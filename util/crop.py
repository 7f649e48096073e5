"""The centre crop of ADM (Dhariwal and Nichol 2021), on which published FIDs depend."""

import numpy as np
from PIL import Image


def center_crop_arr(image, size):
    """The centre `size`×`size` of a PIL image whose shorter side is scaled to `size`.

    Halved by a box filter while the shorter side is at least twice too large, then bicubic: no
    aliasing, and no dependence on the resampling of one library call.
    """
    while min(image.size) >= 2 * size:
        image = image.resize([side // 2 for side in image.size], Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    top, left = ((side - size) // 2 for side in (image.height, image.width))
    return Image.fromarray(np.asarray(image)[top : top + size, left : left + size])
