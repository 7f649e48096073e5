"""Tokenizers: images to moments to latents, and back.

    images (N, I, H, W) in [-1, 1]
      encode  -> moments (N, M, h, w): deterministic; a cache holds these
      sample  -> latents (N, C, h, w): a random draw, normalized to about mean 0 and std 1
      decode  -> images (N, I, H, W)

with h = H / stride and w = W / stride. Every tokenizer is a subclass of `Tokenizer`. A new one is a
class, or a `partial` of one, and a row of TOKENIZERS in models/settings.py.
"""

import math
from functools import partial

import numpy as np
import torch
from torch import nn

from models.consistency import load_consistency_decoder
from models.pca import PatchPCA
from models.scale import check_fixed, check_numbers, scale_and_shift
from models.vae import LEAST, AutoencoderKL, DiagonalGaussian, check_images
from models.vq import VQModel
from util.dist import all_gather, print0
from util.images import to_uint8
from util.weights import digest

DECODED_AT_ONCE = 32  # images; a decoder needs 0.2 GB per image at 256 pixels
EXACT = 2**24  # up to here float32 represents every integer
USUAL_STD = (0.8, 1.25)  # of the latents of a batch
FEW = 8  # images, whose latents may have any std
ENCODER = ("encoder.", "quant_conv.", "token_norm.", "norm_groups")


class Tokenizer(nn.Module):
    """Base class: a subclass has `encode` and `decode`.

    Latents are normalized raw latents: latents = (raw − shift) · scale. `scale` and `shift` are
    each a float, or a list of one float per channel.

    The latents of a discrete tokenizer are code indices: one channel of floats, so that caches and
    models treat all tokenizers alike. Its `num_codes` is K, and its `scale` and `shift` are None.

    Args:
        channels: channels C of the latents.
        stride: pixels per latent along each side.
        patch_size: default side, in latents, of the patches that models take as tokens.
        scale, shift: see above.
        vae: network, frozen here, or None.

    Raises:
        ValueError: scale or shift is not finite or not one per channel, or scale is not above 0.

    Attributes: the arguments; `num_codes`, None unless discrete; `moment_channels`, M above;
    `image_channels`; `token_norm`, whether latents have one norm, see models/token_norm.py;
    `config`, name and arguments of one of `models.build_tokenizer`, else None.
    """

    config = None
    num_codes = None
    image_channels = None  # I above; None for any
    gaussian = False  # whether moments are the means and log-variances of a Gaussian, M = 2C
    normalized = True  # whether latents should have about std 1
    encoding = ()  # how names of the network's weights begin that latents depend on; (): not known
    token_norm = False

    def __init__(self, channels, stride, patch_size, scale, shift, vae=None):
        super().__init__()
        self.channels, self.stride, self.patch_size = channels, stride, patch_size
        self.moment_channels = 2 * channels if self.gaussian else channels
        self._set("scale", check_numbers("scale", scale, channels, positive=True))
        self._set("shift", check_numbers("shift", shift, channels))
        self.vae = vae and vae.requires_grad_(False).eval()
        self.checked = False  # by `check_first`

    def _set(self, name, value):
        setattr(self, name, value)
        if isinstance(value, list):  # a buffer moves with the module; it is not a weight
            value = torch.tensor(value).view(-1, 1, 1)
            self.register_buffer(f"_{name}", value, persistent=False)
        else:
            setattr(self, f"_{name}", value)

    def encode(self, images):
        """Images (N, I, H, W) in [-1, 1] to moments (N, M, h, w), float32. Deterministic."""
        raise NotImplementedError

    def sample(self, moments, generator=None):
        """Moments (N, M, h, w) to latents (N, C, h, w). generator: as in util.rng."""
        raw = DiagonalGaussian(moments).sample(generator) if self.gaussian else moments
        return self.to_latents(raw)

    def mode(self, moments):
        """Moments (N, M, h, w) to their most likely latents (N, C, h, w): no random draw."""
        return self.to_latents(DiagonalGaussian(moments).mode() if self.gaussian else moments)

    def moments_of(self, latents):
        """Moments (N, M, h, w) that stand for latents (N, C, h, w) alone: the inverse of `mode`."""
        raw = latents if self.num_codes else self.to_raw(latents)
        return torch.cat([raw, torch.full_like(raw, LEAST)], 1) if self.gaussian else raw

    def decode(self, latents, generator=None):
        """Latents (N, C, h, w) to images (N, I, H, W), about [-1, 1], unclipped.

        generator: as in util.rng, for a decoder that draws random numbers.
        """
        raise NotImplementedError

    def to_latents(self, raw):
        """Raw latents (N, C, h, w) to latents: (raw − shift) · scale."""
        return (raw - self._shift if self.shift else raw) * self._scale

    def to_raw(self, latents):
        """Latents (N, C, h, w) to raw latents: latents / scale + shift."""
        raw = latents / self._scale
        return raw + self._shift if self.shift else raw  # −0 + 0 would be +0

    def encoder_sha256(self):
        """The sha256 of the weights that latents depend on, whatever decodes them; None if not
        known. In half precision, so that it is that of a file of 16 bits, too."""
        if not (self.vae and self.encoding):
            return None
        own = self.vae.state_dict().items()
        return digest({name: value.half() for name, value in own if name.startswith(self.encoding)})

    def check_first(self, latents):
        """Say it if the first latents (N, C, h, w) of a run are far from std 1. Only once.

        A collective call.
        """
        if self.checked or not self.normalized or self.num_codes:
            return
        self.checked = True
        mean, std = mean_and_std(latents)
        if len(latents) < FEW:
            return
        if USUAL_STD[0] <= std <= USUAL_STD[1] or not 0 < std < math.inf:
            return
        scales = self.scale if isinstance(self.scale, list) else [self.scale]
        better = ",".join(f"{scale / std:.4g}" for scale in scales)
        print0(
            f"NOTE: the latents of the first batch have std {std:.3g} (mean {mean:.3g}), expected "
            f"about 1: in a new run, --vae_scale {better} gives that"
        )


class AutoencoderTokenizer(Tokenizer):
    """Base class of tokenizers whose latents are those of an autoencoder in a file.

    Args:
        vae_path: file of the network, or folder of diffusers.
        scale, shift: see Tokenizer; if None, see `scale_and_shift`.
        published_scale, published_shift: those of the published network, if any.
        network: arguments of `autoencoder` that the file must match; others are read from it.

    Raises:
        ValueError: the file is missing or holds another network, or there is no scale.
    """

    autoencoder = None  # class of the network, AutoencoderKL or VQModel
    config_has_scale = False  # whether configurations of diffusers do

    def __init__(
        self,
        vae_path,
        scale=None,
        shift=None,
        patch_size=1,
        published_scale=None,
        published_shift=0.0,
        **network,
    ):
        vae = self.autoencoder.from_file(vae_path, **network)
        published = published_scale, published_shift
        described = vae.described if self.config_has_scale else None
        channels, given = vae.config["embed_dim"], (scale, shift)
        if vae.fixed_scale:
            check_fixed(vae_path, vae.fixed_scale, scale, shift)
            scale, shift = vae.fixed_scale, 0.0
        scale, shift = scale_and_shift(vae_path, vae.config, described, scale, shift, published)
        if given[0] is None:
            check_numbers(f"{vae_path}: scale", scale, channels, positive=True)
        if given[1] is None:
            check_numbers(f"{vae_path}: shift", shift, channels)
        super().__init__(channels, vae.stride, patch_size, scale, shift, vae)
        self.image_channels = vae.config["in_channels"]


class KLTokenizer(AutoencoderTokenizer):
    """A KL autoencoder; latents are samples of its posterior."""

    gaussian = True
    encoding = ENCODER
    autoencoder = AutoencoderKL
    config_has_scale = True

    @property
    def token_norm(self):
        return self.vae.config["token_norm"]

    def encode(self, images):
        return self.vae.encode(images).moments

    def to_latents(self, raw):
        return super().to_latents(self.vae.project(raw))

    def decode(self, latents, generator=None):
        return self.vae.decode(self.to_raw(latents))


class VQLatentTokenizer(AutoencoderTokenizer):
    """The latents of a VQ autoencoder before quantization; `decode` quantizes them."""

    encoding = ENCODER
    autoencoder = VQModel  # diffusers writes KL-8's scale into the configuration of any

    def encode(self, images):
        return self.vae.encode(images)

    def decode(self, latents, generator=None):
        return self.vae.decode(self.vae.lookup(self.vae.quantize(self.to_raw(latents))))


class VQTokenizer(Tokenizer):
    """The code indices of a VQ autoencoder, (N, 1, h, w), floats with integer values.

    network: arguments of VQModel that the file must match; others are read from it.
    Raises ValueError if the file is missing or holds another network, or for a scale or shift.
    """

    encoding = (*ENCODER, "quantize.")

    def __init__(self, vae_path, scale=None, shift=None, patch_size=1, **network):
        for name, value in {"scale": scale, "shift": shift}.items():
            if value is not None:
                raise ValueError(f"{name} {value}: code indices have no {name}, expected none")
        vae = VQModel.from_file(vae_path, **network)
        if vae.num_codes > EXACT:
            raise ValueError(f"{vae_path}: {vae.num_codes} codes, expected at most {EXACT}")
        super().__init__(1, vae.stride, patch_size, None, None, vae)
        self.num_codes, self.image_channels = vae.num_codes, vae.config["in_channels"]

    def encode(self, images):
        return self.vae.quantize(self.vae.encode(images)).unsqueeze(1).float()

    def to_latents(self, raw):
        return raw

    def decode(self, latents, generator=None):
        """Code indices (N, 1, h, w) to images. Raises ValueError for an index out of range."""
        return self.vae.decode(self.vae.lookup(latents.squeeze(1).round().long()))


class ConsistencyTokenizer(Tokenizer):
    """The latents of KL-8, decoded from noise by the Consistency Decoder (OpenAI 2023).

    vae_path: see `load_consistency_decoder`. scale: by default, that of KL-8.
    Raises ValueError if the file is missing or does not fit, or diffusers is not installed.
    """

    gaussian, image_channels = True, 3

    def __init__(self, vae_path, scale=0.18215, shift=0.0, patch_size=2):
        vae = load_consistency_decoder(vae_path)
        stride = 2 ** (len(vae.config.encoder_block_out_channels) - 1)
        super().__init__(4, stride, patch_size, scale, shift, vae)

    def encode(self, images):
        check_images(images, 3, self.stride)
        return self.vae.quant_conv(self.vae.encoder(images))

    def decode(self, latents, generator=None):
        if isinstance(generator, tuple):  # the library accepts several generators only as a list
            generator = list(generator)
        return self.vae.decode(self.to_raw(latents), generator, return_dict=False)[0]


class PCATokenizer(Tokenizer):
    """Principal components of patches, as main_tokenizer.py fits them; deterministic.

    vae_path: its file. scale, shift: by default those in the file, one per channel.
    Raises ValueError if the file is missing or holds another network.
    """

    encoding = ("",)  # all of them

    def __init__(self, vae_path, scale=None, shift=None, patch_size=1):
        vae = PatchPCA.from_file(vae_path)
        scale, shift = scale_and_shift(vae_path, vae.config, None, scale, shift)
        super().__init__(vae.config["embed_dim"], vae.stride, patch_size, scale, shift, vae)
        self.image_channels = vae.config["in_channels"]

    def encode(self, images):
        return self.vae.encode(images)

    def decode(self, latents, generator=None):
        return self.vae.decode(self.to_raw(latents))


class PixelTokenizer(Tokenizer):
    """Pixels as latents, to be grouped into patches: lossless and deterministic."""

    normalized = False  # images in [-1, 1] have a std of about 0.5

    def __init__(self, channels=3, scale=1.0, shift=0.0, patch_size=4):
        super().__init__(channels, 1, patch_size, scale, shift)
        self.image_channels = channels

    def encode(self, images):
        return images

    def decode(self, latents, generator=None):
        return self.to_raw(latents)


@torch.no_grad()
def decode(tokenizer, latents, generators):
    """Latents (N, C, h, w) to images uint8 (N, H, W, 3). generators: one per image."""
    parts = [slice(i, i + DECODED_AT_ONCE) for i in range(0, len(latents), DECODED_AT_ONCE)]
    return np.concatenate(
        [to_uint8(tokenizer.decode(latents[part], generators[part])) for part in parts]
    )


def mean_and_std(latents):
    """Mean and standard deviation of the elements of all processes' latents. A collective call."""
    variance, mean = torch.var_mean(latents.float(), correction=0)
    parts = all_gather((latents.numel(), mean.item(), (variance + mean**2).item()))
    count = sum(n for n, _, _ in parts)
    mean, square = (sum(part[0] * part[i] for part in parts) / count for i in (1, 2))
    return mean, math.sqrt(max(0.0, square - mean**2))


_CONVS = {"quant_conv": True, "post_quant_conv": True}
_KL16 = {"embed_dim": 16, "ch_mult": (1, 1, 2, 2, 4), **_CONVS}
_KL8 = {"embed_dim": 4, "ch_mult": (1, 2, 4, 4), **_CONVS}
_VQ16 = {"embed_dim": 8, "ch_mult": (1, 1, 2, 2, 4), "num_codes": 16384}

kl16 = partial(KLTokenizer, published_scale=0.2325, **_KL16)
kl8 = partial(KLTokenizer, published_scale=0.18215, patch_size=2, **_KL8)
vq16 = partial(VQTokenizer, **_VQ16)
vq16_latent = partial(VQLatentTokenizer, **_VQ16)
