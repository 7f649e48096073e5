"""What is computed for some timesteps alone. Run: python -m pytest tests/test_timesteps.py"""

import math

import pytest
import torch
from rule import by_rule

from diffusion import create_diffusion
from diffusion.gaussian import discretized_nll, normal_kl
from models.diffloss import TimestepEmbedder


def test_equal_timesteps_are_embedded_once(monkeypatch):
    """For more rows than timesteps; the result and the gradients are those of each row's own."""
    module, seen = by_rule(TimestepEmbedder(32)), []
    t = torch.arange(1200).view(3, 400) % 7 * 100
    embed = module.embed
    monkeypatch.setattr(module, "embed", lambda t: seen.append(t) or embed(t))
    shared = _embedded(module, t)
    assert [x.tolist() for x in seen] == [[0, 100, 200, 300, 400, 500, 600]]
    for ours, theirs in zip(shared, _embedded(module, t, embed), strict=True):
        assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


def _embedded(module, t, function=None):
    module.zero_grad()
    y = (function or module)(t)
    (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), *(p.grad for p in module.parameters())]


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
