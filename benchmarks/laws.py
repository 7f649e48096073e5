"""What cost grows by: FLOPs from the shapes, and the constants of a law."""

import numpy as np
from scipy.optimize import nnls

from benchmarks import work
from models.order import token_counts
from models.settings import TOKEN_SCHEDULES


def fit(terms, seconds):
    """The constants c ≥ 0 with which Σ c·terms is nearest to seconds, by relative squares.

    terms: (points, constants). seconds: (points,). Returns (constants, Σ c·terms (points,)).
    """
    terms, seconds = np.asarray(terms, float), np.asarray(seconds, float)
    scale = terms.max(0)  # FLOPs beside ones
    constants = nnls(terms / scale / seconds[:, None], np.ones(len(seconds)))[0] / scale
    return constants.tolist(), (terms @ constants).tolist()


def training_flops(model, masked):
    """FLOPs of the forward and backward pass of one image with `masked` masked tokens."""
    weights = sum(p.numel() for p in model.diffloss.net.parameters() if p.ndim > 1)
    of_conditions = 2 * weights - work.head_flops(model)  # of t and z, which sampling has once
    rows = model.diffloss.diffusion_batch_mul * masked
    more = rows * of_conditions - left_out(model, masked)
    return work.training_flops(model, masked) + 3 * more


def sampling_flops(model, num_iter, num_sampling_steps):
    """FLOPs of one image with guidance: (Transformer, head). Tokens per step are the cosine's."""
    transformer, unknown = 0, model.seq_len
    for remaining in token_counts(TOKEN_SCHEDULES["cosine"], model.seq_len, num_iter):
        whole = work.transformer_flops(model, model.seq_len - unknown)
        transformer += 2 * (whole - left_out(model, unknown - remaining))
        unknown = remaining
    return transformer, 2 * model.seq_len * num_sampling_steps * work.head_flops(model)


def left_out(model, rows):
    """FLOPs that the last block saves, as it computes `rows` tokens from all keys and values."""
    width, tokens = model.fake_latent.shape[1], model.buffer_size + model.seq_len
    return (tokens - rows) * (20 * width**2 + 4 * tokens * width)


def cached_flops(model):
    """FLOPs of one image with guidance of a causal model that keeps keys and values, without head.

    Token n attends to n: Σ 24·D² + 4·n·D = 24·L·D² + 2·L·(L + 1)·D for each block.
    """
    length, width = model.seq_len, model.fake_latent.shape[1]
    return 2 * len(model.blocks) * (24 * length * width**2 + 2 * length * (length + 1) * width)
