"""The order in which tokens are generated, and the number per step.

An order lists positions; its end is generated first. While m tokens are unknown, they are
`orders[:, :m]`: known tokens, unknown ones and those to predict are slices (the published layout).
"""

import math

import torch

from util.rng import rand


class RandomOrder:
    """A uniformly random order, drawn for each image. Base class of the others.

    A new order is a subclass and a row of models.settings.ORDERS.
    """

    varies = (
        True  # whether images have different orders; a causal model is then told the next position
    )
    last = "the tokens that come last in it"  # what is filled in of an image in this order alone
    by_confidence = False  # whether `commit` chooses by confidence, which changes the orders

    def start(self, bsz, length, generator=None, device=None):
        """Orders (bsz, length)."""
        return rand((bsz, length), generator, device).argsort(dim=1, stable=True)

    def first_to_predict(self, remaining):
        """Index in the order of the first token to predict, when `remaining` stay unknown."""
        return remaining

    def commit(self, orders, sampled, unknown, remaining, confidence, done, generator=None):
        """The orders and the tokens (N, unknown − remaining, C) of `orders[:, remaining:unknown]`.

        sampled: predicted tokens (N, n, C). confidence: function of tokens that returns their
        log-probabilities (N, n). done: the fraction of steps done after this one.
        """
        return orders, sampled


class RasterOrder(RandomOrder):
    """Row by row from the top left."""

    varies = False
    last = "the tokens that come last in it, the rows at the bottom"

    def start(self, bsz, length, generator=None, device=None):
        return torch.arange(length - 1, -1, -1, device=device).expand(bsz, -1)


class ConfidenceOrder(RandomOrder):
    """Predict all unknown tokens and commit the most confident (MaskGIT; MAGE, section 3.2).

    Confidence is log p plus Gumbel noise whose scale decreases linearly to 0 over the steps.
    """

    by_confidence = True
    noise = 6.0  # as in MAGE; the paper does not state it

    def first_to_predict(self, remaining):
        return 0

    def commit(self, orders, sampled, unknown, remaining, confidence, done, generator=None):
        u = rand(sampled.shape[:2], generator, sampled.device).clamp(min=1e-20)
        gumbel = -(-u.log()).clamp(min=1e-20).log()
        scores = confidence(sampled) + self.noise * (1 - done) * gumbel
        ranked = scores.argsort(dim=1, stable=True)  # the most confident last
        orders = torch.cat([orders[:, :unknown].gather(1, ranked), orders[:, unknown:]], dim=1)
        kept = ranked[:, remaining:].unsqueeze(-1).expand(-1, -1, sampled.shape[-1])
        return orders, sampled.gather(1, kept)


def token_counts(schedule, length, num_iter):
    """The number of tokens still unknown after each of num_iter steps, strictly decreasing.

    schedule: a row of TOKEN_SCHEDULES; each step predicts at least one token regardless of it.
    """
    counts, remaining = [], length
    for k in range(1, num_iter):
        remaining = max(num_iter - k, min(remaining - 1, schedule(length, k, num_iter)))
        counts.append(remaining)
    return [*counts, 0]


def cosine(length, k, num_iter):
    """floor(L·cos(π/2·k/K)) tokens stay unknown after step k of K (paper, section 4)."""
    return math.floor(length * math.cos(math.pi / 2 * k / num_iter))


def uniform(length, k, num_iter):
    """ceil(L·(1 − k/K)) tokens stay unknown after step k of K: equally many per step."""
    return math.ceil(length * (num_iter - k) / num_iter)
