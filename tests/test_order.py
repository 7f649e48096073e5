"""Orders of generation. Run: python -m pytest tests/test_order.py"""

import itertools

import pytest
import torch
from rule import by_rule

from models.mar import mar_tiny
from models.order import ConfidenceOrder, RasterOrder, cosine, token_counts, uniform
from models.settings import ORDERS, TOKEN_SCHEDULES
from util.rng import image_generators

CE = {"img_size": 64, "vae_embed_dim": 1, "num_codes": 32, "class_num": 10}


def test_raster_begins_at_the_top_left():
    """The end of an order is generated first."""
    orders = RasterOrder().start(2, 16)
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
    for (latents, mask), remaining in zip(steps, token_counts(cosine, 16, 4), strict=True):
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
    policy, unknown = ORDERS[order](), 16
    orders = policy.start(8, 16, image_generators(0, range(8)))
    assert torch.equal(orders.sort(1).values, torch.arange(16).expand(8, -1))
    assert torch.equal(orders, policy.start(8, 16, image_generators(0, range(8))))
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


@pytest.mark.parametrize(("said", "first"), [(10**6, 15), (0, 12)])
def test_a_schedule_that_stalls_or_rushes(said, first):
    """Each step has a token to predict all the same."""
    counts = token_counts(lambda length, k, num_iter: said if k > 1 else first, 16, 5)
    assert counts == ([15, 14, 13, 12, 0] if said else [12, 3, 2, 1, 0])
