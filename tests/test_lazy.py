"""Sampling that leaves out what hardly changes. Run: python -m pytest tests/test_lazy.py"""

import itertools

import pytest
import torch
from rule import by_rule

from models.ar import ar_tiny
from models.fast import lazy
from models.mar import mar_tiny
from models.settings import Sampling
from util.rng import image_generators

SETTINGS = {"img_size": 64, "class_num": 10, "diffloss_d": 2, "diffloss_w": 64, "max_timestep": 950}


@pytest.fixture(scope="module")
def model():
    return by_rule(mar_tiny(buffer_size=8, num_sampling_steps="5", **SETTINGS)).double()


def sample(model, n=3, seed=0, **kwargs):
    settings = {"num_iter": 8, "cfg": 2.0, "labels": torch.arange(n) + 1}
    generator = image_generators(seed, range(n))
    return model.sample_tokens(n, **{"generator": generator, **settings, **kwargs})


def rms(a, b):
    return ((a - b).square().mean().sqrt() / b.std()).item()


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_every_step_a_full_one_is_exact(model, monkeypatch, cfg):
    """Where every step computes everything, samples are those of the model without a Lazy."""
    exact = sample(model, cfg=cfg)
    started = start_always(monkeypatch, model, refresh_every=1)
    torch.testing.assert_close(sample(model, cfg=cfg), exact)
    assert len(started) == 1 and started[0].features is not None


def test_all_tokens_recomputed_is_exact(model, monkeypatch):
    """Without guidance nothing else is left out."""
    exact = sample(model, cfg=1.0)
    assert rms(sample(model, cfg=1.0, refresh_every=3), exact) > 0.01
    monkeypatch.setattr(lazy, "RECOMPUTED", 1.0)
    torch.testing.assert_close(sample(model, cfg=1.0, refresh_every=3), exact)


def start_always(monkeypatch, model, refresh_every):
    """Have a Lazy also where the settings ask for none. Gives those that were started."""
    started = []

    def start(sampling):
        started.append(lazy.Lazy(refresh_every))
        return started[-1]

    monkeypatch.setattr(model, "start_cache", start)
    return started


def test_less_is_computed(model):
    """Between full steps: no unconditional half, and few of the tokens behind the first block."""
    rows, hooks = [], []
    for block in model.decoder_blocks:
        hook = block.mlp.register_forward_hook(lambda m, x, y: rows.append(tuple(y.shape[:2])))
        hooks.append(hook)
    sample(model, refresh_every=4)
    for hook in hooks:
        hook.remove()
    steps = [rows[i : i + 2] for i in range(0, len(rows), 2)]
    assert [first for first, _ in steps] == [(6, 24), (3, 24), (3, 24), (3, 24)] * 2
    for k, (_, (sequences, tokens)) in enumerate(steps):
        assert sequences == (6 if k % 4 == 0 else 3)
        assert k % 4 == 0 or tokens < 12


def test_it_is_near(model):
    """Nearer to exact samples than samples of other noise are, and nearer if refreshed more."""
    settings = {"n": 8, "num_iter": 16}
    exact = sample(model, **settings)
    far = rms(sample(model, seed=9, **settings), exact)
    errors = [rms(sample(model, refresh_every=every, **settings), exact) for every in (2, 4, 8, 16)]
    # measured: 0.11, 0.15, 0.22 and 0.39, where samples of other noise are 1.4 apart
    assert 0 < errors[0] < 0.2 * far and errors[-1] < 0.5 * far
    for oftener, rarer in itertools.pairwise(errors):
        assert 1.2 * oftener < rarer


@pytest.mark.parametrize("kind", ["mar", "ar"])
def test_guidance_interval(kind, model):
    """All of it is the whole; none of the steps inside is no guidance; a part is neither."""
    if kind == "ar":
        model = by_rule(ar_tiny(num_sampling_steps="5", order="random", **SETTINGS)).double()
    whole = sample(model, num_iter=16)
    assert torch.equal(sample(model, num_iter=16, cfg_interval=(0, 1)), whole)
    # step k of 16 begins when k / 16 are done: none in this interval
    none = sample(model, num_iter=16, cfg_interval=(0.51, 0.52))
    torch.testing.assert_close(none, sample(model, num_iter=16, cfg=1.0))
    part = sample(model, num_iter=16, cfg_interval=(0.25, 0.6))
    assert not torch.allclose(part, whole) and not torch.allclose(part, none)


def test_interval_of_a_causal_model_without_its_cache(monkeypatch):
    """An unconditional half that ends, or that guidance does not use yet, leaves no gap in it."""
    model = by_rule(ar_tiny(num_sampling_steps="5", order="random", **SETTINGS)).double()
    cached = sample(model, num_iter=16, cfg_interval=(0.25, 0.6))
    monkeypatch.setattr(model, "start_cache", lambda sampling: None)
    torch.testing.assert_close(cached, sample(model, num_iter=16, cfg_interval=(0.25, 0.6)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cfg_interval": (0.5, 0.5)}, r"cfg_interval 0\.5 0\.5: expected"),
        ({"cfg_interval": (-0.5, 0.5)}, r"cfg_interval -0\.5 0\.5: expected"),
        ({"refresh_every": 0}, "refresh_every 0: expected 1 or more"),
        (
            {"refresh_every": 2, "order": "confidence"},
            "order 'confidence': expected .* cross-entropy head",
        ),
    ],
)
def test_wrong_settings(model, settings, message):
    """Refused when sampling starts, and before by `check`."""
    with pytest.raises(ValueError, match=message):
        model.check(Sampling.of(**settings))
    with pytest.raises(ValueError, match=message):
        sample(model, **settings)


def test_causal_models_refuse_it():
    """They have a cache of their own, which is exact."""
    model = by_rule(ar_tiny(num_sampling_steps="5", **SETTINGS))
    with pytest.raises(ValueError, match="refresh_every 2: AR supports only 1"):
        model.check(Sampling(refresh_every=2))


def test_the_confidence_order_refuses_it():
    """There every unknown token is predicted at each step."""
    model = by_rule(mar_tiny(img_size=64, vae_embed_dim=1, num_codes=32, class_num=10))
    model.check(Sampling(order="confidence"))
    with pytest.raises(ValueError, match="refresh_every 2: expected 1 or more, and 1 for"):
        model.check(Sampling(order="confidence", refresh_every=2))
