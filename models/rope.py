"""Rotary positions on a grid of tokens, for the blocks (--rope).

RoFormer (Su et al. 2021, arXiv 2104.09864) rotates pairs of numbers of a query and of a key by
angles in proportion to their positions, so that the product of both depends on the difference of
positions alone. Here half of the pairs follow the row and half the column: the axial form for
images of Heo et al. 2024 (arXiv 2403.13298), with its base.
"""

import torch
from timm.layers import apply_rot_embed_cat, build_rotary_pos_embed
from torch.nn import functional as F

BASE = 100.0  # of the frequencies BASE^(−4i/D), i < D/4: rows and columns are fewer than words


def rotations(positions, length, grid, width):
    """Sines and cosines (N, 1, length, 2·width) of the tokens of a sequence, for `rotate`.

    positions: (N, n), in raster order on a grid (height, width), of the last n tokens. Those before
    them, class tokens, stand at 0, which rotates nothing. width: numbers of a head, D.
    """
    table = build_rotary_pos_embed(
        grid, dim=width, temperature=BASE, in_pixels=False, device=positions.device
    )
    places = F.pad(positions, (length - positions.shape[1], 0))
    return F.embedding(places, torch.cat(table, -1)).unsqueeze(1)


def rotate(x, rotation):
    """Queries or keys x (N, heads, n, D), rotated. rotation: (N, 1, n, 2·D), of `rotations`."""
    return apply_rot_embed_cat(x, rotation).to(x.dtype)
