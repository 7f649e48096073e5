"""The loop over autoregressive steps, and the schedules of guidance (paper, sections 3.4 and 4)."""

import torch

from models.latents import columns, take
from models.order import token_counts
from models.settings import CFG_SCHEDULES, ORDERS, TOKEN_SCHEDULES


def constant(cfg, remaining, length):
    """The guidance scale ω throughout."""
    return cfg


def linear(cfg, remaining, length):
    """From 1 to ω as tokens become known: 1 + (ω − 1)·known/L.

    As in the published code, one token counts as unknown even after the last step.
    """
    return 1 + (cfg - 1) * (length - max(remaining, 1)) / length


@torch.no_grad()
def sample_steps(
    model, bsz, sampling, labels=None, generator=None, orders=None, latents=None, mask=None
):
    """See `Autoregressive.sample_steps`. sampling: a models.settings.Sampling."""
    policy = _pick_order(model, sampling)
    interval = _guidance_interval(sampling)
    _check_batch(model, bsz, orders)
    orders, tokens, unknown = _start(model, bsz, policy, orders, generator, latents, mask)
    model.check_orders(orders, sampling.order)
    _check_steps(model, sampling.num_iter, unknown)
    guidance = CFG_SCHEDULES[sampling.cfg_schedule]
    both = torch.cat([model.embed_labels(labels, bsz), model.embed_labels(None, bsz)])  # (2N, D)
    cache = model.start_cache(sampling)
    draw = model.head.sampler(sampling)

    schedule = TOKEN_SCHEDULES[sampling.token_schedule]
    for step, remaining in enumerate(token_counts(schedule, unknown, sampling.num_iter)):
        done = step / sampling.num_iter
        to_predict = slice(policy.first_to_predict(remaining), unknown)
        acts = interval[0] <= done < interval[1]
        cfg = guidance(sampling.cfg, remaining, model.seq_len) if acts else 1.0
        guided = model.needs_unconditional(done, interval)
        if cache and not guided:
            cache.keep(bsz)
        z = model.predict(tokens, orders, to_predict, both if guided else both[:bsz], cache)
        z, z_uncond = z.chunk(2) if guided else (z, None)  # (N, n, D) each
        sampled = draw(z, cfg, z_uncond, generator, done).to(tokens.dtype)  # (N, n, C·p²)
        orders, sampled = policy.commit(
            orders,
            sampled,
            unknown,
            remaining,
            lambda tokens: model.head.confidence(tokens, z, cfg, z_uncond),  # noqa: B023 (not stored)
            (step + 1) / sampling.num_iter,
            generator,
        )
        tokens[:, remaining:unknown] = sampled
        unknown = remaining
        in_place = torch.zeros_like(tokens).scatter(1, columns(orders, tokens), tokens)
        still = torch.zeros_like(tokens[..., 0]).scatter(1, orders[:, :unknown], 1.0)
        yield model.unpatchify(in_place), still


def check_sampling(model, sampling):
    """Raises ValueError for settings that the model does not support."""
    orders = _pick_order(model, sampling).start(1, model.seq_len, torch.Generator())
    model.check_orders(orders, sampling.order)
    _guidance_interval(sampling)
    if sampling.cfg != 1.0 and not model.label_drop_prob:
        raise ValueError(
            f"cfg {sampling.cfg}: the model was trained with --label_drop_prob 0, so it has no "
            "unconditional mode; expected 1"
        )
    for table in (CFG_SCHEDULES, TOKEN_SCHEDULES):
        table[getattr(sampling, table.kind)]
    model.start_cache(sampling)
    model.head.sampler(sampling)


def _pick_order(model, sampling):
    """The order to sample in, a row of ORDERS. Raises ValueError if the model cannot follow it."""
    name = sampling.order or model.order
    policy = ORDERS[name]()
    if policy.by_confidence and (model.one_at_a_time or not model.head.confidence):
        raise ValueError(
            f"order {name!r}: expected a bidirectional model with the cross-entropy head, "
            f"this is {type(model).__name__} with {type(model.head).__name__}"
        )
    return policy


def _guidance_interval(sampling):
    """The fractions of steps (begin, end) between which guidance is applied; empty at scale 1.

    As in Kynkäänniemi et al. 2024, but over autoregressive steps. Raises ValueError.
    """
    begin, end = sampling.cfg_interval
    if not 0 <= begin < end <= 1:
        raise ValueError(f"cfg_interval {begin} {end}: expected 0 ≤ first < second ≤ 1")
    return (begin, end) if sampling.cfg != 1.0 else (0.0, 0.0)


def _check_batch(model, bsz, orders):
    if bsz < 1:
        raise ValueError(f"bsz {bsz}: expected 1 or more")
    if orders is not None and orders.shape != (bsz, model.seq_len):
        raise ValueError(
            f"orders of shape {tuple(orders.shape)}: expected ({bsz}, {model.seq_len})"
        )


def _check_steps(model, num_iter, unknown):
    if model.one_at_a_time and num_iter != unknown:
        raise ValueError(
            f"num_iter {num_iter}: expected {unknown}, causal attention gives one token per step"
        )
    if not 1 <= num_iter <= unknown:
        raise ValueError(
            f"num_iter {num_iter}: expected 1 to {unknown}, the number of tokens to generate"
        )


def _start(model, bsz, policy, orders, generator, latents, mask):
    """Orders (N, L), initial tokens in them (N, L, C·p²), and the number of unknown tokens."""
    device = model.fake_latent.device
    if orders is None:
        orders = policy.start(bsz, model.seq_len, generator, device)
    if (latents is None) != (mask is None):
        raise ValueError("latents and mask: expected both (inpainting) or neither")
    if latents is None:
        tokens = torch.zeros(bsz, model.seq_len, model.token_embed_dim, device=device)
        return orders, tokens, model.seq_len
    mask, unknown = _check_mask(model, bsz, latents, mask)
    # known tokens move to the end of the order, as if already generated
    unknown_first = (~mask).gather(1, orders).byte().argsort(dim=1, stable=True)
    orders = orders.gather(1, unknown_first)
    tokens = model.patchify(latents).float().masked_fill(mask.unsqueeze(-1), 0.0)
    return orders, take(tokens, orders), unknown


def _check_mask(model, bsz, latents, mask):
    """The mask as (N, L) booleans, and the number of tokens it hides in each image."""
    if len(latents) != bsz or mask.numel() != bsz * model.seq_len:
        raise ValueError(
            f"latents of shape {tuple(latents.shape)} and mask of shape {tuple(mask.shape)}: "
            f"expected {bsz} latents, and a mask of ({bsz}, {model.seq_len}), one entry per token"
        )
    mask = mask.reshape(bsz, model.seq_len) > 0
    unknown = mask.sum(1)
    if unknown.min() != unknown.max() or not unknown.min():
        raise ValueError(
            f"masks with {unknown.tolist()} unknown tokens: expected the same in each, above 0"
        )
    return mask, int(unknown[0])
