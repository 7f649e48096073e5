"""Orders of generation. Run: python -m pytest tests/test_order.py"""

import pytest
import torch
from rule import by_rule

from models.mar import mar_tiny
from models.order import ORDERS, token_counts
from util.rng import image_generators

CE = {"img_size": 64, "vae_embed_dim": 1, "num_codes": 32, "class_num": 10}


def test_raster_begins_at_the_top_left():
    """The end of an order is generated first."""
    orders = ORDERS["raster"].start(2, 16)
    assert orders[1].tolist() == list(range(15, -1, -1))


def test_one_token_a_step():
    """K = L asks for one token at each step."""
    assert token_counts(16, 16) == list(range(15, -1, -1))


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
    for (latents, mask), remaining in zip(steps, token_counts(16, 4), strict=True):
        known = mask.view(3, 1, 4, 4) == 0
        assert torch.equal(latents[known], final[known])
        assert (mask.sum(1) == remaining).all()


def test_raster_order_fills_rows(model):
    """After one of 16 steps the top left token is known, after six the first row and a half."""
    steps = steps_of(model, "raster", 16)
    assert (steps[5][1].argmin(1) == 0).all()
    assert (steps[5][1][:, :6] == 0).all() and (steps[5][1][:, 6:] == 1).all()


def test_confidence_keeps_the_most_confident():
    """Without noise, the tokens that settle are those with the highest log p."""
    policy = type(ORDERS["confidence"])()
    policy.noise = 0.0
    orders = torch.tensor([[3, 1, 0, 2]])  # 2 is known, the others unknown
    sampled = torch.tensor([[[30.0], [10.0], [0.0]]])
    log_p = {30.0: -1.0, 10.0: -0.1, 0.0: -5.0}

    def head(ids):
        return torch.tensor([[log_p[float(i)] for i in ids[0, :, 0]]])

    orders, kept = policy.settle(orders, sampled, 3, 1, head, 0.5)
    assert orders.tolist() == [[0, 3, 1, 2]]
    assert kept[..., 0].tolist() == [[30.0, 10.0]]


def test_confidence_noise_is_annealed_to_zero():
    """At the last step there is none: confidence alone decides. Before, chance does too."""
    policy = ORDERS["confidence"]
    orders, sampled = torch.arange(16).expand(64, -1), torch.arange(16.0).view(1, 16, 1)
    sampled = sampled.expand(64, -1, -1)

    def head(ids):
        return ids[..., 0] / 16

    generator = torch.Generator().manual_seed(0)
    last, _ = policy.settle(orders, sampled, 16, 8, head, 1.0, generator)
    assert torch.equal(last, orders)
    first, _ = policy.settle(orders, sampled, 16, 8, head, 0.25, generator)
    assert len({tuple(o) for o in first[:, 8:].tolist()}) > 50


def test_confidence_needs_cross_entropy():
    """Diffusion Loss has no probability of a token to be confident of."""
    model = mar_tiny(img_size=64, class_num=10)
    with pytest.raises(ValueError, match="'confidence': expected .* MAR with DiffLoss"):
        model.sample_tokens(2, num_iter=4, order="confidence")
