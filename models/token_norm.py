"""Latents of one norm (SphereAR: Ke and Xue 2025, arXiv 2509.24335).

At each position the C channels of the latents are scaled to norm √C, so that their mean square is
1. Guidance, and errors that add up over autoregressive steps, then cannot change the norm: sampled
tokens are projected again before the next step. SphereAR's posterior is one of directions (power
spherical); here it is the autoencoder's Gaussian, and its samples are projected.
"""

import torch
from torch import nn
from torch.nn import functional as F


def project(latents, dim=1):
    """Latents scaled to norm √C along `dim`, their C channels; zeros stay zeros."""
    scaled = F.normalize(latents.float(), dim=dim) * latents.shape[dim] ** 0.5
    return scaled.to(latents.dtype)


class TokenNorm(nn.Module):
    """`project` as a module of a network whose latents have C channels. Its one entry in the
    weights, √C, tells them from those of a network without it."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("norm", torch.tensor(channels**0.5))

    def forward(self, latents):
        return project(latents)
