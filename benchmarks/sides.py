"""The two sides of `benchmarks.speed`, ours and plain, as pairs of functions that do the same."""

import math
from contextlib import contextmanager
from itertools import cycle

import torch

from benchmarks import plain
from engine_mar import parameter_groups
from models import build_model
from util.ema import EMA
from util.precision import autocast
from util.rng import image_generators


class Sides:
    """A model of ours and the plain one, with the same random weights, and how both are sampled.

    arguments: those of `build_model`. sampling: a models.settings.Sampling. precision: precision of
    the timings. Raises ValueError for more autoregressive steps than tokens.
    """

    def __init__(self, arguments, sampling, device, precision):
        self.sampling, self.device, self.precision = sampling, device, precision
        with torch.device(device):
            self.model = build_model(**arguments)
            randomize(self.model, device)
            self.plain = plain.PlainMAR(self.model)
        self.plain.diffloss.start_at(sampling.max_timestep)
        self.eval()
        if sampling.num_iter > self.model.seq_len:
            raise ValueError(
                f"--num_iter {sampling.num_iter}: expected at most {self.model.seq_len}, the tokens"
            )

    @property
    def gpu(self):
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def diffusion_steps(self):
        """Number of steps of the full reverse process."""
        return self.model.diffloss.gen_diffusion.num_steps

    def train(self, mode=True):
        """Both models in training mode."""
        self.model.train(mode)
        self.plain.train(mode)

    def eval(self):
        """Both models in evaluation mode."""
        self.train(False)

    def autocast(self):
        """The autocast of the precision that is timed."""
        return autocast(self.device, self.precision)

    def randn(self, *shape, seed=0):
        """Standard normal numbers of this shape, on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device)

    @contextmanager
    def computing_in(self, precision):
        """What is made within computes in this precision."""
        before, self.precision = self.precision, precision
        try:
            yield
        finally:
            self.precision = before

    @contextmanager
    def starting_at(self, timestep):
        """Both start the reverse process at this timestep; None is its very end."""
        before, self.sampling = self.sampling, self.sampling.but(max_timestep=timestep)
        self.plain.diffloss.start_at(timestep)
        try:
            yield
        finally:
            self.sampling = before
            self.plain.diffloss.start_at(before.max_timestep)

    # ---- pairs of functions (ours, plain) ------------------------------------------------------

    def head(self, rows, noise=None):
        """Sampling of `rows` tokens with guidance; of plain both halves, (2·rows, C).

        noise: (steps + 1, rows, C); drawn if not given.
        """
        width = self.model.fake_latent.shape[1]
        z, z_uncond = self.randn(rows, width, seed=1), self.randn(rows, width, seed=2)
        draw, cfg = self.model.head.sampler(self.sampling), self.sampling.cfg
        both = torch.cat([z, z_uncond])

        def ours():
            return draw(z, cfg, z_uncond, noise=noise)

        @torch.no_grad()
        def theirs():
            return self.plain.diffloss.sample(both, cfg, guided=True, noise=noise)

        return ours, theirs

    def images(self, bsz):
        """Sampling of a whole batch, without the tokenizer."""
        labels = self.labels(bsz)
        orders = self.model.sample_orders(bsz, torch.Generator(self.device).manual_seed(4))

        def ours():
            generators = image_generators(0, range(bsz))
            settings = self.sampling.asdict()
            return self.model.sample_tokens(bsz, labels=labels, generator=generators, **settings)

        def theirs():
            return self.plain.sample(orders, labels, self.sampling.num_iter, self.sampling.cfg)

        return self.autocast_in(ours), self.autocast_in(theirs)

    def labels(self, bsz):
        """A label for each image of a batch."""
        return torch.arange(bsz, device=self.device) % self.model.class_num

    def autocast_in(self, function):
        """The function, called with the autocast of the present precision."""
        precision = self.precision

        def run():
            with autocast(self.device, precision):
                return function()

        return run

    def training(self, bsz, draws=1, same=False):
        """The loss of a batch, with its backward pass; `draws` calls draw anew, then they repeat.

        In corresponding calls both mask the same number of tokens. same: all draws of all calls are
        the same.
        """
        model, precision = self.model, self.precision
        sides = (n * model.patch_size for n in (model.seq_h, model.seq_w))
        latents = self.randn(bsz, model.vae_embed_dim, *sides, seed=3)
        labels = self.labels(bsz)

        def ours(generator, step_generator):
            return model(latents, labels, generator, step_generator)

        def theirs(generator, step_generator):
            draws = training_draws(model, bsz, generator, step_generator)
            return self.plain(model.patchify(latents), self.plain.class_emb(labels), *draws)

        def side(network, forward):
            seeds = cycle([0] if same else draw_seeds(draws))

            def run():
                network.zero_grad(set_to_none=True)
                seed = next(seeds)
                generators = torch.Generator(self.device), torch.Generator()
                with autocast(self.device, precision):
                    loss = forward(*(g.manual_seed(seed) for g in generators))
                loss.backward()
                return loss.detach()

            return run

        return side(model, ours), side(self.plain, theirs)


def draw_seeds(draws):
    """Seeds of the training steps of `Sides.training`."""
    return range(1, 1 + draws)


def randomize(model, device):
    """Redraw all weights, as layers initialized with 0 would hide differences."""
    generator = torch.Generator(device).manual_seed(0)
    for name, p in model.named_parameters():
        std = p[0].numel() ** -0.5 if p.ndim > 1 and name.endswith("weight") else 0.02
        torch.nn.init.normal_(p, 1.0 * (p.ndim == 1 and "weight" in name), std, generator)


def training_draws(model, bsz, generator, step_generator):
    """The draws of our forward pass, in its order, in the form of plain: all tokens by position.

    Returns mask (N, L), timesteps (mul·N·L,) and noise (mul·N·L, C), 0 where nothing is masked.
    """
    orders, device = model.sample_orders(bsz, generator), model.fake_latent.device
    if model.training:
        torch.rand(bsz, 1, generator=generator, device=device)  # which labels are dropped
    masked = orders[:, : math.ceil(model.sample_mask_ratio(step_generator) * model.seq_len)]
    rows = (model.diffloss.diffusion_batch_mul, *masked.shape)
    t = model.diffloss.draw_timesteps(rows, generator, device)
    noise = torch.randn(*rows, model.token_embed_dim, generator=generator, device=device)
    mask = torch.zeros(bsz, model.seq_len, device=device).scatter(1, masked, 1.0)

    def in_place(x):
        index = masked.expand(len(x), -1, -1).view(*rows, *[1] * (x.ndim - 3)).expand_as(x)
        return x.new_zeros(*rows[:2], model.seq_len, *x.shape[3:]).scatter(2, index, x)

    return mask, in_place(t).flatten(), in_place(noise).flatten(0, 2)


class Updates:
    """AdamW and EMA of both sides, with random gradients."""

    rate = 0.9999

    def __init__(self, sides):
        self.pair = sides.model, sides.plain
        groups = parameter_groups(sides.model, 0.02)
        self.optimizer = torch.optim.AdamW(groups, lr=8e-4, betas=(0.9, 0.95), fused=True)
        self.plain_optimizer = plain.optimizer(sides.plain)
        self.ema = EMA(sides.model, self.rate)
        self.averages = [p.detach().clone() for p in sides.plain.parameters()]
        generator = torch.Generator(sides.device).manual_seed(5)
        for mine, other in self.weights():
            mine.grad = torch.randn(mine.shape, generator=generator, device=sides.device)
            other.grad = mine.grad.clone()

    def weights(self):
        """Pairs of parameters (ours, plain)."""
        return list(zip(*(model.parameters() for model in self.pair), strict=True))

    def averaged(self):
        """Pairs of averaged parameters (ours, plain)."""
        return list(zip(self.ema.module.parameters(), self.averages, strict=True))

    def ours(self):
        """One update."""
        self.optimizer.step()
        self.ema.update(self.pair[0])

    def plain(self):
        """One update, as plain does it."""
        self.plain_optimizer.step()
        plain.update_ema(self.averages, self.pair[1].parameters(), self.rate)


def whole_steps(sides, updates, bsz, draws):
    """Functions (ours, plain) that do a whole step: forward, backward, clipping, AdamW, EMA.

    updates: an Updates of the sides. draws: see `Sides.training`.
    """

    def side(model, passes, update):
        def run():
            passes()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
            update()

        return run

    ours, plain = sides.training(bsz, draws)
    return side(sides.model, ours, updates.ours), side(sides.plain, plain, updates.plain)
