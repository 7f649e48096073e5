"""The reverse process arranged for speed, against the plain one, and its approximations.

Run: python -m pytest tests/test_denoiser.py
"""

import copy
import itertools
import math

import pytest
import torch
from rule import by_rule, rule_input

from diffusion import create_diffusion
from diffusion.schedule import annealing
from diffusion.solvers import SOLVERS
from models.diffloss import DiffLoss
from models.fast import denoiser, products
from models.fast.graphs import Graphs
from models.heads import L2
from models.settings import Sampling
from util.precision import autocast


@pytest.fixture(scope="module")
def head():
    return by_rule(DiffLoss(16, 48, depth=3, width=128, num_sampling_steps="20"))


def inputs(rows=6):
    z, z_uncond = rule_input("z", (rows, 48)), rule_input("zu", (rows, 48))
    return z, z_uncond, torch.randn(21, rows, 16, generator=torch.Generator().manual_seed(0))


def plainly(head, z, z_uncond, noise, cfg, temperature):
    """The same by the network as it is trained, step by step, with guidance written out."""

    def network(x, t):
        if cfg == 1:
            return head.net(x, t, z)
        cond, uncond = head.net(x, t, z), head.net(x, t, z_uncond)
        (noise, v), noise_uncond = cond.chunk(2, dim=-1), uncond.chunk(2, dim=-1)[0]
        return torch.cat([noise_uncond + cfg * (noise - noise_uncond), v], dim=-1)

    with torch.no_grad():
        return head.gen_diffusion.sample(network, noise[0], noise[1:], temperature)


def difference(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("at_once", [1, 7, 40, 10**6])
@pytest.mark.parametrize(("cfg", "temperature"), [(1.0, 1.0), (3.0, 0.9), (3.0, 0.0)])
def test_same_samples_for_the_same_noise(head, monkeypatch, at_once, cfg, temperature):
    """However many steps' modulations are made at once, with and without guidance, to 1e-5."""
    monkeypatch.setattr(denoiser, "ROWS_AT_ONCE", at_once)
    z, z_uncond, noise = inputs()
    ours = head.sample(z, temperature, cfg, z_uncond, noise=noise)
    assert difference(ours, plainly(head, z, z_uncond, noise, cfg, temperature)) < 1e-5


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.05)])
def test_packed_weights(head, monkeypatch, precision, tolerance):
    """By oneDNN, from weights packed once, the samples are the same."""
    monkeypatch.setattr(products, "mode", "onednn")
    if not (products._available and (precision == "fp32" or products.packs_bf16())):
        pytest.skip("oneDNN is not there or does not compute in this precision")
    packed, pack = [], products.pack
    monkeypatch.setattr(products, "pack", lambda weight: packed.append(weight) or pack(weight))
    z, z_uncond, noise = inputs()
    with autocast(z.device, precision):
        ours = head.sample(z, 1.0, 3.0, z_uncond, noise=noise)
    assert packed
    assert difference(ours, plainly(head, z, z_uncond, noise, 3.0, 1.0)) < tolerance


def test_guidance_has_one_state_per_token(head, monkeypatch):
    """x keeps N rows; the network alone sees 2N."""
    seen = []
    network = denoiser.Denoiser._network

    def noted(self, x, *args, **kwargs):
        output = network(self, x, *args, **kwargs)
        seen.append((len(x), len(output)))
        return output

    monkeypatch.setattr(denoiser.Denoiser, "_network", noted)
    z, z_uncond, noise = inputs()
    head.sample(z, 1.0, 2.0, z_uncond, noise=noise)
    head.sample(z, 1.0, noise=noise)
    assert seen == [(6, 12)] * 20 + [(6, 6)] * 20


def test_new_weights_are_used(head):
    """Arranged weights are copies; each sampling makes them anew."""
    head = copy.deepcopy(head)
    z, _, noise = inputs()
    before = head.sample(z, noise=noise)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.data.mul_(0.9)  # which no version counter sees
    after = head.sample(z, noise=noise)
    assert difference(before, after) > 1e-2
    assert difference(after, plainly(head, z, None, noise, 1.0, 1.0)) < 1e-5


class Recorder(Graphs):
    """Says that graphs can be recorded here, and calls the function instead."""

    def __init__(self):
        super().__init__()
        self.keys = []

    def usable(self, device):
        return True

    def __call__(self, key, function, *inputs):
        self.keys.append((key, *(x.shape for x in inputs)))
        return function(*inputs)


def test_what_a_graph_would_record(head, monkeypatch):
    """Rows are padded to few shapes, which changes no sample; weights stay where they were."""
    head = copy.deepcopy(head)
    head.fast.graphs = recorder = Recorder()
    monkeypatch.setattr(denoiser, "Graphs", lambda: recorder)
    plain = {}
    for rows in (3, 6, 8):
        z, z_uncond, noise = inputs(rows)
        plain[rows] = plainly(head, z, z_uncond, noise, 2.0, 1.0)
        ours = head.sample(z, 1.0, 2.0, z_uncond, noise=noise)
        assert difference(ours, plain[rows]) < 1e-5
    assert len(set(recorder.keys)) == 1
    arranged = head.fast.arranged[1]
    with torch.no_grad():
        head.net.cond_embed.weight.mul_(2.0)
    changed = head.sample(z, 1.0, 2.0, z_uncond, noise=noise)
    assert head.fast.arranged[1] is arranged
    assert difference(changed, plainly(head, z, z_uncond, noise, 2.0, 1.0)) < 1e-5
    head.net.cond_embed.weight = torch.nn.Parameter(head.net.cond_embed.weight / 2)
    again = head.sample(z, 1.0, 2.0, z_uncond, noise=noise)
    assert head.fast.arranged[1] is not arranged
    assert difference(again, plain[8]) < 1e-5


def test_tables_stay_on_the_host():
    """Whatever torch's default device is: their numbers are read one by one."""
    with torch.device("meta"):
        head = DiffLoss(16, 48, depth=1, width=32)
    assert head.gen_diffusion.steps()[0].from_x > 1
    assert head.gen_diffusion.alphas_cumprod.device.type == "cpu"


# ---- solvers: data of standard deviation s, for which the best network is known ---------------

STD = 0.5


def best_network(x, t):
    """ε of x for data from N(0, s²): E[ε | x_t]."""
    alpha = create_diffusion().alphas_cumprod[t].float().unsqueeze(-1)
    predicted = (1 - alpha).sqrt() * x / (alpha * STD**2 + 1 - alpha)
    return torch.cat([predicted, torch.zeros_like(x)], dim=-1)


def solve(solver, steps, x):
    log_snr = SOLVERS[solver].log_snr
    diffusion = create_diffusion(steps, highest=950, log_snr=log_snr)
    return diffusion.sample(best_network, x, temperature=0.0, solver=solver)


def exact(x):
    """Where the noiseless process takes x from t = 950: scaled by the ratio of the stds."""
    alpha = create_diffusion().alphas_cumprod[950].item()
    return x * STD / math.sqrt(alpha * STD**2 + 1 - alpha)


def test_solvers_converge_as_their_order_says():
    """DDIM's error halves with twice the steps, DPM-Solver++'s is quartered."""
    x = torch.linspace(-2, 2, 8).view(-1, 1)
    for solver, factor in (("ddim", 2), ("dpm++", 4)):
        errors = [(solve(solver, n, x) - exact(x)).abs().max().item() for n in (20, 40, 80)]
        for coarse, fine in itertools.pairwise(errors):
            assert 0.75 * factor < coarse / fine < 1.6 * factor, (solver, errors)
    assert (solve("dpm++", 10, x) - exact(x)).abs().max() < 0.05
    assert (solve("ddim", 10, x) - exact(x)).abs().max() > 0.1


def test_the_solvers_of_a_head(head):
    """They draw no noise but the start, which the temperature scales, and follow guidance."""
    z, z_uncond, noise = inputs()
    other = torch.cat([noise[:1], noise[1:].roll(1, 1)])
    for solver in ("ddim", "dpm++"):
        draw = head.sampler(Sampling(solver=solver))
        first = draw(z, 2.0, z_uncond, noise=noise)
        assert torch.equal(first, draw(z, 2.0, z_uncond, noise=other))
        assert not torch.allclose(first, draw(z, noise=noise))
        colder = head.sampler(Sampling(temperature=0.5, solver=solver))(
            z, 2.0, z_uncond, noise=noise
        )
        scaled = torch.cat([noise[:1] / 2, noise[1:]])
        assert torch.equal(colder, draw(z, 2.0, z_uncond, noise=scaled))
        cold = head.sampler(Sampling(temperature=0.0, solver=solver))
        assert cold(z, noise=noise).isfinite().all()


def test_annealing():
    """From the first to the last count, in fives between."""
    assert [annealing("linear")(p / 10) for p in range(11)] == [
        *(50, 50, 45, 40, 35, 30, 25, 20, 15, 10, 5)
    ]
    assert annealing("two-stage:20:2")(0.49) == 20 and annealing("two-stage:20:2")(0.5) == 2
    assert annealing("cosine")(0.5) == 40 and annealing("cosine:100")(0.0) == 100
    assert annealing("linear:4:2")(0.9) == 4 and annealing("linear:4:2")(1.0) == 2
    for wrong in ("exponential", "linear:0", "linear:5:x", "linear:1:2:3", "linear:5:10", ""):
        with pytest.raises(ValueError, match=f"anneal '{wrong}': expected"):
            annealing(wrong)


def test_annealed_steps_of_a_head(head, monkeypatch):
    """The counts reach the loop, with 950 for what is above it (so that of 40 two are one); more
    steps than the head's own have noise too."""
    counts = []
    run = denoiser.Denoiser.run

    def noted(self, steps, *args, **kwargs):
        counts.append((len(steps), steps[0].timestep))
        return run(self, steps, *args, **kwargs)

    monkeypatch.setattr(denoiser.Denoiser, "run", noted)
    draw = head.sampler(Sampling(anneal="linear:40:4"))
    for done in (0.0, 0.5, 0.99):
        assert draw(inputs()[0], done=done).isfinite().all()
    assert counts == [(39, 950), (23, 950), (9, 950)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "euler"}, "solver 'euler': expected one of ddpm, ddim, dpm"),
        ({"anneal": "slowly"}, "anneal 'slowly': expected linear"),
        ({"anneal": "linear:2000"}, "2000 steps do not fit"),
    ],
)
def test_wrong_settings(head, settings, message):
    """Refused before anything is sampled; and by a head without a diffusion."""
    with pytest.raises(ValueError, match=message):
        head.sampler(Sampling.of(**settings))
    with pytest.raises(ValueError, match="L2 has no diffusion"):
        L2(4, 8).sampler(Sampling.of(**settings))
