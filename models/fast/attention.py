"""Attention on a CPU: in float32, and with dropout in fewer operations.

Torch's bf16 kernels saved no time there when measured, and with few tokens their backward pass took
ten times as long; `benchmarks/RESULTS.md` has both. It has no fused attention with dropout there.
"""

import torch
from torch.nn import functional as F

from models.fast.dropout import drop, usable


def attention(q, k, v, mask=None, dropout=0.0, causal=False):
    """F.scaled_dot_product_attention of q (N, heads, n, D), k and v (N, heads, m, D).

    mask: mask of the keys, 1 = seen, broadcast to (N, heads, n, m). dropout: of the weights.
    """
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", enabled=False):
            parts = (x.float() for x in (q, k, v))
            return attention(*parts, mask, dropout, causal).to(q.dtype)
    if 0 < dropout < 1 and mask is None and usable(q):
        return _dropping(q, k, v, dropout, causal)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)


def _dropping(q, k, v, dropout, causal):
    """Attention with dropout, without a mask."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if causal:
        scores = scores + q.new_full(scores.shape[-2:], -torch.inf).triu(1)
    weights = scores.softmax(-1)
    return (weights * drop(weights, dropout)) @ v
