"""Transformer blocks with causal attention, and the cache that saves their keys and values."""

import torch
from timm.layers import Mlp
from torch import nn
from torch.nn import functional as F


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


class CausalAttention(nn.Module):
    """Self-attention in which a token sees itself and those before it."""

    def __init__(self, width, heads, attn_dropout=0.0, proj_dropout=0.0):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width}: expected a multiple of the {heads} heads")
        self.heads, self.attn_dropout = heads, attn_dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(proj_dropout)

    def forward(self, x, block=0, cache=None):
        """x (N, n, D), the tokens that are new where there is a cache: (N, n, D)."""
        bsz, new, width = x.shape
        q, k, v = self.qkv(x).view(bsz, new, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.append(block, k, v)
        seen, mask = k.shape[2], None
        if 1 < new < seen:
            mask = torch.ones(new, seen, dtype=torch.bool, device=x.device).tril(seen - new)
        dropout = self.attn_dropout if self.training else 0.0
        causal = 1 < new == seen
        x = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(bsz, new, width)))


class CausalBlock(nn.Module):
    """A pre-norm block: x + attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, width, heads, mlp_ratio, norm_layer, attn_dropout=0.0, proj_dropout=0.0):
        super().__init__()
        self.norm1 = norm_layer(width)
        self.attn = CausalAttention(width, heads, attn_dropout, proj_dropout)
        self.norm2 = norm_layer(width)
        self.mlp = Mlp(width, int(width * mlp_ratio), drop=proj_dropout)

    def forward(self, x, block=0, cache=None):
        x = x + self.attn(self.norm1(x), block, cache)
        return x + self.mlp(self.norm2(x))
