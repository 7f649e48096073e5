"""Sizes of images in pixels: an int if they are square, else [height, width]."""


def sides(img_size, stride=1):
    """(height, width) of images of a size, or of their latents at a stride. Raises ValueError."""
    pair = img_size if isinstance(img_size, list | tuple) else (img_size, img_size)
    if len(pair) != 2 or not all(type(side) is int and side >= 1 for side in pair):
        raise ValueError(
            f"img_size {img_size}: expected an integer, at least 1, or two, height and width"
        )
    return pair[0] // stride, pair[1] // stride


def plain(img_size):
    """A size in the one form that is stored: of two equal sides, the int. Raises ValueError."""
    height, width = sides(img_size)
    return height if height == width else [height, width]


def shown(img_size):
    """A size in messages: "256", or "512×256", height first. Raises ValueError."""
    return "×".join(str(side) for side in dict.fromkeys(sides(img_size)))
