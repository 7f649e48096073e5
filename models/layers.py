"""Transformer blocks, and the cache that saves keys and values of causal ones."""

import torch
from timm.layers import Mlp
from torch import nn
from torch.nn import functional as F

from models.linear import linear


class KVCache:
    """Keys and values of the tokens seen so far, of all blocks, in one tensor.

    depth: blocks. length: the most tokens that will ever be held. Allocated at the first `append`,
    which tells sizes, dtype and device.
    """

    def __init__(self, depth, length):
        self.depth, self.capacity = depth, length
        self.length = 0  # tokens that all blocks have seen
        self.held = None  # (2, depth, N, heads, capacity, D)

    def append(self, block, k, v):
        """Keys and values (N, heads, n, D) of new tokens; returns those of all, at this block."""
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
    """Self-attention. causal: a token sees itself and those before it."""

    def __init__(self, width, heads, attn_dropout=0.0, proj_dropout=0.0, causal=False):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width}: expected a multiple of the {heads} heads")
        self.heads, self.attn_dropout, self.causal = heads, attn_dropout, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(proj_dropout)

    def forward(self, x, rows=None, mask=None, block=0, cache=None):
        """x (N, n, D) to (N, n, D), or of the tokens that the slice `rows` takes alone.

        mask: of the keys, 1 = seen, broadcast to (N, heads, n, n). cache: holds the tokens before
        x, of a causal model; block: this one's number in it.
        """
        q, k, v = self.project(x, rows)
        if cache is not None:
            k, v = cache.append(block, k, v)
        new, seen = q.shape[2], k.shape[2]
        if self.causal and 1 < new < seen:
            mask = torch.ones(new, seen, dtype=torch.bool, device=x.device).tril(seen - new)
        return self.attend(q, k, v, mask, causal=self.causal and 1 < new == seen)

    def project(self, x, rows=None):
        """Queries, keys and values, each (N, heads, n, D), the queries of `rows` alone."""
        if rows is None:
            return self._split(self.qkv(x), 3)
        width = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        (q,) = self._split(linear(x[:, rows], weight[:width], bias[:width]), 1)
        return q, *self._split(linear(x, weight[width:], bias[width:]), 2)

    def attend(self, q, k, v, mask=None, causal=False):
        """What the queries (N, heads, n, D) find, projected: (N, n, heads·D)."""
        dropout = self.attn_dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))

    def _split(self, x, parts):
        """(N, n, parts·D) to `parts` of (N, heads, n, D / heads)."""
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class Block(nn.Module):
    """A pre-norm block: x + attention(LN(x)), then x + MLP(LN(x)). Named as timm's."""

    def __init__(
        self,
        width,
        heads,
        mlp_ratio,
        norm_layer,
        attn_dropout=0.0,
        proj_dropout=0.0,
        causal=False,
    ):
        super().__init__()
        self.norm1 = norm_layer(width)
        self.attn = Attention(width, heads, attn_dropout, proj_dropout, causal)
        self.norm2 = norm_layer(width)
        self.mlp = Mlp(width, int(width * mlp_ratio), drop=proj_dropout)

    def forward(self, x, rows=None, mask=None, block=0, cache=None):
        """x (N, n, D) to (N, n, D), of `rows` alone where they are given. See `Attention`."""
        attended = self.attn(self.norm1(x), rows, mask, block, cache)
        x = (x if rows is None else x[:, rows]) + attended
        return x + self.mlp(self.norm2(x))
