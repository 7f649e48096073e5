"""Changes of an autoencoder's latents in training, which make them easier to model. All are off by
default; a network trained with them is used like any other.

- Noise and masks: the decoder learns to repair what a model of the latents is trained to repair
  (l-DeTok, Yang et al. 2025, arXiv 2507.15856).
- Equivariance: scaled or rotated latents decode to scaled or rotated images (EQ-VAE, Kouzelis et
  al. 2025, arXiv 2502.09509).
"""

import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from util.rng import rand, randn

SMALLEST = 1 / 4  # scale of images (EQ-VAE)


class Trained(nn.Module):
    """An autoencoder in training, whose latents are changed before they are decoded.

    network: an AutoencoderKL or a VQModel. changes: a models.autoencoder_settings.Changes.
    least_side: pixels along each side that scaled images keep, such as a discriminator needs.
    """

    def __init__(self, network, changes, least_side=1):
        super().__init__()
        self.network, self.changes, self.least_side = network, changes, least_side

    def forward(self, images, generator=None):
        """Images (N,I,H,W) -> (target (N,I,H',W'), output): what is to be decoded, and the
        network's output, see its `forward`. The target is the images, scaled and rotated as the
        latents are.

        generator: None or a torch.Generator. Nothing is drawn for a change that is off.
        """
        alike = self._draw_transform(images, generator)
        change = partial(self._change, alike=alike, generator=generator)
        return alike(images), self.network(images, generator, change)

    def _change(self, latents, alike, generator):
        latents, own = alike(latents), self.changes
        if own.latent_noise:
            latents = add_noise(latents, own.latent_noise, generator)
        if own.latent_mask:
            latents = hide(latents, own.latent_mask, generator)
        return latents

    def _draw_transform(self, images, generator):
        """A function that scales and rotates, (N,C,h,w) -> (N,C,h',w'); the identity for the other
        batches. Sides of latents stay integers, and images that are not square turn by 180°."""
        if not self.changes.equivariance:
            return _same
        chance, *draws = rand((3,), generator, images.device).tolist()
        if chance >= self.changes.equivariance:
            return _same
        sides = [side // self.network.stride for side in images.shape[2:]]
        whole = math.gcd(*sides)
        needed = math.ceil(self.least_side * whole / min(images.shape[2:]))
        least = min(whole, max(math.ceil(SMALLEST * whole), needed))
        part = least + int(draws[0] * (whole - least))
        turns = 1 + int(3 * draws[1]) if len(set(sides)) == 1 else 2
        return partial(transform, part=part, whole=whole, turns=turns)


def _same(x):
    return x


def transform(x, part, whole, turns):
    """x (N,C,h,w) scaled by part/whole and rotated by so many quarter turns, as EQ-VAE does."""
    if part != whole:
        sides = [side * part // whole for side in x.shape[2:]]
        x = F.interpolate(x, size=sides, mode="bilinear", align_corners=False)
    return torch.rot90(x, turns, (2, 3))


def add_noise(latents, most, generator=None):
    """(1 − τ)z + τγσε for latents z (N,C,h,w): τ ~ U(0, 1) per image, ε ~ N(0, I), γ = `most`.

    σ is the standard deviation of these latents. The noise grows with them, so that a network whose
    weight of the KL is tiny gains nothing by growing its latents: without the gradient of σ they
    run away. At σ = 1 this is l-DeTok's.
    """
    tau = rand((len(latents), 1, 1, 1), generator, latents.device)
    noise = randn(latents.shape, generator, latents.device)
    std = latents.float().std(correction=0)
    return ((1 - tau) * latents + tau * (most * std * noise)).to(latents.dtype)


def hide(latents, most, generator=None):
    """Latents (N,C,h,w) with zeros at a fraction of the positions: max(0, U(−0.1, most)) per image,
    rounded down to whole positions.

    l-DeTok hides patches of the image from its encoder, a Transformer. A convolutional encoder
    needs all of them, so here it is latents that are hidden, from the decoder.
    """
    n, _, h, w = latents.shape
    ratio = (rand((n, 1), generator, latents.device) * (most + 0.1) - 0.1).clamp(min=0)
    ranks = rand((n, h * w), generator, latents.device).argsort(1).argsort(1)
    hidden = ranks < (ratio * (h * w)).floor()
    return latents.masked_fill(hidden.view(n, 1, h, w), 0)
