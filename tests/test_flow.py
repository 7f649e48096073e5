"""Rectified flow: process, solvers and head. Run: python -m pytest tests/test_flow.py"""

import itertools

import pytest
import torch
from rule import by_rule, rule_input

from diffusion.flow import FLOW_SOLVERS, RectifiedFlow, flow_steps
from diffusion.solvers import reverse
from models.flow import Flow
from models.settings import Sampling

STD = 0.5  # of the data, N(0, s²), for which the best network is known


def best_velocity(x, timesteps):
    """E[ε − x_0 | x_t] for x (..., C) at 1,000·t."""
    t = timesteps.unsqueeze(-1) / 1000
    return (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2) * x


def solve(solver, count, x, velocity=best_velocity):
    def predict(x, step):
        return velocity(x, torch.full(x.shape[:-1], step.timestep)), None

    return reverse(flow_steps(FLOW_SOLVERS[solver], count), predict, x)


def small_head(**kwargs):
    return by_rule(Flow(4, 48, depth=1, width=32, num_sampling_steps="5", **kwargs))


def test_the_loss_of_the_best_network():
    """It is the variance of ε − x_0 that x_t leaves, at every t; that of another is higher."""
    process, draw = RectifiedFlow(), torch.Generator().manual_seed(0)
    for step in (0, 199, 699, 999):
        t = (step + 1) / 1000
        rows = torch.full((50000,), step)
        x_start, noise = STD * torch.randn(50000, 4, generator=draw), None
        noise = torch.randn(50000, 4, generator=draw)
        of_x = (1 - t) ** 2 * STD**2 + t**2
        left = 1 + STD**2 - (t - (1 - t) * STD**2) ** 2 / of_x
        best = process.training_losses(best_velocity, x_start, rows, noise)["loss"]
        assert best.shape == (50000,) and abs(best.mean() / left - 1) < 0.02
        worse = process.training_losses(
            lambda x, t: 1.2 * best_velocity(x, t) + 0.1, x_start, rows, noise
        )
        assert worse["loss"].mean() > best.mean() + 0.005


def test_solvers_converge_as_their_order_says():
    """Of data N(0, s²) the flow ends at s·x. Euler's error halves with twice the steps, Heun's is
    quartered."""
    x = torch.linspace(-2, 2, 8).view(-1, 1)
    for solver, factor in (("euler", 2), ("heun", 4)):
        errors = [(solve(solver, n, x) - STD * x).abs().max().item() for n in (20, 40, 80)]
        for coarse, fine in itertools.pairwise(errors):
            assert 0.8 * factor < coarse / fine < 1.25 * factor, (solver, errors)
    assert (solve("heun", 10, x) - STD * x).abs().max() < 0.01


def test_a_straight_path_takes_one_step():
    """If all data are one token c, its velocity is (x − c)/t, and one step of Euler ends at c."""
    c, x = torch.tensor([0.3, -1.2]), torch.randn(5, 2)
    for count in (1, 7):
        found = solve("euler", count, x, lambda x, t: (x - c) * 1000 / t.unsqueeze(-1))
        torch.testing.assert_close(found, c.expand(5, -1), atol=1e-5, rtol=1e-5)


def test_heun_is_exact_for_velocities_linear_in_t():
    """dx/dt = 2t − 1 is integrated without error, by the mean of both ends."""
    x = torch.randn(5, 2)
    found = solve("heun", 3, x, lambda x, t: (2 * t / 1000 - 1).unsqueeze(-1).expand_as(x))
    torch.testing.assert_close(found, x)


@pytest.mark.parametrize(("solver", "cfg"), [("euler", 1.0), ("heun", 3.0)])
def test_the_head_follows_its_network(solver, cfg):
    """The fast path gives what the loop gives for the guided velocity u_u + ω(u_c − u_u), from
    noise that the temperature scales."""
    head = small_head().eval()
    z, z_uncond = rule_input("z", (6, 48)), rule_input("zu", (6, 48))

    @torch.no_grad()
    def velocity(x, t):
        uncond = head.net(x, t, z_uncond)
        return uncond + cfg * (head.net(x, t, z) - uncond)

    noise = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    draw = head.sampler(Sampling(solver=solver, temperature=0.8))
    expected = solve(solver, 5, 0.8 * noise[0], velocity)
    torch.testing.assert_close(draw(z, cfg, z_uncond, noise=noise), expected, atol=1e-5, rtol=1e-5)


def test_its_network_has_no_variance():
    """It gives a velocity for each channel, and training leaves out no weight of it."""
    head = small_head()
    assert head.net(torch.zeros(2, 4), torch.zeros(2), torch.zeros(2, 48)).shape == (2, 4)


def test_steps_of_a_flow():
    """From t = 1 down to 0; of the annealed counts where asked; --max_timestep changes nothing."""
    head, z = small_head(), rule_input("z", (6, 48))
    times = [step.timestep for step in head.plan(Sampling())[0](0.0)[1]]
    torch.testing.assert_close(torch.tensor(times), torch.tensor([1000.0, 800, 600, 400, 200]))
    assert len(head.plan(Sampling(solver="heun"))[0](0.0)[1]) == 10
    steps_at, _ = head.plan(Sampling(anneal="linear:8:2"))
    assert [len(steps_at(done)[1]) for done in (0.0, 0.5, 0.99)] == [8, 7, 7]
    drawn = (
        head.sampler(Sampling(max_timestep=t))(z, generator=torch.Generator().manual_seed(0))
        for t in (None, 100)
    )
    assert torch.equal(*drawn)


@pytest.mark.parametrize("steps", ["10,10,20", "ddim50", "0"])
def test_steps_that_a_flow_cannot_take(steps):
    """Refused before anything is drawn, as a model's or a sampling's."""
    with pytest.raises(ValueError, match=f"diffusion steps '{steps}': a flow takes even steps"):
        small_head().sampler(Sampling(num_sampling_steps=steps))
    with pytest.raises(ValueError, match=f"diffusion steps '{steps}'"):
        Flow(4, 8, depth=1, width=8, num_sampling_steps=steps)


def test_it_learns_two_modes():
    """Tokens that are ±1, which L2 regresses to 0, are drawn as ±1."""
    torch.manual_seed(0)
    head, z = Flow(1, 4, depth=1, width=32, diffusion_batch_mul=4), torch.ones(64, 4)
    optimizer = torch.optim.Adam(head.parameters(), 0.02)
    for _ in range(80):
        optimizer.zero_grad()
        head(torch.randint(0, 2, (64, 1)) * 2.0 - 1, z).backward()
        optimizer.step()
    drawn = head.eval().sampler(Sampling(solver="heun"))(torch.ones(2000, 4))
    assert (drawn.abs() - 1).abs().mean() < 0.3
    assert abs((drawn > 0).float().mean() - 0.5) < 0.15
    head.train()(torch.ones(64, 1), z)
    assert list(head.statistics()) == [
        "loss_t0-249",
        "loss_t250-499",
        "loss_t500-749",
        "loss_t750-999",
    ]
