"""Editing of images: tokens that are known stay, the others are drawn anew.

    inpaint     fills in the pixels of a mask; with another label, puts something else there
    vary        draws a share of all tokens anew
    outpaint    extends images beyond their edges, window by window

Images are arrays uint8 (N, H, W, 3), in and out, of the model's size or larger, in whole tokens.
Known tokens are the tokenizer's encoding, without a random draw. Known pixels are returned as they
were, and the rest is blended with them.

labels: a list of class indices, or None for no class. sampling: a models.settings.Sampling, of
whose num_iter a window takes no more than it has tokens to fill in. generators: one per image, see
util.rng.image_generators. precision: see util.precision. settings: fields of
models.settings.Editing, and progress, the label of a progress bar of windows (default: none).
"""

from collections import deque
from functools import partial

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt

from models.order import RandomOrder
from models.settings import FILL_ORDERS, ORDERS, Editing
from models.tokenizer import DECODED_AT_ONCE, decode
from util.data.pictures import LARGEST, to_range
from util.precision import autocast_steps
from util.progress import Progress
from util.rng import generator_of, rand

GREY = (0.299, 0.587, 0.114)  # luminance of red, green and blue


def inpaint(model, tokenizer, images, mask, labels, sampling, generators, **settings):
    """The images (N, H, W, 3) with what the mask marks filled in: the last of `inpaint_steps`."""
    steps = _edit(model, tokenizer, images, mask, labels, sampling, generators, **settings)
    ((show, _),) = deque(steps, maxlen=1)  # only the last step is decoded
    return show()


def inpaint_steps(model, tokenizer, images, mask, labels, sampling, generators, **settings):
    """Yields images uint8 (N, H, W, 3) and the tokens still unknown (N, h, w), as 1, at each step.

    mask: (N, H, W), above 0 where pixels are to be filled in; so is a token that has such a pixel.
    See the top of this file for the rest. Raises ValueError for what does not fit, and for what the
    model cannot fill in.
    """
    steps = _edit(model, tokenizer, images, mask, labels, sampling, generators, **settings)
    for show, hidden in steps:
        yield show(), hidden


def vary(model, tokenizer, images, labels, sampling, generators, *, strength, **settings):
    """Variations of the images (N, H, W, 3): the share `strength` of all tokens is drawn anew."""
    given = images, np.ones(images.shape[:3], bool), labels, sampling, generators
    return inpaint(model, tokenizer, *given, strength=strength, **settings)


def outpaint(
    model,
    tokenizer,
    images,
    labels,
    sampling,
    generators,
    *,
    left=0,
    right=0,
    top=0,
    bottom=0,
    **settings,
):
    """The images (N, H, W, 3) extended by so many pixels at each side, rounded up to whole tokens.

    images: None for new ones, which are generated and then extended.
    """
    token = model.patch_size * tokenizer.stride
    size = len(generators), model.seq_h * token, model.seq_w * token
    known = np.zeros((*size, 3), np.uint8) if images is None else images
    canvas, mask = extended(known, token, left, right, top, bottom)
    mask |= images is None
    if settings.get("strength", 1.0) != 1.0:
        raise ValueError(f"strength {settings['strength']}: nothing is there yet, expected 1")
    return inpaint(model, tokenizer, canvas, mask, labels, sampling, generators, **settings)


def extended(images, token, left=0, right=0, top=0, bottom=0):
    """Images (N, H, W, 3) with margins to fill in, and their mask (N, H, W), True in the margins.

    token: side of a token in pixels, to a multiple of which margins are rounded up. Raises
    ValueError if they are larger than pictures can be.
    """
    top, bottom, left, right = (-(-n // token) * token for n in (top, bottom, left, right))
    height, width = images.shape[1] + top + bottom, images.shape[2] + left + right
    if height * width > LARGEST:
        raise ValueError(
            f"images of {height}×{width} pixels: expected at most {LARGEST // 10**6} million"
        )
    edges = (0, 0), (top, bottom), (left, right)
    mask = np.pad(np.zeros(images.shape[:3], bool), edges, constant_values=True)
    return np.pad(images, (*edges, (0, 0))), mask


# ---- tokens --------------------------------------------------------------------------------------


def _edit(
    model,
    tokenizer,
    images,
    mask,
    labels,
    sampling,
    generators,
    precision="fp32",
    progress=None,
    **settings,
):
    """Yields (a function that gives the images, the unknown tokens (N, h, w)) after each step."""
    settings, mask = Editing.of(**settings), np.asarray(mask) > 0
    device, token = model.fake_latent.device, model.patch_size * tokenizer.stride
    _check(model, token, images, mask, labels, generators, settings)
    images = _as_seen(images, tokenizer)
    known = _Known(images, mask, settings, token)
    latents = _encode(tokenizer, images, device)  # (N, C, h·p, w·p)
    hidden = torch.from_numpy(_tokens_of(mask, token)).to(device)
    first = _corners(~hidden, model.grid)
    hidden = _share(hidden, settings.strength, generators)
    labels = None if labels is None else torch.as_tensor(labels, device=device)
    windows = _counted([*_windows(model, hidden.shape[1:], first, settings.overlap)], progress)
    given = labels, sampling, generators, settings
    for found, still in _fill(model, latents, hidden, windows, precision, *given):
        yield partial(_show, tokenizer, known, found, generators), still


def _show(tokenizer, known, latents, generators):
    """The images that the latents stand for. The generators stay as they are, for later steps."""
    copies = [generator.clone_state() for generator in generators]
    return known.put_back(decode(tokenizer, latents, copies))


def _fill(model, latents, hidden, windows, precision, labels, sampling, generators, settings):
    """Yields latents (N, C, h·p, w·p) and unknown tokens (N, h, w) after each step of each window.

    Once, if no token is unknown. labels: (N,), or None. windows: see `_windows`.
    """
    if not hidden.any():
        yield latents, hidden
    for rows, box, cells in windows:
        rows = [i for i in rows if hidden[(i, *box)].any()]  # of the others, nothing is drawn
        if not rows:
            continue
        tokens, cells = (rows, *box), (rows, slice(None), *cells)
        inside, own = hidden[tokens], generator_of(generators, rows, len(latents))
        most = int(inside.flatten(1).sum(1).max())
        orders = FILL_ORDERS[settings.order](inside, own)
        if orders is not None:
            model.check_orders(orders, f"fill {settings.order}")
            if ORDERS[sampling.order or model.order].by_confidence:
                raise ValueError(f"fill {settings.order}: the confidence order finds its own")
        count = most if model.one_at_a_time else min(sampling.num_iter, most)
        steps = model.sample_steps(
            len(rows),
            labels=None if labels is None else labels[rows],
            generator=own,
            orders=orders,
            latents=latents[cells],
            mask=inside,
            **sampling.but(num_iter=count).asdict(),
        )
        for found, still in autocast_steps(steps, latents.device, precision):
            latents, hidden = latents.clone(), hidden.clone()
            latents[cells], hidden[tokens] = found, still.view(inside.shape) > 0
            yield latents, hidden


def _counted(windows, label):
    """Yields the windows, with a progress bar if it has a label."""
    bar = Progress(len(windows), label, "window")
    for window in windows:
        yield window
        bar.update()
    bar.close()


def _windows(model, size, first, overlap):
    """Yields some images, as indices, and a window of each: the slices of its tokens (height,
    width), and those of its latents.

    size: height and width of the canvas in tokens. first: see `_corners`.
    """
    p, (height, width) = model.patch_size, model.grid
    for corner in dict.fromkeys(first):
        rows = [i for i, own in enumerate(first) if own == corner]
        for y in _starts(corner[0], size[0], height, overlap):
            for x in _starts(corner[1], size[1], width, overlap):
                box = slice(y, y + height), slice(x, x + width)
                yield rows, box, [slice(p * side.start, p * side.stop) for side in box]


def _starts(first, length, window, overlap):
    """Where windows begin along a side: from the first to the end, then back to the beginning."""
    step, last = max(1, window - round(overlap * window)), length - window
    starts = [*range(first, last, step), last, *range(first - step, 0, -step), 0]
    return list(dict.fromkeys(min(start, last) for start in starts))


def _corners(known, window):
    """(row, column) of the first window of each image: the first of its cells (N, h, w) that are
    known, 0 if there is none. window: its height and width."""
    first = torch.stack([known.any(side).byte().argmax(1) for side in (2, 1)], 1).tolist()
    last = [length - own for length, own in zip(known.shape[1:], window, strict=True)]
    return [(min(row, last[0]), min(column, last[1])) for row, column in first]


def _tokens_of(mask, token):
    """The tokens (N, h, w) with a pixel in the mask (N, H, W), both booleans."""
    count, height, width = mask.shape
    cells = mask.reshape(count, height // token, token, width // token, token)
    return cells.any((2, 4))


def _share(hidden, strength, generators):
    """A random share of the hidden tokens (N, h, w) of each image, at least one if it is not 0."""
    if strength == 1:
        return hidden
    flat = hidden.flatten(1)
    draws = rand(flat.shape, generators, flat.device).masked_fill(~flat, 2.0)
    wanted = (strength * flat.sum(1, keepdim=True)).round()
    wanted = wanted.clamp(min=1) if strength else wanted
    return (draws.argsort(1).argsort(1) < wanted).logical_and(flat).view(hidden.shape)


def given_order(hidden, generators):
    """No order of its own: that of the Sampling, which is the model's unless it is given."""
    return None


def border_first(hidden, generators):
    """Orders (N, L) from the known tokens inwards; hidden: (N, h, w). Ties are drawn at random."""
    distance = np.stack([_distance(image) for image in hidden.cpu().numpy()])
    distance = torch.from_numpy(distance).flatten(1).to(hidden.device)
    orders = RandomOrder().start(len(hidden), hidden.shape[1:], generators, hidden.device)
    farthest = distance.gather(1, orders).argsort(dim=1, descending=True, stable=True)
    return orders.gather(1, farthest)


def _distance(hidden):
    """The distance of each cell (h, w) to the nearest that is not hidden; 0 if all are."""
    return np.zeros(hidden.shape) if hidden.all() else distance_transform_edt(hidden)


# ---- pixels --------------------------------------------------------------------------------------


class _Known:
    """The known pixels of images, put back into decoded images and blended with them.

    images: uint8 (N, H, W, 3). mask: (N, H, W), True where they are not known. token: its side in
    pixels.
    """

    def __init__(self, images, mask, settings, token):
        self.images, self.mask, self.blend = images, mask, settings.blend
        self.seam = settings.seam * token
        self.places = [_nearest(image, self.seam) for image in mask] if self.blend else None

    def put_back(self, decoded):
        """The known pixels, and elsewhere the decoded ones, corrected near the known ones.

        The correction is the error at the nearest known pixel, and fades out over the seam.
        """
        if not self.blend:
            return decoded
        blended = np.where(self.mask[..., None], decoded, self.images)
        for i, place in enumerate(self.places):
            if place is None:
                continue
            weight, where = place
            error = self.images[i].astype(np.float32) - decoded[i]
            corrected = decoded[i] + weight[..., None] * error[where]
            corrected = corrected.round().clip(0, 255).astype(np.uint8)
            blended[i] = np.where(self.mask[i][..., None], corrected, blended[i])
        return blended


def _nearest(mask, seam):
    """(weights (H, W), indices of the nearest known pixel) of an image; None if all are alike."""
    if not seam or mask.all() or not mask.any():
        return None
    distance, where = distance_transform_edt(mask, return_indices=True)
    return (1 - distance / (seam + 1)).clip(0).astype(np.float32), tuple(where)


def _as_seen(images, tokenizer):
    """The images as the tokenizer knows them: grey if it has one channel."""
    if tokenizer.image_channels != 1:
        return images
    grey = (images @ np.array(GREY)).round().astype(np.uint8)
    return np.repeat(grey[..., None], 3, -1)


@torch.no_grad()
def _encode(tokenizer, images, device):
    """Latents (N, C, h·p, w·p) of images, without a random draw."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)[:, : tokenizer.image_channels]
    parts = to_range(pixels.contiguous()).split(DECODED_AT_ONCE)
    return torch.cat([tokenizer.mode(tokenizer.encode(part.to(device))).float() for part in parts])


# ---- checks --------------------------------------------------------------------------------------


def _check(model, token, images, mask, labels, generators, settings):
    """Raises ValueError for what does not fit. token: its side in pixels."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"images of shape {images.shape} and type {images.dtype}: expected uint8 (N, H, W, 3)"
        )
    (height, width), least = images.shape[1:3], (model.seq_h * token, model.seq_w * token)
    if height < least[0] or width < least[1] or height % token or width % token:
        raise ValueError(
            f"images of {height}×{width} pixels: expected {least[0]}×{least[1]}, the model's size, "
            f"or more in steps of {token}"
        )
    if mask.shape != images.shape[:3]:
        raise ValueError(f"mask of shape {mask.shape}: expected {images.shape[:3]}")
    own = {"generators": generators} | ({} if labels is None else {"labels": labels})
    for name, given in own.items():
        if np.shape(given) != (len(images),):
            raise ValueError(
                f"{name} of shape {np.shape(given)}: expected one for each of {len(images)} images"
            )
    for name in ("strength", "overlap"):
        if not 0 <= getattr(settings, name) <= 1:
            raise ValueError(f"{name} {getattr(settings, name)}: expected a number from 0 to 1")
