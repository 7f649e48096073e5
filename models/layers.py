"""Transformer blocks, and the key/value cache of causal ones.

A new option of the blocks is a keyword argument of Block or Attention, and a field of
models.settings.Model with the same name.
"""

from functools import partial

import torch
from timm.layers import Mlp, SwiGLUPacked
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.fast.attention import attention
from models.fast.dropout import Dropout
from models.fast.linear import linear
from models.options import named_by
from models.rope import rotate, rotations


class KVCache:
    """Keys and values of the tokens seen so far, for all blocks in one tensor.

    depth: number of blocks. length: maximum number of tokens. Allocated by the first `append`, when
    sizes, dtype and device are known.
    """

    def __init__(self, depth, length):
        self.depth, self.capacity = depth, length
        self.length = 0  # tokens that all blocks have seen
        self.held = None  # (2, depth, N, heads, capacity, D)

    def append(self, block, k, v):
        """Add keys and values of new tokens to block number `block`, and return all of them.

        k, v: (N, heads, n, D).
        """
        if self.held is None:
            bsz, heads, _, width = k.shape
            self.held = k.new_empty(2, self.depth, bsz, heads, self.capacity, width)
        end = self.length + k.shape[2]
        assert end <= self.capacity, f"{end} tokens in a cache of {self.capacity}"
        self.held[0, block, :, :, self.length : end] = k
        self.held[1, block, :, :, self.length : end] = v
        if block == self.depth - 1:
            self.length = end
        return self.held[0, block, :, :, :end], self.held[1, block, :, :, :end]

    def keep(self, count):
        """Forget all but the first `count` sequences."""
        if self.held is not None:
            self.held = self.held[:, :, :count]


class Attention(nn.Module):
    """Self-attention. causal: a token attends to itself and to those before it.

    qk_norm: whether queries and keys pass a LayerNorm without bias, one for all heads, before they
    are compared (ViT-22B, Dehghani et al. 2023, arXiv 2302.05442).
    """

    def __init__(self, width, heads, causal, attn_dropout=0.0, proj_dropout=0.0, qk_norm=False):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width}: expected a multiple of the {heads} heads")
        self.heads, self.attn_dropout, self.causal = heads, attn_dropout, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_drop = Dropout(proj_dropout)
        norm = partial(nn.LayerNorm, width // heads, eps=1e-6, bias=False)
        self.q_norm, self.k_norm = (norm(), norm()) if qk_norm else (nn.Identity(), nn.Identity())

    def forward(self, x, rows=None, mask=None, block=0, cache=None, rotation=None):
        """x (N, n, D) to (N, n, D); if the slice `rows` is given, only those queries.

        mask: mask of the keys, 1 = hidden, broadcast to (N, heads, n, n). cache: holds keys and
        values of other tokens, under the number `block` (see KVCache). rotation: of models/rope.py,
        (N, 1, n, 2·D / heads), of the tokens in x; keys are cached as rotated.
        """
        q, k, v = self.project(x, rows)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if rotation is not None:
            q = rotate(q, rotation if rows is None else rotation[:, :, rows])
            k = rotate(k, rotation)
        if cache is not None:
            k, v = cache.append(block, k, v)
        new, seen = q.shape[2], k.shape[2]
        seen_mask = None if mask is None else ~mask
        if self.causal and 1 < new < seen:
            seen_mask = torch.ones(new, seen, dtype=torch.bool, device=x.device).tril(seen - new)
        dropout = self.attn_dropout if self.training else 0.0
        causal = self.causal and 1 < new == seen
        x = attention(q, k, v, seen_mask, dropout, causal)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))

    def project(self, x, rows=None):
        """Queries, keys and values of x (N, n, D), each (N, heads, n, D / heads).

        rows: slice of x to compute queries for; None for all.
        """
        if rows is None:
            return self._split(self.qkv(x), 3)
        width = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        (q,) = self._split(linear(x[:, rows], weight[:width], bias[:width]), 1)
        return q, *self._split(linear(x, weight[width:], bias[width:]), 2)

    def _split(self, x, parts):
        """(N, n, parts·D) to `parts` of (N, heads, n, D / heads)."""
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class Block(nn.Module):
    """A pre-norm block: x + attention(LN(x)), then x + MLP(LN(x)). Parameters are named as timm's.

    swiglu: whether the MLP is gated, see `gated_mlp`. mlp_dropout: dropout rate in the MLP; None
    for proj_dropout. options: arguments of Attention. Raises TypeError for any other.
    """

    def __init__(
        self,
        width,
        heads,
        norm_layer=nn.LayerNorm,
        mlp_ratio=4.0,
        proj_dropout=0.0,
        swiglu=False,
        mlp_dropout=None,
        **options,
    ):
        super().__init__()
        self.norm1 = norm_layer(width)
        self.attn = Attention(width, heads, proj_dropout=proj_dropout, **options)
        self.norm2 = norm_layer(width)
        hidden, rate = int(width * mlp_ratio), proj_dropout if mlp_dropout is None else mlp_dropout
        self.mlp = gated_mlp(width, hidden) if swiglu else Mlp(width, hidden)
        self.mlp.drop1, self.mlp.drop2 = Dropout(rate), Dropout(rate)

    def forward(self, x, rows=None, **context):
        """x (N, n, D) to (N, n, D); if `rows` is given, only those tokens.

        context: arguments of `Attention.forward`.
        """
        attended = self.attn(self.norm1(x), rows, **context)
        x = (x if rows is None else x[:, rows]) + attended
        return x + self.mlp(self.norm2(x))


def gated_mlp(width, hidden):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): (SiLU(xW) ⊙ xV)U, biases aside.

    It has three matrices instead of two, so as there its hidden layer has 2/3 of the width
    `hidden`, rounded to a multiple of 8, for as many parameters.
    """
    return SwiGLUPacked(width, 2 * 8 * max(1, round(hidden / 12)))


class Blocks(nn.ModuleList):
    """A sequence of blocks, called in the same way in training and in sampling.

    The positional arguments are set by the backbone, and so is rope: (height, width) of the grid on
    which tokens have rotary positions, or None. options are those of Block and Attention.
    """

    def __init__(
        self, depth, width, heads, causal=False, /, rope=None, grad_checkpointing=False, **options
    ):
        options = named_by(options, Block, Attention)
        super().__init__(Block(width, heads, causal=causal, **options) for _ in range(depth))
        self.grad_checkpointing = grad_checkpointing
        self.rope, self.head_width = rope, width // heads
        if rope and self.head_width % 4:
            raise ValueError(f"rope: heads of {self.head_width} numbers, expected a multiple of 4")

    def forward(self, x, rows=None, first=0, last=None, positions=None, **context):
        """x (N, n, D) through blocks first to last − 1 (None: all), the final one for `rows`.

        positions: (N, m) or fewer rows that repeat, positions of the last m tokens on the grid.
        context: arguments of `Attention.forward`, such as mask and cache.
        """
        if self.rope:
            places = positions.repeat(len(x) // len(positions), 1)
            context["rotation"] = rotations(places, x.shape[1], self.rope, self.head_width)
        for i in range(first, len(self) if last is None else last):
            wanted = rows if i == len(self) - 1 else None
            x = run_block(self[i], self.grad_checkpointing, x, wanted, block=i, **context)
        return x


def run_block(module, grad_checkpointing, *args, **context):
    """Call a block: compiled and checkpointed (if enabled) in training, plainly in sampling."""
    if not module.training:
        return module.forward(
            *args, **context
        )  # blocks are compiled for the few lengths of training
    if grad_checkpointing:
        return checkpoint(module, *args, use_reentrant=False, **context)
    return module(*args, **context)
