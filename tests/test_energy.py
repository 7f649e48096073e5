"""The energy score as head. Run: python -m pytest tests/test_energy.py"""

import math

import pytest
import torch
from rule import by_rule, rule_input

from models.energy import NOISE, Energy
from models.settings import Sampling


class Normal(torch.nn.Module):
    """A network whose samples are normal: a first number of noise through the quantile function."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, noise, z):
        return self.mean + self.std * torch.special.ndtri(noise[..., :1] + 0.5)


def score(mean=0.0, std=1.0, rows=20000, **options):
    """The loss of normal samples on standard normal tokens."""
    head = Energy(1, 4, depth=1, width=8, **options)
    head.net = Normal(mean, std)
    draw = torch.Generator().manual_seed(0)
    target = torch.randn(rows, 1, generator=draw)
    return head(target, torch.zeros(rows, 4), generator=draw).item()


def test_the_loss_of_the_true_distribution():
    """In one dimension, β = 1: E|X − x| − ½E|X − X'| = 1/√π for standard normals, whatever the
    number of samples."""
    for samples in (1, 2, 5):
        assert abs(score(diffusion_batch_mul=samples) - 1 / math.sqrt(math.pi)) < 0.01


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
def test_no_other_distribution_has_a_smaller_loss(beta):
    """Too narrow, too wide or off: all lose. The draws are the same, so the rank is sure."""
    best = score(energy_beta=beta)
    others = [(0.0, 0.6), (0.0, 1.5), (0.4, 1.0), (0.0, 0.0)]
    assert all(score(*other, energy_beta=beta) > best + 0.005 for other in others)


def test_the_loss_starts_finite():
    """All samples of a new network are equal: distances of 0 have a gradient, of 0."""
    for beta in (0.5, 1.0):
        torch.manual_seed(0)
        head, z = Energy(3, 8, depth=1, width=16, energy_beta=beta), torch.randn(5, 8)
        head(torch.randn(5, 3), z).backward()
        assert all(p.grad.isfinite().all() for p in head.parameters())
        assert head.net.final_layer.linear.weight.grad.any()


def test_it_learns_two_modes():
    """Tokens that are ±1, which L2 regresses to 0, are drawn as ±1, half of them each; and then
    samples are as far from targets as from one another."""
    torch.manual_seed(0)
    head, z = Energy(1, 4, depth=1, width=16, diffusion_batch_mul=4), torch.ones(64, 4)
    optimizer = torch.optim.Adam(head.parameters(), 0.02)
    for step in range(120):
        head.statistics() if step == 80 else None
        optimizer.zero_grad()
        head(torch.randint(0, 2, (64, 1)) * 2.0 - 1, z).backward()
        optimizer.step()
    drawn = head.eval().sampler(Sampling())(torch.ones(2000, 4))
    assert (drawn.abs() - 1).abs().mean() < 0.3
    assert abs((drawn > 0).float().mean() - 0.5) < 0.15
    distances = head.statistics(reduce=lambda sums: 3 * sums)
    assert list(distances) == ["distance_to_target", "distance_between"]
    assert 0.85 < distances["distance_to_target"] < 1.15
    assert abs(distances["distance_to_target"] - distances["distance_between"]) < 0.15
    assert head.statistics() == {}


def test_one_evaluation_draws_a_token(monkeypatch):
    """With the guided z = z_u + ω(z_c − z_u), and noise that the temperature scales: at 0 none."""
    head = by_rule(Energy(4, 48, depth=1, width=32))
    z, z_uncond = rule_input("z", (6, 48)), rule_input("zu", (6, 48))
    seen = []

    def seeing(noise, z):
        seen.append(noise)
        return type(head.net).forward(head.net, noise, z)

    monkeypatch.setattr(head.net, "forward", seeing)
    draws = [head.sampler(Sampling(temperature=t)) for t in (1.0, 0.5, 0.0)]
    guided = [draw(z, 3.0, z_uncond, torch.Generator().manual_seed(0)) for draw in draws]
    noise, half, none = seen
    assert noise.shape == (6, NOISE) and noise.min() >= -0.5 and noise.max() < 0.5
    assert noise.std() > 0.2 and torch.equal(half, noise / 2) and not none.any()
    expected = head.net(noise, z_uncond + 3 * (z - z_uncond))
    torch.testing.assert_close(guided[0], expected.detach())
    assert torch.equal(draws[2](z), draws[2](z))


@pytest.mark.parametrize("beta", [0.0, 2.0, -1.0])
def test_powers_that_are_no_score(beta):
    """With 2 the loss is that of the mean alone."""
    with pytest.raises(ValueError, match=f"energy_beta {beta}: expected a number between 0 and 2"):
        Energy(1, 4, depth=1, width=8, energy_beta=beta)
