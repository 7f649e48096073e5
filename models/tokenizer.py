"""One face for all tokenizers: images, moments, latents, and back.

    images (N, I, H, W) in [-1, 1]
      encode  -> moments: what a cache holds, no randomness spent
      sample  -> latents (N, C, H/stride, W/stride): a draw, scaled to about unit deviation
      decode  -> images

A discrete tokenizer's latents are numbers of codes, kept as floats so that caches and models treat
all tokenizers alike. Attributes of each: `stride`, `channels` C, `moment_channels`, `patch_size`
(its usual one), `num_codes` (None: continuous) and `scale` (None: discrete). Each tokenizer owns
its scale; no other file knows one. A new one is a row of `TOKENIZERS`.
"""

from functools import partial

from torch import nn

from models.consistency import load_consistency_decoder
from models.vae import AutoencoderKL, DiagonalGaussian, check_images
from models.vq import VQModel
from util.weights import read_file

EXACT = 2**24  # up to here float32 holds every whole number


class KLTokenizer(nn.Module):
    """A KL autoencoder; its posterior is drawn afresh at each `sample`.

    scale: one over the deviation of its latents over the training set; if not given the file's
    own, else `published_scale`. network: arguments of AutoencoderKL that the file must agree with;
    the others are the file's.
    Raises ValueError where the file is missing or holds another network, or there is no scale.
    """

    num_codes = None

    def __init__(self, vae_path, scale=None, published_scale=None, patch_size=1, **network):
        super().__init__()
        self.vae = AutoencoderKL.from_file(vae_path, **network)
        self.vae.requires_grad_(False).eval()
        self.stride = self.vae.stride
        self.channels = self.vae.config["embed_dim"]
        self.moment_channels = 2 * self.channels
        self.scale = find_scale(vae_path, scale, published_scale)
        self.patch_size = patch_size

    def encode(self, images):
        """Images (N, I, H, W) to moments (N, 2C, h, w), unscaled."""
        return self.vae.encode(images).moments

    def sample(self, moments, generator=None):
        """Moments (N, 2C, h, w) to one draw of latents (N, C, h, w)."""
        return DiagonalGaussian(moments).sample(generator) * self.scale

    def decode(self, latents, generator=None):
        """Latents (N, C, h, w) to images (N, I, H, W), about [-1, 1]. Nothing is drawn."""
        return self.vae.decode(latents / self.scale)


class ConsistencyTokenizer(nn.Module):
    """KL-8's latents, decoded by the Consistency Decoder (OpenAI 2023) in two steps, from noise.

    vae_path: see `load_consistency_decoder`. scale: that of KL-8 unless given.
    Raises ValueError where the file is missing or another, or the diffusers library is not there.
    """

    num_codes = None
    channels, moment_channels = 4, 8

    def __init__(self, vae_path, scale=0.18215, patch_size=2):
        super().__init__()
        self.vae = load_consistency_decoder(vae_path).requires_grad_(False).eval()
        self.stride = 2 ** (len(self.vae.config.encoder_block_out_channels) - 1)
        self.scale = find_scale(vae_path, scale)
        self.patch_size = patch_size

    def encode(self, images):
        """Images (N, 3, H, W) to moments (N, 8, h, w), unscaled: those of KL-8."""
        check_images(images, 3, self.stride)
        return self.vae.quant_conv(self.vae.encoder(images))

    def sample(self, moments, generator=None):
        """Moments (N, 8, h, w) to one draw of latents (N, 4, h, w)."""
        return DiagonalGaussian(moments).sample(generator) * self.scale

    def decode(self, latents, generator=None):
        """Latents (N, 4, h, w) to images (N, 3, H, W); generator, as in util.rng, gives the noise.

        The library draws by itself, and takes one generator an image only as a list.
        """
        if isinstance(generator, tuple):
            generator = list(generator)
        return self.vae.decode(latents / self.scale, generator, return_dict=False)[0]


class VQTokenizer(nn.Module):
    """The numbers of a VQ autoencoder's codes: moments and latents (N, 1, h, w), whole floats.

    network: arguments of VQModel that the file must agree with; the others are the file's.
    Raises ValueError where the file is missing or holds another network, or a scale is given.
    """

    scale = None
    channels = moment_channels = 1

    def __init__(self, vae_path, scale=None, patch_size=1, **network):
        super().__init__()
        if scale is not None:
            raise ValueError(f"scale {scale}: numbers of codes are not scaled, expected none")
        self.vae = VQModel.from_file(vae_path, **network)
        self.vae.requires_grad_(False).eval()
        self.stride, self.num_codes = self.vae.stride, self.vae.num_codes
        if self.num_codes > EXACT:
            raise ValueError(f"{vae_path}: {self.num_codes} codes, expected at most {EXACT}")
        self.patch_size = patch_size

    def encode(self, images):
        """Images (N, I, H, W) to numbers (N, 1, h, w), float32."""
        return self.vae.quantize(self.vae.encode(images)).unsqueeze(1).float()

    def sample(self, moments, generator=None):
        """The numbers, as they are."""
        return moments

    def decode(self, latents, generator=None):
        """Numbers (N, 1, h, w) to images. Raises ValueError for one that is of no code."""
        return self.vae.decode(self.vae.lookup(latents.squeeze(1).round().long()))


class VQLatentTokenizer(nn.Module):
    """A VQ autoencoder's latents before quantization, which is where decoding begins.

    scale: one over the deviation of its latents; if not given the file's own, without which a
    ValueError says how to measure it (none is published). network: as of VQTokenizer.
    """

    num_codes = None

    def __init__(self, vae_path, scale=None, patch_size=1, **network):
        super().__init__()
        self.vae = VQModel.from_file(vae_path, **network)
        self.vae.requires_grad_(False).eval()
        self.stride = self.vae.stride
        self.channels = self.moment_channels = self.vae.config["embed_dim"]
        self.scale = find_scale(vae_path, scale)
        self.patch_size = patch_size

    def encode(self, images):
        """Images (N, I, H, W) to moments (N, C, h, w), unscaled."""
        return self.vae.encode(images)

    def sample(self, moments, generator=None):
        """Moments times the scale: nothing is drawn."""
        return moments * self.scale

    def decode(self, latents, generator=None):
        """Latents (N, C, h, w) to images (N, I, H, W), through their nearest codes."""
        return self.vae.decode(self.vae.lookup(self.vae.quantize(latents / self.scale)))


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


def find_scale(path, given, published=None):
    """The scale given, else the one in the file at `path`, else the published one.

    A file that main_tokenizer.py trained has it under `scale`. Raises ValueError where there is
    none or it is not above 0.
    """
    scale = given
    if scale is None:
        scale = read_file(path).get("scale", published)
    if scale is None:
        raise ValueError(
            f"{path}: holds no scale for its latents, and none is published; measure it with "
            "main_tokenizer.py --vae_scale 1 (latent_scale), then pass it as --vae_scale"
        )
    if not isinstance(scale, float | int) or not scale > 0:
        raise ValueError(f"scale {scale}: expected a number above 0")
    return float(scale)


_KL16 = {"embed_dim": 16, "ch_mult": (1, 1, 2, 2, 4)}
_KL8 = {"embed_dim": 4, "ch_mult": (1, 2, 4, 4)}
_VQ16 = {"embed_dim": 8, "ch_mult": (1, 1, 2, 2, 4), "num_codes": 16384}

# name -> constructor(vae_path=…, scale=…), for pixels without vae_path. The last three take any
# network of their kind, such as main_tokenizer.py trains.
TOKENIZERS = {
    "kl16": partial(KLTokenizer, published_scale=0.2325, **_KL16),
    "kl8": partial(KLTokenizer, published_scale=0.18215, patch_size=2, **_KL8),
    "pixels": PixelTokenizer,
    "vq16": partial(VQTokenizer, **_VQ16),
    "vq16_latent": partial(VQLatentTokenizer, **_VQ16),
    "consistency": ConsistencyTokenizer,
    "kl": KLTokenizer,
    "vq": VQTokenizer,
    "vq_latent": VQLatentTokenizer,
}
