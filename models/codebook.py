"""The codebook of a VQ autoencoder: nearest codes, how codes are learned, and the entropy loss.

Codes are learned by the codebook loss (a gradient) or as moving averages of the latents nearest to
them; with both, codes out of use are moved onto latents. `code_learner` builds what does this.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from models.autoencoder_settings import CODEBOOKS
from util import dist
from util.evaluation.metrics import code_use
from util.precision import full_precision

MAX_DISTANCES = 2**24  # of points and codes, in memory at once: 64 MiB, however many points
PATIENCE = 20  # latents per code; a code that is the nearest to none of them is revived
SMOOTHING = 1e-5  # latents added to the average number of each code
TEMPERATURE = 0.01  # of the entropy loss, as in the code of MaskGIT and MAGVIT

# ---- codes -----------------------------------------------------------------------------------


def rows(latents):
    """Latents (N, C, h, w) as points, (N·h·w, C)."""
    return latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])


def nearest(points, codes):
    """Index of the code nearest to each point by Euclidean distance; the first among equals.

    points (M, C), codes (K, C) -> (M,) int64. Computed in float32 and in chunks (MAX_DISTANCES).
    """
    with full_precision(points.device.type):
        points, codes = points.float(), codes.float()
        return torch.cat([_distances(chunk, codes).argmin(1) for chunk in _chunks(points, codes)])


def _distances(points, codes):
    """|p − c|² − |p|², (M, K): |p|² is the same for every code."""
    return codes.square().sum(1) - 2 * points @ codes.T


def _chunks(points, codes):
    """The points (M, C) in parts of at most MAX_DISTANCES distances."""
    return points.split(max(1, MAX_DISTANCES // len(codes)))


class Codebook(nn.Module):
    """K codes of C dimensions, `embedding.weight` (K, C), initially uniform in [-1/K, 1/K]."""

    def __init__(self, num_codes, dim):
        super().__init__()
        self.embedding = nn.Embedding(num_codes, dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)

    def forward(self, latents):
        """Latents (N, C, h, w) -> indices of their nearest codes, (N, h, w) int64."""
        n, _, h, w = latents.shape
        return nearest(rows(latents), self.embedding.weight).view(n, h, w)


# ---- the entropy loss --------------------------------------------------------------------------


def entropy_loss(latents, codes):
    """E[H(p(k|z))] − H(E[p(k|z)]), a scalar in nats: from −log K, if each latent is at one code and
    all codes are as frequent, to 0, if all latents have the same p.

    Of MAGVIT-v2 (Yu et al. 2023, arXiv 2310.05737), with p(k|z) = softmax(−|z − code|² /
    TEMPERATURE), and E over this process's latents. Computed in float32 and in chunks, which the
    backward pass computes again: at most 8 · MAX_DISTANCES floats are in memory at once.

    latents (N, C, h, w), codes (K, C); both get a gradient.
    """
    points = rows(latents)
    found = [
        checkpoint(_soft_codes, chunk, codes, use_reentrant=False, preserve_rng_state=False)
        for chunk in _chunks(points, codes)
    ]
    entropy, mean = (sum(part) / len(points) for part in zip(*found, strict=True))
    log = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()  # p of a far code is 0
    return entropy + (mean * log).sum()


def _soft_codes(points, codes):
    """Sums over points of H(p(k|z)), a scalar, and of p(k|z), (K,)."""
    with full_precision(points.device.type):
        log = F.log_softmax(_distances(points.float(), codes.float()) / -TEMPERATURE, dim=1)
        p = log.exp()
        return -(p * log).sum(), p.sum(0)


# ---- learning codes ----------------------------------------------------------------------------


class Reviver:
    """Moves unused codes onto latents of the batch, drawn at random.

    A code that is the nearest to no latent gets no gradient and would never move; most codes start
    like this. A code is unused if it was the nearest to none of the last PATIENCE · K latents. The
    first step moves unused codes at once, so that training starts with codes among the latents.

    model: a VQModel. generator: torch.Generator of the draws, the same on all processes.
    `revived`: number of codes moved since the last `metrics`, a tensor. The state is the same on
    all processes.
    """

    tensors = ("uses", "seen", "revived")  # of the state

    def __init__(self, model, generator):
        self.codes, self.generator = model.quantize.embedding.weight, generator
        self.uses = torch.zeros(len(self.codes), dtype=torch.int64, device=self.codes.device)
        self.seen = torch.zeros_like(self.uses)  # uses since the last `metrics`
        self.waiting = 0  # latents until the next revival
        self.revived = torch.zeros_like(self.uses[0])

    @classmethod
    def of(cls, model, losses, generator):
        """The learner by the settings `losses`, a models.autoencoder_settings.Losses."""
        return cls(model, generator)

    @torch.no_grad()
    def step(self, latents, indices):
        """Call after each optimizer step, with its latents (N,C,h,w) and code indices (N,h,w).

        A collective call, which does not wait for the device.
        """
        points, indices = rows(latents.detach()).float(), indices.flatten()
        counts = torch.zeros_like(self.uses)  # not bincount, which waits for the device
        dist.all_reduce(counts.index_add_(0, indices, torch.ones_like(indices)))
        self._learn(points, indices, counts)
        self.uses += counts
        self.seen += counts
        self.waiting -= len(indices) * dist.world_size()
        if self.waiting > 0:
            return
        dead = self.uses == 0
        self._move(dead, self._places(points))
        self.revived += dead.sum()
        self.uses.zero_()
        self.waiting = PATIENCE * len(self.codes)

    def _learn(self, points, indices, counts):
        """Move codes in use: here the optimizer does it.

        points (M, C) and indices (M,) of their codes are of this process, counts (K,) of all.
        """

    def _move(self, dead, places):
        """Move codes, dead (K,) bool, to places (K, C)."""
        self.codes.copy_(torch.where(dead[:, None], places, self.codes))

    def _places(self, points):
        """A point of rank 0 for each code, (K, C); none repeats until all have been used."""
        device = self.generator.device
        order = torch.randperm(len(points), generator=self.generator, device=device)
        turns = torch.arange(len(self.codes), device=device) % len(points)
        places = points[order[turns].to(points.device)]
        return dist.all_reduce(places if dist.is_main() else torch.zeros_like(places))

    def metrics(self):
        """`code_use` and `codes_revived` since the last call, over all processes."""
        found = code_use(self.seen) | {"codes_revived": self.revived.item()}
        self.seen.zero_()
        self.revived.zero_()
        return found

    def state_dict(self):
        """All but the codes: tensors and an integer, copied."""
        found = {name: getattr(self, name).clone() for name in self.tensors}
        return found | {"waiting": self.waiting, "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        """Restore `state_dict()`. Raises ValueError for that of another way to learn codes."""
        expected = {*self.tensors, "waiting", "generator"}
        if state.keys() != expected:
            raise ValueError(
                f"state of the codebook: {', '.join(sorted(state))}; expected "
                f"{', '.join(sorted(expected))}, of the same --codebook"
            )
        for name in self.tensors:
            getattr(self, name).copy_(state[name])
        self.waiting = state["waiting"]
        if len(state["generator"]) == len(self.generator.get_state()):  # else of another device
            self.generator.set_state(state["generator"].cpu())


class MovingAverages(Reviver):
    """Codes as moving averages of the latents nearest to them, over all processes.

    Appendix A.1 of van den Oord et al. 2017 (arXiv 1711.00937). For each code, with n latents of
    the batch whose sum is s:

        N ← γ N + (1 − γ) n,    m ← γ m + (1 − γ) s,    code ← m / N

    N is smoothed (Laplace) as in the authors' code: (N + ε) / (ΣN + K ε) · ΣN. Both start, and
    restart where a code is revived, as if one latent were at the code. The codes get no gradient.

    decay: γ. See Reviver.
    """

    tensors = (*Reviver.tensors, "counts", "sums")

    def __init__(self, model, generator, decay):
        super().__init__(model, generator)
        if not decay < 1:
            raise ValueError(f"--codebook_decay {decay}: expected below 1")
        self.codes.requires_grad_(False)
        self.decay = decay
        self.counts = torch.ones(len(self.codes), device=self.codes.device)  # N
        self.sums = self.codes.detach().clone()  # m

    @classmethod
    def of(cls, model, losses, generator):
        return cls(model, generator, losses.codebook_decay)

    def _learn(self, points, indices, counts):
        self.counts.lerp_(counts.float(), 1 - self.decay)
        self.sums.lerp_(dist.all_reduce(_sums(points, indices, len(counts))), 1 - self.decay)
        total, added = self.counts.sum(), SMOOTHING
        smooth = (self.counts + added) / (total + len(counts) * added) * total
        self.codes.copy_(self.sums / smooth[:, None])

    def _move(self, dead, places):
        super()._move(dead, places)
        self.counts.masked_fill_(dead, 1)
        self.sums.copy_(torch.where(dead[:, None], places, self.sums))


def _sums(points, indices, num_codes):
    """Sum of the points (M, C) of each index, (K, C): the gradient of a lookup, which has a fixed
    order on GPUs too, where that of index_add_ varies."""
    with torch.enable_grad():
        table = points.new_zeros(num_codes, points.shape[1]).requires_grad_()
        return torch.autograd.grad(F.embedding(indices, table), table, points)[0]


def code_learner(network, settings, generator):
    """The Reviver or MovingAverages of a VQModel's codes; None for a network without codes.

    To be called when the network is on its device, and before the optimizer and `dist.wrap`: codes
    that are moving averages get no gradient from then on. The training loop calls `step(latents,
    indices)` after each optimizer step, `metrics()` for its log, `state_dict()` and
    `load_state_dict(state)` for checkpoints. settings: Losses. generator: see Reviver.
    """
    if not network.num_codes:
        return None
    return CODEBOOKS[settings.codebook].of(network, settings, generator)
