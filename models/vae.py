"""The KL autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752): KL-16 and KL-8.

images (N,3,H,W) in [-1,1] -> encode -> a Gaussian over latents (N,C,H/s,W/s) -> decode -> images.

Modules are named as in the authors' code (`down.0.block.1.conv1`, `nin_shortcut`, ...), because
published files are loaded by name. The scale and shift that normalize the latents are not part of
this network; they belong to the tokenizer.

| variant | arguments of `AutoencoderKL` | stride, channels |
| --- | --- | --- |
| KL-16, as published with MAR | the defaults | 16, 16 |
| KL-16, as published with LDM | `decoder_attention=True` | 16, 16 |
| KL-8 (also SDXL) | `embed_dim=4, ch_mult=(1, 2, 4, 4), encoder_attention=False` | 8, 4 |
| SD3, FLUX.1 | KL-8's, but `embed_dim=16, quant_conv=False, post_quant_conv=False` | 8, 16 |

The VQ autoencoder, models/vq.py, shares the encoder and the decoder; models/autoencoder_files.py
reads the files of both.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.autoencoder_blocks import GROUPS, Decoder, Encoder, regroup
from models.autoencoder_files import kl_variant, load_first_stage
from models.autoencoder_settings import Losses
from models.diffusers_files import check_config, read_config
from models.token_norm import TokenNorm
from util.files import first_line
from util.rng import randn
from util.weights import check_fits, load_strictly

LEAST = -30  # log-variance


class DiagonalGaussian:
    """A diagonal Gaussian over latents.

    Args:
        moments: (N, 2C, h, w), the means followed by the log-variances, from the encoder or a
            cache. Log-variances are clamped to [-30, 20], so that neither std nor 1/std overflows.

    Attributes: `moments` (alias `parameters`); `mean`, `logvar` and `std`, each (N, C, h, w).
    """

    def __init__(self, moments):
        if moments.ndim != 4 or moments.shape[1] % 2:
            raise ValueError(f"moments must be (N, 2C, h, w), got {tuple(moments.shape)}")
        self.moments = moments
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(LEAST, 20)
        self.std = torch.exp(self.logvar / 2)

    @property
    def parameters(self):
        """The moments, under their name in the published code."""
        return self.moments

    def sample(self, generator=None):
        """One draw, (N, C, h, w). generator: as in util.rng."""
        noise = randn(self.mean.shape, generator, self.mean.device)
        return self.mean + self.std * noise.to(self.mean.dtype)

    def mode(self):
        """The most likely latents, i.e. the mean, (N, C, h, w)."""
        return self.mean

    def kl(self):
        """KL(self || N(0, I)) in nats, summed over the latents of each image, (N,)."""
        terms = self.mean**2 + self.std**2 - 1 - self.logvar
        return terms.sum(dim=(1, 2, 3)) / 2


def check_images(images, channels, stride):
    """Raises ValueError for images that cannot be encoded at this stride."""
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(f"images must be (N, {channels}, H, W), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images must be floating point in [-1, 1], got {images.dtype}")
    height, width = images.shape[2:]
    if not height or not width or height % stride or width % stride:
        raise ValueError(
            f"image sides must be multiples of the stride {stride}, got {height}x{width}"
        )


class Autoencoder(nn.Module):
    """Base class of the KL and the VQ autoencoder: loading, stride and checks of the inputs.

    A subclass sets `config`, the keyword arguments that rebuild it, and has `variant(state)`, the
    keyword arguments that fit a state dict in LDM's names, and `diffusers`, the name of its class
    in that library. `described` is the config.json of diffusers that came with its file, if any.
    `fixed_scale` is the scale of the latents where the network sets it itself, else None.
    """

    described = None
    own_losses = ()  # fields of Losses that no other kind of network has
    summed = True  # whether LDM sums this network's losses over an image, or averages them
    fixed_scale = None
    fitted = False  # whether one pass over the images gives the weights, by `fit`

    @classmethod
    def from_file(cls, path, **expected):
        """The network in the file at `path`, or in a folder of diffusers.

        expected: constructor arguments that are not read from the file; a file that holds another
        variant raises a ValueError that names the first differences. So does a config.json that
        describes another network than ours, see `check_config`.
        """
        config = read_config(path, cls.diffusers)
        state = load_first_stage(path)
        try:
            arguments = {**cls.variant(state), **expected}
            with torch.device("meta"):  # sizes in a file could take all memory
                model = cls(**arguments)
        except (ValueError, ArithmeticError, IndexError, RuntimeError) as error:
            raise ValueError(f"{path}: {first_line(error)}") from None
        fits = check_config(config, path, model)
        check_fits(model, state, path, model._variant_hint(state))
        model = cls(**arguments)
        model._load(state, path)
        model.described = config if fits else None
        return model

    def as_diffusers(self):
        """The entries of diffusers' config.json that its weights show, name -> value."""
        own = self.config
        widths = [own["ch"] * m for m in own["ch_mult"]]
        plain = len(widths) - 1
        lowest = {side: "Attn" * own[f"{side}_attention"] for side in ("encoder", "decoder")}
        up, down = "UpDecoderBlock2D", "DownEncoderBlock2D"
        return {
            "in_channels": own["in_channels"],
            "out_channels": own["in_channels"],
            "latent_channels": own["embed_dim"],
            "block_out_channels": widths,
            "layers_per_block": own["res_blocks"],
            "down_block_types": [down] * plain + [lowest["encoder"] + down],
            "up_block_types": [lowest["decoder"] + up] + [up] * plain,
            "mid_block_add_attention": True,
        }

    def as_diffusers_hidden(self):
        """The entries that its weights do not show."""
        groups = {norm.num_groups for norm in self.modules() if isinstance(norm, nn.GroupNorm)}
        return {"act_fn": "silu", "norm_num_groups": max(groups)}

    @property
    def stride(self):
        """Pixels per latent along each side."""
        return 2 ** (len(self.config["ch_mult"]) - 1)

    @property
    def last_layer(self):
        """The weight of the decoder's last convolution, for the adaptive weight of a loss."""
        return self.decoder.conv_out.weight

    def _check_images(self, images):
        check_images(images, self.config["in_channels"], self.stride)

    def _check_latents(self, latents):
        channels = self.config["embed_dim"]
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"latents must be (N, {channels}, h, w), got {tuple(latents.shape)}")

    def _load(self, state, source):
        load_strictly(self, state, source, hint=self._variant_hint(state))

    def _variant_hint(self, state):
        """A hint that names the variant that the weights fit, or "" if they fit none."""
        try:
            variant = self.variant(state)
        except ValueError:
            return ""
        other = [f"{k}={v!r}" for k, v in variant.items() if v != self.config[k]]
        return f"The file's variant is {', '.join(other)}." if other else ""


class AutoencoderKL(Autoencoder):
    """Images to a Gaussian over latents, and latents to images.

    The defaults are KL-16 as published with MAR. Only the lowest level may have attention: the
    encoder's does in that KL-16, neither does in KL-8.

    Args:
        embed_dim: channels C of the latents.
        ch_mult: width of each level in units of `ch`, full resolution first.
        ckpt_path: weight file, in any form that `load_first_stage` reads; it must fit exactly.
        ch: base width.
        encoder_attention, decoder_attention: whether the lowest level has attention.
        in_channels: channels I of the images.
        quant_conv, post_quant_conv: whether a 1×1 convolution follows the encoder, and precedes
            the decoder.
        res_blocks: residual blocks of a level of the encoder; the decoder's have one more.
        token_norm: whether latents have one norm, see models/token_norm.py.
        norm_groups: see `regroup` in models/autoencoder_blocks.py.

    Raises:
        ValueError: the file is missing, unreadable or does not fit; token_norm with one channel,
            of which only the sign would be left.

    Attributes: `config`, these arguments except `ckpt_path`.
    """

    num_codes = None
    own_losses = ("kl_weight",)
    diffusers = "AutoencoderKL"

    def __init__(
        self,
        embed_dim=16,
        ch_mult=(1, 1, 2, 2, 4),
        ckpt_path=None,
        ch=128,
        encoder_attention=True,
        decoder_attention=False,
        in_channels=3,
        quant_conv=True,
        post_quant_conv=True,
        res_blocks=2,
        token_norm=False,
        norm_groups=GROUPS,
    ):
        super().__init__()
        if token_norm and embed_dim < 2:
            raise ValueError(f"embed_dim {embed_dim}: expected 2 or more with token_norm")
        self.config = {
            "embed_dim": embed_dim,
            "ch_mult": tuple(ch_mult),
            "ch": ch,
            "encoder_attention": encoder_attention,
            "decoder_attention": decoder_attention,
            "in_channels": in_channels,
            "quant_conv": quant_conv,
            "post_quant_conv": post_quant_conv,
            "res_blocks": res_blocks,
            "token_norm": token_norm,
            "norm_groups": norm_groups,
        }
        shape = ch, ch_mult
        self.encoder = Encoder(2 * embed_dim, *shape, encoder_attention, in_channels, res_blocks)
        self.decoder = Decoder(embed_dim, *shape, decoder_attention, in_channels, res_blocks)
        moments, latents = 2 * embed_dim, embed_dim
        self.quant_conv = nn.Conv2d(moments, moments, 1) if quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latents, latents, 1) if post_quant_conv else nn.Identity()
        self.token_norm = TokenNorm(embed_dim) if token_norm else nn.Identity()
        regroup(self, norm_groups)
        if ckpt_path is not None:
            self._load(load_first_stage(ckpt_path), ckpt_path)

    @staticmethod
    def variant(state):
        return kl_variant(state)

    @property
    def fixed_scale(self):
        """1 with token norm, which needs neither scale nor shift; else None: they are measured."""
        return 1.0 if self.config["token_norm"] else None

    def as_diffusers(self):
        convs = {f"use_{name}": self.config[name] for name in ("quant_conv", "post_quant_conv")}
        return super().as_diffusers() | convs

    def encode(self, images):
        """Images (N,I,H,W) in [-1,1] -> `DiagonalGaussian` over latents (N,C,H/stride,W/stride).

        Raises:
            ValueError: wrong shape, integer dtype, or a side that is not a multiple of the stride.
                The range is not checked, as that would synchronize with the GPU for every batch.
        """
        self._check_images(images)
        return DiagonalGaussian(self.quant_conv(self.encoder(images)))

    def decode(self, z):
        """Raw latents (N,C,h,w) -> images (N,I,h*stride,w*stride), about [-1,1], unclipped.

        Raises:
            ValueError: wrong shape.
        """
        self._check_latents(z)
        return self.decoder(self.post_quant_conv(self.project(z)))

    def project(self, latents):
        """Latents (N,C,h,w) scaled to norm √C at each position, if the network has token norm."""
        return self.token_norm(latents)

    def forward(self, images, generator=None, change=None):
        """Training: images (N,I,H,W) -> (one sample of the posterior decoded, the posterior).

        change: function of the sample (N,C,h,w) that gives what is decoded instead, see
        models/changes.py.
        """
        posterior = self.encode(images)
        latents = self.project(posterior.sample(generator))
        return self.decode(change(latents) if change else latents), posterior

    def losses(self, images, output):
        """Name -> scalar; their sum is the training loss of `output = model(images)`.

        LDM's recipe, |error| + 1e-6 · KL, both summed over an image. Here both are divided by the
        number of elements of an image, so that the loss does not depend on the resolution. LDM's
        perceptual and adversarial losses are in models/objective.py.
        """
        l1 = F.l1_loss(output[0].float(), images)
        return {"l1": l1, **self.regularizers(output, Losses())}

    def regularizers(self, output, settings):
        """Name -> scalar: KL(posterior || N(0, I)), per element of a decoded image, weighted.

        settings: a models.autoencoder_settings.Losses.
        """
        decoded, posterior = output
        kl = DiagonalGaussian(posterior.moments.float()).kl().mean() / decoded[0].numel()
        return {"kl": settings.kl_weight * kl}

    def latents(self, images, generator=None):
        """Images -> raw latents (N,C,h,w), sampled as in the tokenizer."""
        return self.project(self.encode(images).sample(generator))

    def reconstruct(self, latents):
        """Raw latents (N,C,h,w) -> images (N,I,h*stride,w*stride)."""
        return self.decode(latents)
