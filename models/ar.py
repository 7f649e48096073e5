"""Causal autoregression, in raster or in random order, one token a step (paper, section 3.4).

One GPT-like Transformer with all the blocks. Its input is the sequence of tokens in the order in
which they are generated, shifted by a start token that carries the class; z for the place asked
next comes from the last token known.
"""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.autoregressive import Autoregressive
from models.latents import embed_tokens, initialize
from models.layers import Block, KVCache


class AR(Autoregressive):
    """A causal Transformer of embed_dim with `depth` blocks.

    order: "raster", or "random", a fresh permutation for each image. In the random order the model
    must be told which place is asked next: a second table of positions does, added to the token
    before (the paper says no more; this is our choice, that of the fewest parameters). The other
    arguments are those of `MAR`. Raises ValueError for another order.
    """

    one_at_a_time = True

    def __init__(
        self,
        img_size=256,
        vae_stride=16,
        patch_size=1,
        embed_dim=1024,
        depth=32,
        num_heads=16,
        mlp_ratio=4.0,
        norm_layer=nn.LayerNorm,
        vae_embed_dim=16,
        label_drop_prob=0.1,
        class_num=1000,
        attn_dropout=0.1,
        proj_dropout=0.1,
        diffloss_d=3,
        diffloss_w=1024,
        num_sampling_steps="100",
        diffusion_batch_mul=4,
        grad_checkpointing=False,
        vlb=True,
        max_timestep=None,
        head=None,
        num_codes=None,
        order="raster",
    ):
        super().__init__(
            img_size,
            vae_stride,
            patch_size,
            vae_embed_dim,
            class_num,
            label_drop_prob,
            embed_dim,
            num_codes,
        )
        if order not in ("raster", "random"):
            raise ValueError(f"order {order!r}: expected raster or random for a causal model")
        self.order = order
        self.grad_checkpointing = grad_checkpointing

        self.z_proj = self._token_embedding(embed_dim)
        # of the start token, then of each place
        self.pos_embed_learned = nn.Parameter(torch.zeros(1, 1 + self.seq_len, embed_dim))
        if order == "random":
            self.target_pos_embed_learned = nn.Parameter(torch.zeros(1, self.seq_len, embed_dim))
        self.z_proj_ln = nn.LayerNorm(embed_dim, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, norm_layer, attn_dropout, proj_dropout, True)
            for _ in range(depth)
        )
        self.norm = norm_layer(embed_dim)
        initialize(self)
        self._add_head(
            head,
            embed_dim,
            depth=diffloss_d,
            width=diffloss_w,
            num_sampling_steps=num_sampling_steps,
            grad_checkpointing=grad_checkpointing,
            diffusion_batch_mul=diffusion_batch_mul,
            vlb=vlb,
            max_timestep=max_timestep,
        )

    def teach(self, tokens, orders, classes, generator=None, step_generator=None):
        """Every token, in the order of generation: (N, L, C·p²) and z (N, L, D)."""
        tokens, places = tokens.flip(1), orders.flip(1)
        return tokens, self.run(tokens[:, :-1], places[:, :-1], places, classes)

    def predict(self, tokens, orders, asked, classes, cache=None):
        """z (S·N, 1, D) of the one token asked; see `Autoregressive.predict`."""
        known = slice(asked.stop, None)
        places = orders[:, asked.start :].flip(1)
        return self.run(tokens[:, known].flip(1), places[:, :-1], places, classes, cache)[:, -1:]

    def start_cache(self):
        """Room for the keys and values of the start token and all tokens but the last."""
        return KVCache(len(self.blocks), self.seq_len)

    def streams(self, progress, begin, end):
        """Both until guidance has ended: the cache of one that stopped would have gaps."""
        return 2 if progress < end else 1

    def run(self, tokens, places, targets, classes, cache=None):
        """z (S·N, 1 + V, D): after the start token and after each of tokens (N, V, C·p²).

        places: (N, V), where these lie. targets: (N, 1 + V), the place that each predicts. classes:
        (S·N, D), S streams of the same tokens. With a cache, z after those alone that are not in it
        yet.
        """
        streams = len(classes) // len(tokens)
        seen = cache.length if cache else 0
        new = slice(max(0, seen - 1), None)
        first, others = self.pos_embed_learned[0].split([1, self.seq_len])
        x = embed_tokens(self.z_proj, tokens[:, new]) + F.embedding(places[:, new], others)
        x = x.repeat(streams, 1, 1)
        if not seen:
            start = (classes + first).unsqueeze(1)
            x = torch.cat([start.to(x.dtype), x], dim=1)
        if self.order == "random":
            asked = F.embedding(targets[:, seen:], self.target_pos_embed_learned[0])
            x = x + asked.repeat(streams, 1, 1)
        x = self.z_proj_ln(x)
        for i, block in enumerate(self.blocks):
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x) if cache is None else block.forward(x, block=i, cache=cache)
        return self.norm(x)

    def check_orders(self, orders, name):
        """Raises ValueError for another order than the raster one, where that is what it learned.

        orders: (N, L).
        """
        raster = torch.arange(self.seq_len - 1, -1, -1, device=orders.device)
        if self.order == "raster" and not torch.equal(orders, raster.expand_as(orders)):
            raise ValueError(
                f"order {name or 'as given'}: this model learned the raster order only, and fills "
                "in what comes last in it"
            )


def _size(width, depth, heads):
    norm_layer = partial(nn.LayerNorm, eps=1e-6)
    return partial(AR, embed_dim=width, depth=depth, num_heads=heads, norm_layer=norm_layer)


ar_tiny = _size(64, 4, 4)  # for small data and tests
ar_base = _size(768, 24, 12)
ar_large = _size(1024, 32, 16)
ar_huge = _size(1280, 40, 16)
