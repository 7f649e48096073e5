"""The diffusion of single tokens. Run: python -m pytest tests/test_diffusion.py"""

import math

import numpy as np
import pytest
import torch
from rule import GOLDEN, by_rule, rule_input

import diffusion.gaussian
import models.dit
import models.fast.denoiser
from diffusion import create_diffusion
from diffusion.gaussian import discretized_nll, normal_kl
from diffusion.schedule import spaced_timesteps
from diffusion.solvers import BELOW_SINGULARITY, SOLVERS, ReverseStep, reverse
from models.diffloss import DiffLoss
from models.fast.denoiser import Denoiser, guided
from models.settings import Sampling

TABLES = [
    "timesteps",
    "betas",
    "alphas_cumprod",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "posterior_log_variance_clipped",
]


@pytest.mark.parametrize("spacing", ["train", "100", "50", "25", "10", "ddim50", "10,10,20"])
@pytest.mark.parametrize("table", TABLES)
def test_tables_equal_the_published(spacing, table):
    """Every table of every spacing, in float64."""
    expected = np.load(GOLDEN / "diffusion_tables.npz")[f"{spacing}/{table}"]
    diffusion = create_diffusion("" if spacing == "train" else spacing)
    np.testing.assert_allclose(getattr(diffusion, table).numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize(
    "spacing", ["x", "0", "-5", "ddim", "ddim999999", "1001", "10,2000", "1.5"]
)
def test_wrong_spacing_says_what_was_expected(spacing):
    """A spacing that cannot be had names itself."""
    with pytest.raises(ValueError, match=spacing):
        spaced_timesteps(spacing)


def test_one_step_is_the_first_timestep():
    """A count of 1 keeps timestep 0 and has finite tables."""
    diffusion = create_diffusion("1")
    assert diffusion.timesteps.tolist() == [0]
    assert torch.isfinite(diffusion.posterior_log_variance_clipped).all()


def test_unknown_schedule():
    """A schedule that does not exist is named, with those that do."""
    with pytest.raises(ValueError, match=r"'linear'.*cosine"):
        create_diffusion(noise_schedule="linear")


@pytest.fixture(scope="module")
def golden():
    head = by_rule(DiffLoss(16, 48, depth=2, width=64, num_sampling_steps="10"))
    x, noise = rule_input("diffloss/x", (12, 16)), rule_input("diffloss/noise", (12, 16))
    z = rule_input("diffloss/z", (12, 48))
    values = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "diffusion_loss.npz").items()}
    return head, x, z, noise, values


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def relative(actual, expected):
    """max|difference| / max|expected|: for values that the first reverse step made large."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def test_network_output(golden):
    """The denoising MLP, conditional and guided; the variance half is the conditional one's."""
    head, x, z, _, values = golden
    with torch.no_grad():
        cond, uncond = (head.net(x, values["t"], z) for z in (z, z.flip(0)))
    close(cond, values["net"])
    noise, v = guided(torch.cat([cond, uncond]), 3.0)
    close(torch.cat([noise, v], dim=-1), values["net_cfg3"])


@pytest.mark.parametrize(("cfg", "name"), [(None, "net"), (3.0, "net_cfg3")])
def test_noise_predicted_by_the_sampler(golden, cfg, name):
    """The network as the sampler arranges it predicts the published noise, guided or not."""
    head, x, z, _, values = golden
    denoiser = Denoiser(head.net, torch.float32)
    z = z if cfg is None else torch.cat([z, z.flip(0)])
    for row, t in enumerate(values["t"].tolist()):
        steps = [ReverseStep(timestep=t, index=0, from_x=0.0, from_noise=-1.0)]  # x becomes ε
        with torch.no_grad():
            predicted = denoiser.run(steps, denoiser.embed_times(steps), z, x[None], cfg)
        close(predicted[row], values[name][row, :16])


def test_loss_of_each_row(golden):
    """Noise error, variational bound and their sum."""
    head, x, z, noise, values = golden
    with torch.no_grad():
        losses = head.train_diffusion.training_losses(
            lambda x, t: head.net(x, t, z), x, values["t"], noise
        )
    assert 0 in values["t"], "the likelihood term at t = 0 would go untested"
    for name in ("mse", "vb", "loss"):
        close(losses[name], values[name])
    mask = values["mask"]
    close((losses["loss"] * mask).sum() / mask.sum(), values["masked_loss"])


def test_reverse_steps(golden):
    """Every single step of the reverse process at temperature 0.9."""
    head, x, z, noise, values = golden
    steps = head.gen_diffusion.steps()[::-1]
    with torch.no_grad():
        assert len(steps) == len(values["p_sample_t09"])
        for i, expected in enumerate(values["p_sample_t09"]):
            step = steps[i]
            assert step.index == i
            t = torch.full((len(x),), step.timestep)
            predicted, v = head.net(x, t, z).chunk(2, dim=-1)
            assert relative(step(x, predicted, v, noise, 0.9), expected) < 1e-4, f"step {i}"


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_reverse_process(golden, cfg):
    """Whole chains at temperature 0 from a given x_T, with and without guidance."""
    head, _, z, noise, values = golden
    name = "sample_temp0" if cfg == 1 else "sample_temp0_cfg3"
    uncond = None if cfg == 1 else z.flip(0)
    draws = torch.cat([noise.unsqueeze(0), torch.zeros(10, 12, 16)])
    sample = head.sample(z, temperature=0.0, cfg=cfg, z_uncond=uncond, noise=draws)
    assert relative(sample, values[name]) < 1e-4


def test_variational_term_trains_only_the_variance():
    """No gradient of the variational bound reaches the predicted noise."""
    output = torch.randn(5, 8, requires_grad=True)
    t = torch.tensor([0, 1, 10, 500, 999])
    losses = create_diffusion().training_losses(
        lambda x, t: output, torch.randn(5, 4), t, torch.randn(5, 4)
    )
    losses["vb"].sum().backward()
    assert output.grad[:, :4].eq(0).all()
    assert output.grad[:, 4:].ne(0).all()


def test_variational_term_off():
    """vlb=False: the loss is the noise error alone."""
    x = torch.randn(5, 4)
    losses = create_diffusion().training_losses(
        lambda x, t: torch.zeros(5, 8), x, torch.arange(5), x, vlb=False
    )
    assert "vb" not in losses
    assert torch.equal(losses["loss"], losses["mse"])


def test_kl_and_likelihood_of_known_cases():
    """KL of equal Gaussians is 0, of shifted ones Δ²/2; the 256 grey levels sum to one."""
    zero = torch.zeros(3)
    assert normal_kl(zero, zero, zero).abs().max() == 0
    torch.testing.assert_close(normal_kl(zero + 2, zero, zero), zero + 2)
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    nll = discretized_nll(levels - 0.1, levels, torch.tensor(-1.0).double())
    torch.testing.assert_close((-nll).exp().sum().item(), 1.0, atol=1e-6, rtol=0)


def exact_denoiser(diffusion_tables, mean, std):
    """The best noise prediction for data N(mean, std²), with v = 1: the larger variance, β."""

    def network(x, t):
        alpha = diffusion_tables[t].float().unsqueeze(-1)
        variance = alpha * std**2 + 1 - alpha
        noise = (1 - alpha).sqrt() * (x - alpha.sqrt() * mean) / variance
        return torch.cat([noise, torch.ones_like(noise)], -1)

    return network


@pytest.mark.parametrize(("mean", "std"), [(0.7, 0.5), (-0.3, 1.0)])
def test_gaussian_data_is_sampled_with_its_mean_and_std(mean, std):
    """With the exact denoiser, 1,000 steps give N(mean, std²).

    20,000 values: one standard error is std/141 of the mean, std/200 of the standard
    deviation; the bounds below are five of them and 2% of discretisation.
    """
    generator = torch.Generator().manual_seed(0)
    diffusion = create_diffusion()
    network = exact_denoiser(diffusion.alphas_cumprod, mean, std)
    x = torch.randn(20000, 1, generator=generator)
    noise = torch.randn(1000, 20000, 1, generator=generator)
    sample = diffusion.sample(network, x, noise)
    assert abs(sample.mean() - mean) < 5 * std / math.sqrt(20000)
    assert abs(sample.std() / std - 1) < 5 / math.sqrt(40000) + 0.02
    # temperature narrows the samples, and changes no mean
    cold = diffusion.sample(network, x, noise, temperature=0.5)
    assert cold.std() < 0.8 * sample.std()
    assert abs(cold.mean() - mean) < 0.02


def test_start_below_the_singularity():
    """max_timestep drops the steps above it and nothing else; one below all is refused."""
    diffusion = create_diffusion("10")
    seen = []

    def network(x, t):
        seen.append(int(t[0]))
        return torch.zeros(*x.shape[:-1], 2 * x.shape[-1])

    diffusion.sample(network, torch.zeros(2, 3), temperature=0, max_timestep=950)
    assert seen == [t for t in reversed(diffusion.timesteps.tolist()) if t <= 950]
    with pytest.raises(ValueError, match="max_timestep -1"):
        diffusion.first_step(-1)


def test_noise_is_needed():
    """A temperature without noise is refused, not treated as 0."""
    with pytest.raises(ValueError, match=r"temperature 1\.0 needs noise"):
        create_diffusion("10").sample(lambda x, t: x, torch.zeros(2, 3))


# ---- solvers and the loop over steps ---------------------------------------------------------


@pytest.fixture(params=SOLVERS)
def solver(request):
    return request.param


def spaced(count, solver, highest=None):
    return create_diffusion(count, highest=highest, log_snr=SOLVERS[solver].log_snr)


def test_steps_go_down_to_zero(solver):
    """Each starts at the highest timestep kept, falls strictly, and ends at timestep 0."""
    steps = spaced("20", solver, highest=950).steps(solver=solver)
    timesteps = [step.timestep for step in steps]
    assert timesteps[0] == 950 and timesteps[-1] == 0
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert [step.index for step in steps] == list(reversed(range(len(steps))))


def test_a_known_token_is_found(solver):
    """If all data are one token c, the best network knows the noise, and every solver ends at c."""
    c = torch.tensor([0.3, -1.2])
    alphas = create_diffusion().alphas_cumprod

    def network(x, t):
        alpha = alphas[t].float().unsqueeze(-1)
        noise = (x - alpha.sqrt() * c) / (1 - alpha).sqrt()
        return torch.cat([noise, torch.zeros_like(noise)], dim=-1)

    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    sample = spaced("10", solver, highest=950).sample(
        network, x, torch.randn(10, 5, 2), temperature=1.0, solver=solver
    )
    torch.testing.assert_close(sample, c.expand(5, -1), atol=1e-4, rtol=1e-4)


def test_draws_noise_or_not(solver):
    """As its row says: then noise is needed, changes the sample, and is planned for."""
    row, diffusion = SOLVERS[solver], spaced("10", solver, highest=950)
    steps = diffusion.steps(solver=solver)
    assert any(step.random for step in steps) == row.draws_noise
    assert not steps[-1].random  # the last step gives the mean

    def network(x, t):
        return torch.cat([0.9 * x, torch.zeros_like(x)], dim=-1)

    x, noise = torch.ones(3, 2), torch.randn(2, 10, 3, 2)
    if row.draws_noise:
        with pytest.raises(ValueError, match=r"temperature 1\.0 needs noise"):
            diffusion.sample(network, x, solver=solver)
        samples = [diffusion.sample(network, x, n, solver=solver) for n in noise]
        assert not torch.allclose(*samples)
    else:
        samples = [diffusion.sample(network, x, n, solver=solver) for n in (None, *noise)]
        assert torch.equal(samples[0], samples[1]) and torch.equal(samples[0], samples[2])
    _, draws = small_head().plan(Sampling(solver=solver))
    assert draws == (10 if row.draws_noise else 0)


def small_head(**kwargs):
    return by_rule(DiffLoss(16, 48, depth=1, width=32, num_sampling_steps="10", **kwargs))


def test_where_it_starts(solver):
    """Where its row says; else where the head says; else where this sampling says."""

    def start(head, **settings):
        steps_at, _ = head.plan(Sampling(solver=solver, **settings))
        return steps_at(0.0)[1][0].timestep

    of_row = 999 if SOLVERS[solver].start is None else SOLVERS[solver].start
    assert start(small_head()) == of_row
    assert start(small_head(max_timestep=666)) == 666
    assert start(small_head(max_timestep=666), max_timestep=777) == 777
    assert start(small_head(), max_timestep=999) == 999


def test_only_the_paper_s_solver_starts_at_the_singularity():
    """The others go by the predicted x_0, whose error is magnified there."""
    assert {name: row.start for name, row in SOLVERS.rows()} == {
        **{name: BELOW_SINGULARITY for name in SOLVERS},
        "ddpm": None,
    }


def test_unknown_solver():
    """It is named, with those that exist."""
    with pytest.raises(ValueError, match=r"solver 'heun': expected one of ddpm, ddim, dpm\+\+"):
        create_diffusion("10").steps(solver="heun")


def test_there_is_one_loop():
    """DiffLoss, DiT and GaussianDiffusion.sample run the same function."""
    users = (diffusion.gaussian, models.fast.denoiser, models.dit)
    assert all(user.reverse is reverse for user in users)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_the_head_samples_as_the_diffusion_does(solver, cfg):
    """The fast path gives what GaussianDiffusion.sample gives for its network and noise."""
    head, row = small_head(), SOLVERS[solver]
    z, z_uncond = rule_input("z", (6, 48)), rule_input("zu", (6, 48))
    noise = torch.randn(11, 6, 16, generator=torch.Generator().manual_seed(0))

    def network(x, t):
        noise, v = head.net(x, t, z).chunk(2, dim=-1)
        noise_uncond = head.net(x, t, z_uncond).chunk(2, dim=-1)[0]
        return torch.cat([noise_uncond + cfg * (noise - noise_uncond), v], dim=-1)

    process = spaced("10", solver, highest=row.start)
    with torch.no_grad():
        expected = process.sample(network, noise[0], noise[1:], 1.0, solver=solver)
    draw = head.sampler(Sampling(solver=solver))
    assert relative(draw(z, cfg, z_uncond, noise=noise), expected) < 1e-5
