"""Blocks, their attention and their cache. Run: python -m pytest tests/test_layers.py"""

import itertools

import pytest
import torch
from rule import by_rule, rule_input
from torch.nn.functional import scaled_dot_product_attention

import models.layers
from models.fast.attention import attention
from models.fast.lazy import Lazy
from models.layers import Attention, Blocks, KVCache

WIDTH, HEADS, DEPTH, LENGTH = 32, 4, 3, 10


def blocks(causal=False, **options):
    return by_rule(Blocks(DEPTH, WIDTH, HEADS, causal, **options))


@pytest.fixture
def x():
    return rule_input("x", (2, LENGTH, WIDTH))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [slice(0, 3), slice(4, 5), slice(7, LENGTH)])
def test_rows_are_those_of_the_whole(x, rows):
    """With `rows` the last block gives only those, with the values that it gives them among all."""
    model = blocks()
    seen = []
    model[-1].mlp.register_forward_hook(lambda m, x, y: seen.append(y.shape[1]))
    close(model(x, rows), model(x)[:, rows])
    assert seen == [rows.stop - rows.start, LENGTH]


def test_parts_make_the_whole(x):
    """The first blocks, then the rest."""
    model = blocks()
    close(model(model(x, last=1), first=1), model(x))
    close(model(model(x, slice(2, 4), last=2), slice(2, 4), first=2), model(x, slice(2, 4)))
    assert torch.equal(model(x, last=0), x)


def test_a_hidden_key_is_not_seen(x):
    """In a mask 1 is hidden: what is there changes nothing elsewhere; what is at a 0 does."""
    attention = by_rule(Attention(WIDTH, HEADS, causal=False))
    mask = torch.zeros(LENGTH, dtype=torch.bool)
    mask[3] = 1
    mask = mask.view(1, 1, 1, -1)
    others = torch.arange(LENGTH) != 3
    hidden, seen = x.clone(), x.clone()
    hidden[:, 3] += 1
    seen[:, 4] += 1
    before = attention(x, mask=mask)
    assert torch.equal(attention(hidden, mask=mask)[:, others], before[:, others])
    assert (attention(seen, mask=mask) - before).abs().amax(-1).gt(1e-4).all()
    close(attention(x[:, others]), before[:, others])  # as if it were not there
    none = torch.zeros_like(mask)
    close(attention(x, mask=none), attention(x))


def test_blocks_hand_the_mask_on(x):
    """To every block: masked tokens are seen by none of the others."""
    model, hidden = blocks(), x.clone()
    hidden[:, :2] = 9.0
    mask = (torch.arange(LENGTH) < 2).view(1, 1, 1, -1)
    assert torch.equal(model(hidden, mask=mask)[:, 2:], model(x, mask=mask)[:, 2:])
    close(model(x, mask=mask)[:, 2:], model(x[:, 2:]))


def test_causal_blocks_see_the_past_alone(x):
    """Changing token j changes it and those after it."""
    model = blocks(causal=True)
    for j in (0, 4, LENGTH - 1):
        other = x.clone()
        other[:, j, 0] += 5  # a constant in all channels would fall to the LayerNorm
        change = (model(other) - model(x)).abs().amax(dim=(0, 2))
        assert change[:j].eq(0).all() and change[j:].gt(1e-4).all()


@pytest.mark.parametrize("parts", [[1] * LENGTH, [4, 1, 5], [LENGTH]])
def test_with_a_cache(x, parts):
    """However many tokens are new at once, they are what they are without it."""
    model, cache = blocks(causal=True), KVCache(DEPTH, LENGTH)
    ends = [0, *itertools.accumulate(parts)]
    outputs = [model(x[:, a:b], cache=cache) for a, b in itertools.pairwise(ends)]
    close(torch.cat(outputs, dim=1), model(x))
    assert cache.length == LENGTH
    with pytest.raises(AssertionError, match="11 tokens in a cache of 10"):
        model(x[:, :1], cache=cache)


def keys(n, length=4, first=0):
    values = torch.arange(first, first + n * length, dtype=torch.float32)
    return values.view(n, 1, length, 1).expand(-1, 2, -1, 3)


def test_the_verb_of_a_kv_cache():
    """`append` gives all keys and values so far, each block's own; `keep` drops sequences."""
    cache = KVCache(2, 8)
    for block in (0, 1):
        k, v = cache.append(block, keys(4, first=block), -keys(4, first=block))
        assert torch.equal(k, keys(4, first=block)) and torch.equal(v, -k)
    assert cache.length == 4
    cache.keep(2)
    for block in (0, 1):
        k, v = cache.append(block, keys(2, 1, 50), -keys(2, 1, 50))
        before = keys(4, first=block)[:2]
        assert torch.equal(k, torch.cat([before, keys(2, 1, 50)], dim=2)) and torch.equal(v, -k)
    assert cache.length == 5


def test_the_verb_of_a_lazy_cache():
    """`append` is called in the same way: it replaces the chosen rows, each block's own."""
    cache = Lazy(2)
    cache.features = torch.zeros(2, 4, 1)
    for block in (0, 1):  # a full step, in which the unconditional half is not kept
        k, v = cache.append(block, keys(4, first=block), -keys(4, first=block))
        assert torch.equal(k, keys(4, first=block)) and torch.equal(v, -k)
    cache.chosen = torch.tensor([[1, 3], [0, 2]])
    new = keys(2, 2, 50)  # 50 and 51 of the first sequence, 52 and 53 of the second
    for block in (0, 1):
        k, v = cache.append(block, new, -new)
        expected = torch.tensor([[0.0, 50, 2, 51], [52, 5, 53, 7]])
        expected += block * (expected < 50)
        assert torch.equal(k, expected.view(2, 1, 4, 1).expand(-1, 2, -1, 3))
        assert torch.equal(v, -k)


@pytest.mark.parametrize("rows", [None, slice(2, 5)])
def test_checkpointing_changes_no_number(x, rows, monkeypatch):
    """Neither outputs nor gradients, dropout included; and it is done in training alone."""
    calls, checkpoint = [], models.layers.checkpoint

    def counted(*args, **kwargs):
        calls.append(1)
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr(models.layers, "checkpoint", counted)
    results = []
    for grad_checkpointing in (False, True):
        model = blocks(grad_checkpointing=grad_checkpointing, attn_dropout=0.2, proj_dropout=0.2)
        model.train()
        torch.manual_seed(0)
        with torch.enable_grad():
            y = model(x, rows)
            y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters())])
        assert len(calls) == (DEPTH if grad_checkpointing else 0)
    for plain, checkpointed in zip(*results, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-6)
    model.eval()
    with torch.enable_grad():
        model(x)
    assert len(calls) == DEPTH


def test_heads_divide_the_width():
    """Refused otherwise, with both numbers."""
    with pytest.raises(ValueError, match="width 30: expected a multiple of the 4 heads"):
        Attention(30, 4, causal=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision_is_that_of_float32(dtype):
    """On a CPU, rounded once, under autocast too, with a mask and without."""
    q, k, v = rule_input("qkv", (3, 2, HEADS, LENGTH, 8)).to(dtype)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    for seen, causal in ((None, False), (mask, False), (None, True)):
        expected = scaled_dot_product_attention(
            q.float(), k.float(), v.float(), seen, is_causal=causal
        ).to(dtype)
        with torch.autocast("cpu", dtype):
            assert torch.equal(attention(q, k, v, seen, causal=causal), expected)
