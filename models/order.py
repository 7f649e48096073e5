"""In which order tokens are generated, and how many at a step.

An order lists positions; the end of it is generated first. So while m tokens are unknown they are
`orders[:, :m]`: known, asked and unknown tokens are slices (the published convention).
"""

import math

import torch

from util.rng import rand


class RandomOrder:
    """Uniformly random, another one for each image."""

    def start(self, bsz, length, generator=None, device=None):
        """Orders (bsz, length)."""
        return rand((bsz, length), generator, device).argsort(dim=1, stable=True)

    def first_asked(self, remaining):
        """Where in the order the asked tokens begin, when `remaining` are to stay unknown."""
        return remaining

    def settle(self, orders, sampled, unknown, remaining, head, progress, generator=None):
        """(orders, tokens (N, unknown − remaining, C) for `orders[:, remaining:unknown]`).

        sampled: tokens for the asked positions. head: gives the confidence (N, n) of them.
        progress: share of the steps that are done after this one.
        """
        return orders, sampled


class RasterOrder(RandomOrder):
    """Row by row, from the top left."""

    def start(self, bsz, length, generator=None, device=None):
        return torch.arange(length - 1, -1, -1, device=device).expand(bsz, -1)


class ConfidenceOrder(RandomOrder):
    """All unknown tokens are sampled, the most confident are kept (MaskGIT; MAGE, section 3.2).

    Confidence is log p plus Gumbel noise, whose scale falls linearly to 0 over the steps.
    """

    noise = 6.0  # MAGE's; the paper does not give its own

    def first_asked(self, remaining):
        return 0

    def settle(self, orders, sampled, unknown, remaining, head, progress, generator=None):
        u = rand(sampled.shape[:2], generator, sampled.device).clamp(min=1e-20)
        gumbel = -(-u.log()).clamp(min=1e-20).log()
        confidence = head(sampled) + self.noise * (1 - progress) * gumbel
        ranked = confidence.argsort(dim=1, stable=True)  # the most confident last
        orders = torch.cat([orders[:, :unknown].gather(1, ranked), orders[:, unknown:]], dim=1)
        kept = ranked[:, remaining:].unsqueeze(-1).expand(-1, -1, sampled.shape[-1])
        return orders, sampled.gather(1, kept)


ORDERS = {"random": RandomOrder(), "raster": RasterOrder(), "confidence": ConfidenceOrder()}


def token_counts(length, num_iter):
    """Tokens still unknown after each of num_iter steps: the cosine schedule, always falling.

    floor(L·cos(π/2·k/K)) after step k of K (paper, section 4), at least one fewer than before and,
    before the last step, at least one.
    """
    counts, remaining = [], length
    for k in range(1, num_iter):
        masked = math.floor(length * math.cos(math.pi / 2 * k / num_iter))
        remaining = max(1, min(remaining - 1, masked))
        counts.append(remaining)
    return [*counts, 0]
