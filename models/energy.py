"""An energy score as head: one evaluation of a small MLP draws a token.

The energy score of a distribution P at x is E‖X − x‖^β − ½E‖X − X'‖^β with X, X' ~ P independent,
0 < β < 2. Its mean over x is smallest if P is the distribution of x, and only then: a strictly
proper scoring rule (Gneiting and Raftery 2007, section 4.3), for which samples of P suffice.
Network, noise and guidance as in EAR (Shao et al. 2025, arXiv 2505.07812).
"""

import torch
from torch import nn
from torch.nn import functional as F

from models.diffloss import FinalLayer, ResBlock, initialize_mlp
from models.fast.linear import speed_up
from models.heads import Head, check_no_diffusion, masked_mean
from models.layers import run_block
from util.rng import rand

NOISE = 64  # numbers of noise per token, uniform from −½ to ½


class Energy(Head):
    """The head of a model of continuous tokens.

    depth, width: size of the MLP. diffusion_batch_mul: samples per token in training, at least 2.
    energy_beta: the power β of distances.
    """

    without_effect = ("num_sampling_steps", "max_timestep", "solver", "anneal")
    aliases = {"diffloss_d": "depth", "diffloss_w": "width"}

    def __init__(
        self,
        out_channels,
        z_channels,
        depth,
        width,
        grad_checkpointing=False,
        diffusion_batch_mul=1,
        energy_beta=1.0,
    ):
        super().__init__()
        if not 0 < energy_beta < 2:
            raise ValueError(f"energy_beta {energy_beta}: expected a number between 0 and 2")
        self.net = SamplingMLP(z_channels, width, out_channels, depth, grad_checkpointing)
        self.samples = max(2, diffusion_batch_mul)
        self.energy_beta = energy_beta
        self.sums = None  # of distances to the targets and between samples, and steps: (3,)

    def forward(self, target, z, mask=None, generator=None):
        """The mean energy score: target (..., C), z (..., D), mask (...), 1 = included."""
        noise = self.draw_noise((self.samples, *z.shape[:-1]), generator, z.device)
        samples = self.net(noise, z).float()
        to_target = self.distances(samples - target).mean(0)
        between = self.between(samples)
        if self.training:
            self._count(masked_mean(to_target, mask), masked_mean(between, mask))
        return masked_mean(to_target - between / 2, mask)

    def draw_noise(self, shape, generator, device):
        """Uniform noise of tokens of this shape: (*shape, 64)."""
        return rand((*shape, NOISE), generator, device) - 0.5

    def distances(self, differences):
        """‖d‖^β of differences d (..., C), with a gradient of 0 at 0."""
        return (differences.square().sum(-1) + 1e-12).pow(self.energy_beta / 2)

    def between(self, samples):
        """The mean ‖X − X'‖^β over all pairs of samples (m, ..., C)."""
        i, j = torch.triu_indices(len(samples), len(samples), 1, device=samples.device)
        return self.distances(samples[i] - samples[j]).mean(0)

    def sampler(self, sampling, guide=None):
        """See Head. Temperature scales the noise. Guidance is that of z, z_u + ω(z_c − z_u); by
        a guide, whose z is another, that of the tokens which both draw from the same noise."""
        check_no_diffusion(self, sampling)

        @torch.no_grad()
        def draw(z, cfg=1.0, z_uncond=None, generator=None, done=0.0):
            noise = self.draw_noise(z.shape[:-1], generator, z.device) * sampling.temperature
            if guide and cfg != 1.0:
                weak = guide.net(noise, z_uncond).float()
                return weak + cfg * (self.net(noise, z).float() - weak)
            if cfg != 1.0:
                z = z_uncond.float() + cfg * (z.float() - z_uncond.float())
            return self.net(noise, z).float()

        return draw

    def statistics(self, reduce=None):
        """Mean distances of samples to targets and to one another: equal once all is learned."""
        if self.sums is None:
            return {}
        sums = self.sums if reduce is None else reduce(self.sums)
        (to_target, between, steps), self.sums = sums.tolist(), None
        return {"distance_to_target": to_target / steps, "distance_between": between / steps}

    def _count(self, to_target, between):
        values = torch.stack([to_target, between, torch.ones_like(between)]).detach()
        self.sums = values if self.sums is None else self.sums + values

    def to_compile(self):
        """See Head."""
        return [self.net]

    def to_shard(self):
        """See Head."""
        return list(self.net.res_blocks)


class SamplingMLP(nn.Module):
    """A token from z and noise: residual MLP blocks on z, conditioned on the noise by AdaLN."""

    def __init__(self, z_channels, width, out_channels, depth, grad_checkpointing=False):
        super().__init__()
        self.grad_checkpointing = grad_checkpointing
        self.noise_embed = nn.Linear(NOISE, width)
        self.input_proj = nn.Linear(z_channels, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, out_channels)
        initialize_mlp(self)
        speed_up(self)

    def forward(self, noise, z):
        """noise (..., 64) and z (..., D), broadcast against each other, give (..., C)."""
        y = F.silu(self.noise_embed(noise.to(self.noise_embed.weight.dtype)))
        x = self.input_proj(z.to(self.input_proj.weight.dtype))
        for block in self.res_blocks:
            x = run_block(block, self.grad_checkpointing, x, y)
        return self.final_layer(x, y)
