"""One face for all tokenizers: images, moments, latents, and back.

    images (N, 3, H, W) in [-1, 1]
      encode  -> moments: what a cache holds, no randomness spent
      sample  -> latents (N, C, H/stride, W/stride): a draw, scaled to about unit deviation
      decode  -> images

Each tokenizer owns its scale; no other file knows one. A new one is a row of `TOKENIZERS`.
"""

from functools import partial

from torch import nn

from models.vae import AutoencoderKL, DiagonalGaussian


class KLTokenizer(nn.Module):
    """A KL autoencoder; its posterior is drawn afresh at each `sample`.

    embed_dim, ch_mult: which network the file must hold (with or without attention in its
    decoder). scale: one over the deviation of its latents over the training set.
    Raises ValueError where the file is missing or holds another network.
    """

    num_codes = None  # latents are continuous

    def __init__(self, vae_path, embed_dim, ch_mult, scale, patch_size=1):
        super().__init__()
        self.vae = AutoencoderKL.from_file(vae_path, embed_dim=embed_dim, ch_mult=ch_mult)
        self.vae.requires_grad_(False).eval()
        self.stride = self.vae.stride
        self.channels = embed_dim
        self.moment_channels = 2 * embed_dim
        self.scale = scale
        self.patch_size = patch_size

    def encode(self, images):
        """Images (N, 3, H, W) to moments (N, 2C, h, w), unscaled."""
        return self.vae.encode(images).moments

    def sample(self, moments, generator=None):
        """Moments (N, 2C, h, w) to one draw of latents (N, C, h, w)."""
        return DiagonalGaussian(moments).sample(generator) * self.scale

    def decode(self, latents, generator=None):
        """Latents (N, C, h, w) to images (N, 3, H, W), about [-1, 1]."""
        return self.vae.decode(latents / self.scale)


class PixelTokenizer(nn.Module):
    """Pixels themselves, to be grouped into patches: nothing is lost and nothing drawn."""

    stride = 1
    num_codes = None

    def __init__(self, channels=3, scale=1.0, patch_size=4):
        super().__init__()
        self.channels = self.moment_channels = channels
        self.scale = scale
        self.patch_size = patch_size

    def encode(self, images):
        """Images (N, C, H, W), as they are."""
        return images

    def sample(self, moments, generator=None):
        """Images times the scale."""
        return moments * self.scale

    def decode(self, latents, generator=None):
        """Latents (N, C, H, W) to images."""
        return latents / self.scale


# name -> constructor(vae_path=…, scale=…), for pixels without vae_path
TOKENIZERS = {
    "kl16": partial(KLTokenizer, embed_dim=16, ch_mult=(1, 1, 2, 2, 4), scale=0.2325),
    "kl8": partial(KLTokenizer, embed_dim=4, ch_mult=(1, 2, 4, 4), scale=0.18215, patch_size=2),
    "pixels": PixelTokenizer,
}
