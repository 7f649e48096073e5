"""Latents changed in training, and latents of one norm: formulas, draws, files, and sampling.

Run: python -m pytest tests/test_changes.py
"""

import pytest
import torch
from rule import by_rule, rule_input
from torch import nn

from models import changes
from models.autoencoder_settings import Changes
from models.changes import Trained, add_noise, hide
from models.vae import AutoencoderKL
from models.vq import VQModel

TINY = {"embed_dim": 4, "ch_mult": (1, 2), "ch": 8}
NETWORKS = {"kl": AutoencoderKL(**TINY), "vq": VQModel(num_codes=16, **TINY)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def network_of(kind="kl"):
    return by_rule(NETWORKS[kind])


# Noise and masks


def test_noise_is_interpolated_by_the_formula():
    """(1 − τ)z + τγσε with the draws in this order, τ one per image, σ that of the batch."""
    z = 3 * rule_input("latents", (5, 4, 2, 6)) + 1
    got, generator = add_noise(z, 2.5, seeded()), seeded()
    tau = torch.rand(5, 1, 1, 1, generator=generator)
    noise = torch.randn(5, 4, 2, 6, generator=generator)
    sigma = (z - z.mean()).square().mean().sqrt()
    torch.testing.assert_close(got, (1 - tau) * z + tau * 2.5 * sigma * noise)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_growing_latents_do_not_escape_the_noise(monkeypatch, scale):
    """At τ = 1/2 the variance is (σ/2)²(1 + γ²) at any size of the latents, and the gradient of
    a latent is 1 − τ: none goes through σ."""
    monkeypatch.setattr(changes, "rand", lambda shape, *_: torch.full(shape, 0.5))
    z = (scale * rule_input("latents", (64, 4, 8, 8))).requires_grad_()
    noisy = add_noise(z, 3.0, seeded())
    assert noisy.var().item() == pytest.approx((scale / 2) ** 2 * (1 + 3**2), rel=0.05)
    noisy.sum().backward()
    assert torch.equal(z.grad, torch.full_like(z, 0.5))


def test_masks_hide_at_most_the_given_fraction():
    """max(0, U(−0.1, M)) of the positions, all channels alike; 1/8 of the images keep all at 0.7.
    What is not hidden is as it was."""
    z = rule_input("latents", (4000, 3, 4, 5))
    hidden = hide(z, 0.7, seeded())
    gone = (hidden == 0).all(1)
    assert torch.equal(hidden, z * ~gone.unsqueeze(1))
    shares = gone.flatten(1).float().mean(1)
    assert 0.6 < shares.max() <= 0.7
    # 1/8 below 0, and of the rest 1/14 below one of 20 positions
    assert (shares == 0).float().mean().item() == pytest.approx(1 / 8 + 7 / 8 / 14, abs=0.02)
    assert shares.mean().item() == pytest.approx(7 / 8 * (0.35 - 0.025), abs=0.02)
    places = gone.float().mean(0)
    assert places.max() - places.min() < 0.08


# Equivariance


class Pointwise(nn.Module):
    """An exactly equivariant autoencoder of stride 1: the negative, and back."""

    stride = 1

    def forward(self, images, generator=None, change=None):
        return -change(-images), None


class Blocks(nn.Module):
    """Stride 2: means of 2×2 pixels, and each repeated. Only rotation is exact."""

    stride = 2

    def forward(self, images, generator=None, change=None):
        latents = change(nn.functional.avg_pool2d(images, 2))
        return nn.functional.interpolate(latents, scale_factor=2), latents


@pytest.mark.parametrize("size", [(8, 8), (6, 4), (1, 1)])
def test_equivariant_networks_have_no_error(size):
    """Target and latents are scaled and rotated alike, for square images and others."""
    trained, images = (
        Trained(Pointwise(), Changes.of(equivariance=1.0)),
        rule_input("x", (2, 3, *size)),
    )
    for seed in range(30):
        target, (decoded, _) = trained(images, seeded(seed))
        torch.testing.assert_close(decoded, target, atol=0, rtol=0)


def test_scales_and_turns():
    """Scales from 1/4 up to below 1 with whole latents, three rotations, in the share of the
    batches asked for; images that are not square keep their shape and turn by 180°."""
    trained = Trained(Blocks(), Changes.of(equivariance=0.5))
    images, generator, sizes, same = rule_input("x", (1, 1, 16, 16)), seeded(), [], 0
    for _ in range(400):
        target, (decoded, latents) = trained(images, generator)
        assert decoded.shape == target.shape
        same += torch.equal(target, images)
        sizes.append(latents.shape[-1])
    assert 160 < same < 240
    assert sorted(set(sizes)) == [2, 3, 4, 5, 6, 7, 8]
    wide = rule_input("x", (1, 1, 8, 16))
    seen = {tuple(trained(wide, seeded(i))[0].shape[2:]) for i in range(60)}
    assert seen == {(8, 16), (2, 4), (4, 8), (6, 12)}


def test_rotations_are_by_quarter_turns():
    """At one scale, targets are the three rotations of the image; if not square, that by 180°."""
    trained = Trained(Blocks(), Changes.of(equivariance=1.0), least_side=8)
    for shape, turns in {(8, 8): (1, 2, 3), (8, 16): (2,)}.items():
        images = rule_input("x", (1, 1, *shape))
        expected = [torch.rot90(images, k, (2, 3)) for k in turns]
        seen = set()
        for seed in range(30):
            target, _ = trained(images, seeded(seed))
            seen |= {k for k, e in zip(turns, expected, strict=True) if torch.equal(target, e)}
        assert seen == set(turns)


def test_scaled_images_keep_a_least_side():
    """What a discriminator needs is kept, also if it is all."""
    images = rule_input("x", (1, 1, 16, 16))
    for least, fits in ((8, {8, 10, 12, 14}), (15, {16}), (99, {16})):
        trained = Trained(Blocks(), Changes.of(equivariance=1.0), least_side=least)
        assert {trained(images, seeded(i))[0].shape[-1] for i in range(40)} == fits


# What is trained


@pytest.mark.parametrize("kind", NETWORKS)
def test_nothing_is_drawn_when_all_is_off(kind):
    """The network's own bits and state of the generator, and the images as target."""
    network, images = network_of(kind), rule_input("image", (2, 3, 8, 8))
    generator, other = seeded(), seeded()
    target, (decoded, *_) = Trained(network, Changes())(images, generator)
    assert target is images
    assert torch.equal(decoded, network(images, other)[0])
    assert torch.equal(generator.get_state(), other.get_state())


@pytest.mark.parametrize("kind", NETWORKS)
def test_changes_train_encoder_and_decoder(kind):
    """With all on, the gradient passes the change (for VQ, straight through): both halves get one,
    and the loss is of target and output of one shape."""
    network, images = network_of(kind), rule_input("image", (4, 3, 16, 16))
    on = Changes.of(latent_noise=3.0, latent_mask=0.5, equivariance=1.0)
    target, output = Trained(network, on)(images, seeded())
    assert target.shape == output[0].shape != images.shape
    network.zero_grad()
    network.losses(target, output)["l1"].backward()
    for half in (network.encoder, network.decoder):
        assert half.conv_in.weight.grad.abs().sum() > 0
        assert all(p.grad.isfinite().all() for p in half.parameters() if p.grad is not None)


def test_changes_depend_on_the_generator_alone():
    """The same state of the generator gives the same target and output."""
    trained = Trained(network_of(), Changes.of(latent_noise=1.0, latent_mask=0.5, equivariance=0.5))
    images = rule_input("image", (2, 3, 8, 8))
    for seed in (0, 1, 2):
        (a, (x, _)), (b, (y, _)) = (trained(images, seeded(seed)) for _ in range(2))
        assert torch.equal(a, b) and torch.equal(x, y)
