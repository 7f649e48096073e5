"""MAR: bidirectional, random order, several tokens per step (paper, sections 3.4 and 4)."""

import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from models.autoregressive import Autoregressive
from models.fast.lazy import Lazy
from models.latents import embed_tokens, initialize
from models.layers import Blocks
from models.settings import ORDERS
from util.rng import rand

MASK_RATIO_STD = 0.25
BUCKET = 8  # of known tokens: 11 lengths for mask ratios from 0.7 to 1 with 256 tokens


class MAR(Autoregressive):
    """An encoder of the known tokens and a decoder that predicts the others, as in MAE.

    img_size is the side of the images, or (height, width); their latents have vae_embed_dim
    channels at stride vae_stride, and patches of patch_size × patch_size latents are tokens.
    buffer_size copies of the class embedding precede the encoder's tokens. In training, a fraction
    of tokens between mask_ratio_min and 1 is masked, and a fraction label_drop_prob of the labels
    is dropped. head: a row of models.settings.HEADS; if not given, Diffusion Loss for continuous
    latents and cross-entropy for num_codes codes. token_norm: whether sampled latents have the norm
    √C, as those of the tokenizer then have. rope: whether blocks rotate queries and keys by the
    positions of their tokens (models/rope.py), beside the learned tables; class tokens are not
    rotated. known_noise: see `with_noise`. options: those of the head (diffloss_d=3,
    diffloss_w=1024, num_sampling_steps="100", diffusion_batch_mul=4, …, see `DiffLoss`) and of the
    blocks (mlp_ratio=4.0, norm_layer=nn.LayerNorm, attn_dropout=0.1, proj_dropout=0.1, …, see
    `Block`).
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
        head=None,
        num_codes=None,
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
            encoder_embed_dim,
            num_codes,
            token_norm,
            known_noise=known_noise,
        )
        if not 0 < mask_ratio_min < 1:
            raise ValueError(f"mask_ratio_min {mask_ratio_min}: expected between 0 and 1")
        self.mask_ratio_min = mask_ratio_min
        self.buffer_size = buffer_size
        length = buffer_size + self.seq_len
        options["grad_checkpointing"] = grad_checkpointing
        blocks = partial(
            Blocks,
            rope=self.grid if rope else None,
            norm_layer=norm_layer,
            mlp_ratio=mlp_ratio,
            attn_dropout=attn_dropout,
            proj_dropout=proj_dropout,
            **options,
        )

        self.z_proj = self._token_embedding(encoder_embed_dim)
        self.z_proj_ln = nn.LayerNorm(encoder_embed_dim, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, encoder_embed_dim))
        self.encoder_blocks = blocks(encoder_depth, encoder_embed_dim, encoder_num_heads)
        self.encoder_norm = norm_layer(encoder_embed_dim)

        self.decoder_embed = nn.Linear(encoder_embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, decoder_embed_dim))
        self.decoder_blocks = blocks(decoder_depth, decoder_embed_dim, decoder_num_heads)
        self.decoder_norm = norm_layer(decoder_embed_dim)
        # redundant, according to its author; here because released weights have it
        self.diffusion_pos_embed_learned = nn.Parameter(
            torch.zeros(1, self.seq_len, decoder_embed_dim)
        )
        initialize(self)
        self._add_head(head, decoder_embed_dim, options)

    # ---- the method ----------------------------------------------------------------------------

    def training_targets(
        self, tokens, orders, classes, generator=None, step_generator=None, mask_ratio=None
    ):
        """The first ceil(ratio·L) tokens of each order (N, n, C·p²), which are masked, and z."""
        if mask_ratio is None:
            mask_ratio = self.sample_mask_ratio(step_generator or generator)
        masked = slice(0, math.ceil(mask_ratio * self.seq_len))
        predict = self._predict_in_buckets if self.compiled else self.predict
        known = self.with_noise(tokens, generator)
        return tokens[:, masked], predict(known, orders, masked, classes)

    def sample_mask_ratio(self, generator=None):
        """A draw from N(1, 0.25²) truncated to [mask_ratio_min, 1] (paper, appendix B)."""
        low = torch.special.ndtr(torch.tensor((self.mask_ratio_min - 1) / MASK_RATIO_STD))
        u = low + (0.5 - low) * rand((), generator).cpu()
        return min(1.0, float(1 + MASK_RATIO_STD * torch.special.ndtri(u)))

    def predict(self, tokens, orders, to_predict, classes, cache=None):
        """z (S·N, n, D); see `Autoregressive.predict`. cache: a `Lazy`."""
        if cache:
            return cache.predict(self, tokens, orders, to_predict, classes)
        known = slice(to_predict.stop, None)
        x = self.encode(tokens[:, known], orders[:, known], classes)  # (S·N, B + V, D)
        return self.decode(x, orders, to_predict)  # (S·N, n, D)

    def encode(self, tokens, positions, classes, mask=None):
        """Encode B class tokens and known tokens (N, V, C·p²) at positions (N, V): (S·N, B + V, D).

        classes: (S·N, D), see `predict`. mask: mask of the keys, 1 = hidden, see `Attention`.
        """
        repeats = len(classes) // len(tokens)
        of_buffer, of_tokens = self._positions(self.encoder_pos_embed_learned)
        buffer = classes.unsqueeze(1) + of_buffer
        x = embed_tokens(self.z_proj, tokens) + F.embedding(positions, of_tokens)
        x = self.z_proj_ln(torch.cat([buffer, x.repeat(repeats, 1, 1)], dim=1))
        return self.encoder_norm(self.encoder_blocks(x, mask=mask, positions=positions))

    def decode(self, x, orders, to_predict):
        """z (S·N, n, D) at orders[:, to_predict], from the encoder's output for known tokens."""
        x = self.decoder_input(x, orders, to_predict.stop)  # (S·N, B + L, D)
        rows = self.decoder_rows(to_predict)
        x = self.decoder_blocks(x, rows, positions=orders)  # (S·N, n, D)
        return self.decoder_output(x, orders, to_predict)

    def decoder_input(self, x, orders, unknown):
        """The decoder's input (S·N, B + L, D) from the encoder's output (S·N, B + V, D).

        Tokens stay in their order: unknown ones, each a mask token, then known ones.
        """
        repeats, buffer = len(x) // len(orders), self.buffer_size
        of_buffer, of_tokens = self._positions(self.decoder_pos_embed_learned)
        positions = F.embedding(orders, of_tokens)
        masked = self.mask_token + positions[:, :unknown]
        x = self.decoder_embed(x)
        parts = [x[:, :buffer] + of_buffer, masked.repeat(repeats, 1, 1)]
        parts += [x[:, buffer:] + positions[:, unknown:].repeat(repeats, 1, 1)]
        return torch.cat(parts, dim=1)

    def decoder_rows(self, to_predict):
        """The slice of the decoder's sequence that holds the tokens to predict."""
        return slice(self.buffer_size + to_predict.start, self.buffer_size + to_predict.stop)

    def decoder_output(self, x, orders, to_predict):
        """z (S·N, n, D) from the last block's output for the tokens to predict."""
        last = F.embedding(orders[:, to_predict], self.diffusion_pos_embed_learned[0])
        return self.decoder_norm(x) + last.repeat(len(x) // len(orders), 1, 1)

    def _positions(self, table):
        """A table of position embeddings, split into class tokens (B, D) and tokens (L, D)."""
        return table[0].split([self.buffer_size, self.seq_len])

    def position_tables(self):
        """Name of each table of positions -> its rows before those of tokens; see LatentModel."""
        both = "encoder_pos_embed_learned", "decoder_pos_embed_learned"
        return {**dict.fromkeys(both, self.buffer_size), "diffusion_pos_embed_learned": 0}

    # ---- faster, same result -------------------------------------------------------------------

    def _predict_in_buckets(self, tokens, orders, masked, classes):
        """`predict` with the encoder's input padded to few lengths, for which blocks are compiled.

        The padding consists of masked tokens, hidden from all others.
        """
        buffer, known = self.buffer_size, self.seq_len - masked.stop
        padding = min(-known % BUCKET, masked.stop)
        given = slice(masked.stop - padding, None)
        places = torch.arange(buffer + padding + known, device=tokens.device)
        hidden = (places >= buffer) & (places < buffer + padding)
        x = self.encode(tokens[:, given], orders[:, given], classes, hidden.view(1, 1, 1, -1))
        x = torch.cat([x[:, :buffer], x[:, buffer + padding :]], 1)
        # all rows through the last block too: it would be compiled again for each number of them
        x = self.decoder_input(x, orders, masked.stop)
        x = self.decoder_blocks(x, positions=orders)
        return self.decoder_output(x[:, self.decoder_rows(masked)], orders, masked)

    def start_cache(self, sampling):
        """A `Lazy` if some steps reuse features, else None. Raises ValueError."""
        every, order = sampling.refresh_every, ORDERS[sampling.order or self.order]
        if every < 1 or (every != 1 and order.by_confidence):
            raise ValueError(
                f"refresh_every {every}: expected 1 or more, and 1 for the confidence order"
            )
        return Lazy(every) if every != 1 else None


def _size(width, depth, heads, **defaults):
    """A MAR of this width with `depth` blocks, half of them in the encoder."""
    return partial(
        MAR,
        encoder_embed_dim=width,
        encoder_depth=depth // 2,
        encoder_num_heads=heads,
        decoder_embed_dim=width,
        decoder_depth=depth // 2,
        decoder_num_heads=heads,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **defaults,
    )


mar_tiny = _size(64, 4, 4, diffloss_w=64)  # for tests and 8×8 images
mar_mini = _size(128, 6, 4, diffloss_w=128)  # for small data on a CPU
mar_small = _size(256, 10, 8, diffloss_w=256)  # for small data
mar_base = _size(768, 24, 12)
mar_large = _size(1024, 32, 16)
mar_huge = _size(1280, 40, 16)
