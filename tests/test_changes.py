"""Latents changed in training, and latents of one norm: formulas, draws, files, and sampling.

Run: python -m pytest tests/test_changes.py
"""

import pytest
import torch
from rule import by_rule, rule_input
from torch import nn

from models import build_model, build_tokenizer, changes
from models.autoencoder_settings import Changes
from models.changes import Trained, add_noise, hide
from models.config import resolve_model
from models.settings import Model
from models.token_norm import project
from models.vae import AutoencoderKL
from models.vq import VQModel
from util.weights import digest

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
    """At τ = 1/2 the variance is (σ/2)²(1 + γ²) at any size of the latents, and where the size of
    what is decoded does not matter, no gradient makes them larger: it would never end."""
    monkeypatch.setattr(changes, "rand", lambda shape, *_: torch.full(shape, 0.5))
    z = (scale * rule_input("latents", (64, 4, 8, 8))).requires_grad_()
    noisy = add_noise(z, 3.0, seeded())
    assert noisy.var().item() == pytest.approx((scale / 2) ** 2 * (1 + 3**2), rel=0.05)
    (noisy[:, 0].sum() / noisy.norm()).backward()
    growing = (z.grad * z).sum() / (z.grad.norm() * z.detach().norm())
    assert abs(growing.item()) < 1e-4  # 0.006 without the gradient of σ


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


# Token norm


@pytest.fixture
def normed(tmp_path):
    """(network with token norm, its file as main_tokenizer.py writes it)."""
    network, path = by_rule(AutoencoderKL(token_norm=True, **TINY)), tmp_path / "tokenizer.ckpt"
    content = {"model": network.state_dict(), "scale": network.fixed_scale}
    torch.save({**content, "config": {"network": network.config}}, path)
    return network, path


def norms(latents, dim=1):
    return latents.square().sum(dim).sqrt()


def test_projection():
    """Norm √C at each position, in the direction it had; zeros stay zeros, with a finite gradient;
    the dtype stays."""
    z = rule_input("latents", (2, 4, 3, 5)) * 1e3
    z[0, :, 0, 0] = 0
    projected = project(z.requires_grad_())
    expected = torch.full((2, 3, 5), 2.0)
    expected[0, 0, 0] = 0
    torch.testing.assert_close(norms(projected), expected)
    torch.testing.assert_close(projected * norms(z).unsqueeze(1), 2 * z)
    projected.square().sum().backward()
    assert z.grad.isfinite().all()
    half = project(z.detach().half())
    assert half.dtype == torch.float16 and norms(half.float()).max() == pytest.approx(2, abs=1e-2)


@torch.no_grad()
def test_latents_have_one_norm(normed):
    """Sampled, most likely, cached as float16, and as the network itself gives them; scale 1,
    shift 0; decoding does not depend on their length."""
    network, path = normed
    tokenizer, images = build_tokenizer("kl", path), rule_input("image", (2, 3, 8, 8)).tanh()
    moments = tokenizer.encode(images)
    drawn = tokenizer.sample(moments, seeded())
    cached = tokenizer.sample(moments.half().float(), seeded())
    for latents in (drawn, tokenizer.mode(moments), cached, network.latents(images, seeded())):
        torch.testing.assert_close(norms(latents), torch.full((2, 4, 4), 2.0))
    assert (tokenizer.scale, tokenizer.shift, tokenizer.token_norm) == (1.0, 0.0, True)
    assert torch.equal(tokenizer.decode(drawn), tokenizer.decode(4 * drawn))
    decoded, posterior = network(images, seeded())
    torch.testing.assert_close(decoded, network.decode(posterior.sample(seeded())))
    assert torch.equal(drawn, network.latents(images, seeded()))


@torch.no_grad()
def test_changes_see_the_projected_latents(normed):
    """What a change is given has norm √C, and so has what is decoded after it."""
    network, _ = normed
    images, seen = rule_input("image", (2, 3, 8, 8)), []
    doubled, _ = network(images, seeded(), lambda z: seen.append(z) or 2 * z)
    torch.testing.assert_close(norms(seen[0]), torch.full((2, 4, 4), 2.0))
    assert torch.equal(doubled, network(images, seeded())[0])


def test_token_norm_is_kept_in_the_weights(normed):
    """from_file finds it there; the sha256 of a network and of its encoder are others with it."""
    network, path = normed
    loaded = AutoencoderKL.from_file(path)
    assert loaded.config == network.config and loaded.fixed_scale == 1.0
    weights = network.state_dict()
    del weights["token_norm.norm"]
    torch.save({"model": weights, "scale": 2.0}, plain := path.with_name("plain.ckpt"))
    with_norm, without = build_tokenizer("kl", path), build_tokenizer("kl", plain)
    assert not without.token_norm and without.scale == 2.0 and without.vae.fixed_scale is None
    assert with_norm.encoder_sha256() != without.encoder_sha256()
    assert digest(with_norm.state_dict()) != digest(without.state_dict())


def test_token_norm_needs_no_scale(normed):
    """A scale or shift that contradicts is refused in one line; 1 and 0, as a resumed run gives
    them, are taken, and what the file says of others is not used."""
    _, path = normed
    for given in ({"scale": 0.5}, {"shift": 0.1}, {"scale": [1.0] * 4}, {"shift": [0.0] * 4}):
        with pytest.raises(ValueError, match=r"one norm \(token_norm\), expected [10];") as got:
            build_tokenizer("kl", path, **given)
        assert str(got.value).startswith(next(iter(given))) and "\n" not in str(got.value)
    assert build_tokenizer("kl", path, scale=1.0, shift=0.0).scale == 1.0
    with pytest.raises(ValueError, match="embed_dim 1: expected 2 or more with token_norm"):
        AutoencoderKL(**{**TINY, "embed_dim": 1}, token_norm=True)
    torch.save({**torch.load(path, weights_only=True), "scale": 3.0}, path)
    assert build_tokenizer("kl", path).scale == 1.0


@pytest.mark.parametrize("name", ["mar_tiny", "ar_tiny"])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_sampled_tokens_have_the_norm(name, patch_size):
    """With guidance, after every step, each latent of a patch by itself; without token norm the
    same draws have other norms."""
    size = {"img_size": 8, "vae_stride": 2, "vae_embed_dim": 4, "patch_size": patch_size}
    how = {"class_num": 3, "num_sampling_steps": "2", "max_timestep": 950}
    for on in (True, False):
        model = by_rule(build_model(name, **size, **how, token_norm=on))
        count = model.seq_len if model.one_at_a_time else 3
        settings = {"num_iter": count, "cfg": 3.0, "labels": torch.tensor([0, 2])}
        for latents, hidden in model.sample_steps(2, generator=seeded(), **settings):
            hidden = hidden.view(2, 1, model.seq_h, model.seq_w) > 0
            hidden = hidden.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
            known = norms(latents)[~hidden[:, 0]]
            assert torch.allclose(known, torch.full_like(known, 2.0)) == on


@torch.no_grad()
def test_known_tokens_stay_in_inpainting():
    """They are the tokenizer's; those drawn beside them, some steps lazy, have the norm."""
    size = {"img_size": 8, "vae_stride": 2, "vae_embed_dim": 4, "patch_size": 1, "class_num": 3}
    model = by_rule(build_model("mar_tiny", **size, num_sampling_steps="2", token_norm=True))
    latents, mask = project(rule_input("latents", (2, 4, 4, 4))), torch.zeros(2, 4, 4)
    mask[:, 1:3] = 1
    found = model.sample_tokens(
        2, 4, 2.0, generator=seeded(), latents=latents, mask=mask, max_timestep=950, refresh_every=2
    )
    known = (mask == 0).unsqueeze(1).expand_as(latents)
    assert torch.equal(found[known], latents[known])
    assert not torch.equal(found, latents)
    torch.testing.assert_close(norms(found), torch.full((2, 4, 4), 2.0))


def test_models_follow_the_tokenizer(normed):
    """resolve_model takes it from the tokenizer, and a stored model without it has none."""
    tokenizer = build_tokenizer("kl", normed[1])
    requested = Model().but(name="mar_tiny", img_size=8, num_sampling_steps="2")
    arguments = resolve_model(requested, {"name"}, {}, tokenizer)
    assert arguments["token_norm"] is True
    old = {k: v for k, v in arguments.items() if k != "token_norm"}
    assert build_model(**old).token_norm is False
    assert "token_norm" not in resolve_model(
        requested.but(name="dit_tiny"), {"name"}, {}, tokenizer
    )  # its latents are projected when they are decoded
