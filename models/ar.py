"""Causal autoregression in raster or random order, one token per step (paper, section 3.4).

A GPT-like Transformer that holds all the blocks. Its input is the sequence of tokens in the order
of generation, shifted by one start token that carries the class; z for the next token is the output
at the last known one.
"""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from models.autoregressive import Autoregressive
from models.latents import embed_tokens, initialize
from models.layers import Blocks, KVCache
from models.settings import ORDERS


class AR(Autoregressive):
    """A causal Transformer of embed_dim with `depth` blocks.

    order: a row of models.settings.ORDERS, such as "raster", or "random", a fresh permutation for
    each image. If orders vary, the model must be told which position comes next: a second position
    embedding, that of the next token, is added to the input (the paper does not say how; this is
    our choice, the one with the fewest parameters). The other arguments are those of `MAR`. Raises
    ValueError for an order that is only for sampling, such as "confidence".
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
        head=None,
        num_codes=None,
        order="raster",
        grad_checkpointing=False,
        token_norm=False,
        rope=False,
        known_noise=0.0,
        **options,
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
            token_norm,
            known_noise=known_noise,
        )
        if not ORDERS[order].learned:
            others = [name for name, row in ORDERS.rows() if row.learned]
            expected = " or ".join(reversed(others))
            raise ValueError(f"order {order!r}: expected {expected} for a causal model")
        self.order, self.varies = order, ORDERS[order].varies
        options["grad_checkpointing"] = grad_checkpointing

        self.z_proj = self._token_embedding(embed_dim)
        # for the start token, then for each position
        self.pos_embed_learned = nn.Parameter(torch.zeros(1, 1 + self.seq_len, embed_dim))
        if self.varies:
            self.target_pos_embed_learned = nn.Parameter(torch.zeros(1, self.seq_len, embed_dim))
        self.z_proj_ln = nn.LayerNorm(embed_dim, eps=1e-6)
        self.blocks = Blocks(
            depth,
            embed_dim,
            num_heads,
            True,  # causal
            rope=self.grid if rope else None,
            norm_layer=norm_layer,
            mlp_ratio=mlp_ratio,
            attn_dropout=attn_dropout,
            proj_dropout=proj_dropout,
            **options,
        )
        self.norm = norm_layer(embed_dim)
        initialize(self)
        self._add_head(head, embed_dim, options)

    def training_targets(
        self, tokens, orders, classes, generator=None, step_generator=None, mask_ratio=None
    ):
        """Every token in the order of generation, (N, L, C·p²), and z (N, L, D)."""
        tokens, positions = tokens.flip(1), orders.flip(1)
        known = self.with_noise(tokens, generator)[:, :-1]
        return tokens, self.run(known, positions[:, :-1], positions, classes)

    def predict(self, tokens, orders, to_predict, classes, cache=None):
        """z (S·N, 1, D) of the one token to predict; see `Autoregressive.predict`."""
        known = slice(to_predict.stop, None)
        positions = orders[:, to_predict.start :].flip(1)
        z = self.run(tokens[:, known].flip(1), positions[:, :-1], positions, classes, cache)
        return z[:, -1:]

    def start_cache(self, sampling):
        """A cache for the keys and values of the start token and of all tokens but the last."""
        super().start_cache(sampling)
        return KVCache(len(self.blocks), self.seq_len)

    def needs_unconditional(self, done, interval):
        """True until guidance has ended: if the unconditional half paused, its cache would gap.

        See `Autoregressive`.
        """
        return done < interval[1]

    def run(self, tokens, positions, targets, classes, cache=None):
        """z (S·N, 1 + V, D) after the start token and after each of the tokens (N, V, C·p²).

        positions: (N, V), positions of the tokens. targets: (N, 1 + V), the position that each z
        predicts. classes: (S·N, D), see `predict`. With a cache, only z after tokens that are not
        in it yet.
        """
        repeats = len(classes) // len(tokens)
        seen = cache.length if cache else 0
        new = slice(max(0, seen - 1), None)
        first, others = self.pos_embed_learned[0].split([1, self.seq_len])
        positions = positions[:, new]
        x = embed_tokens(self.z_proj, tokens[:, new]) + F.embedding(positions, others)
        x = x.repeat(repeats, 1, 1)  # (S·N, V, D)
        if not seen:
            start = (classes + first).unsqueeze(1)
            x = torch.cat([start.to(x.dtype), x], dim=1)  # (S·N, 1 + V, D)
        if self.varies:
            following = F.embedding(targets[:, seen:], self.target_pos_embed_learned[0])
            x = x + following.repeat(repeats, 1, 1)
        return self.norm(self.blocks(self.z_proj_ln(x), positions=positions, cache=cache))

    def position_tables(self):
        """Name of each table of positions -> its rows before those of tokens; see LatentModel."""
        following = {"target_pos_embed_learned": 0} if self.varies else {}
        return {"pos_embed_learned": 1, **following}

    def check_orders(self, orders, what):
        """Raises ValueError for an order other than the learned one, unless it varied in training.

        orders: (N, L). what: setting that the message names.
        """
        if self.varies:
            return
        learned = ORDERS[self.order]().start(1, self.grid, device=orders.device)
        if not torch.equal(orders, learned.expand_as(orders)):
            raise ValueError(
                f"{what}: this model learned the {self.order} order only, and "
                f"fills in {ORDERS[self.order].last}"
            )


def _size(width, depth, heads, **defaults):
    norm_layer = partial(nn.LayerNorm, eps=1e-6)
    return partial(
        AR, embed_dim=width, depth=depth, num_heads=heads, norm_layer=norm_layer, **defaults
    )


ar_tiny = _size(64, 4, 4, diffloss_w=64)  # for tests and 8×8 images
ar_mini = _size(128, 6, 4, diffloss_w=128)  # for small data on a CPU
ar_small = _size(256, 10, 8, diffloss_w=256)  # for small data
ar_base = _size(768, 24, 12)
ar_large = _size(1024, 32, 16)
ar_huge = _size(1280, 40, 16)
