"""Parts with a backward pass of their own. Run: python -m pytest tests/test_backward.py"""

import math

import pytest
import torch
from rule import by_rule, rule_input

from diffusion import create_diffusion
from diffusion.gaussian import discretized_nll, normal_kl
from models.diffloss import DenoisingMLP, TimestepEmbedder
from models.fast import training
from models.layers import Blocks, Dropout

WIDTH = 32


@pytest.fixture
def used(monkeypatch):
    """The functions with a backward pass of their own that were called."""
    calls = []
    for name in ("residual", "mlp", "attend", "dropout"):
        function = getattr(training, name)

        def counted(*args, name=name, function=function):
            calls.append(name)
            return function(*args)

        monkeypatch.setattr(training, name, counted)
    return calls


def results(module, *inputs, seed=0):
    """Output of a module, and gradients of inputs and parameters."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    module.zero_grad()
    torch.manual_seed(seed)
    y = module(*leaves)
    (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), *(x.grad for x in (*leaves, *module.parameters()))]


def both_ways(monkeypatch, module, *inputs):
    """Pairs of results, with and without the functions of models/fast/training.py."""
    fast = results(module, *inputs)
    monkeypatch.setattr(training, "enabled", False)
    plain = results(module, *inputs)
    monkeypatch.setattr(training, "enabled", True)
    return list(zip(fast, plain, strict=True))


def close(pairs):
    for fast, plain in pairs:
        assert (fast - plain).abs().max() <= 2e-5 * plain.abs().max() + 2e-6


def test_denoising_mlp(monkeypatch, used):
    """The residual blocks: the output, the gradients of x and z and of each parameter."""
    net = by_rule(DenoisingMLP(6, WIDTH, 16, depth=3))
    t = torch.arange(24).view(2, 3, 4) * 40
    x, z = rule_input("backward/x", (2, 3, 4, 6)), rule_input("backward/z", (3, 4, 16))
    monkeypatch.setattr(net, "forward", lambda x, z: DenoisingMLP.forward(net, x, t, z))
    close(both_ways(monkeypatch, net, x, z))
    assert used == ["residual"] * 3


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [None, slice(2, 5)])
def test_blocks(monkeypatch, used, causal, rows):
    """Given torch's masks, dropout too is that of torch's modules, and all numbers are the same."""
    monkeypatch.setattr(training, "drop", lambda x, rate: torch.empty_like(x).bernoulli_(1 - rate))
    model = by_rule(Blocks(2, WIDTH, 4, causal, attn_dropout=0.3, proj_dropout=0.2)).train()
    x = rule_input("backward/x", (3, 7, WIDTH))
    rows = None if causal else rows
    monkeypatch.setattr(model, "forward", lambda x: Blocks.forward(model, x, rows))
    pairs = both_ways(monkeypatch, model, x)
    close(pairs)
    assert used == ["attend", "dropout", "mlp"] * 2
    for block in model:
        monkeypatch.setattr(block.attn, "attn_dropout", 0.0)
    other = both_ways(monkeypatch, model, x)
    close(other)
    assert not torch.equal(other[0][0], pairs[0][0])
    monkeypatch.setattr(training, "SHORT", 6)  # for more keys torch has something better
    results(model, x)
    assert used[6:] == ["attend", "dropout", "mlp"] * 2 + ["dropout", "mlp"] * 2


def test_only_in_plain_training_on_a_cpu(used):
    """Not without gradients, in another dtype, under autocast, or in a transform of functions."""
    model = by_rule(Blocks(1, WIDTH, 4, attn_dropout=0.3, proj_dropout=0.2)).train()
    x = rule_input("backward/x", (3, 7, WIDTH))
    with torch.no_grad():
        model(x)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    torch.func.grad(lambda x: model[0].mlp(x).sum())(x)
    model.double()(x.double())
    assert not used
    model.float()(x)
    assert used == ["attend", "dropout", "mlp"]


def test_equal_timesteps_are_embedded_once(monkeypatch):
    """For more rows than timesteps; the result and the gradients are those of each row's own."""
    module, seen = by_rule(TimestepEmbedder(WIDTH)), []
    t = torch.arange(1200).view(3, 400) % 7 * 100
    embed = module.embed
    monkeypatch.setattr(module, "embed", lambda t: seen.append(t) or embed(t))
    shared = _embedded(module, t)
    assert [x.tolist() for x in seen] == [[0, 100, 200, 300, 400, 500, 600]]
    close(zip(shared, _embedded(module, t, embed), strict=True))


def _embedded(module, t, function=None):
    module.zero_grad()
    y = (function or module)(t)
    (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.97])
def test_statistics_of_dropout(rate):
    """The rate, and elements independent of each other and of the next mask; seeds repeat them."""
    torch.manual_seed(0)
    x = torch.ones(401, 501)
    masks = [training.drop(x, rate) for _ in range(2)]
    n, std = x.numel(), (rate * (1 - rate)) ** 0.5
    for mask in masks:
        assert mask.unique().tolist() == [0.0, 1.0]
        assert abs(mask.mean().item() - (1 - rate)) < 5 * std / n**0.5
    flat, other = (((mask - 1 + rate) / std).flatten() for mask in masks)
    pairs = [(flat, other), *((flat[k:], flat[:-k]) for k in (1, 2, 3, 4, 8, 501))]
    for a, b in pairs:  # each correlation has standard error 1 / √n
        assert abs((a * b).mean().item()) < 5 / n**0.5
    torch.manual_seed(0)
    assert torch.equal(training.drop(x, rate), masks[0])


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


@pytest.mark.parametrize("steps", [[0, 3, 0, 999], [5, 3, 1, 999]])
def test_likelihood_of_the_last_step_alone(steps):
    """It is computed for rows at t = 0, and for these the variational term is nothing else."""
    diffusion, t = create_diffusion(), torch.tensor(steps).expand(2, 4)
    x, noise = torch.randn(4, 3) / 2, torch.randn(2, 4, 3)
    output = torch.randn(2, 4, 6, requires_grad=True)
    found = diffusion.training_losses(lambda x, t: output, x, t, noise)["vb"]
    (gradient,) = torch.autograd.grad(found.sum(), output)
    predicted, v = output.chunk(2, -1)
    shift = diffusion._at("mean_from_noise", t, x) * (predicted.detach() - noise)
    log_variance = diffusion._log_variance(v, t)
    kl = normal_kl(shift, diffusion._at("posterior_log_variance_clipped", t, x), log_variance)
    nll = discretized_nll(shift, x, log_variance / 2)
    expected = torch.where(t == 0, nll.mean(-1), kl.mean(-1)) / math.log(2)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), output)[0])
