"""MAR: bidirectional attention, random order, several tokens a step (paper, sections 3.4 and 4)."""

import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.autoregressive import Autoregressive
from models.latents import embed_tokens, initialize
from models.layers import Block
from models.lazy import Lazy
from util.rng import rand

MASK_RATIO_STD = 0.25
BUCKET = 8  # known tokens: 11 lengths for ratios of 0.7 to 1 of 256


class MAR(Autoregressive):
    """An encoder of the known tokens and a decoder that is asked for the others, as in MAE.

    Images are img_size wide; their latents have vae_embed_dim channels at stride vae_stride and are
    grouped patch_size × patch_size into one token. buffer_size copies of the class embedding stand
    before the encoder's tokens. In training, a ratio between mask_ratio_min and 1 of the tokens is
    unknown and label_drop_prob of the labels are dropped. diffloss_*, num_sampling_steps,
    diffusion_batch_mul, vlb, max_timestep: see `DiffLoss`. head, num_codes: see `models.heads`; by
    default Diffusion Loss for continuous latents, cross-entropy for num_codes ids.
    """

    def __init__(
        self,
        img_size=256,
        vae_stride=16,
        patch_size=1,
        encoder_embed_dim=1024,
        encoder_depth=16,
        encoder_num_heads=16,
        decoder_embed_dim=1024,
        decoder_depth=16,
        decoder_num_heads=16,
        mlp_ratio=4.0,
        norm_layer=nn.LayerNorm,
        vae_embed_dim=16,
        mask_ratio_min=0.7,
        label_drop_prob=0.1,
        class_num=1000,
        attn_dropout=0.1,
        proj_dropout=0.1,
        buffer_size=64,
        diffloss_d=3,
        diffloss_w=1024,
        num_sampling_steps="100",
        diffusion_batch_mul=4,
        grad_checkpointing=False,
        vlb=True,
        max_timestep=None,
        head=None,
        num_codes=None,
    ):
        super().__init__(
            img_size,
            vae_stride,
            patch_size,
            vae_embed_dim,
            class_num,
            label_drop_prob,
            encoder_embed_dim,
            num_codes,
        )
        if not 0 < mask_ratio_min < 1:
            raise ValueError(f"mask_ratio_min {mask_ratio_min}: expected between 0 and 1")
        self.mask_ratio_min = mask_ratio_min
        self.buffer_size = buffer_size
        self.grad_checkpointing = grad_checkpointing
        length = buffer_size + self.seq_len
        block = partial(
            Block,
            mlp_ratio=mlp_ratio,
            norm_layer=norm_layer,
            attn_dropout=attn_dropout,
            proj_dropout=proj_dropout,
        )

        self.z_proj = self._token_embedding(encoder_embed_dim)
        self.z_proj_ln = nn.LayerNorm(encoder_embed_dim, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, encoder_embed_dim))
        self.encoder_blocks = nn.ModuleList(
            block(encoder_embed_dim, encoder_num_heads) for _ in range(encoder_depth)
        )
        self.encoder_norm = norm_layer(encoder_embed_dim)

        self.decoder_embed = nn.Linear(encoder_embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, decoder_embed_dim))
        self.decoder_blocks = nn.ModuleList(
            block(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth)
        )
        self.decoder_norm = norm_layer(decoder_embed_dim)
        # a leftover, by its author's word: kept because released weights have it
        self.diffusion_pos_embed_learned = nn.Parameter(
            torch.zeros(1, self.seq_len, decoder_embed_dim)
        )
        initialize(self)

        self._add_head(
            head,
            decoder_embed_dim,
            depth=diffloss_d,
            width=diffloss_w,
            num_sampling_steps=num_sampling_steps,
            grad_checkpointing=grad_checkpointing,
            diffusion_batch_mul=diffusion_batch_mul,
            vlb=vlb,
            max_timestep=max_timestep,
        )

    def teach(self, tokens, orders, classes, generator=None, step_generator=None):
        """In one training step: the first ceil(ratio·L) tokens of each order, (N, A, C·p²), z."""
        ratio = self.sample_mask_ratio(step_generator or generator)
        asked = slice(0, math.ceil(ratio * self.seq_len))
        if self.compiled:
            return tokens[:, asked], self._predict_in_buckets(tokens, orders, asked, classes)
        return tokens[:, asked], self.predict(tokens, orders, asked, classes)

    def _predict_in_buckets(self, tokens, orders, asked, classes):
        """`predict` where the encoder's input has one of few lengths: those compiled for.

        Some unknown tokens go in, but nothing sees them.
        """
        buffer, known = self.buffer_size, self.seq_len - asked.stop
        hidden = min(-known % BUCKET, asked.stop)
        given = slice(asked.stop - hidden, None)
        places = torch.arange(buffer + hidden + known, device=tokens.device)
        seen = (places < buffer) | (places >= buffer + hidden)
        x = self.encode(tokens[:, given], orders[:, given], classes, seen.view(1, 1, 1, -1))
        x = self.join(torch.cat([x[:, :buffer], x[:, buffer + hidden :]], 1), orders, asked.stop)
        x = self._run(self.decoder_blocks, x)[:, self.rows(asked)]
        return self.finish(x, orders, asked)

    def sample_mask_ratio(self, generator=None):
        """A draw from N(1, 0.25²) truncated to [mask_ratio_min, 1] (paper, appendix B)."""
        low = torch.special.ndtr(torch.tensor((self.mask_ratio_min - 1) / MASK_RATIO_STD))
        u = low + (0.5 - low) * rand((), generator).cpu()
        return min(1.0, float(1 + MASK_RATIO_STD * torch.special.ndtri(u)))

    def predict(self, tokens, orders, asked, classes, cache=None):
        """z (S·N, A, D) of the tokens asked; see `Autoregressive.predict`. cache: a `Lazy`."""
        if cache:
            return cache.predict(self, tokens, orders, asked, classes)
        known = slice(asked.stop, None)
        x = self.encode(tokens[:, known], orders[:, known], classes)  # (S·N, B + V, D)
        return self.decode(x, orders, asked)

    def start_lazily(self, refresh_every, order):
        """See `models.lazy`."""
        if refresh_every < 1 or order == "confidence":
            raise ValueError(
                f"refresh_every {refresh_every}: expected 1 or more, and 1 in the order confidence"
            )
        return Lazy(refresh_every)

    def encode(self, tokens, places, classes, mask=None):
        """Tokens (N, V, C·p²) at places (N, V), behind B class tokens: (S·N, B + V, D).

        classes: (S·N, D), S streams of the same tokens. mask: of what is seen, see `Attention`.
        """
        streams = len(classes) // len(tokens)
        of_buffer, of_tokens = self._positions(self.encoder_pos_embed_learned)
        buffer = classes.unsqueeze(1) + of_buffer
        x = embed_tokens(self.z_proj, tokens) + F.embedding(places, of_tokens)
        x = self.z_proj_ln(torch.cat([buffer, x.repeat(streams, 1, 1)], dim=1))
        return self.encoder_norm(self._run(self.encoder_blocks, x, mask=mask))

    def decode(self, x, orders, asked):
        """z (S·N, A, D) at orders[:, asked] (N, L), from what `encode` gave for those after it."""
        x = self.join(x, orders, asked.stop)
        x = self._run(self.decoder_blocks, x, self.rows(asked))
        return self.finish(x, orders, asked)

    def join(self, x, orders, unknown):
        """The decoder's input (S·N, B + L, D), from what `encode` gave (S·N, B + V, D).

        Tokens stay in the order of generation: unknown ones, each a mask token, then known ones.
        """
        streams, buffer = len(x) // len(orders), self.buffer_size
        of_buffer, of_tokens = self._positions(self.decoder_pos_embed_learned)
        places = F.embedding(orders, of_tokens)
        masked = self.mask_token + places[:, :unknown]
        x = self.decoder_embed(x)
        parts = [x[:, :buffer] + of_buffer, masked.repeat(streams, 1, 1)]
        parts += [x[:, buffer:] + places[:, unknown:].repeat(streams, 1, 1)]
        return torch.cat(parts, dim=1)

    def rows(self, asked):
        """Where the tokens asked are in the decoder."""
        return slice(self.buffer_size + asked.start, self.buffer_size + asked.stop)

    def finish(self, x, orders, asked):
        """z (S·N, A, D) from what the last block gave for the tokens asked."""
        last = F.embedding(orders[:, asked], self.diffusion_pos_embed_learned[0])
        return self.decoder_norm(x) + last.repeat(len(x) // len(orders), 1, 1)

    def _positions(self, table):
        """A table of positions, of the class tokens (B, D) and of the others (L, D)."""
        return table[0].split([self.buffer_size, self.seq_len])

    def _run(self, blocks, x, rows=None, mask=None):
        """x through all blocks; of the last one only the `rows`."""
        for block in blocks:
            wanted = rows if block is blocks[-1] else None
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, wanted, mask, use_reentrant=False)
            elif self.training:
                x = block(x, wanted, mask)
            else:
                x = block.forward(x, wanted, mask)  # not what was compiled for training
        return x


def _size(width, depth, heads):
    """MAR of this width with `depth` blocks, half of them in the encoder."""
    return partial(
        MAR,
        encoder_embed_dim=width,
        encoder_depth=depth // 2,
        encoder_num_heads=heads,
        decoder_embed_dim=width,
        decoder_depth=depth // 2,
        decoder_num_heads=heads,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )


mar_tiny = _size(64, 4, 4)  # for small data and tests
mar_base = _size(768, 24, 12)
mar_large = _size(1024, 32, 16)
mar_huge = _size(1280, 40, 16)
