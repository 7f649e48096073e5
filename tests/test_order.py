"""Orders of generation. Run: python -m pytest tests/test_order.py"""

import itertools
import math

import pytest
import torch
from rule import by_rule

from models.ar import ar_tiny
from models.mar import mar_tiny
from models.order import (
    ConfidenceOrder,
    RandomOrder,
    RasterOrder,
    SpreadOrder,
    cosine,
    exponential,
    root,
    split_steps,
    square,
    token_counts,
    uniform,
)
from models.settings import ORDERS, TOKEN_SCHEDULES
from util.rng import image_generators

CE = {"img_size": 64, "vae_embed_dim": 1, "num_codes": 32, "class_num": 10}


def test_raster_begins_at_the_top_left():
    """The end of an order is generated first."""
    orders = RasterOrder().start(2, (4, 4))
    assert orders[1].tolist() == list(range(15, -1, -1))


def test_one_token_per_step():
    """With K = L each step predicts one token."""
    assert token_counts(cosine, 16, 16) == list(range(15, -1, -1))


@pytest.fixture(scope="module")
def model():
    return by_rule(mar_tiny(**CE))


def steps_of(model, order, num_iter=4, n=3):
    return list(
        model.sample_steps(
            n,
            num_iter,
            labels=torch.arange(n),
            order=order,
            generator=image_generators(0, range(n)),
        )
    )


@pytest.mark.parametrize("order", ORDERS)
def test_known_tokens_stay_in_every_order(model, order):
    """What a step has generated is the same at the end, and the counts are the schedule's."""
    steps = steps_of(model, order)
    final = steps[-1][0]
    policy = ORDERS[order]()
    (size,) = {*policy.sizes(torch.ones(3, 4, 4, dtype=torch.bool))}
    counts = policy.counts(cosine, size, 4)
    for (latents, mask), remaining in zip(steps, counts, strict=True):
        known = mask.view(3, 1, 4, 4) == 0
        assert torch.equal(latents[known], final[known])
        assert (mask.sum(1) == remaining).all()


def test_raster_order_fills_rows(model):
    """After one of 16 steps the top left token is known, after six the first row and a half."""
    steps = steps_of(model, "raster", 16)
    assert (steps[5][1].argmin(1) == 0).all()
    assert (steps[5][1][:, :6] == 0).all() and (steps[5][1][:, 6:] == 1).all()


def test_confidence_keeps_the_most_confident():
    """Without noise, the tokens that are kept are those with the highest log p."""
    policy = ConfidenceOrder()
    policy.noise = 0.0
    orders = torch.tensor([[3, 1, 0, 2]])  # 2 is known, the others unknown
    sampled = torch.tensor([[[30.0], [10.0], [0.0]]])
    log_p = {30.0: -1.0, 10.0: -0.1, 0.0: -5.0}

    def log_probability(indices):
        return torch.tensor([[log_p[float(i)] for i in indices[0, :, 0]]])

    orders, kept = policy.commit(orders, sampled, 3, 1, log_probability, 0.5)
    assert orders.tolist() == [[0, 3, 1, 2]]
    assert kept[..., 0].tolist() == [[30.0, 10.0]]


def test_confidence_noise_is_annealed_to_zero():
    """At the last step there is none: confidence alone decides. Before, chance does too."""
    policy = ConfidenceOrder()
    orders, sampled = torch.arange(16).expand(64, -1), torch.arange(16.0).view(1, 16, 1)
    sampled = sampled.expand(64, -1, -1)

    def log_probability(indices):
        return indices[..., 0] / 16

    generator = torch.Generator().manual_seed(0)
    last, _ = policy.commit(orders, sampled, 16, 8, log_probability, 1.0, generator)
    assert torch.equal(last, orders)
    first, _ = policy.commit(orders, sampled, 16, 8, log_probability, 0.25, generator)
    assert len({tuple(o) for o in first[:, 8:].tolist()}) > 50


def test_confidence_needs_cross_entropy():
    """Diffusion Loss has no probability of a token to be confident of."""
    model = mar_tiny(img_size=64, class_num=10)
    with pytest.raises(ValueError, match="'confidence': expected .* MAR with DiffLoss"):
        model.sample_tokens(2, num_iter=4, order="confidence")


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_is_a_permutation(order):
    """At the start, and after each step that commits tokens; known positions stay."""
    for grid in ((1, 1), (1, 7), (5, 3), (6, 4)):
        started = ORDERS[order]().start(4, grid, image_generators(0, range(4)))
        expected = torch.arange(grid[0] * grid[1]).expand(4, -1)
        assert torch.equal(started.sort(1).values, expected)
    policy, unknown = ORDERS[order](), 16
    orders = policy.start(8, (4, 4), image_generators(0, range(8)))
    assert torch.equal(orders.sort(1).values, torch.arange(16).expand(8, -1))
    assert torch.equal(orders, policy.start(8, (4, 4), image_generators(0, range(8))))
    tokens = torch.zeros(8, 16, 1)
    for remaining in (15, 9, 3, 0):
        first, before = policy.first_to_predict(remaining), orders
        assert 0 <= first <= remaining
        sampled = orders[:, first:unknown].unsqueeze(-1).float()  # each token is its position
        orders, kept = policy.commit(
            orders,
            sampled,
            unknown,
            remaining,
            lambda tokens: -tokens[..., 0],
            0.5,
            image_generators(1, range(8)),
        )
        assert kept.shape == (8, unknown - remaining, 1)
        assert torch.equal(orders.sort(1).values, torch.arange(16).expand(8, -1))
        assert torch.equal(orders[:, unknown:], before[:, unknown:])
        tokens[:, remaining:unknown] = kept
        unknown = remaining
    assert torch.equal(tokens[..., 0].long(), orders)


def beside(mask):
    """Whether two neighbours, above or beside one another, are both in the mask (…, h, w)."""
    below, right = mask[..., 1:, :] & mask[..., :-1, :], mask[..., 1:] & mask[..., :-1]
    return bool(below.any() or right.any())


@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (3, 5), (1, 7), (2, 9)])
def test_the_spread_half_has_no_neighbours(grid):
    """It is at the end of the order, which is generated first; each half of it is a stage."""
    policy, length = SpreadOrder(), grid[0] * grid[1]
    orders = policy.start(16, grid, image_generators(0, range(16)))
    ((first, second, rest),) = {*policy.sizes(torch.ones(1, *grid, dtype=torch.bool))}
    assert first + second == math.ceil(length / 2) and rest == length // 2

    def taken(count):
        mask = torch.zeros(16, length, dtype=torch.bool)
        return mask.scatter(1, orders[:, length - count :], True).view(16, *grid)

    half = taken(first + second)
    assert (half == half[0]).all() and not beside(half) and not beside(~half)
    assert (taken(first) == taken(first)[0]).all()
    assert first == 1 or len({*map(tuple, orders.tolist())}) > 1  # random within a stage


def test_a_stage_has_its_share_of_the_steps():
    """GtR's 24, 6 and 2 of 32 steps; each has a step, and no more than tokens."""
    sizes, rates = (64, 64, 128), SpreadOrder.rates
    assert split_steps(sizes, rates, 32) == [(64, 24), (64, 6), (128, 2)]
    assert split_steps(sizes, rates, 2) == [(128, 1), (128, 1)]
    assert split_steps((4, 0, 5), rates, 9) == [(4, 4), (5, 5)]
    assert split_steps((0, 1, 30), rates, 8) == [(1, 1), (30, 7)]
    assert SpreadOrder().counts(uniform, sizes, 32)[-3:] == [128, 64, 0]
    assert RandomOrder().counts(cosine, (16,), 4) == token_counts(cosine, 16, 4)
    for sizes in ((7, 8, 14), (2, 0, 9), (0, 0, 3), (1, 1, 1)):
        for num_iter, schedule in itertools.product(range(1, sum(sizes) + 1), (cosine, root)):
            counts = SpreadOrder().counts(schedule, sizes, num_iter)
            assert len(counts) == num_iter and counts[-1] == 0
            assert all(a > b for a, b in itertools.pairwise([sum(sizes), *counts]))
            boundaries = {sizes[2], sizes[1] + sizes[2]} - {sum(sizes)}
            assert num_iter < 3 or boundaries <= {*counts}


def test_stages_of_partly_known_images(model):
    """Each image has its own: its spread tokens are all known before the first of the others is."""
    generators = image_generators(0, range(3))
    hidden = torch.ones(3, 16)
    hidden[0, [0, 2, 5, 9]] = 0  # 12 tokens, 5 of them spread
    hidden[1, [1, 3, 4, 6]] = 0  # 12 tokens, 8 of them spread
    hidden[2, 8:] = 0
    latents, even = torch.randint(32, (3, 1, 4, 4)), SpreadOrder().stage((4, 4)) < 2
    given = {"latents": latents, "mask": hidden, "generator": generators}
    steps = list(model.sample_steps(3, 5, order="spread", **given))
    for before, (_, after) in itertools.pairwise([(None, hidden), *steps]):
        for i in range(3):
            drawn = (before[1][i] - after[i]) > 0
            assert not drawn[even].any() or not drawn[~even].any()
            assert not drawn[~even].any() or not after[i][even].any()
    assert not steps[-1][1].any()
    known = hidden.view(3, 1, 4, 4) == 0
    assert torch.equal(steps[-1][0][known], latents[known])
    again = {**given, "generator": image_generators(0, [1])}
    again |= {"latents": latents[1:2], "mask": hidden[1:2]}
    alone = model.sample_tokens(1, num_iter=5, order="spread", **again)
    assert torch.equal(alone[0], steps[-1][0][1])


def test_given_orders_have_one_stage(model):
    """Whatever order the sampling names: the counts are the schedule's."""
    orders = torch.arange(16).expand(2, -1)
    given = {"orders": orders, "order": "spread", "generator": image_generators(0, range(2))}
    counts = [int(mask[0].sum()) for _, mask in model.sample_steps(2, 4, **given)]
    assert counts == token_counts(cosine, 16, 4)


def test_causal_models_and_the_spread_order():
    """One of random order can be sampled in it, a token per step; none is trained in it."""
    causal = by_rule(ar_tiny(**CE, order="random"))
    given = {"order": "spread", "generator": image_generators(0, range(2))}
    first = list(causal.sample_steps(2, 16, **given))[7][1].view(2, 4, 4) == 0
    assert first.sum() == 16 and not beside(first)
    with pytest.raises(ValueError, match="'spread': expected raster or random for a causal"):
        ar_tiny(**CE, order="spread")
    with pytest.raises(ValueError, match="learned the raster order only"):
        ar_tiny(**CE).sample_tokens(2, num_iter=16, order="spread")


def test_rows_are_classes():
    """An instance for each sampling: none sees what another keeps in its own."""
    assert all(isinstance(row, type) for _, row in ORDERS.rows())


@pytest.mark.parametrize("name", TOKEN_SCHEDULES)
@pytest.mark.parametrize("length", [1, 2, 16, 100, 256])
def test_every_schedule_falls_to_zero(name, length):
    """Strictly, from below the length, in as many steps as wanted."""
    for num_iter in range(1, length + 1):
        counts = token_counts(TOKEN_SCHEDULES[name], length, num_iter)
        assert len(counts) == num_iter and counts[-1] == 0
        assert all(before > after for before, after in itertools.pairwise([length, *counts]))


def test_schedules_differ_as_they_say():
    """The cosine one predicts few tokens at first, the uniform one as many at each step."""
    assert token_counts(uniform, 16, 4) == [12, 8, 4, 0]
    assert token_counts(uniform, 16, 3) == [11, 6, 0]
    assert token_counts(cosine, 16, 4) == [14, 11, 6, 0]
    assert token_counts(square, 16, 4) == [15, 12, 7, 0]
    assert token_counts(exponential, 16, 4) == [14, 12, 8, 0]
    assert token_counts(root, 16, 4) == [8, 4, 2, 0]


@pytest.mark.parametrize(("said", "first"), [(10**6, 15), (0, 12)])
def test_a_schedule_that_stalls_or_rushes(said, first):
    """Each step has a token to predict all the same."""
    counts = token_counts(lambda length, k, num_iter: said if k > 1 else first, 16, 5)
    assert counts == ([15, 14, 13, 12, 0] if said else [12, 3, 2, 1, 0])
