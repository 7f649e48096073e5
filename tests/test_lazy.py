"""What sampling leaves out when asked to. Run: python -m pytest tests/test_lazy.py"""

import pytest
import torch
from rule import by_rule

from models import lazy
from models.ar import ar_tiny
from models.mar import mar_tiny
from util.rng import image_generators

SETTINGS = {"img_size": 64, "class_num": 10, "diffloss_d": 2, "diffloss_w": 64, "max_timestep": 950}


@pytest.fixture(scope="module")
def model():
    return by_rule(mar_tiny(buffer_size=8, num_sampling_steps="5", **SETTINGS)).double()


def sample(model, **kwargs):
    settings = {"num_iter": 8, "cfg": 2.0, "labels": torch.tensor([1, 2, 3])}
    generator = image_generators(0, range(3))
    return model.sample_tokens(3, **{"generator": generator, **settings, **kwargs})


def rms(a, b):
    return ((a - b).square().mean().sqrt() / b.std()).item()


def test_nothing_left_out_is_exact(model, monkeypatch):
    """With all tokens recomputed and no guidance, and where every step is a full one."""
    monkeypatch.setattr(lazy, "RECOMPUTED", 1.0)
    exact = sample(model, cfg=1.0)
    torch.testing.assert_close(sample(model, cfg=1.0, refresh_every=3), exact)
    monkeypatch.setattr(model, "start_cache", lambda: lazy.Lazy(1))
    torch.testing.assert_close(sample(model), sample(model, refresh_every=1))
    monkeypatch.undo()
    torch.testing.assert_close(sample(model), sample(model, refresh_every=1))


def test_fewer_tokens_and_streams_are_computed(model, monkeypatch):
    """Between full steps: one stream, and a part of the tokens behind the first block."""
    rows = []
    for block in model.decoder_blocks:
        block.mlp.register_forward_hook(lambda m, x, y: rows.append(tuple(y.shape[:2])))
    sample(model, refresh_every=4)
    steps = [rows[i : i + 2] for i in range(0, len(rows), 2)]
    assert [first for first, _ in steps] == [(6, 24), (3, 24), (3, 24), (3, 24)] * 2
    for k, (_, (streams, tokens)) in enumerate(steps):
        assert streams == (6 if k % 4 == 0 else 3)
        assert k % 4 == 0 or tokens < 12
    for block in model.decoder_blocks:
        block.mlp._forward_hooks.clear()


def test_it_is_near(model):
    """Nearer to exact samples than samples of other noise are, and nearer if refreshed more."""
    exact = sample(model)
    other = sample(model, generator=image_generators(9, range(3)))
    far = rms(other, exact)
    assert rms(sample(model, refresh_every=2), exact) < 0.5 * far
    assert rms(sample(model, refresh_every=2), exact) > 0


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
    """A stream that ends, and one that has not begun to matter, leave no gap in the cache."""
    model = by_rule(ar_tiny(num_sampling_steps="5", order="random", **SETTINGS)).double()
    cached = sample(model, num_iter=16, cfg_interval=(0.25, 0.6))
    monkeypatch.setattr(model, "start_cache", lambda: None)
    torch.testing.assert_close(cached, sample(model, num_iter=16, cfg_interval=(0.25, 0.6)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cfg_interval": (0.5, 0.5)}, r"cfg_interval 0\.5 0\.5: expected"),
        ({"cfg_interval": (-0.5, 0.5)}, r"cfg_interval -0\.5 0\.5: expected"),
        ({"refresh_every": 0}, "refresh_every 0: expected 1 or more"),
    ],
)
def test_wrong_settings(model, settings, message):
    """Refused when sampling starts, and before by check_sampling."""
    for refused in (model.check_sampling, lambda **kw: sample(model, **kw)):
        with pytest.raises(ValueError, match=message):
            refused(**settings)


def test_causal_models_refuse_it():
    """They have a cache of their own, which is exact."""
    model = by_rule(ar_tiny(num_sampling_steps="5", **SETTINGS))
    with pytest.raises(ValueError, match="refresh_every 2: AR knows only 1"):
        model.check_sampling(refresh_every=2)
