"""Diffusion Loss: a small denoising MLP that models p(token | z) (paper, sections 3.2 and 3.3)."""

import math
from contextlib import nullcontext
from functools import cache, partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffusion import create_diffusion
from diffusion.schedule import annealing
from models.denoiser import Denoiser, guided
from models.linear import speed_up
from util.graphs import Graphs, padded
from util.precision import full_precision
from util.rng import rand, randn

QUARTERS = 4
BELOW_SINGULARITY = 950  # 1/sqrt(ᾱ) is 13 there, 20,291 at 999


class Diffused(nn.Module):
    """What is trained by a diffusion and sampled by its reverse process.

    num_sampling_steps: of the reverse process, as in `diffusion.schedule.spaced_timesteps`. vlb:
    whether the loss has the variational term. max_timestep: where sampling starts unless told
    otherwise; None is the very end of the process.
    """

    def start_diffusion(self, num_sampling_steps, vlb, max_timestep):
        self.train_diffusion = create_diffusion()
        self.vlb = vlb
        self.max_timestep = max_timestep
        self.respace(num_sampling_steps)
        self.quarters = None  # sums and counts of the loss by quarter of the timesteps, (2, 4)

    def respace(self, num_sampling_steps):
        """Sample with these diffusion steps from now on. Raises ValueError if they do not fit."""
        self.spacing = num_sampling_steps
        self.gen_diffusion = create_diffusion(num_sampling_steps)
        self.gen_diffusion.first_step(self.max_timestep)

    def losses(self, network, target, t, generator=None):
        """Loss of each row: target (..., C), broadcast to timesteps t (...), gives (...)."""
        noise = randn((*t.shape, target.shape[-1]), generator, target.device)
        losses = self.train_diffusion.training_losses(network, target, t, noise, self.vlb)["loss"]
        if self.training:
            self._count_quarters(losses.detach(), t)
        return losses

    def draw_timesteps(self, shape, generator, device):
        """Uniform timesteps of this shape."""
        steps = self.train_diffusion.num_steps
        return (rand(shape, generator, device) * steps).long().clamp(max=steps - 1)

    def draw_noise(self, shape, generator, device, steps=None):
        """For rows (N, ..., C) the start of the reverse process and a draw for each step of it:
        (steps + 1, N, ..., C)."""
        steps = self.gen_diffusion.num_steps if steps is None else steps
        shape = (shape[0], steps + 1, *shape[1:])
        return randn(shape, generator, device).movedim(1, 0)

    def denoise(self, network, noise, temperature=1.0, max_timestep=None):
        """The reverse process from noise (steps + 1, ..., C) to rows (..., C).

        Raises ValueError for a negative temperature.
        """
        if temperature < 0:
            raise ValueError(f"temperature {temperature}: expected 0 or more")
        start = self.max_timestep if max_timestep is None else max_timestep
        careful = without_autocast_at_first(network)
        return self.gen_diffusion.p_sample_loop(careful, noise[0], noise[1:], temperature, start)

    def pop_statistics(self, reduce=lambda sums: sums):
        """Mean training loss by quarter of the timesteps since the last call: name -> float.

        reduce: adds up a tensor over processes.
        """
        if self.quarters is None:
            return {}
        (sums, counts), self.quarters = reduce(self.quarters).tolist(), None
        size = self.train_diffusion.num_steps // QUARTERS
        return {
            f"loss_t{q * size}-{(q + 1) * size - 1}": sums[q] / counts[q]
            for q in range(QUARTERS)
            if counts[q]
        }

    def _count_quarters(self, losses, t):
        if self.quarters is None:  # a plain tensor, on the device: nothing waits for it
            self.quarters = torch.zeros(2, QUARTERS, device=losses.device)
        quarter = (t * QUARTERS // self.train_diffusion.num_steps).flatten()
        self.quarters[0].index_add_(0, quarter, losses.flatten())
        self.quarters[1].index_add_(0, quarter, torch.ones_like(losses).flatten())


class DiffLoss(Diffused):
    """The head of a model of continuous tokens: `forward` is its loss, `sample` its sampler.

    target_channels: of a token. z_channels: of the vector z that the backbone gives for it. depth,
    width: of the denoising MLP. diffusion_batch_mul: timesteps drawn for each token in training (4
    in the paper). num_sampling_steps, vlb, max_timestep: see `Diffused`.
    """

    discrete = False

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
    ):
        super().__init__()
        self.in_channels = target_channels
        self.net = DenoisingMLP(target_channels, width, z_channels, depth, grad_checkpointing)
        self.diffusion_batch_mul = diffusion_batch_mul
        self.start_diffusion(num_sampling_steps, vlb, max_timestep)
        self.graphs, self.arranged = Graphs(), None

    def forward(self, target, z, mask=None, generator=None):
        """Mean loss over tokens: target (..., C), z (..., D), mask (...) with 1 = counts."""
        rows = (self.diffusion_batch_mul, *target.shape[:-1])
        t = self.draw_timesteps(rows, generator, target.device)
        losses = self.losses(lambda x, t: self.net(x, t, z), target, t, generator).mean(0)
        return losses.mean() if mask is None else (losses * mask).sum() / mask.sum()

    @torch.no_grad()
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
        conditional half first, and so does the result, twice the same (the published form).
        noise: (steps + 1, ..., C), the start and one draw a step; drawn from `generator` if not
        given. Raises ValueError for a negative temperature.
        """
        stacked = cfg != 1.0 and z_uncond is None
        if stacked:
            z, z_uncond = z.chunk(2)
        draw = self.start_sampling(temperature, max_timestep)
        x = draw(z, cfg, z_uncond, generator, noise=noise)
        return torch.cat([x, x]) if stacked else x

    def start_sampling(self, temperature=1.0, max_timestep=None, solver="ddpm", anneal=None):
        """`sample` for many z of the same weights, which are arranged once.

        Returns draw(z, cfg=1.0, z_uncond=None, generator=None, progress=0.0, noise=None), whose
        progress is the share of the autoregressive steps that are done. solver: one of
        `diffusion.solvers.SOLVERS`; the temperature of those without noise scales the start.
        anneal: fewer diffusion steps with the progress, see `diffusion.schedule.annealing`. With
        either of them the process begins at max_timestep, by default at 950. Raises ValueError.
        """
        if temperature < 0:
            raise ValueError(f"temperature {temperature}: expected 0 or more")
        start = self.max_timestep if max_timestep is None else max_timestep
        plan, most = self._plan(start, solver, anneal)
        weight = self.net.input_proj.weight
        kind = weight.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else weight.dtype
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            denoiser = self._arrange(dtype)
        times = {}

        @torch.no_grad()
        def draw(z, cfg=1.0, z_uncond=None, generator=None, progress=0.0, noise=None):
            if noise is None:
                shape = (*z.shape[:-1], self.in_channels)
                noise = self.draw_noise(shape, generator, z.device, most)
            noise = noise.reshape(len(noise), -1, self.in_channels)
            both = [z.flatten(0, -2)] if cfg == 1.0 else [z.flatten(0, -2), z_uncond.flatten(0, -2)]
            with torch.autocast(kind, enabled=False):
                name, steps = plan(progress)
                if name not in times:
                    times[name] = denoiser.embed_times(steps)
                if solver != "ddpm":
                    noise = torch.cat([noise[:1] * temperature, noise[1:]])
                run = partial(denoiser.run, steps, temperature=temperature)
                x = self._denoise((name, temperature), run, times[name], both, noise, cfg)
            return x.view(*z.shape[:-1], self.in_channels)

        return draw

    def _plan(self, start, solver, anneal):
        """(a name and the steps of the reverse process, as a function of the progress; the most
        steps there are)."""
        if solver == "ddpm" and not anneal:
            steps = self.gen_diffusion.steps(start)
            named = (solver, tuple(step.timestep for step in steps)), steps
            return (lambda progress: named), self.gen_diffusion.num_steps
        highest = BELOW_SINGULARITY if start is None else start
        count = annealing(anneal) if anneal else lambda progress: self.spacing

        @cache
        def named(spacing):
            log_snr = solver == "dpm++"
            diffusion = create_diffusion(spacing, highest=highest, log_snr=log_snr)
            return (solver, tuple(diffusion.timesteps.tolist())), diffusion.steps(solver=solver)

        _, first = named(count(0.0))  # refuses what does not fit at once
        most = len(first) if first[0].random else 0  # the others draw their start alone
        return (lambda progress: named(count(progress))), most

    def _denoise(self, name, run, times, both, noise, cfg):
        """Tokens (R, C) for z of one stream or both, each (R, D), from noise (S + 1, R, C).

        run: of a Denoiser, whose steps `name` tells from others.
        """
        rows = noise.shape[1]
        inputs = [times, torch.cat(both), noise]
        if self.graphs.usable(noise.device):
            more = padded(rows) - rows
            z = torch.cat([F.pad(z, (0, 0, 0, more)) for z in both])
            inputs = [times, z, F.pad(noise, (0, 0, 0, more))]
        if len(both) > 1:
            inputs.append(torch.full((), cfg, device=noise.device))
        key = name, torch.get_float32_matmul_precision()
        return self.graphs(key, run, *inputs)[:rows]

    def _arrange(self, dtype):
        """The weights as they are now, in this type, where recordings of them can be replayed."""
        weight, fresh = self.net.input_proj.weight, Denoiser(self.net, dtype)
        if not self.graphs.usable(weight.device):
            return fresh
        # recordings read the weights where they were
        places = (dtype, *(p.data_ptr() for p in self.net.parameters()))
        if self.arranged and self.arranged[0] == places:
            self.arranged[1].take_over(fresh)
        else:
            self.arranged, self.graphs = (places, fresh), Graphs()
        return self.arranged[1]


class DenoisingMLP(nn.Module):
    """ε_θ(x | t, z) and the variance's v: residual MLP blocks, conditioned by AdaLN."""

    def __init__(self, in_channels, width, z_channels, depth, grad_checkpointing=False):
        super().__init__()
        self.grad_checkpointing = grad_checkpointing
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = nn.Linear(z_channels, width)
        self.input_proj = nn.Linear(in_channels, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * in_channels)
        self._initialize()
        speed_up(self)

    def forward(self, x, t, z):
        """x (..., C), t (...), z (..., D), broadcast against each other, give (..., 2C)."""
        y = self.time_embed(t) + self.cond_embed(z.to(self.cond_embed.weight.dtype))
        x = self.input_proj(x.to(self.input_proj.weight.dtype))
        for block in self.res_blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, y, use_reentrant=False)
            else:
                x = block(x, y)
        return self.final_layer(x, y)

    def with_cfg(self, x, t, z, z_uncond, cfg):
        """The guided noise ε_u + ω(ε_c − ε_u) (paper, appendix B); v is the conditional one's."""
        both = self(torch.cat([x, x]), torch.cat([t, t]), torch.cat([z, z_uncond]))
        return torch.cat(guided(both, cfg), dim=-1)

    def _initialize(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for i in (0, 2):
            nn.init.normal_(self.time_embed.mlp[i].weight, std=0.02)
        # every block starts as the identity, and the network predicts zero
        for layer in (*self.res_blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)


class TimestepEmbedder(nn.Module):
    """Sinusoidal embedding of a timestep, then an MLP: (...) gives (..., width)."""

    def __init__(self, width, frequencies=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.half = frequencies // 2

    def forward(self, t):
        # made here in float32, so that a model cast to another type keeps its frequencies
        rates = torch.arange(self.half, device=t.device) * (-math.log(10000) / self.half)
        angles = t.unsqueeze(-1) * rates.exp()
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class ResBlock(nn.Module):
    """x + gate(y)·MLP(LN(x)·(1 + scale(y)) + shift(y))."""

    def __init__(self, width):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(modulate(self.in_ln(x), shift, scale))


class FinalLayer(nn.Module):
    """LayerNorm without parameters, AdaLN, linear."""

    def __init__(self, width, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, y):
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def without_autocast_at_first(network):
    """A network(x, t) whose first call is in the precision of its weights.

    The first reverse step magnifies the network's error, 316 times from t = 999 in 100 steps, every
    later one at most 1.6 times.
    """
    calls = 0

    def careful(x, t):
        nonlocal calls
        calls += 1
        with full_precision(x.device.type) if calls == 1 else nullcontext():
            return network(x, t)

    return careful


def modulate(x, shift, scale):
    return x * (1 + scale) + shift
