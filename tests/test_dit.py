"""DiT, the baseline. Run: python -m pytest tests/test_dit.py"""

import pytest
import torch
from rule import by_rule, rule_input

from diffusion import create_diffusion
from diffusion.solvers import SOLVERS
from engine_mar import parameter_groups
from models.dit import dit_tiny, dit_xl
from util.rng import image_generators

SIZES = {"img_size": 64, "class_num": 10, "num_sampling_steps": "6", "max_timestep": 950}


def test_every_parameter_gets_a_gradient_and_a_group():
    """One training step reaches all of them."""
    torch.manual_seed(0)
    model = dit_tiny(**SIZES, label_drop_prob=0.5).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model(torch.randn(8, 16, 4, 4), torch.arange(8)).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    none, some = (group["params"] for group in parameter_groups(model, 0.02))
    assert len(none) + len(some) == len(list(model.parameters()))
    assert all(p.ndim > 1 for p in some)


def test_untrained_loss_is_that_of_predicting_zero():
    """ε_θ = 0 at the start: the noise error is 1."""
    torch.manual_seed(0)
    model = dit_tiny(**SIZES, vlb=False).train()
    losses = [model(torch.randn(8, 16, 4, 4), torch.arange(8)) for _ in range(20)]
    assert abs(torch.stack(losses).mean().item() - 1) < 0.04
    assert model.statistics()


def test_samples_depend_on_seed_class_and_guidance_alone():
    """Not on the batch; guidance 1 is no guidance."""
    model, labels = by_rule(dit_tiny(**SIZES)), torch.tensor([1, 4, 7])

    def images(indices, **kwargs):
        return model.sample_tokens(
            len(indices),
            labels=labels[indices],
            generator=image_generators(3, indices),
            **kwargs,
        )

    together = images([0, 1, 2])
    assert together.shape == (3, 16, 4, 4)
    torch.testing.assert_close(images([2, 1]), together[[2, 1]], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(images([0, 1, 2], cfg=1 + 1e-6), together, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(images([0, 1, 2], cfg=3.0), together, atol=1e-3)
    labels = labels.roll(1)
    assert not torch.allclose(images([0, 1, 2]), together, atol=1e-3)


def test_tokens_see_each_other():
    """Unlike the head of a MAR, DiT denoises all tokens together."""
    model = by_rule(dit_tiny(**SIZES))
    x = rule_input("x", (1, 16, 16))
    other = x.clone()
    other[:, 0] += 1
    t, classes = torch.full((1, 16), 300), model.embed_labels(None, 1)
    change = (model.net(x, t, classes) - model.net(other, t, classes)).abs().amax(-1)
    assert (change > 1e-5).all()


def test_the_size_of_dit_xl_2():
    """675 million parameters, as its authors count theirs on 4-channel latents at patch 2."""
    with torch.device("meta"):
        model = dit_xl(vae_stride=8, vae_embed_dim=4, patch_size=2)
    assert abs(sum(p.numel() for p in model.parameters()) / 675e6 - 1) < 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"latents": torch.zeros(2, 16, 4, 4), "mask": torch.ones(2, 16)},
            "latents: DiT generates",
        ),
        ({"mask": torch.ones(2, 16)}, "mask: DiT generates all tokens at once"),
        ({"refresh_every": 2}, "refresh_every 2: DiT samples in one step"),
        ({"anneal": "linear"}, "anneal linear: DiT samples in one step"),
        ({"cfg_interval": (0.2, 0.8)}, r"cfg_interval \[0\.2, 0\.8\]: DiT samples in one step"),
        ({"solver": "euler"}, "solver 'euler': expected one of ddpm"),
        ({"temperature": -1.0}, r"temperature -1\.0: expected 0 or more"),
        ({"banana": 1}, "banana: no such setting"),
    ],
)
def test_wrong_sampling_arguments(arguments, message):
    """Inpainting and approximations that DiT does not know are refused, not ignored."""
    with pytest.raises(ValueError, match=message):
        dit_tiny(**SIZES).sample_tokens(2, **arguments)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_samples_are_those_of_the_diffusion(solver, cfg):
    """GaussianDiffusion.sample, given DiT's network and noise, gives DiT's samples."""
    model, labels = by_rule(dit_tiny(**SIZES)), torch.tensor([1, 4])
    classes, uncond = model.embed_labels(labels, 2), model.embed_labels(None, 2)

    def network(x, t):
        noise, v = model.net(x, t, classes).chunk(2, dim=-1)
        noise_uncond = model.net(x, t, uncond).chunk(2, dim=-1)[0]
        return torch.cat([noise_uncond + cfg * (noise - noise_uncond), v], dim=-1)

    draws = SOLVERS[solver].draws_noise
    log_snr = SOLVERS[solver].log_snr
    noise = model.draw_noise((2, 16, 16), image_generators(3, range(2)), None, 6 if draws else 0)
    diffusion = create_diffusion("6", highest=None if draws else 950, log_snr=log_snr)
    with torch.no_grad():
        expected = diffusion.sample(network, noise[0], noise[1:], 1.0, 950, solver)
    sampled = model.sample_tokens(
        2, cfg=cfg, labels=labels, generator=image_generators(3, range(2)), solver=solver
    )
    torch.testing.assert_close(model.patchify(sampled), expected, atol=1e-4, rtol=1e-4)
