"""The order in which tokens are generated, and the number per step.

An order lists positions; its end is generated first. While m tokens are unknown, they are
`orders[:, :m]`: known tokens, unknown ones and those to predict are slices (the published layout).
An order may have stages, sets of tokens that follow one another; each has its share of the steps.
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
    learned = True  # whether a causal model can be trained in it
    last = "the tokens that come last in it"  # what is filled in of an image in this order alone
    by_confidence = False  # whether `commit` chooses by confidence, which changes the orders
    rates = (1,)  # tokens per step in each stage, relative to one another

    def start(self, bsz, grid, generator=None, device=None):
        """Orders (bsz, L) of the tokens of a grid (height, width)."""
        return rand((bsz, math.prod(grid)), generator, device).argsort(dim=1, stable=True)

    def stage(self, grid, device=None):
        """The stage (L,) in which each token of a grid (height, width) is generated, from 0."""
        return torch.zeros(math.prod(grid), dtype=torch.long, device=device)

    def sizes(self, mask):
        """Tokens to generate in each stage, counted: a tuple for each image. mask: (N, h, w)."""
        stage = self.stage(mask.shape[1:], mask.device)
        counts = [(mask.flatten(1) & (stage == number)).sum(1) for number in range(len(self.rates))]
        return [tuple(own) for own in torch.stack(counts, 1).tolist()]

    def counts(self, schedule, sizes, num_iter):
        """`token_counts` of the stages of these sizes, one after the other."""
        counts, unknown = [], sum(sizes)
        for size, steps in split_steps(sizes, self.rates, num_iter):
            unknown -= size
            counts += [unknown + rest for rest in token_counts(schedule, size, steps)]
        return counts

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

    def start(self, bsz, grid, generator=None, device=None):
        return torch.arange(math.prod(grid) - 1, -1, -1, device=device).expand(bsz, -1)


class SpreadOrder(RandomOrder):
    """Half of the tokens slowly, no two of them neighbours, then the rest fast.

    As GtR (Yan et al. 2025), without its choice of diffusion steps. Three stages by the sum of row
    and column: divisible by 4, the other even ones, odd; random within each. On a whole image they
    take 12, 3 and 1 of 16 steps, as GtR's rates for MAR.
    """

    learned = False  # without several tokens per step it gains nothing
    rates = (1, 4, 24)

    def start(self, bsz, grid, generator=None, device=None):
        orders = super().start(bsz, grid, generator, device)
        stages = self.stage(grid, device)[orders]
        return orders.gather(1, stages.argsort(dim=1, descending=True, stable=True))

    def stage(self, grid, device=None):
        row, column = (torch.arange(length, device=device) for length in grid)
        of_sum = torch.tensor([0, 2, 1, 2], device=device)  # of the sum modulo 4
        return of_sum[(row[:, None] + column) % 4].flatten()


class ConfidenceOrder(RandomOrder):
    """Predict all unknown tokens and commit the most confident (MaskGIT; MAGE, section 3.2).

    Confidence is log p plus Gumbel noise whose scale decreases linearly to 0 over the steps.
    """

    by_confidence = True
    learned = False
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


def split_steps(sizes, rates, num_iter):
    """(tokens, steps) of each stage that has tokens.

    Steps are in proportion to tokens / rate, but at least 1 and at most one a token. If there are
    more stages than steps, the first stages are one.
    """
    stages = [(size, size / rate) for size, rate in zip(sizes, rates, strict=True) if size]
    while len(stages) > num_iter:
        (first, own), (second, other), *rest = stages
        stages = [(first + second, own + other), *rest]
    unit = sum(share for _, share in stages) / num_iter
    steps = [1] * len(stages)
    for _ in range(num_iter - len(stages)):
        lacking = [
            share / unit - taken if taken < size else -math.inf
            for (size, share), taken in zip(stages, steps, strict=True)
        ]
        steps[lacking.index(max(lacking))] += 1
    return [(size, taken) for (size, _), taken in zip(stages, steps, strict=True)]


def cosine(length, k, num_iter):
    """floor(L·cos(π/2·k/K)) tokens stay unknown after step k of K (paper, section 4)."""
    return math.floor(length * math.cos(math.pi / 2 * k / num_iter))


def uniform(length, k, num_iter):
    """ceil(L·(1 − k/K)) tokens stay unknown after step k of K: equally many per step."""
    return math.ceil(length * (num_iter - k) / num_iter)


# the other schedules that MaskGIT compares (Chang et al. 2022), but for the logarithmic one


def square(length, k, num_iter):
    """floor(L·(1 − (k/K)²)) tokens stay unknown after step k of K: near `cosine`."""
    return math.floor(length * (1 - (k / num_iter) ** 2))


def exponential(length, k, num_iter):
    """floor(L·(1 − L^(k/K − 1))) tokens stay unknown after step k of K: few early, many late."""
    return math.floor(length * (1 - length ** (k / num_iter - 1)))


def root(length, k, num_iter):
    """floor(L·(1 − √(k/K))) tokens stay unknown after step k of K: many early, few late."""
    return math.floor(length * (1 - math.sqrt(k / num_iter)))
