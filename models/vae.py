"""The KL autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752): KL-16 and KL-8.

images (N,3,H,W) in [-1,1] -> encode -> a Gaussian over latents (N,C,H/s,W/s) -> decode -> images.

The modules carry the names of the authors' code (`down.0.block.1.conv1`, `nin_shortcut`, ...),
because published files are loaded by name. The scale that gives the latents unit variance is no
part of this network: it belongs to the tokenizer.

| variant | arguments of `AutoencoderKL` | stride, channels |
| --- | --- | --- |
| KL-16, as published with MAR | the defaults | 16, 16 |
| KL-16, as published with LDM | `decoder_attention=True` | 16, 16 |
| KL-8 | `embed_dim=4, ch_mult=(1, 2, 4, 4), encoder_attention=False` | 8, 4 |

Encoder, decoder and all that concerns files are shared with the VQ autoencoder, models/vq.py.
"""

import math
import re
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F

from util.download import source_of
from util.rng import randn
from util.weights import load_strictly, read_weights

KL_WEIGHT = 1e-6  # of the KL in nats against the absolute error, both summed over an image: LDM's


class DiagonalGaussian:
    """A Gaussian over latents, independent in every element.

    Args:
        moments: (N, 2C, h, w), means and then log-variances, from the encoder or from a cache. The
            log-variances are clamped to [-30, 20], so that neither std nor 1/std overflows.

    Attributes: `moments` (also `parameters`), and `mean`, `logvar`, `std`, each (N, C, h, w).
    """

    def __init__(self, moments):
        if moments.ndim != 4 or moments.shape[1] % 2:
            raise ValueError(f"moments must be (N, 2C, h, w), got {tuple(moments.shape)}")
        self.moments = moments
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30, 20)
        self.std = torch.exp(self.logvar / 2)

    @property
    def parameters(self):
        """The moments, under the name that the published code gives them."""
        return self.moments

    def sample(self, generator=None):
        """One draw, (N, C, h, w). generator: as in util.rng."""
        noise = randn(self.mean.shape, generator, self.mean.device)
        return self.mean + self.std * noise.to(self.mean.dtype)

    def mode(self):
        """The most likely latent, which is the mean, (N, C, h, w)."""
        return self.mean

    def kl(self):
        """KL(self || N(0, I)) in nats, summed over each image's latent, (N,)."""
        terms = self.mean**2 + self.std**2 - 1 - self.logvar
        return terms.sum(dim=(1, 2, 3)) / 2


def group_norm(channels):
    """32 groups; fewer where the width is no multiple of 32, as in tests."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the width changes."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        # Registered only where needed: published files hold no weights for an identity.
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """x + attention over all places of the feature map, one head as wide as the map."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        h = self.norm(x)
        # (N,C,h,w) -> (N,1,h*w,C)
        q, k, v = (f(h).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """(N,C,h,w) -> (N,C,h/2,w/2). Zeros go only right and below: released weights expect it."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """(N,C,h,w) -> (N,C,2h,2w), nearest neighbour and a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where the level has it.

    The encoder adds `downsample` after the blocks, the decoder `upsample`, except at its last.
    """

    def __init__(self, c_in, c_out, blocks, attention):
        super().__init__()
        widths = [c_in] + [c_out] * blocks
        self.block = nn.ModuleList(ResnetBlock(widths[i], widths[i + 1]) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) for _ in range(blocks if attention else 0))

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class Mid(nn.Module):
    """The middle, at the lowest resolution: block, attention, block."""

    def __init__(self, channels):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """(N,in_channels,H,W) -> (N,out_channels,H/s,W/s), s = 2**(levels - 1).

    `down.0` has the full resolution. `attention` is that of the lowest level; the middle always
    has it.
    """

    def __init__(
        self, out_channels, ch=128, ch_mult=(1, 1, 2, 2, 4), attention=True, in_channels=3
    ):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(pairwise([ch, *widths])):
            level = Level(c_in, c_out, blocks=2, attention=attention and i == last)
            if i < last:
                level.downsample = Downsample(c_out)
            self.down.append(level)
        self.mid = Mid(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """(N,z_channels,h,w) -> (N,out_channels,s*h,s*w), s = 2**(levels - 1).

    `up.0` has the full resolution, so the levels run from the last to the first. `attention` is
    that of the lowest level; the middle always has it.
    """

    def __init__(
        self, z_channels, ch=128, ch_mult=(1, 1, 2, 2, 4), attention=False, out_channels=3
    ):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1])
        self.up = nn.ModuleList()
        for i, c_out in enumerate(widths):
            c_in = widths[min(i + 1, last)]
            level = Level(c_in, c_out, blocks=3, attention=attention and i == last)
            if i > 0:
                level.upsample = Upsample(c_out)
            self.up.append(level)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


def check_images(images, channels, stride):
    """Raises ValueError for what cannot be encoded to latents of this stride."""
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
    """What the KL and the VQ autoencoder share: their files, their stride and their inputs' checks.

    A subclass sets `config`, the keyword arguments that make its like, and says what its file is:
    `read(path)`, the state dict in LDM's names, and `variant(state)`, the arguments it belongs to.
    """

    @classmethod
    def from_file(cls, path, **expected):
        """The variant that the file at `path` holds, with its weights.

        What is `expected` (arguments of the constructor) is not taken from the file: a file that
        holds something else raises a ValueError that names the first differences.
        """
        state = load_first_stage(path)
        try:
            variant = cls.variant(state)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        model = cls(**{**variant, **expected})
        model._load(state, path)
        return model

    @property
    def stride(self):
        """Pixels per latent, along each side."""
        return 2 ** (len(self.config["ch_mult"]) - 1)

    def _check_images(self, images):
        check_images(images, self.config["in_channels"], self.stride)

    def _check_latents(self, latents):
        channels = self.config["embed_dim"]
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"latents must be (N, {channels}, h, w), got {tuple(latents.shape)}")

    def _load(self, state, source):
        load_strictly(self, state, source, hint=self._variant_hint(state))

    def _variant_hint(self, state):
        """The arguments with which the weights would fit, where they are those of a variant."""
        try:
            variant = self.variant(state)
        except ValueError:
            return ""
        other = [f"{k}={v!r}" for k, v in variant.items() if v != self.config[k]]
        return f"The file's variant is {', '.join(other)}." if other else ""


class AutoencoderKL(Autoencoder):
    """Images to a Gaussian over latents, and latents to images.

    The defaults are KL-16 as published with MAR. Level attention is at the lowest resolution only;
    that KL-16 has it in its encoder alone, KL-8 in neither.

    Args:
        embed_dim: channels C of a latent.
        ch_mult: widths of the levels, full resolution first, in units of `ch`.
        ckpt_path: a file to load, in any form that `load_first_stage` reads; it must fit exactly.
        ch: base width.
        encoder_attention, decoder_attention: whether the lowest level attends after each block.
        in_channels: of an image, I below.

    Raises:
        ValueError: the file is missing, cannot be read or does not fit.

    Attributes: `config`, these arguments but `ckpt_path`; `AutoencoderKL(**config)` is its like.
    """

    num_codes = None

    def __init__(
        self,
        embed_dim=16,
        ch_mult=(1, 1, 2, 2, 4),
        ckpt_path=None,
        ch=128,
        encoder_attention=True,
        decoder_attention=False,
        in_channels=3,
    ):
        super().__init__()
        self.config = {
            "embed_dim": embed_dim,
            "ch_mult": tuple(ch_mult),
            "ch": ch,
            "encoder_attention": encoder_attention,
            "decoder_attention": decoder_attention,
            "in_channels": in_channels,
        }
        self.encoder = Encoder(2 * embed_dim, ch, ch_mult, encoder_attention, in_channels)
        self.decoder = Decoder(embed_dim, ch, ch_mult, decoder_attention, in_channels)
        self.quant_conv = nn.Conv2d(2 * embed_dim, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, embed_dim, 1)
        if ckpt_path is not None:
            self._load(load_first_stage(ckpt_path), ckpt_path)

    @staticmethod
    def variant(state):
        return kl_variant(state)

    def encode(self, images):
        """images (N,I,H,W) in [-1,1] -> `DiagonalGaussian` over latents (N,C,H/stride,W/stride).

        Raises:
            ValueError: another shape or an integer dtype, or a side that is no multiple of the
                stride. The range is not looked at: on a GPU that would wait for every batch.
        """
        self._check_images(images)
        return DiagonalGaussian(self.quant_conv(self.encoder(images)))

    def decode(self, z):
        """latents (N,C,h,w), unscaled -> images (N,I,h*stride,w*stride), about [-1,1], unclipped.

        Raises:
            ValueError: another shape.
        """
        self._check_latents(z)
        return self.decoder(self.post_quant_conv(z))

    def forward(self, images, generator=None):
        """For training: images -> (the decoding of one draw, the posterior)."""
        posterior = self.encode(images)
        return self.decode(posterior.sample(generator)), posterior

    def losses(self, images, output):
        """Name -> scalar, which add up to the training loss of `output = model(images)`.

        LDM's recipe: |error| + KL_WEIGHT · KL(posterior || N(0, I)), both summed over an image.
        Here both are divided by the image's number of elements: l1 is a mean, the balance stays,
        and the loss's size does not depend on the resolution. The recipe has a perceptual and an
        adversarial loss beside these, which are not here.
        """
        decoded, posterior = output
        kl = DiagonalGaussian(posterior.moments.float()).kl().mean() / images[0].numel()
        return {"l1": F.l1_loss(decoded.float(), images), "kl": KL_WEIGHT * kl}

    def latents(self, images, generator=None):
        """Images -> unscaled latents (N,C,h,w) as the tokenizer samples them."""
        return self.encode(images).sample(generator)


def load_first_stage(path):
    """The weights in an autoencoder's file: a state dict in LDM's names, on the CPU.

    Reads the published KL-16 and our own (weights under `model`), LDM's training checkpoints
    (`state_dict`, without the entries of its losses and its EMA), a whole latent diffusion
    checkpoint (of which only `first_stage_model.` is kept), and the diffusers library's names;
    `.safetensors` or `torch.save`.

    Raises:
        ValueError: the file is missing, damaged, or holds pickled objects that are refused.
    """
    state = _first_stage(read_weights(path, missing=source_of(path)))
    if any(re.match(_DIFFUSERS, name) for name in state):
        state = _from_diffusers(state)
    return state


def kl_variant(state):
    """The keyword arguments of the `AutoencoderKL` that `state` (LDM's names) belongs to.

    Raises:
        ValueError: it is no KL autoencoder's.
    """
    variant = read_variant(state, "KL")
    if CODEBOOK in state:
        raise ValueError(f"not the weights of a KL autoencoder: with {CODEBOOK} it is a VQ one")
    return variant


CODEBOOK = "quantize.embedding.weight"  # what only a VQ autoencoder has


def read_variant(state, kind):
    """The keyword arguments that both autoencoders have. kind: "KL" or "VQ", for the ValueError."""
    names = ("encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight")
    for name in (*names, "post_quant_conv.weight"):
        if name not in state:
            raise ValueError(f"not the weights of a {kind} autoencoder: there is no {name}")
    ch, in_channels = state["encoder.conv_in.weight"].shape[:2]
    return {
        "embed_dim": state["post_quant_conv.weight"].shape[1],
        "ch_mult": tuple(width // ch for width in _level_widths(state)),
        "ch": ch,
        "encoder_attention": _lowest_level_attends(state, "encoder.down"),
        "decoder_attention": _lowest_level_attends(state, "decoder.up"),
        "in_channels": in_channels,
    }


def _level_widths(state):
    """Channels of the encoder's levels, full resolution first."""
    widths = []
    while (name := f"encoder.down.{len(widths)}.block.0.conv1.weight") in state:
        widths.append(state[name].shape[0])
    return widths


def _lowest_level_attends(state, levels):
    return f"{levels}.{len(_level_widths(state)) - 1}.attn.0.norm.weight" in state


def _first_stage(state):
    """The autoencoder's entries alone, without those of its training."""
    prefix = "first_stage_model."
    if any(name.startswith(prefix) for name in state):
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    training = ("loss.", "discriminator.", "model_ema.")
    return {name: value for name, value in state.items() if not name.startswith(training)}


_DIFFUSERS = r"(encoder\.down_blocks|encoder\.mid_block|decoder\.up_blocks|decoder\.mid_block)\."

# diffusers' names -> LDM's, applied in this order. The decoder's levels are renumbered as well.
_RENAMINGS = [
    (r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block."),
    (r"down_blocks\.(\d+)\.attentions\.", r"down.\1.attn."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"up_blocks\.(\d+)\.resnets\.", r"up.\1.block."),
    (r"up_blocks\.(\d+)\.attentions\.", r"up.\1.attn."),
    (r"up_blocks\.(\d+)\.upsamplers\.0\.", r"up.\1.upsample."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.group_norm\.", ".norm."),
    (r"\.(to_q|query)\.", ".q."),
    (r"\.(to_k|key)\.", ".k."),
    (r"\.(to_v|value)\.", ".v."),
    (r"\.(to_out\.0|proj_attn)\.", ".proj_out."),
]


def _from_diffusers(state):
    """diffusers' autoencoder weights in LDM's names and shapes."""
    ups = [re.match(r"decoder\.up_blocks\.(\d+)\.", name) for name in state]
    last = max((int(up[1]) for up in ups if up), default=0)
    return {_ldm_name(name, last): _as_convolution(name, v) for name, v in state.items()}


def _ldm_name(name, last):
    """`last` is the highest index of the decoder's levels: diffusers counts in running order."""
    name = re.sub(r"up_blocks\.(\d+)", lambda up: f"up_blocks.{last - int(up[1])}", name)
    for pattern, replacement in _RENAMINGS:
        name = re.sub(pattern, replacement, name)
    return name


def _as_convolution(name, value):
    """(C,C) -> (C,C,1,1) for attention's linear layers, which are LDM's 1x1 convolutions."""
    return value[:, :, None, None] if value.ndim == 2 and ".attentions." in name else value
