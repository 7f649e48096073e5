"""The loop over autoregressive steps, and the schedules of guidance (paper, sections 3.4 and 4)."""

from inspect import signature
from itertools import islice, pairwise

import torch

from models.latents import columns, take
from models.order import RandomOrder
from models.settings import CFG_SCHEDULES, ORDERS, TOKEN_SCHEDULES
from util.rng import generator_of

# attributes that a model and its guide have in common: kind and layout of tokens, and the classes
SHARED = ("num_codes", "vae_embed_dim", "patch_size", "grid", "class_num", "head_name")
SHARED = (*SHARED, "one_at_a_time")


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
    model,
    bsz,
    sampling,
    labels=None,
    generator=None,
    orders=None,
    latents=None,
    mask=None,
    guide=None,
):
    """See `Autoregressive.sample_steps`. sampling: a models.settings.Sampling.

    Images with equally many unknown tokens, in each stage of the order, form a group, which is
    sampled as if it were alone.
    """
    policy = _pick_order(model, sampling)
    _guidance_interval(sampling)
    check_guide(model, guide)
    _check_batch(model, bsz, orders)
    staged = policy if orders is None else RandomOrder()  # orders that are given have one stage
    orders, tokens, mask = _start(model, bsz, policy, orders, generator, latents, mask)
    for each in (model, *([guide] if guide else [])):
        each.check_orders(orders, f"order {sampling.order or 'as given'}")
    sizes = staged.sizes(mask.view(bsz, *model.grid))
    _check_steps(model, sampling.num_iter, max(map(sum, sizes)))
    classes = model.embed_labels(labels, bsz)
    uncond = guide.embed_labels(labels, bsz) if guide else model.embed_labels(None, bsz)
    draw = _sampler(model, sampling, guide)
    schedule, groups = TOKEN_SCHEDULES[sampling.token_schedule], []
    for size in sorted(own for own in {*sizes} if sum(own)):
        rows = [i for i, own in enumerate(sizes) if own == size]
        own = sampling.but(num_iter=min(sampling.num_iter, sum(size)))
        counts = [sum(size), *staged.counts(schedule, size, own.num_iter)]
        random = generator_of(generator, rows, bsz)
        rows = torch.tensor(rows, device=orders.device)
        predictor = _Predictor(model, guide, own, classes[rows], uncond[rows])
        steps = _sample_group(predictor, policy, draw, random, orders[rows], tokens[rows], counts)
        groups.append((rows, steps))

    still, in_place = mask.float(), _in_place(orders, tokens)
    for _ in range(sampling.num_iter if groups else 1):
        for rows, steps in groups:
            for tokens, unknown in islice(steps, 1):  # none from groups that are done
                in_place = in_place.index_copy(0, rows, tokens)
                still = still.index_copy(0, rows, unknown)
        yield model.unpatchify(in_place), still


def _sample_group(predictor, policy, draw, generator, orders, tokens, counts):
    """Yields tokens (N, L, C·p²), in raster order, and the mask (N, L) after each step.

    predictor: a _Predictor. draw: see Head.sampler. tokens: in the order of orders (N, L). counts:
    the number of tokens that are unknown, first in orders, at the start and after each step.
    """
    model, num_iter = predictor.model, predictor.sampling.num_iter
    for step, (unknown, remaining) in enumerate(pairwise(counts)):
        done = step / num_iter
        to_predict = slice(policy.first_to_predict(remaining), unknown)
        cfg = predictor.cfg(done, remaining)
        z, z_uncond = predictor(tokens, orders, to_predict, done)
        sampled = draw(z, cfg, z_uncond, generator, done).to(tokens.dtype)  # (N, n, C·p²)
        orders, sampled = policy.commit(
            orders,
            model.project(sampled),
            unknown,
            remaining,
            lambda tokens: predictor.confidence(tokens, z, cfg, z_uncond),  # noqa: B023 (not stored)
            (step + 1) / num_iter,
            generator,
        )
        tokens[:, remaining:unknown] = sampled
        still = torch.zeros_like(tokens[..., 0]).scatter(1, orders[:, :remaining], 1.0)
        yield _in_place(orders, tokens), still


class _Predictor:
    """z of the tokens to predict, and z of what guidance leads away from.

    That is the model without the class or, if there is a guide, this other model with the class,
    with a cache of its own. classes, uncond: the class embeddings of each (N, D).
    """

    def __init__(self, model, guide, sampling, classes, uncond):
        self.model, self.guide, self.sampling = model, guide, sampling
        self.classes, self.uncond = classes, uncond
        self.interval = _guidance_interval(sampling)
        self.guidance = CFG_SCHEDULES[sampling.cfg_schedule]
        self.cache = model.start_cache(sampling)
        self.guide_cache = guide and guide.start_cache(sampling)

    def cfg(self, done, remaining):
        """The guidance scale once the fraction `done` of the steps is done.

        remaining: the number of tokens unknown after the next.
        """
        begin, end = self.interval
        if not begin <= done < end:
            return 1.0
        return self.guidance(self.sampling.cfg, remaining, self.model.seq_len)

    def __call__(self, tokens, orders, to_predict, done):
        """(z, z_uncond) (N, n, D) each, see `Autoregressive.predict`; None if it is not needed."""
        given = tokens, orders, to_predict
        guided = self.model.needs_unconditional(done, self.interval)
        if guided and not self.guide:
            both = torch.cat([self.classes, self.uncond])
            return self.model.predict(*given, both, self.cache).chunk(2)
        if self.cache:
            self.cache.keep(len(orders))
        z = self.model.predict(*given, self.classes, self.cache)
        return z, self.guide.predict(*given, self.uncond, self.guide_cache) if guided else None

    def confidence(self, tokens, z, cfg, z_uncond):
        """log p of tokens (N, n, 1), see `Head.confidence`."""
        other = {"guide": self.guide.head} if self.guide else {}
        return self.model.head.confidence(tokens, z, cfg, z_uncond, **other)


def _in_place(orders, tokens):
    """Tokens (N, L, C·p²) in the order of orders (N, L), put in raster order."""
    return torch.zeros_like(tokens).scatter(1, columns(orders, tokens), tokens)


def _sampler(model, sampling, guide):
    """See Head.sampler, which is told of the guide only if there is one."""
    return model.head.sampler(sampling, **({"guide": guide.head} if guide else {}))


def check_guide(model, guide):
    """Raises ValueError unless a model, None for none, can guide another (autoguidance)."""
    if guide is None:
        return
    if "guide" not in signature(model.head.sampler).parameters:
        raise ValueError(f"guide: the head {model.head_name!r} cannot be guided by another model")
    for name in SHARED:
        own, other = getattr(model, name), getattr(guide, name)
        if own != other:
            raise ValueError(f"guide: its {name} is {other}, expected the model's, {own}")


def check_sampling(model, sampling, guide=None):
    """Raises ValueError for settings that the model does not support.

    guide: another model that guides it, see `Autoregressive.sample_steps`.
    """
    check_guide(model, guide)
    orders = _pick_order(model, sampling).start(1, model.grid, torch.Generator())
    for each in (model, *([guide] if guide else [])):
        each.check_orders(orders, f"order {sampling.order or 'as given'}")
        each.start_cache(sampling)
    _guidance_interval(sampling)
    if sampling.cfg != 1.0 and not model.label_drop_prob and not guide:
        raise ValueError(
            f"cfg {sampling.cfg}: the model was trained with --label_drop_prob 0, so it has no "
            "unconditional mode; expected 1"
        )
    for table in (CFG_SCHEDULES, TOKEN_SCHEDULES):
        table[getattr(sampling, table.kind)]
    _sampler(model, sampling, guide)


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
    """unknown: the largest number of unknown tokens in an image; with 0 there are no steps."""
    if model.one_at_a_time and num_iter != unknown > 0:
        raise ValueError(
            f"num_iter {num_iter}: expected {unknown}, causal attention gives one token per step"
        )
    if not 1 <= num_iter <= unknown and unknown:
        raise ValueError(
            f"num_iter {num_iter}: expected 1 to {unknown}, the number of tokens to generate"
        )


def _start(model, bsz, policy, orders, generator, latents, mask):
    """Orders (N, L), initial tokens in them (N, L, C·p²), and the mask (N, L), booleans."""
    device = model.fake_latent.device
    if orders is None:
        orders = policy.start(bsz, model.grid, generator, device)
    if (latents is None) != (mask is None):
        raise ValueError("latents and mask: expected both (inpainting) or neither")
    if latents is None:
        tokens = torch.zeros(bsz, model.seq_len, model.token_embed_dim, device=device)
        return orders, tokens, torch.ones_like(tokens[..., 0], dtype=torch.bool)
    mask = _check_mask(model, bsz, latents, mask)
    # known tokens move to the end of the order, as if already generated
    unknown_first = (~mask).gather(1, orders).byte().argsort(dim=1, stable=True)
    orders = orders.gather(1, unknown_first)
    tokens = model.patchify(latents).float().masked_fill(mask.unsqueeze(-1), 0.0)
    return orders, take(tokens, orders), mask


def _check_mask(model, bsz, latents, mask):
    """The mask as (N, L) booleans."""
    if len(latents) != bsz or mask.numel() != bsz * model.seq_len:
        raise ValueError(
            f"latents of shape {tuple(latents.shape)} and mask of shape {tuple(mask.shape)}: "
            f"expected {bsz} latents, and a mask of ({bsz}, {model.seq_len}), one entry per token"
        )
    return mask.reshape(bsz, model.seq_len) > 0
