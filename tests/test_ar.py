"""Causal autoregression: causality, its cache, its sizes. Run: python -m pytest tests/test_ar.py"""

import pytest
import torch
from rule import by_rule, rule_input

from models import MODELS
from models.ar import ar_tiny
from models.autoregressive import take
from models.layers import KVCache
from models.settings import Sampling
from util.rng import image_generators

CONTINUOUS = {
    "img_size": 64,
    "class_num": 10,
    "diffloss_d": 2,
    "diffloss_w": 64,
    "num_sampling_steps": "6",
    "max_timestep": 950,
}
DISCRETE = {"img_size": 64, "class_num": 10, "vae_embed_dim": 1, "num_codes": 32}
KINDS = {
    "diffloss": CONTINUOUS,
    "l2": {**CONTINUOUS, "head": "l2"},
    "ce": DISCRETE,
}


def tiny(kind, order):
    return by_rule(ar_tiny(**KINDS[kind], order=order))


def latents_of(kind, n=3):
    if kind == "ce":
        draw = torch.Generator().manual_seed(0)
        return torch.randint(0, 32, (n, 1, 4, 4), generator=draw).float()
    return rule_input("latents", (n, 16, 4, 4))


@pytest.fixture(params=["raster", "random"])
def order(request):
    return request.param


@pytest.fixture(params=list(KINDS))
def kind(request):
    return request.param


def test_nothing_of_the_future_leaks(order, kind):
    """Changing token j changes no z at or before j's place in the order, and changes the next."""
    model = tiny(kind, order)
    tokens = model.patchify(latents_of(kind))
    orders = model.sample_orders(3, torch.Generator().manual_seed(1))
    classes = model.embed_labels(torch.tensor([1, 2, 3]), 3)
    with torch.no_grad():
        _, z = model.training_targets(tokens, orders, classes)
        for j in (0, 7, 14):
            other = tokens.clone()
            other[:, 15 - j] = 5  # tokens stand in the order of generation, the first at the end
            _, changed = model.training_targets(other, orders, classes)
            assert torch.equal(z[:, : j + 1], changed[:, : j + 1])
            moved = (z - changed).abs().amax(dim=(0, 2))
            assert (moved[j + 1 :] > 1e-4).all()


def test_the_position_to_predict_is_used():
    """In the random order, z depends on the position to predict; and on the class."""
    model = tiny("diffloss", "random")
    tokens = model.patchify(latents_of("diffloss"))
    orders = model.sample_orders(3, torch.Generator().manual_seed(1))
    tokens, to_predict = take(tokens, orders), slice(7, 8)
    swapped = orders.clone()
    swapped[:, [3, 7]] = orders[:, [7, 3]]
    classes = model.embed_labels(torch.tensor([1, 2, 3]), 3)
    with torch.no_grad():
        z = model.predict(tokens, orders, to_predict, classes)
        elsewhere = model.predict(tokens, swapped, to_predict, classes)
        other_class = model.predict(tokens, orders, to_predict, classes.roll(1, 0))
    assert not torch.allclose(z, elsewhere, atol=1e-3)
    assert not torch.allclose(z, other_class, atol=1e-3)


def test_training_is_predicting(order, kind):
    """z of the whole sequence at once is z of each place in turn, from what is known then."""
    model = tiny(kind, order)
    tokens = model.patchify(latents_of(kind))
    orders = model.sample_orders(3, torch.Generator().manual_seed(1))
    classes = model.embed_labels(torch.tensor([1, 2, 3]), 3)
    with torch.no_grad():
        target, z = model.training_targets(tokens, orders, classes)
        assert torch.equal(target, tokens.flip(1))
        for unknown in (16, 9, 1):
            one = model.predict(tokens, orders, slice(unknown - 1, unknown), classes)
            torch.testing.assert_close(one[:, 0], z[:, 16 - unknown], atol=1e-5, rtol=1e-5)


def test_cache_changes_no_z(order, kind):
    """Step by step, z with the cache is z without it, to 1e-5."""
    model = tiny(kind, order)
    tokens = model.patchify(latents_of(kind))
    orders = model.sample_orders(3, torch.Generator().manual_seed(1))
    classes, cache = model.embed_labels(torch.tensor([1, 2, 3]), 3), model.start_cache(Sampling())
    with torch.no_grad():
        for unknown in range(12, 0, -1):  # four tokens are given at the start
            to_predict = slice(unknown - 1, unknown)
            cached = model.predict(tokens, orders, to_predict, classes, cache)
            plain = model.predict(tokens, orders, to_predict, classes)
            torch.testing.assert_close(cached, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_cache_changes_no_sample(order, kind, cfg, monkeypatch):
    """Whole samples, with guidance. In float64: 16 steps of a random network would magnify the
    rounding of float32, which the order of its sums decides, by as many times."""
    model = tiny(kind, order).double()

    def draw():
        return model.sample_tokens(
            3,
            num_iter=16,
            cfg=cfg,
            labels=torch.tensor([1, 2, 3]),
            generator=image_generators(0, range(3)),
        )

    cached = draw()
    monkeypatch.setattr(model, "start_cache", lambda sampling: None)
    torch.testing.assert_close(cached, draw(), atol=1e-5, rtol=1e-5)


def test_cache_is_allocated_once(monkeypatch):
    """One tensor for all blocks, keys, values and steps, of exactly the size that is needed."""
    model, caches = tiny("diffloss", "random"), []

    def start(sampling):
        caches.append(Counting(len(model.blocks), model.seq_len))
        return caches[-1]

    monkeypatch.setattr(model, "start_cache", start)
    model.sample_tokens(2, num_iter=16, cfg=2.0, labels=torch.tensor([1, 2]))
    (cache,) = caches
    assert cache.allocations == 1 and cache.length == 16
    # keys and values, 4 blocks, 2 images with and without class, 4 heads, 16 tokens, 16 channels
    assert cache.held.shape == (2, 4, 4, 4, 16, 16)


class Counting(KVCache):
    allocations = 0

    def __setattr__(self, name, value):
        if name == "held" and value is not None:
            self.allocations += 1
        super().__setattr__(name, value)


def test_one_batch_equals_many(order):
    """Image i is the same alone and in a batch."""
    model = tiny("diffloss", order)

    def images(indices):
        return model.sample_tokens(
            len(indices),
            num_iter=16,
            labels=torch.tensor([1, 4, 7])[indices],
            generator=image_generators(3, indices),
        )

    together = images([0, 1, 2])
    for part in ([0], [2, 1]):
        torch.testing.assert_close(images(part), together[part], atol=1e-4, rtol=1e-4)


def test_every_parameter_gets_a_gradient(order, kind):
    """One training step reaches all of them."""
    torch.manual_seed(0)
    model = ar_tiny(**KINDS[kind], order=order, label_drop_prob=0.5).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model(latents_of(kind, 8), torch.arange(8)).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_sizes_are_those_of_the_bidirectional_models(size):
    """As many parameters within 3%, head included, with the heads of the published models."""
    depth, width = {"base": (6, 1024), "large": (8, 1280), "huge": (12, 1536)}[size]
    counts = []
    with torch.device("meta"):
        for name in (f"ar_{size}", f"mar_{size}"):
            model = MODELS[name](diffloss_d=depth, diffloss_w=width)
            counts.append(sum(p.numel() for p in model.parameters()))
    assert abs(counts[0] / counts[1] - 1) < 0.03


def test_filling_in(order):
    """Given tokens stay; the raster model takes only those that come first in its order."""
    model = tiny("diffloss", order)
    latents, mask = latents_of("diffloss"), torch.ones(3, 4, 4)
    mask[:, :2] = 0
    settings = {"num_iter": 8, "labels": torch.tensor([1, 2, 3]), "latents": latents}
    filled = model.sample_tokens(3, mask=mask, **settings)
    assert torch.equal(filled[:, :, :2], latents[:, :, :2])
    assert not torch.allclose(filled[:, :, 2:], latents[:, :, 2:])
    if order == "raster":
        with pytest.raises(ValueError, match="learned the raster order only"):
            model.sample_tokens(3, mask=mask.flip(1), **settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_iter": 8}, "num_iter 8: expected 16, causal attention gives one token per step"),
        ({"order": "random"}, "order random: this model learned the raster order only"),
        ({"order": "confidence"}, "'confidence': expected a bidirectional model"),
        ({"order": "spiral"}, "order 'spiral': expected one of random, raster, spread"),
    ],
)
def test_wrong_sampling_arguments(arguments, message):
    """What a causal model cannot do is said."""
    with pytest.raises(ValueError, match=message):
        tiny("diffloss", "raster").sample_tokens(2, **{"num_iter": 16, **arguments})


def test_wrong_construction():
    """An order of training that does not exist, and heads that do not fit the tokenizer."""
    with pytest.raises(ValueError, match="order 'confidence': expected raster or random"):
        ar_tiny(**CONTINUOUS, order="confidence")
    with pytest.raises(ValueError, match="head 'ce': the tokenizer is continuous, expected diffl"):
        ar_tiny(**CONTINUOUS, head="ce")
    with pytest.raises(ValueError, match="head 'l2': the tokenizer is discrete, expected ce"):
        ar_tiny(**DISCRETE, head="l2")
    with pytest.raises(ValueError, match="patch_size 2, vae_embed_dim 1: expected 1 and 1"):
        ar_tiny(**DISCRETE, patch_size=2)
