"""Timesteps and loss weights of training. Run: python -m pytest tests/test_diffusion_training.py"""

import pytest
import torch
from rule import by_rule, rule_input

from diffusion import create_diffusion
from diffusion.flow import RectifiedFlow
from models.diffloss import DiffLoss
from models.dit import dit_tiny
from models.flow import Flow
from models.settings import LOSS_WEIGHTS, TIMESTEPS

PROCESSES = {"diffusion": create_diffusion, "flow": RectifiedFlow}


@pytest.fixture(params=PROCESSES)
def process(request):
    return PROCESSES[request.param]()


def seeded():
    return torch.Generator().manual_seed(0)


def quantiles(values, *q):
    return values.double().quantile(torch.tensor(q, dtype=torch.float64))


def small_head(kind=DiffLoss, **kwargs):
    return by_rule(kind(4, 8, depth=1, width=16, **kwargs))


@pytest.mark.parametrize("name", TIMESTEPS)
def test_timesteps_are_steps_of_the_process(process, name):
    """Integers of the shape asked for, from 0 to T − 1, decided by the generator."""
    t = TIMESTEPS[name](process, (3, 5000), seeded())
    assert t.shape == (3, 5000) and t.dtype == torch.int64
    assert t.min() >= 0 and t.max() < process.num_steps
    assert torch.equal(t, TIMESTEPS[name](process, (3, 5000), seeded()))


def test_how_often_timesteps_are_drawn(process):
    """Quantiles: of the uniform; of the logit-normal, sigmoids of those of the normal; of the log
    SNR, which is even from −10 to 10."""
    q = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    found = {
        name: row(process, (20000,), seeded()).double() / process.num_steps
        for name, row in TIMESTEPS.rows()
    }
    torch.testing.assert_close(found["uniform"].quantile(q), q, atol=0.015, rtol=0)
    expected = torch.special.ndtri(q).sigmoid()
    torch.testing.assert_close(found["logit-normal"].quantile(q), expected, atol=0.015, rtol=0)
    t = (found["log-snr"] * process.num_steps).long()
    levels = process.log_snr()[t].double().quantile(q)
    torch.testing.assert_close(levels, 20 * q - 10, atol=0.5, rtol=0)


def test_log_snr_of_the_processes():
    """log(ᾱ/(1 − ᾱ)) and log((1 − t)²/t²): both fall, and the flow's is 0 at t = ½."""
    alphas = create_diffusion().alphas_cumprod
    expected = (alphas / (1 - alphas)).log().float()
    torch.testing.assert_close(create_diffusion().log_snr(), expected, atol=0.01, rtol=0.01)
    flow = RectifiedFlow().log_snr()
    assert len(flow) == 1000 and (flow.diff() < 0).all() and abs(flow[499]) < 1e-4


def test_min_snr_weights():
    """min(SNR, 5) / SNR: 1 where there is more noise than that, 5 / SNR elsewhere."""
    diffusion, t = create_diffusion(), torch.arange(1000).view(10, 100)
    snr = diffusion.log_snr().exp().view(10, 100)
    weights = LOSS_WEIGHTS["min-snr"](diffusion, t)
    assert torch.equal(weights[snr <= 5], torch.ones_like(weights[snr <= 5]))
    torch.testing.assert_close(weights[snr > 5], 5 / snr[snr > 5])
    assert (snr > 5).float().mean() > 0.2
    assert LOSS_WEIGHTS["none"](diffusion, t) is None


def test_weights_multiply_the_error_alone():
    """Not the variational term."""
    diffusion, draw = create_diffusion(), seeded()
    x, noise = torch.randn(8, 4, generator=draw), torch.randn(8, 4, generator=draw)
    t, weights = torch.arange(0, 1000, 125), torch.linspace(0.1, 2, 8)

    def network(x, t):
        return torch.cat([0.5 * x, torch.zeros_like(x)], dim=-1)

    losses = diffusion.training_losses(network, x, t, noise, weights=weights)
    torch.testing.assert_close(losses["loss"], weights * losses["mse"] + losses["vb"])
    losses = diffusion.training_losses(network, x, t, noise, vlb=False, weights=weights)
    torch.testing.assert_close(losses["loss"], weights * losses["mse"])


@pytest.mark.parametrize("kind", [DiffLoss, Flow])
def test_a_head_draws_its_timesteps_in_training(kind):
    """In evaluation mode they are uniform, so that losses of differently trained heads compare."""
    head = small_head(kind, timesteps="log-snr")
    drawn = [head.train(mode).draw_timesteps((5, 7), seeded(), None) for mode in (True, False)]
    for t, name in zip(drawn, ("log-snr", "uniform"), strict=True):
        assert torch.equal(t, TIMESTEPS[name](head.train_diffusion, (5, 7), seeded()))


def test_the_usual_timesteps():
    """Diffusion Loss: uniform, as in the paper; a flow: logit-normal."""
    assert small_head().timesteps is TIMESTEPS["uniform"]
    assert small_head(Flow).timesteps is TIMESTEPS["logit-normal"]
    assert small_head().loss_weight is LOSS_WEIGHTS["none"]


def test_a_head_weighs_its_losses_in_training():
    """By min-snr where asked: less than without, and the same in evaluation mode."""
    z, target = rule_input("z", (64, 8)), rule_input("x", (64, 4))
    heads = [small_head(loss_weight=name, vlb=False) for name in ("none", "min-snr")]
    for mode in (True, False):
        plain, weighted = (head.train(mode)(target, z, generator=seeded()) for head in heads)
        assert weighted < 0.98 * plain if mode else torch.equal(weighted, plain)


def test_dit_has_both_options():
    """And its loss changes with each."""
    latents, labels = torch.randn(8, 16, 4, 4, generator=seeded()), torch.arange(8)
    options = {}, {"timesteps": "logit-normal"}, {"loss_weight": "min-snr"}
    models = [by_rule(dit_tiny(img_size=64, class_num=10, **own)).train() for own in options]
    losses = {model(latents, labels, seeded()).item() for model in models}
    assert len(losses) == 3


@pytest.mark.parametrize("kind", [DiffLoss, Flow])
def test_unknown_names(kind):
    """They are named, with those that exist."""
    with pytest.raises(ValueError, match="timesteps 'normal': expected one of uniform, logit-norm"):
        small_head(kind, timesteps="normal")
    with pytest.raises(ValueError, match="loss_weight 'snr': expected one of none, min-snr"):
        small_head(loss_weight="snr")
