"""Dropout, and attention with it, on a CPU. Run: python -m pytest tests/test_dropout.py"""

import pytest
import torch
from rule import by_rule, rule_input
from torch.nn import functional as F

from models.fast import attention, dropout
from models.fast.dropout import Dropout, drop
from models.layers import Blocks


@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_dropout(monkeypatch, causal):
    """The output and gradients are torch's, for the same mask: here one that both are given."""
    mask = (torch.arange(2 * 4 * 7 * 7).view(2, 4, 7, 7) % 5 > 0) / 0.8
    monkeypatch.setattr(attention, "drop", lambda weights, rate: mask)
    found = []
    for given in (True, False):
        q, k, v = (rule_input(f"drop/{x}", (2, 4, 7, 8)).requires_grad_() for x in "qkv")
        if given:
            out = attention.attention(q, k, v, None, 0.2, causal)
        else:
            hidden = torch.full((7, 7), -torch.inf).triu(1) if causal else 0.0
            out = ((q @ k.mT / 8**0.5 + hidden).softmax(-1) * mask) @ v
        out.square().sum().backward()
        found.append([out.detach(), q.grad, k.grad, v.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    monkeypatch.setattr(attention, "drop", lambda weights, rate: 1.0)
    torch.testing.assert_close(attention.attention(q, k, v, None, 0.2, causal), exact)


def test_where_masks_are_cheap(monkeypatch):
    """In blocks that are trained on a CPU, in any dtype; not in sampling or under transforms."""
    calls = []
    for module in (attention, dropout):
        monkeypatch.setattr(module, "drop", lambda x, rate: calls.append(x.dtype) or 1.0)
    model = by_rule(Blocks(1, 32, 4, attn_dropout=0.3, proj_dropout=0.2)).train()
    x = rule_input("backward/x", (3, 7, 32))
    model(x)
    assert calls == [torch.float32] * 4  # attention, its projection, two layers
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert calls[4:] == [torch.float32] + [torch.bfloat16] * 3
    torch.func.grad(lambda x: model(x).sum())(x)
    model.eval()(x)
    assert len(calls) == 8


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.97])
def test_statistics_of_dropout(rate):
    """The rate, and elements independent of each other and of the next mask; seeds repeat them."""
    torch.manual_seed(0)
    x = torch.ones(401, 501)
    masks = [drop(x, rate) for _ in range(2)]
    n, std = x.numel(), (rate / (1 - rate)) ** 0.5
    for mask in masks:
        torch.testing.assert_close(mask.unique(), torch.tensor([0, 1 / (1 - rate)]))
        assert abs(mask.mean().item() - 1) < 5 * std / n**0.5
    flat, other = (((mask - 1) / std).flatten() for mask in masks)
    pairs = [(flat, other), *((flat[k:], flat[:-k]) for k in (1, 2, 3, 4, 8, 501))]
    for a, b in pairs:  # each correlation has standard error 1 / √n
        assert abs((a * b).mean().item()) < 5 / n**0.5
    torch.manual_seed(0)
    assert torch.equal(drop(x, rate), masks[0])


def test_dropout_keeps_the_mean():
    """What is kept is scaled, and the gradient is that of what was kept."""
    torch.manual_seed(0)
    module, x = Dropout(0.25), torch.ones(301, 303, requires_grad=True)
    y = module(x)
    y.square().sum().backward()
    assert abs(y.mean().item() - 1) < 0.01
    torch.testing.assert_close(y.unique(), torch.tensor([0, 4 / 3]))
    torch.testing.assert_close(x.grad, 2 * y * 4 / 3)
    assert torch.equal(module.eval()(x), x)
