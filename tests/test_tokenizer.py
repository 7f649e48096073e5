"""Tokenizers behind their one face. Run: python -m pytest tests/test_tokenizer.py"""

import pytest
import torch

from models import build_tokenizer
from models.vae import AutoencoderKL


def test_kl_moments_to_latents(vae_path):
    """Latents are the posterior's draw times the scale; decoding divides by it again."""
    tokenizer = build_tokenizer("kl16", vae_path)
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    moments = tokenizer.encode(images)
    assert moments.shape == (2, 32, 2, 3)
    draws = [tokenizer.sample(moments, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    mean, std = moments[:, :16], (moments[:, 16:].clamp(-30, 20) / 2).exp()
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws[0], 0.2325 * (mean + std * noise))
    torch.testing.assert_close(tokenizer.decode(draws[0]), tokenizer.vae.decode(draws[0] / 0.2325))


def test_scale_can_be_chosen(vae_path):
    """A retrained KL-16 has a scale of its own."""
    ours, other = (build_tokenizer("kl16", vae_path, scale=s) for s in (None, 0.5))
    moments = torch.randn(1, 32, 2, 2).index_fill(1, torch.arange(16, 32), -30.0)
    torch.testing.assert_close(
        other.sample(moments) / ours.sample(moments),
        torch.tensor(0.5 / 0.2325).expand(1, 16, 2, 2),
        rtol=1e-3,
        atol=1e-3,
    )


def test_published_scales(tmp_path, vae_path):
    """0.2325 for KL-16, 0.18215 for Stable Diffusion's KL-8, which has patches of 2×2."""
    path = tmp_path / "kl8.ckpt"
    kl8 = AutoencoderKL(embed_dim=4, ch_mult=(1, 2, 4, 4), ch=32, encoder_attention=False)
    torch.save(kl8.state_dict(), path)
    kl16, kl8 = build_tokenizer("kl16", vae_path), build_tokenizer("kl8", path)
    assert (kl16.scale, kl16.stride, kl16.channels, kl16.patch_size) == (0.2325, 16, 16, 1)
    assert (kl8.scale, kl8.stride, kl8.channels, kl8.patch_size) == (0.18215, 8, 4, 2)
    with pytest.raises(ValueError, match="variant is embed_dim=4, ch_mult=.1, 2, 4, 4."):
        build_tokenizer("kl16", path)


def test_attention_in_the_decoder_is_taken_from_the_file(tmp_path):
    """LDM's own KL-16, with attention in its decoder, is a kl16 too."""
    path = tmp_path / "ldm.ckpt"
    torch.save({"state_dict": AutoencoderKL(ch=32, decoder_attention=True).state_dict()}, path)
    tokenizer = build_tokenizer("kl16", path)
    assert tokenizer.decode(torch.zeros(1, 16, 1, 1)).shape == (1, 3, 16, 16)


def test_pixels_are_themselves():
    """Nothing is lost and nothing is drawn."""
    tokenizer = build_tokenizer("pixels", scale=2.0)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    latents = tokenizer.sample(tokenizer.encode(images))
    assert torch.equal(latents, 2 * images)
    assert torch.equal(tokenizer.decode(latents), images)


def test_unknown_tokenizer_and_missing_weights():
    """Both are one line that says what there is."""
    with pytest.raises(ValueError, match="tokenizer 'vq9': expected one of kl16, kl8, pixels"):
        build_tokenizer("vq9")
    with pytest.raises(ValueError, match="nowhere.ckpt: no such file. .*util.download kl16"):
        build_tokenizer("kl16", "nowhere.ckpt")
