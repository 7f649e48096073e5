"""One autoregressive step of both sides, from the same tokens."""

import torch

from models.latents import columns, take
from models.order import token_counts
from models.settings import CFG_SCHEDULES, TOKEN_SCHEDULES
from util.rng import image_generators


def pick_steps(sides, count, bsz, noise=False):
    """A Step from the middle of each of `count` equal parts of sampling. noise: see `Step`."""
    num_iter = sides.sampling.num_iter
    count = min(count, num_iter)
    for part in range(count):
        yield Step(sides, (2 * part + 1) * num_iter // (2 * count), bsz, noise)


class Step:
    """Autoregressive step `number` of ours and of plain, on `bsz` images.

    `unknown` tokens are unknown before it and `remaining` after it. noise: whether both receive the
    same noise instead of drawing it.
    """

    def __init__(self, sides, number, bsz, noise=False):
        self.sides, self.number, self.bsz = sides, number, bsz
        model, device = sides.model, sides.device
        schedule = TOKEN_SCHEDULES[sides.sampling.token_schedule]
        after = token_counts(schedule, model.seq_len, sides.sampling.num_iter)
        self.unknown, self.remaining = [model.seq_len, *after][number : number + 2]
        self.labels = sides.labels(bsz)
        self.orders = model.sample_orders(bsz, torch.Generator(device).manual_seed(number))
        shape = bsz, model.seq_len, model.token_embed_dim
        self.tokens = sides.randn(*shape, seed=number)
        self.tokens[:, : self.unknown] = 0.0
        self.noise = sides.randn(sides.diffusion_steps + 1, *shape, seed=9) if noise else None
        self.arrange()

    def arrange(self):
        """Prepare what sampling prepares once, in the precision of the enabled autocast."""
        model = self.sides.model
        self.draw = model.head.sampler(self.sides.sampling)
        classes = [model.embed_labels(labels, self.bsz) for labels in (self.labels, None)]
        self.classes = torch.cat(classes)
        self.generators = image_generators(0, range(self.bsz))
        self.in_place = put_back(self.tokens, self.orders)
        self.mask = torch.ones(self.tokens.shape[:2], device=self.tokens.device)
        self.mask = self.mask.scatter(1, self.orders[:, self.unknown :], 0.0)

    @torch.no_grad()
    def ours(self):
        """Tokens (N, L, C) by position after the step."""
        model, sampling = self.sides.model, self.sides.sampling
        to_predict = slice(self.remaining, self.unknown)
        cfg = CFG_SCHEDULES[sampling.cfg_schedule](sampling.cfg, self.remaining, model.seq_len)
        z, z_uncond = model.predict(self.tokens, self.orders, to_predict, self.classes).chunk(2)
        noise = self.noise
        if noise is not None:
            noise = torch.stack([take(part, self.orders[:, to_predict]) for part in noise])
        tokens = self.tokens.clone()
        tokens[:, to_predict] = self.draw(z, cfg, z_uncond, self.generators, noise=noise)
        return put_back(tokens, self.orders)

    def plain(self):
        """The same of the plain implementation."""
        sampling = self.sides.sampling
        of_all = self.number, sampling.num_iter, sampling.cfg
        tokens, _ = self.sides.plain.step(
            self.in_place, self.mask, self.orders, self.labels, *of_all, self.noise
        )
        return tokens


def put_back(tokens, orders):
    """Tokens (N, L, C) from the order of generation to their positions."""
    return torch.zeros_like(tokens).scatter(1, columns(orders, tokens), tokens)
