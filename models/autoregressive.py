"""What every generalized autoregressive model of tokens shares (paper, section 3.4).

A model predicts sets of tokens in an order, each from the tokens known before. Here are the parts
that do not depend on its backbone: tokens from latents, orders, labels, the loss and the sampling
loop. A backbone supplies `split`, which part of an order is known in training, and `predict`, which
gives z at the asked positions. The head (`diffloss`) turns z into a loss or into tokens.

An order lists positions; the end of it is generated first. So while m tokens are unknown, they are
`orders[:, :m]`: known, asked and unknown tokens are slices (the published convention).
"""

import math

import torch
from torch import nn
from tqdm import tqdm

from util.rng import rand

CFG_SCHEDULES = {
    "constant": lambda cfg, remaining, length: cfg,
    # the published code counts one token as unknown even after the last step: kept for parity
    "linear": lambda cfg, remaining, length: 1 + (cfg - 1) * (length - max(remaining, 1)) / length,
}


class Autoregressive(nn.Module):
    """Base of the backbones. Parameters are named and ordered as in the published checkpoints."""

    def __init__(
        self, img_size, vae_stride, patch_size, vae_embed_dim, class_num, label_drop_prob, width
    ):
        super().__init__()
        if img_size % (vae_stride * patch_size):
            raise ValueError(
                f"img_size {img_size}: expected a multiple of vae_stride × patch_size, "
                f"{vae_stride} × {patch_size}"
            )
        self.patch_size = patch_size
        self.vae_embed_dim = vae_embed_dim
        self.seq_h = self.seq_w = img_size // vae_stride // patch_size
        self.seq_len = self.seq_h * self.seq_w
        self.token_embed_dim = vae_embed_dim * patch_size**2
        self.class_num = class_num
        self.label_drop_prob = label_drop_prob
        self.class_emb = nn.Embedding(class_num, width)
        self.fake_latent = nn.Parameter(torch.zeros(1, width))  # the class embedding of no class

    def forward(self, latents, labels, generator=None):
        """The training loss, a scalar, of latents (N, C, h, w) with labels (N,)."""
        tokens = self.patchify(latents)  # (N, L, C·p²)
        orders = self.sample_orders(len(tokens), generator)  # (N, L)
        known, asked = self.split(orders, generator)  # (N, V), (N, A)
        classes = self.embed_labels(labels, len(tokens), generator)  # (N, D)
        z = self.predict(tokens, known, asked, classes)  # (N, A, D)
        return self.diffloss(take(tokens, asked), z, generator=generator)

    def split(self, orders, generator=None):
        """Positions that are known (N, V) and asked for (N, A) in one training step."""
        raise NotImplementedError

    def predict(self, tokens, known, asked, classes):
        """z (N, A, D) at positions asked (N, A), from tokens (N, L, C·p²) at known (N, V)."""
        raise NotImplementedError

    def patchify(self, latents):
        """(N, C, h, w) to (N, L, C·p²), rows first. Raises ValueError for another shape."""
        p, h, w = self.patch_size, self.seq_h, self.seq_w
        if latents.shape[1:] != (self.vae_embed_dim, h * p, w * p):
            raise ValueError(
                f"latents of shape {tuple(latents.shape)}: "
                f"expected (N, {self.vae_embed_dim}, {h * p}, {w * p})"
            )
        x = latents.reshape(-1, self.vae_embed_dim, h, p, w, p)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, h * w, self.token_embed_dim)

    def unpatchify(self, tokens):
        """(N, L, C·p²) to (N, C, h, w): the inverse of `patchify`."""
        p, h, w = self.patch_size, self.seq_h, self.seq_w
        x = tokens.reshape(-1, h, w, self.vae_embed_dim, p, p)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, self.vae_embed_dim, h * p, w * p)

    def sample_orders(self, bsz, generator=None):
        """Uniformly random orders (bsz, L)."""
        return rand((bsz, self.seq_len), generator, self.fake_latent.device).argsort(
            dim=1, stable=True
        )

    def embed_labels(self, labels, bsz, generator=None):
        """Class embeddings (bsz, D). None is no class; in training some labels become that."""
        if labels is None:
            return self.fake_latent.expand(bsz, -1)
        classes = self.class_emb(labels)
        if self.training:
            dropped = rand((bsz, 1), generator, classes.device) < self.label_drop_prob
            classes = torch.where(dropped, self.fake_latent, classes)
        return classes

    def sample_tokens(
        self,
        bsz,
        num_iter=64,
        cfg=1.0,
        cfg_schedule="linear",
        labels=None,
        temperature=1.0,
        progress=False,
        **kwargs,
    ):
        """Sampled latents (bsz, C, h, w): the last of `sample_steps`, which says what it takes."""
        steps = self.sample_steps(bsz, num_iter, cfg, cfg_schedule, labels, temperature, **kwargs)
        for latents, _ in tqdm(steps, total=num_iter, disable=not progress, leave=False):
            last = latents
        return last

    @torch.no_grad()
    def sample_steps(
        self,
        bsz,
        num_iter=64,
        cfg=1.0,
        cfg_schedule="linear",
        labels=None,
        temperature=1.0,
        orders=None,
        generator=None,
        max_timestep=None,
        latents=None,
        mask=None,
    ):
        """Sample in num_iter steps, yielding latents (bsz, C, h, w) and mask (bsz, L) after each.

        In the mask 1 is a token not yet generated. num_iter: L is one token at a time. cfg,
        cfg_schedule: guidance scale and its course over the steps (`CFG_SCHEDULES`). labels:
        (bsz,), or None for no class. orders: (bsz, L), random if not given. generator: as in
        util.rng; a sequence holds one for each image. max_timestep: see `DiffLoss`. latents,
        mask: tokens to keep where the mask (bsz, L), or of as many entries, is 0 (inpainting); as
        many in each image.
        Raises ValueError for arguments that do not fit.
        """
        self._check(bsz, labels, orders, cfg_schedule)
        orders, tokens, unknown = self._start(bsz, orders, generator, latents, mask)
        if not 1 <= num_iter <= unknown:
            raise ValueError(
                f"num_iter {num_iter}: expected 1 to {unknown}, the number of tokens to generate"
            )
        classes = self.embed_labels(labels, bsz)
        if cfg != 1.0:
            classes = torch.cat([classes, self.embed_labels(None, bsz)])

        for remaining in token_counts(unknown, num_iter):
            known, asked = orders[:, unknown:], orders[:, remaining:unknown]
            scale = CFG_SCHEDULES[cfg_schedule](cfg, remaining, self.seq_len)
            streams = 1 if cfg == 1.0 else 2
            z = self.predict(
                tokens.repeat(streams, 1, 1),
                known.repeat(streams, 1),
                asked.repeat(streams, 1),
                classes,
            )
            z, z_uncond = (z, None) if cfg == 1.0 else z.chunk(2)
            sampled = self.diffloss.sample(
                z, temperature, scale, z_uncond, generator, max_timestep
            ).to(tokens.dtype)
            tokens = tokens.scatter(1, columns(asked, sampled), sampled)
            unknown = remaining
            still = torch.zeros_like(tokens[..., 0]).scatter(1, orders[:, :unknown], 1.0)
            yield self.unpatchify(tokens), still

    def _start(self, bsz, orders, generator, latents, mask):
        """Orders, tokens to begin with, and how many tokens of each image are unknown."""
        if orders is None:
            orders = self.sample_orders(bsz, generator)
        if (latents is None) != (mask is None):
            raise ValueError("latents and mask: expected both (inpainting) or neither")
        if latents is None:
            tokens = torch.zeros(
                bsz, self.seq_len, self.token_embed_dim, device=self.fake_latent.device
            )
            return orders, tokens, self.seq_len
        mask = mask.reshape(bsz, self.seq_len) > 0
        unknown = mask.sum(1)
        if unknown.min() != unknown.max() or not unknown.min():
            raise ValueError(
                f"masks with {unknown.tolist()} unknown tokens: expected as many in each, and some"
            )
        # known tokens go to the end of the order, where those already generated are
        unknown_first = (~mask).gather(1, orders).byte().argsort(dim=1, stable=True)
        tokens = self.patchify(latents).float().masked_fill(mask.unsqueeze(-1), 0.0)
        return orders.gather(1, unknown_first), tokens, int(unknown[0])

    def _check(self, bsz, labels, orders, cfg_schedule):
        if cfg_schedule not in CFG_SCHEDULES:
            raise ValueError(
                f"cfg_schedule {cfg_schedule!r}: expected one of {', '.join(CFG_SCHEDULES)}"
            )
        if orders is not None and orders.shape != (bsz, self.seq_len):
            raise ValueError(
                f"orders of shape {tuple(orders.shape)}: expected ({bsz}, {self.seq_len})"
            )
        if labels is not None and labels.shape != (bsz,):
            raise ValueError(f"labels of shape {tuple(labels.shape)}: expected ({bsz},)")


def token_counts(length, num_iter):
    """Tokens still unknown after each of num_iter steps: the cosine schedule, always falling.

    floor(L·cos(π/2·k/K)) after step k of K (paper, section 4), at least one fewer than before and,
    before the last step, at least one.
    """
    counts, remaining = [], length
    for k in range(1, num_iter):
        masked = math.floor(length * math.cos(math.pi / 2 * k / num_iter))
        remaining = max(1, min(remaining - 1, masked))
        counts.append(remaining)
    return [*counts, 0]


def take(x, positions):
    """Rows of x (N, L, C) at positions (N, n): (N, n, C)."""
    return x.gather(1, columns(positions, x))


def columns(positions, x):
    return positions.unsqueeze(-1).expand(-1, -1, x.shape[-1])
