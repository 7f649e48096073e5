"""The center crop of ADM (Dhariwal and Nichol 2021), on which published FIDs depend."""

import numpy as np
from PIL import Image

from util.sizes import sides


def center_crop_arr(image, size):
    """The central pixels of a PIL image, scaled so that one side is just that of the crop.

    size: side of the crop, or (height, width). Box filters halve the image while both sides are at
    least twice those of the crop, then a bicubic one finishes: no aliasing, and no dependence on
    the resampling of a single library call.
    """
    height, width = sides(size)
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize([side // 2 for side in image.size], Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    top, left = (image.height - height) // 2, (image.width - width) // 2
    return Image.fromarray(np.asarray(image)[top : top + height, left : left + width])
