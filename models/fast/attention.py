"""Attention, in float32 on a CPU: torch's bf16 and fp16 kernels there save no time.

With few tokens their backward pass takes ten times as long; `benchmarks/RESULTS.md` has both.
"""

import torch
from torch.nn import functional as F


def attention(q, k, v, mask=None, dropout=0.0, causal=False):
    """F.scaled_dot_product_attention of q (N, heads, n, D), k and v (N, heads, m, D).

    mask: mask of the keys, 1 = seen, broadcast to (N, heads, n, m). dropout: of the weights.
    """
    if q.device.type != "cpu" or q.dtype not in (torch.bfloat16, torch.float16):
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
    with torch.autocast("cpu", enabled=False):
        q, k, v, dtype = q.float(), k.float(), v.float(), q.dtype
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal).to(dtype)
