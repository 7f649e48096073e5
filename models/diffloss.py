"""Diffusion Loss: a small denoising MLP that models p(token | z) (paper, sections 3.2 and 3.3)."""

import math
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffusion import create_diffusion
from diffusion.schedule import annealing
from diffusion.solvers import BELOW_SINGULARITY, SOLVERS
from models.fast.denoiser import FastSampler
from models.fast.linear import speed_up
from models.fast.timesteps import of_distinct
from models.heads import Head, masked_mean
from models.settings import LOSS_WEIGHTS, TIMESTEPS, USUAL, Sampling
from util.rng import rand, randn

QUARTERS = 4


class Diffused:
    """Diffusion training and sampling, shared by DiffLoss and DiT.

    usual: see Head. solvers: table of the rows that a Sampling's `solver` can name.
    """

    usual, solvers = USUAL, SOLVERS

    def start_diffusion(
        self, num_sampling_steps, vlb, max_timestep, timesteps=None, loss_weight="none"
    ):
        """Set up both processes.

        num_sampling_steps: steps of the reverse process, as in
        `diffusion.schedule.spaced_timesteps`. vlb: whether the loss has the variational term.
        max_timestep: default first timestep of sampling; None is the very end of the process.
        timesteps: row of TIMESTEPS, from which training draws. loss_weight: row of LOSS_WEIGHTS.
        """
        self.train_diffusion = create_diffusion()
        self.timesteps = TIMESTEPS[timesteps or "uniform"]
        self.loss_weight = LOSS_WEIGHTS[loss_weight]
        self.vlb = vlb
        self.max_timestep, self.spacing = max_timestep, num_sampling_steps
        self.gen_diffusion = create_diffusion(num_sampling_steps)
        self.gen_diffusion.first_step(max_timestep)
        self.quarters = None  # sums and counts of the loss by quarter of the timesteps, (2, 4)

    def losses(self, network, target, t, generator=None):
        """The loss of each row (...): target (..., C), broadcast to timesteps t (...); eq. 1."""
        noise = randn((*t.shape, target.shape[-1]), generator, target.device)
        losses = self.denoising_losses(network, target, t, noise)["loss"]
        if self.training:
            self._count_quarters(losses.detach(), t)
        return losses

    def denoising_losses(self, network, target, t, noise):
        """See `GaussianDiffusion.training_losses`; unweighted in evaluation mode."""
        weights = self.loss_weight(self.train_diffusion, t) if self.training else None
        return self.train_diffusion.training_losses(network, target, t, noise, self.vlb, weights)

    def draw_timesteps(self, shape, generator, device):
        """Timesteps of this shape. In evaluation mode they are uniform, so that losses of models
        that were trained with other ones are comparable."""
        draw = self.timesteps if self.training else TIMESTEPS["uniform"]
        return draw(self.train_diffusion, shape, generator, device)

    def quarter_losses(self, network, target, generators, rows):
        """Held-out losses of each image, name -> (N,): `loss`; `mse`, which is eq. 1 without the
        variational term; and that in each quarter of the timesteps.

        target: (N, n, C). generators: one per image. rows: timesteps drawn per image and quarter, n
        or 1. network: see `losses`.
        """
        steps, (count, tokens, channels) = self.train_diffusion.num_steps, target.shape
        size, parts = steps // QUARTERS, []
        u = rand((count, QUARTERS, rows), generators, target.device)
        noise = randn((count, QUARTERS, tokens, channels), generators, target.device)
        for q in range(QUARTERS):
            t = (q * size + (u[:, q] * size).long().clamp(max=size - 1)).expand(count, tokens)
            parts.append(self.denoising_losses(network, target, t, noise[:, q]))
        loss, mse = (torch.stack([p[name].mean(1) for p in parts]) for name in ("loss", "mse"))
        quarters = {f"mse_{_range(q, size)}": mse[q] for q in range(QUARTERS)}
        return {"loss": loss.mean(0), "mse": mse.mean(0), **quarters}

    def plan(self, sampling):
        """The reverse process for a Sampling: (steps_at, draws).

        steps_at(done) gives (key, ReverseSteps) once the fraction `done` of the autoregressive
        steps is done; key identifies the ReverseSteps. draws is the number of steps that draw
        noise. Raises ValueError for settings that do not fit.
        """
        if sampling.temperature < 0:
            raise ValueError(f"temperature {sampling.temperature}: expected 0 or more")
        start = self.max_timestep if sampling.max_timestep is None else sampling.max_timestep
        spacing = sampling.num_sampling_steps or self.spacing
        (name, solver), count = self.solver(sampling), annealing(sampling.anneal)
        if solver.start is None and not count:
            own = spacing == self.spacing
            diffusion = self.gen_diffusion if own else create_diffusion(spacing)
            named = key_of(name, diffusion.steps(start, name))
            return (lambda done: named), diffusion.num_steps
        highest = BELOW_SINGULARITY if start is None else start

        @cache
        def named_steps(spacing):
            diffusion = create_diffusion(spacing, highest=highest, log_snr=solver.log_snr)
            return key_of(name, diffusion.steps(solver=name))

        steps_at = (
            (lambda done: named_steps(count(done))) if count else lambda done: named_steps(spacing)
        )
        most = len(steps_at(0.0)[1])  # raises now for settings that do not fit
        return steps_at, most if solver.draws_noise else 0

    def solver(self, sampling):
        """(name, row of `solvers`) of a Sampling's solver. Raises ValueError for another."""
        name = sampling.solver or self.usual["solver"]
        return name, self.solvers[name]

    def draw_noise(self, shape, generator, device, draws):
        """The start of the reverse process and the noise of each step, for rows (N, ..., C):
        (draws + 1, N, ..., C)."""
        return randn((shape[0], draws + 1, *shape[1:]), generator, device).movedim(1, 0)

    def scale_start(self, noise, sampling):
        """The noise, its start scaled by the temperature if the solver draws no further noise."""
        if self.solver(sampling)[1].draws_noise:
            return noise
        return torch.cat([noise[:1] * sampling.temperature, noise[1:]])

    def advice(self, sampling):
        """A sentence on what to try if samples diverge."""
        known = (sampling.max_timestep, self.max_timestep, self.solver(sampling)[1].start)
        start = next((t for t in known if t is not None), None)
        if start is None and annealing(sampling.anneal):
            start = BELOW_SINGULARITY
        advice = "Train the model for longer"
        if start is None or start > BELOW_SINGULARITY:
            advice = (
                f"Start the reverse process lower with --max_timestep {BELOW_SINGULARITY}. {advice}"
            )
        return advice

    def statistics(self, reduce=None):
        """Mean training loss by quarter of the timesteps since the last call: name -> float."""
        if self.quarters is None:
            return {}
        sums = self.quarters if reduce is None else reduce(self.quarters)
        (sums, counts), self.quarters = sums.tolist(), None
        size = self.train_diffusion.num_steps // QUARTERS
        return {
            f"loss_{_range(q, size)}": sums[q] / counts[q] for q in range(QUARTERS) if counts[q]
        }

    def _count_quarters(self, losses, t):
        if self.quarters is None:  # on the device, so that no step waits for it
            self.quarters = torch.zeros(2, QUARTERS, device=losses.device)
        quarter = (t * QUARTERS // self.train_diffusion.num_steps).flatten()
        self.quarters[0].index_add_(0, quarter, losses.flatten())
        self.quarters[1].index_add_(0, quarter, torch.ones_like(losses).flatten())


def _range(q, size):
    """The timesteps of a quarter, in names."""
    return f"t{q * size}-{(q + 1) * size - 1}"


def key_of(solver, steps):
    """(key, ReverseSteps) as of `Diffused.plan`. solver: its name."""
    return (solver, tuple(step.timestep for step in steps)), steps


class DiffLoss(Diffused, Head):
    """The head of a model of continuous tokens.

    target_channels: channels of a token. z_channels: width of z. depth, width: size of the
    denoising MLP. diffusion_batch_mul: timesteps drawn per token in training (4 in the paper).
    num_sampling_steps, vlb, max_timestep, timesteps, loss_weight: see `Diffused.start_diffusion`.
    """

    aliases = {"diffloss_d": "depth", "diffloss_w": "width"}

    def __init__(
        self,
        target_channels,
        z_channels,
        depth,
        width,
        num_sampling_steps="100",
        grad_checkpointing=False,
        diffusion_batch_mul=1,
        vlb=True,
        max_timestep=None,
        timesteps=None,
        loss_weight="none",
    ):
        super().__init__()
        self.in_channels = target_channels
        self.net = DenoisingMLP(target_channels, width, z_channels, depth, grad_checkpointing)
        self.diffusion_batch_mul = diffusion_batch_mul
        self.start_diffusion(num_sampling_steps, vlb, max_timestep, timesteps, loss_weight)
        self.fast = FastSampler()

    def forward(self, target, z, mask=None, generator=None):
        """The mean loss (eq. 1): target (..., C), z (..., D), mask (...), 1 = included."""
        rows = (self.diffusion_batch_mul, *target.shape[:-1])
        t = self.draw_timesteps(rows, generator, target.device)
        losses = self.losses(lambda x, t: self.net(x, t, z), target, t, generator).mean(0)
        return masked_mean(losses, mask)

    def held_out_losses(self, target, z, generators):
        """See Head and `quarter_losses`."""
        return self.quarter_losses(
            lambda x, t: self.net(x, t, z), target, generators, target.shape[1]
        )

    def sampler(self, sampling, guide=None):
        """See Head. draw also takes noise (steps + 1, ..., C): the start and a draw per step."""
        steps_at, draws = self.plan(sampling)
        denoise = self.fast.start(self.net, guide and guide.net)

        @torch.no_grad()
        def draw(z, cfg=1.0, z_uncond=None, generator=None, done=0.0, noise=None):
            shape = (*z.shape[:-1], self.in_channels)
            if noise is None:
                noise = self.draw_noise(shape, generator, z.device, draws)
            noise = self.scale_start(noise.reshape(len(noise), -1, self.in_channels), sampling)
            rows = [x if x is None else x.flatten(0, -2) for x in (z, z_uncond)]
            key, steps = steps_at(done)
            return denoise(key, steps, *rows, noise, cfg, sampling.temperature).view(shape)

        return draw

    def sample(
        self,
        z,
        temperature=1.0,
        cfg=1.0,
        z_uncond=None,
        generator=None,
        max_timestep=None,
        noise=None,
    ):
        """Tokens (..., C) drawn from p(token | z) for z (..., D).

        With cfg ≠ 1, z_uncond (..., D) is the unconditional z; without it, z holds both, the
        conditional half first, and the result is repeated for both (the published form).
        noise: (steps + 1, ..., C), the start and one draw per step; drawn from `generator` if not
        given. Raises ValueError for a negative temperature.
        """
        stacked = cfg != 1.0 and z_uncond is None
        if stacked:
            z, z_uncond = z.chunk(2)
        draw = self.sampler(Sampling(temperature=temperature, max_timestep=max_timestep))
        x = draw(z, cfg, z_uncond, generator, noise=noise)
        return torch.cat([x, x]) if stacked else x

    def to_compile(self):
        """See Head."""
        return [self.net]

    def to_shard(self):
        """See Head."""
        return list(self.net.res_blocks)


class DenoisingMLP(nn.Module):
    """ε_θ(x | t, z) and the variance interpolation v: residual MLP blocks conditioned by AdaLN.

    out_channels: those of the output, if they are not 2C.
    """

    def __init__(
        self, in_channels, width, z_channels, depth, grad_checkpointing=False, out_channels=None
    ):
        super().__init__()
        self.grad_checkpointing = grad_checkpointing
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = nn.Linear(z_channels, width)
        self.input_proj = nn.Linear(in_channels, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, out_channels or 2 * in_channels)
        initialize_mlp(self)
        for i in (0, 2):
            nn.init.normal_(self.time_embed.mlp[i].weight, std=0.02)
        speed_up(self)

    def forward(self, x, t, z):
        """x (..., C), t (...), z (..., D), broadcast against each other, give (..., 2C), or as many
        as `out_channels` says."""
        y = self.time_embed(t) + self.cond_embed(z.to(self.cond_embed.weight.dtype))
        y = F.silu(y)  # with which every AdaLN begins
        x = self.input_proj(x.to(self.input_proj.weight.dtype))
        for block in self.res_blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, y, use_reentrant=False)
            else:
                x = block(x, y)
        return self.final_layer(x, y)


def initialize_mlp(net):
    """Xavier-uniform weights; every block starts as the identity, and the network gives zero."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for layer in (*net.res_blocks, net.final_layer):
        nn.init.zeros_(layer.adaLN_modulation[1].weight)
    nn.init.zeros_(net.final_layer.linear.weight)


class TimestepEmbedder(nn.Module):
    """Sinusoidal embedding of a timestep, then an MLP: (...) gives (..., width)."""

    def __init__(self, width, frequencies=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.half = frequencies // 2

    def forward(self, t):
        return of_distinct(self.embed, t)

    def embed(self, t):
        """`forward`, of each of the timesteps."""
        # computed here in float32, so that a model cast to another dtype keeps its frequencies
        rates = torch.arange(self.half, device=t.device) * (-math.log(10000) / self.half)
        angles = t.unsqueeze(-1) * rates.exp()
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class ResBlock(nn.Module):
    """x + gate(y)·MLP(LN(x)·(1 + scale(y)) + shift(y)), given SiLU(y)."""

    def __init__(self, width):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation[1](y).chunk(3, dim=-1)
        return x + gate * self.mlp(modulate(self.in_ln(x), shift, scale))


class FinalLayer(nn.Module):
    """LayerNorm without parameters, AdaLN and a linear layer, given SiLU(y)."""

    def __init__(self, width, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, y):
        shift, scale = self.adaLN_modulation[1](y).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def modulate(x, shift, scale):
    return x * (1 + scale) + shift
