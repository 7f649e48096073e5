"""The codebook of a VQ autoencoder, and how its codes stay in use."""

import torch
import torch.nn as nn

from util import dist
from util.precision import full_precision

MAX_DISTANCES = 2**24  # held at once by `nearest`: 64 MiB, however many latents there are
PATIENCE = 20  # latents per code; a code that is the nearest to none of them is revived


def nearest(points, codes):
    """Index of the code nearest to each point by Euclidean distance; the first among equals.

    points (M, C), codes (K, C) -> (M,) int64. Computed in float32 and in chunks (MAX_DISTANCES).
    """
    with full_precision(points.device.type):
        points, codes = points.float(), codes.float()
        square = codes.square().sum(1)
        # |p - c|² = |p|² + |c|² - 2 p·c, of which |p|² is the same for every code
        chunks = points.split(max(1, MAX_DISTANCES // len(codes)))
        return torch.cat([(square - 2 * chunk @ codes.T).argmin(1) for chunk in chunks])


class Codebook(nn.Module):
    """K codes of C dimensions, `embedding.weight` (K, C), initially uniform in [-1/K, 1/K]."""

    def __init__(self, num_codes, dim):
        super().__init__()
        self.embedding = nn.Embedding(num_codes, dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)

    def forward(self, latents):
        """Latents (N, C, h, w) -> indices of their nearest codes, (N, h, w) int64."""
        n, c, h, w = latents.shape
        points = latents.permute(0, 2, 3, 1).reshape(-1, c)
        return nearest(points, self.embedding.weight).view(n, h, w)


class Reviver:
    """Moves unused codes onto latents of the batch, drawn at random.

    A code that is the nearest to no latent gets no gradient and would never move; most codes start
    like this. A code is unused if it was the nearest to none of the last PATIENCE · K latents. The
    first step moves unused codes at once, so that training starts with codes among the latents.

    model: a VQModel. generator: torch.Generator of the draws. `revived`: number of codes moved, a
    tensor.
    """

    def __init__(self, model, generator):
        self.codes, self.generator = model.quantize.embedding.weight, generator
        self.uses = torch.zeros(len(self.codes), dtype=torch.int64, device=self.codes.device)
        self.waiting = 0  # latents until the next revival
        self.revived = torch.zeros_like(self.uses[0])

    @torch.no_grad()
    def step(self, latents, indices):
        """Call after each optimizer step, with its latents (N,C,h,w) and code indices (N,h,w)."""
        indices = indices.flatten()  # not bincount, which waits for the device
        self.uses.index_add_(0, indices, torch.ones_like(indices))
        self.waiting -= len(indices) * dist.world_size()
        if self.waiting > 0:
            return
        dead = dist.all_reduce(self.uses) == 0
        self.codes.copy_(torch.where(dead[:, None], self._places(latents), self.codes))
        self.revived += dead.sum()
        self.uses.zero_()
        self.waiting = PATIENCE * len(self.codes)

    def _places(self, latents):
        """A latent of rank 0 for each code, (K, C); none repeats until all have been used."""
        points = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).float()
        device = self.generator.device
        order = torch.randperm(len(points), generator=self.generator, device=device)
        turns = torch.arange(len(self.codes), device=device) % len(points)
        places = points[order[turns].to(points.device)]
        return dist.all_reduce(places if dist.is_main() else torch.zeros_like(places))
