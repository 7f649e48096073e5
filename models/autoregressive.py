"""What every generalized autoregressive model of tokens shares (paper, section 3.4).

A model predicts sets of tokens in an order, each from the tokens known before. Here are the parts
that do not depend on its backbone, its order or its head: the loss and the sampling loop. A
backbone supplies `teach`, z at the positions asked for in training, and `predict`, z at those asked
for in sampling. A head (`models.heads`) turns z into a loss or into tokens.
"""

import torch
from torch import nn
from tqdm import tqdm

from models.diffloss import Diffused
from models.heads import HEADS
from models.latents import LatentModel, TokenEmbedding
from models.layers import Block
from models.order import ORDERS, token_counts

CFG_SCHEDULES = {
    "constant": lambda cfg, remaining, length: cfg,
    # the published code counts one token as unknown even after the last step: kept for parity
    "linear": lambda cfg, remaining, length: 1 + (cfg - 1) * (length - max(remaining, 1)) / length,
}


class Autoregressive(LatentModel):
    """Base of the backbones. Parameters are named and ordered as in the published checkpoints.

    Attributes: `order`, in which it samples unless told otherwise; `one_at_a_time`, whether it can
    only generate one token a step; `head_name`, the name of its head's parameters.
    """

    one_at_a_time = False
    order = "random"
    compiled = False

    def forward(self, latents, labels, generator=None, step_generator=None):
        """The training loss, a scalar, of latents (N, C, h, w) with labels (N,).

        step_generator: on the CPU, of what is drawn once for the whole step, so that processes can
        share it; `generator` if not given.
        """
        tokens = self.patchify(latents)  # (N, L, C·p²)
        orders = self.sample_orders(len(tokens), generator)  # (N, L)
        classes = self.embed_labels(labels, len(tokens), generator)  # (N, D)
        tokens = take(tokens, orders)
        target, z = self.teach(tokens, orders, classes, generator, step_generator)
        return self.head(target, z, generator=generator)

    def teach(self, tokens, orders, classes, generator=None, step_generator=None):
        """In one training step: the tokens asked for (N, A, C·p²) and z (N, A, D) for them.

        tokens: (N, L, C·p²), in the order of orders (N, L).
        """
        raise NotImplementedError

    def predict(self, tokens, orders, asked, classes, cache=None):
        """z (S·N, A, D) of the tokens asked, a slice of the orders (N, L).

        tokens: (N, L, C·p²) in the same order, known after the slice. classes: (S·N, D), for S
        streams of the same tokens (with and without class, under guidance). cache: of
        `start_cache`, holding what was computed for the last ones of the known.
        """
        raise NotImplementedError

    def start_cache(self):
        """What `predict` keeps from one step of sampling to the next; None for nothing."""

    def compile_training(self):
        """Compile the blocks and the network of the head, for training alone; sampling has too many
        lengths. Parameters and their names stay."""
        torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
        for block in self.modules():
            if isinstance(block, Block):
                block.compile(dynamic=False)
        if isinstance(self.head, Diffused):
            self.head.net.compile(dynamic=True)  # of as many rows as tokens are masked
        self.compiled = True

    def streams(self, progress, begin, end):
        """How many streams are needed when so much is done: 2 where guidance acts, else 1."""
        return 2 if begin <= progress < end else 1

    def start_lazily(self, refresh_every, order):
        """The cache that leaves out what hardly changes. Raises ValueError where there is none."""
        raise ValueError(f"refresh_every {refresh_every}: {type(self).__name__} knows only 1")

    @property
    def head(self):
        """What turns z into a loss or into tokens."""
        return self.get_submodule(self.head_name)

    def sample_orders(self, bsz, generator=None):
        """Orders (bsz, L) to train in."""
        return ORDERS[self.order].start(bsz, self.seq_len, generator, self.fake_latent.device)

    def check_orders(self, orders, name):
        """Raises ValueError for orders (N, L), or their name, that this backbone cannot follow."""

    def check_sampling(
        self,
        order=None,
        solver="ddpm",
        anneal=None,
        cfg_interval=(0.0, 1.0),
        refresh_every=1,
        **more,
    ):
        """Raises ValueError for what `sample_steps` would refuse, before any work."""
        self._pick_order(order)
        _interval(cfg_interval)
        self.head.start_sampling(solver=solver, anneal=anneal)
        if refresh_every != 1:
            self.start_lazily(refresh_every, order)

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
        order=None,
        solver="ddpm",
        anneal=None,
        cfg_interval=(0.0, 1.0),
        refresh_every=1,
    ):
        """Sample in num_iter steps, yielding latents (bsz, C, h, w) and mask (bsz, L) after each.

        In the mask 1 is a token not yet generated. num_iter: L is one token at a time. cfg,
        cfg_schedule: guidance scale and its course over the steps (`CFG_SCHEDULES`). labels:
        (bsz,), or None for no class. orders: (bsz, L), drawn by `order` (`ORDERS`) if not given,
        which is the model's own if not given. generator: as in util.rng; a sequence holds one for
        each image. max_timestep: see `DiffLoss`. latents, mask: tokens to keep where the mask
        (bsz, L), or of as many entries, is 0 (inpainting); as many in each image.

        What approximates: solver, anneal: see `DiffLoss.start_sampling`. cfg_interval: guidance
        acts while the share of the steps that are done is at least the first and below the second
        (Kynkäänniemi et al. 2024, over autoregressive steps). refresh_every: steps between those
        that are computed in full, see `models.lazy`.
        Raises ValueError for arguments that do not fit.
        """
        policy = self._pick_order(order)
        self._check(bsz, orders, cfg_schedule)
        orders, tokens, unknown = self._start(bsz, policy, orders, generator, latents, mask)
        self.check_orders(orders, order)
        self._check_steps(num_iter, unknown)
        begin, end = _interval(cfg_interval) if cfg != 1.0 else (0.0, 0.0)
        both = torch.cat([self.embed_labels(labels, bsz), self.embed_labels(None, bsz)])
        cache = self.start_lazily(refresh_every, order) if refresh_every != 1 else None
        cache = cache or self.start_cache()
        draw = self.head.start_sampling(
            temperature, max_timestep=max_timestep, solver=solver, anneal=anneal
        )

        for step, remaining in enumerate(token_counts(unknown, num_iter)):
            progress = step / num_iter
            asked = slice(policy.first_asked(remaining), unknown)
            scale = CFG_SCHEDULES[cfg_schedule](cfg, remaining, self.seq_len)
            if not begin <= progress < end:
                scale = 1.0
            streams = self.streams(progress, begin, end)
            if cache and streams == 1:
                cache.keep(bsz)
            z = self.predict(tokens, orders, asked, both[: streams * bsz], cache)
            z, z_uncond = z.chunk(2) if streams == 2 else (z, None)
            sampled = draw(z, scale, z_uncond, generator, progress).to(tokens.dtype)
            orders, sampled = policy.settle(
                orders,
                sampled,
                unknown,
                remaining,
                lambda ids: self.head.confidence(ids, z, scale, z_uncond),  # noqa: B023 (not kept)
                (step + 1) / num_iter,
                generator,
            )
            tokens[:, remaining:unknown] = sampled
            unknown = remaining
            places = torch.zeros_like(tokens).scatter(1, columns(orders, tokens), tokens)
            still = torch.zeros_like(tokens[..., 0]).scatter(1, orders[:, :unknown], 1.0)
            yield self.unpatchify(places), still

    def _start(self, bsz, policy, orders, generator, latents, mask):
        """Orders, tokens in them to begin with, and how many tokens of each image are unknown."""
        device = self.fake_latent.device
        if orders is None:
            orders = policy.start(bsz, self.seq_len, generator, device)
        if (latents is None) != (mask is None):
            raise ValueError("latents and mask: expected both (inpainting) or neither")
        if latents is None:
            tokens = torch.zeros(bsz, self.seq_len, self.token_embed_dim, device=device)
            return orders, tokens, self.seq_len
        if len(latents) != bsz or mask.numel() != bsz * self.seq_len:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} and mask of shape {tuple(mask.shape)}: "
                f"expected {bsz} latents, and a mask of ({bsz}, {self.seq_len}), the tokens"
            )
        mask = mask.reshape(bsz, self.seq_len) > 0
        unknown = mask.sum(1)
        if unknown.min() != unknown.max() or not unknown.min():
            raise ValueError(
                f"masks with {unknown.tolist()} unknown tokens: expected as many in each, and some"
            )
        # known tokens go to the end of the order, where those already generated are
        unknown_first = (~mask).gather(1, orders).byte().argsort(dim=1, stable=True)
        orders = orders.gather(1, unknown_first)
        tokens = self.patchify(latents).float().masked_fill(mask.unsqueeze(-1), 0.0)
        return orders, take(tokens, orders), int(unknown[0])

    def _pick_order(self, name):
        name = name or self.order
        if name not in ORDERS:
            raise ValueError(f"order {name!r}: expected one of {', '.join(ORDERS)}")
        if name == "confidence" and (self.one_at_a_time or not hasattr(self.head, "confidence")):
            raise ValueError(
                "order 'confidence': expected a bidirectional model with the cross-entropy head, "
                f"this is {type(self).__name__} with {type(self.head).__name__}"
            )
        return ORDERS[name]

    def _check(self, bsz, orders, cfg_schedule):
        if bsz < 1:
            raise ValueError(f"bsz {bsz}: expected 1 or more")
        if cfg_schedule not in CFG_SCHEDULES:
            raise ValueError(
                f"cfg_schedule {cfg_schedule!r}: expected one of {', '.join(CFG_SCHEDULES)}"
            )
        if orders is not None and orders.shape != (bsz, self.seq_len):
            raise ValueError(
                f"orders of shape {tuple(orders.shape)}: expected ({bsz}, {self.seq_len})"
            )

    def _check_steps(self, num_iter, unknown):
        if self.one_at_a_time and num_iter != unknown:
            raise ValueError(
                f"num_iter {num_iter}: expected {unknown}, causal attention gives one token a step"
            )
        if not 1 <= num_iter <= unknown:
            raise ValueError(
                f"num_iter {num_iter}: expected 1 to {unknown}, the number of tokens to generate"
            )

    def _token_embedding(self, width):
        """What embeds a token, (…, C) to (…, width): its kind follows the tokenizer's."""
        if self.num_codes:
            return TokenEmbedding(self.num_codes, width)
        return nn.Linear(self.token_embed_dim, width)

    def _add_head(self, name, z_channels, **diffloss):
        """The head of this name (`HEADS`), or that which fits; `diffloss`: arguments of a DiffLoss.

        Raises ValueError for an unknown name, and for one that the tokenizer has no use for.
        """
        name = name or ("ce" if self.num_codes else "diffloss")
        if name not in HEADS:
            raise ValueError(f"head {name!r}: expected one of {', '.join(HEADS)}")
        if HEADS[name].discrete != bool(self.num_codes):
            kind = "discrete" if self.num_codes else "continuous"
            fitting = [n for n, head in HEADS.items() if head.discrete == bool(self.num_codes)]
            raise ValueError(
                f"head {name!r}: the tokenizer is {kind}, expected {' or '.join(fitting)}"
            )
        self.head_name = name
        out = self.num_codes or self.token_embed_dim
        arguments = diffloss if name == "diffloss" else {}
        self.add_module(name, HEADS[name](out, z_channels, **arguments))


def _interval(interval):
    begin, end = interval
    if not 0 <= begin < end <= 1:
        raise ValueError(f"cfg_interval {begin} {end}: expected 0 ≤ first < second ≤ 1")
    return begin, end


def take(x, positions):
    """Rows of x (N, L, C) at positions (N, n): (N, n, C)."""
    return x.gather(1, columns(positions, x))


def columns(positions, x):
    """Positions (N, n), once for each column of x (N, L, C): (N, n, C)."""
    return positions.unsqueeze(-1).expand(-1, -1, x.shape[-1])
