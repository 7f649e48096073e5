"""MAR: bidirectional attention, random order, several tokens a step (paper, sections 3.4 and 4)."""

import math
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.autoregressive import Autoregressive, columns, take
from models.latents import embed_tokens, initialize
from util.rng import rand

MASK_RATIO_STD = 0.25


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
            qkv_bias=True,
            proj_drop=proj_dropout,
            attn_drop=attn_dropout,
            norm_layer=norm_layer,
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

    def teach(self, tokens, orders, classes, generator=None):
        """In one training step: the asked positions (N, A) and z (N, A, D) there."""
        known, asked = self.split(orders, generator)
        return asked, self.predict(tokens, known, asked, classes)

    def split(self, orders, generator=None):
        """The first ceil(ratio·L) positions of each order are asked for, one ratio a step."""
        unknown = math.ceil(self.sample_mask_ratio(generator) * self.seq_len)
        return orders[:, unknown:], orders[:, :unknown]

    def sample_mask_ratio(self, generator=None):
        """A draw from N(1, 0.25²) truncated to [mask_ratio_min, 1] (paper, appendix B)."""
        low = torch.special.ndtr(torch.tensor((self.mask_ratio_min - 1) / MASK_RATIO_STD))
        u = low + (0.5 - low) * rand((), generator).cpu()
        return min(1.0, float(1 + MASK_RATIO_STD * torch.special.ndtri(u)))

    def predict(self, tokens, known, asked, classes, cache=None):
        """z (N, A, D) at positions asked (N, A), from tokens (N, L, C·p²) at known (N, V)."""
        x = self.encode(take(tokens, known), known, classes)  # (N, B + V, D)
        z = self.decode(x, known)  # (N, L, D)
        return take(z, asked)  # (N, A, D)

    def encode(self, tokens, known, classes):
        """Tokens (N, V, C·p²) at positions known (N, V), behind B class tokens: (N, B+V, D)."""
        buffer = classes.unsqueeze(1).expand(-1, self.buffer_size, -1)
        positions = self.encoder_pos_embed_learned.expand(len(tokens), -1, -1)
        x = embed_tokens(self.z_proj, tokens)
        x = torch.cat([buffer, x], dim=1)
        x = x + torch.cat(
            [
                positions[:, : self.buffer_size],
                take(positions[:, self.buffer_size :], known),
            ],
            dim=1,
        )
        return self.encoder_norm(self._run(self.encoder_blocks, self.z_proj_ln(x)))

    def decode(self, x, known):
        """Encoded tokens (N, B+V, D) and mask tokens at all other positions give z (N, L, D)."""
        x = self.decoder_embed(x)
        buffer, x = x[:, : self.buffer_size], x[:, self.buffer_size :]
        masked = self.mask_token.to(x.dtype).expand(len(x), self.seq_len, -1)
        x = torch.cat([buffer, masked.scatter(1, columns(known, x), x)], dim=1)
        x = self._run(self.decoder_blocks, x + self.decoder_pos_embed_learned)
        return self.decoder_norm(x)[:, self.buffer_size :] + self.diffusion_pos_embed_learned

    def _run(self, blocks, x):
        for block in blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
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
