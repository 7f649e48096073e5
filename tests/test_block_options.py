"""Options of the blocks, and noise on known tokens. Run: pytest tests/test_block_options.py"""

import pytest
import torch
from rule import by_rule, rule_input
from torch.nn import functional as F

from models.ar import ar_tiny
from models.fast import lazy
from models.layers import Attention, Block, Blocks
from models.mar import mar_tiny
from models.rope import rotate, rotations
from models.settings import MODELS, Sampling
from util.rng import image_generators

ALL = {"qk_norm": True, "rope": True, "swiglu": True, "mlp_dropout": 0.3}
TINY = {"img_size": (64, 96), "class_num": 10, "diffloss_d": 1, "diffloss_w": 32}  # 4×6 tokens
TINY |= {"max_timestep": 950, "num_sampling_steps": "4"}
GRID, DEPTH, WIDTH, HEADS = (3, 4), 3, 32, 4


def blocks(causal=False, **options):
    options = {"rope": GRID, "qk_norm": True, "swiglu": True, **options}
    return by_rule(Blocks(DEPTH, WIDTH, HEADS, causal, **options)).double()


def mar(**options):
    return by_rule(mar_tiny(buffer_size=8, **{**TINY, **ALL, **options})).double()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def x():
    """Two class tokens and nine of the twelve tokens, in an order of their own for each image."""
    return rule_input("x", (2, 11, WIDTH)).double()


@pytest.fixture
def positions():
    return torch.rand(2, 12, generator=generator()).argsort(1)[:, :9]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# ---- rotary positions ----------------------------------------------------------------------------


def test_the_angles():
    """Pairs of numbers turn by the row, then by the column, times 1 for the first of each."""
    cells = torch.arange(12).view(1, 12)
    turned = rotate(torch.tensor([1.0, 0, 1, 0]).expand(1, 1, 12, 4), rotations(cells, 12, GRID, 4))
    for cell, values in enumerate(turned[0, 0]):
        row, column = torch.tensor(divmod(cell, 4))
        torch.testing.assert_close(
            values, torch.stack([row.cos(), row.sin(), column.cos(), column.sin()])
        )
    slow = rotate(
        torch.tensor([0.0, 0, 1, 0] * 2).expand(1, 1, 12, 8), rotations(cells, 12, GRID, 8)
    )
    assert slow[0, 0, 4, 3].item() == pytest.approx(torch.tensor(0.1).sin())  # 100^(−1/2), row 1


def test_scores_depend_on_relative_positions():
    """A shift of all tokens changes no product of a query and a key; another distance does."""
    q, k = rule_input("qk", (2, 1, 2, 1, 8))
    grid = 6, 5

    def score(query, key):
        a, b = (rotations(torch.tensor([[r * 5 + c]]), 1, grid, 8) for r, c in (query, key))
        return (rotate(q, a) * rotate(k, b)).sum(-1)

    first = score((1, 0), (3, 1))
    torch.testing.assert_close(score((3, 3), (5, 4)), first, atol=1e-5, rtol=1e-5)
    for other in ((3, 0), (2, 1)):
        assert (score((1, 0), other) - first).abs().min() > 1e-3


def test_class_tokens_are_not_rotated(x, positions):
    """What stands before the tokens is as it was, and so is their length."""
    turned = rotate(x[:, None], rotations(positions + 1, 11, (4, 4), WIDTH))[:, 0]
    assert torch.equal(turned[:, :2], x[:, :2])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert (turned - x)[:, 2:].abs().amax(-1).min() > 1e-2


def test_tokens_in_another_order(x, positions):
    """The same tokens at the same places, listed otherwise, give the same; elsewhere not."""
    model, order = blocks(), torch.tensor([3, 0, 8, 1, 2, 7, 4, 6, 5])
    swapped = torch.cat([x[:, :2], x[:, 2:][:, order]], 1)
    expected = model(x, positions=positions)
    found = model(swapped, positions=positions[:, order])
    torch.testing.assert_close(found[:, 2:], expected[:, 2:][:, order])
    torch.testing.assert_close(found[:, :2], expected[:, :2])
    assert (model(x, positions=positions.flip(1)) - expected).abs().max() > 1e-3


def test_each_image_has_its_own_positions(x, positions):
    """And with guidance, where images are there twice, both halves have them."""
    model = blocks()
    both = model(torch.cat([x, 2 * x]), positions=positions)
    for i in (0, 1):
        alone = model(torch.stack([x[i], 2 * x[i]]), positions=positions[i : i + 1])
        torch.testing.assert_close(both[i::2], alone)


# ---- every path gives the same -------------------------------------------------------------------


@pytest.mark.parametrize("rows", [slice(2, 5), slice(7, 11)])
def test_rows_are_those_of_the_whole(x, positions, rows):
    """With `rows` the last block gives only those, as among all."""
    model = blocks()
    whole = model(x, positions=positions)
    torch.testing.assert_close(model(x, rows, positions=positions), whole[:, rows])


def test_the_cache_of_a_causal_model():
    """Step by step, z with the cache is z without it, each image in its own order."""
    model = by_rule(ar_tiny(order="random", **TINY, **ALL)).double()
    tokens = rule_input("tokens", (2, 24, 16)).double()
    orders = model.sample_orders(2, generator())
    classes, cache = model.embed_labels(torch.tensor([1, 2]), 2), model.start_cache(Sampling())
    both = torch.cat([classes, model.embed_labels(None, 2)])
    _, trained = model.training_targets(tokens, orders, classes)
    for unknown in range(20, 12, -1):  # four tokens are given at the start
        given = tokens, orders, slice(unknown - 1, unknown), both
        cached = model.predict(*given, cache)
        torch.testing.assert_close(cached, model.predict(*given))
        torch.testing.assert_close(cached[:2, 0], trained[:, 24 - unknown])


@pytest.mark.parametrize("every", [1, 3])
def test_the_lazy_path(monkeypatch, every):
    """With all tokens recomputed, samples are those of the model without a Lazy."""
    model = mar()

    def sample():
        labels, draws = torch.arange(2), image_generators(0, range(2))
        cfg = 2.0 if every == 1 else 1.0
        return model.sample_tokens(2, num_iter=4, cfg=cfg, labels=labels, generator=draws)

    exact = sample()
    monkeypatch.setattr(model, "start_cache", lambda sampling: lazy.Lazy(every))
    monkeypatch.setattr(lazy, "RECOMPUTED", 1.0)
    torch.testing.assert_close(sample(), exact)


def test_the_bucketed_encoder():
    """Filled up with hidden tokens, as under --compile, it gives the same z."""
    model = mar(rope=True)
    tokens, orders = rule_input("tokens", (2, 24, 16)).double(), model.sample_orders(2, generator())
    given = tokens, orders, slice(0, 13), model.embed_labels(torch.tensor([1, 2]), 2)
    torch.testing.assert_close(model._predict_in_buckets(*given), model.predict(*given))


def test_under_autocast():
    """In bf16 as well, with the cache: queries, keys and values have one dtype."""
    model = mar().float()
    with torch.autocast("cpu", torch.bfloat16):
        model.sample_tokens(2, num_iter=4, cfg=2.0, labels=torch.arange(2), refresh_every=2)


# ---- each option ---------------------------------------------------------------------------------


def test_off_is_as_it_was():
    """No parameter is added, and rotary positions and dropout add none when they are on."""
    names = {}
    for name in ("mar_tiny", "ar_tiny"):
        for options in ({}, {"rope": True, "mlp_dropout": 0.0, "known_noise": 0.5}, ALL):
            model = MODELS[name](**TINY, **options)
            assert not list(model.buffers())  # which --fsdp does not shard
            names[len(options)] = {n: p.shape for n, p in model.named_parameters()}
        assert names[0] == names[3]
        added = names[4].keys() - names[0].keys()
        assert len(added) == 2 * 4 and {names[4][n] for n in added} == {(16,)}


@pytest.mark.parametrize("width", [64, 128, 256, 768, 1024, 1280])
def test_gated_mlps_are_as_large(width):
    """Of about as many parameters, and of a width that is a multiple of 8."""
    with torch.device("meta"):
        plain, gated = (Block(width, 4, causal=False, swiglu=on).mlp for on in (False, True))
    counts = [sum(p.numel() for p in mlp.parameters()) for mlp in (plain, gated)]
    assert abs(counts[1] / counts[0] - 1) < 0.02
    assert gated.fc2.in_features % 8 == 0


def test_a_gated_mlp():
    """(SiLU(xW) ⊙ xV)U, with biases."""
    mlp, x = (
        by_rule(Block(WIDTH, HEADS, causal=False, swiglu=True)).mlp,
        rule_input("x", (5, WIDTH)),
    )
    gate, value = F.linear(x, mlp.fc1.weight, mlp.fc1.bias).chunk(2, -1)
    expected = F.linear(F.silu(gate) * value, mlp.fc2.weight, mlp.fc2.bias)
    torch.testing.assert_close(mlp(x), expected)


def test_normalized_queries_and_keys(x):
    """Their scale has no effect, which without the norm it has."""
    for qk_norm in (True, False):
        attention = by_rule(Attention(WIDTH, HEADS, causal=False, qk_norm=qk_norm)).double()
        before = attention(x)
        for parameter in attention.qkv.parameters():
            parameter[: 2 * WIDTH] *= 3
        change = (attention(x) - before).abs().max()
        assert change < 1e-5 if qk_norm else change > 1e-2


def test_dropout_of_mlps():
    """That of the projections, unless it is given."""
    for given, expected in ((None, 0.2), (0.0, 0.0), (0.5, 0.5)):
        block = Block(WIDTH, HEADS, causal=False, proj_dropout=0.2, mlp_dropout=given)
        assert block.mlp.drop1.p == block.mlp.drop2.p == expected
        assert block.attn.proj_drop.p == 0.2


# ---- noise on known tokens -----------------------------------------------------------------------


def test_the_noise():
    """(1 − t)x + tε, with t up to the rate and one for each image; none outside of training."""
    model = mar_tiny(**TINY, known_noise=0.5)
    tokens = torch.full((400, 24, 16), 8.0)
    noisy = model.train().with_noise(tokens, generator())
    kept = noisy.mean((1, 2)) / 8
    t = (1 - kept)[:, None, None]
    assert 0.49 < kept.min() < 0.52 and 0.98 < kept.max() < 1.01 and abs(kept.mean() - 0.75) < 0.03
    noise = (noisy - (1 - t) * tokens) / t
    assert abs(noise[t.flatten() > 0.1].std() - 1) < 0.02
    assert model.eval().with_noise(tokens) is tokens


@pytest.mark.parametrize("build", [mar_tiny, ar_tiny])
def test_only_what_is_known_is_noisy(build):
    """Targets stay; with a rate of 0 nothing is drawn."""
    tokens, draws = rule_input("tokens", (3, 24, 16)), [generator() for _ in range(2)]
    zs = []
    for rate, draw in zip((0.0, 0.8), draws, strict=True):
        model = by_rule(build(**TINY, known_noise=rate, attn_dropout=0.0, proj_dropout=0.0))
        orders, classes = model.sample_orders(3, generator()), model.embed_labels(None, 3)
        steps = generator(3)  # of which MAR keeps some tokens
        targets, z = model.train().training_targets(tokens, orders, classes, draw, steps)
        count = targets.shape[1]
        assert torch.equal(targets, tokens[:, :count] if build is mar_tiny else tokens.flip(1))
        zs.append(z)
    assert torch.equal(draws[0].get_state(), generator().get_state())
    assert not torch.allclose(*zs, atol=1e-2)


def test_noisy_tokens_have_the_norm_of_sampled_ones():
    """Where latents have one."""
    model = mar_tiny(**TINY, known_noise=0.5, token_norm=True).train()
    noisy = model.with_noise(rule_input("tokens", (3, 24, 16)), generator())
    torch.testing.assert_close(noisy.norm(dim=-1), torch.full((3, 24), 4.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"known_noise": 1.5}, "known_noise 1.5: expected a number from 0 to 1"),
        (
            {"known_noise": 0.1, "vae_embed_dim": 1, "num_codes": 8},
            "known_noise 0.1: expected 0 for code indices",
        ),
        ({"rope": True, "encoder_num_heads": 32}, "rope: heads of 2 numbers, expected a multiple"),
    ],
)
def test_wrong_options(options, message):
    """Refused in one line when a model is built."""
    with pytest.raises(ValueError, match=message):
        mar_tiny(**{**TINY, **options})
