"""The convolutional encoder and decoder of latent diffusion's autoencoders.

Modules are named as in the authors' code, see models/vae.py.
"""

import math
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F

GROUPS = 32  # LDM's


def group_norm(channels):
    """GroupNorm of 32 groups, or fewer if `channels` is not a multiple of 32, as in tests."""
    return nn.GroupNorm(math.gcd(GROUPS, channels), channels, eps=1e-6)


def regroup(network, groups):
    """Set the number of groups of every GroupNorm, or of fewer that divide its channels.

    With LDM's 32, a channel of a network of width 16 is a group of its own, and the norm takes the
    mean of every feature map away. Another number is an entry of the weights, which tells them from
    those of a network with 32.
    """
    if groups == GROUPS:
        return
    if groups < 1:
        raise ValueError(f"norm_groups {groups}: expected 1 or more")
    network.register_buffer("norm_groups", torch.tensor(groups))
    for norm in network.modules():
        if isinstance(norm, nn.GroupNorm):
            norm.num_groups = math.gcd(groups, norm.num_channels)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1×1 shortcut if the width changes."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        # Only if needed: published files hold no weights for an identity.
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """x + single-head attention over all positions of the feature map."""

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
    """(N,C,h,w) -> (N,C,h/2,w/2). Pads right and bottom only, as released weights expect."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """(N,C,h,w) -> (N,C,2h,2w): nearest-neighbor upsampling, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention if `attention`.

    The encoder adds `downsample` to all levels but the last, the decoder `upsample`.
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
    """The middle part, at the lowest resolution: a block, attention, a block."""

    def __init__(self, channels):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """(N,in_channels,H,W) -> (N,out_channels,H/s,W/s), s = 2**(levels - 1).

    `down.0` has the full resolution. attention: whether the lowest level has attention, as the
    middle always does. res_blocks: residual blocks of a level.
    """

    def __init__(
        self,
        out_channels,
        ch=128,
        ch_mult=(1, 1, 2, 2, 4),
        attention=True,
        in_channels=3,
        res_blocks=2,
    ):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(pairwise([ch, *widths])):
            level = Level(c_in, c_out, res_blocks, attention=attention and i == last)
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

    `up.0` has the full resolution, so the levels run from the last to the first. attention:
    whether the lowest level has attention, as the middle always does. res_blocks: residual blocks
    of a level of the encoder; here each has one more.
    """

    def __init__(
        self,
        z_channels,
        ch=128,
        ch_mult=(1, 1, 2, 2, 4),
        attention=False,
        out_channels=3,
        res_blocks=2,
    ):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1])
        self.up = nn.ModuleList()
        for i, c_out in enumerate(widths):
            c_in = widths[min(i + 1, last)]
            level = Level(c_in, c_out, res_blocks + 1, attention=attention and i == last)
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
