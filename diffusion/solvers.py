"""Solvers of the reverse process, whose steps consist of a few plain numbers, and the loop.

The paper samples a token by the ancestral steps of section 3.2, here `ddpm`:

    x_{t−1} = (1/√α_t)·(x_t − (1 − α_t)/√(1 − ᾱ_t)·ε_θ(x_t | t, z)) + τ·σ_t·δ

`ddim` (Song et al. 2021, η = 0) and `dpm++` (Lu et al. 2022, DPM-Solver++(2M)) solve the same
process without noise, in fewer steps. A new solver is a function (diffusion, i, first) that returns
the ReverseStep from x_i to x_{i−1}, and a row of SOLVERS.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from util.table import Table

# Sampling may start here instead of at t = 999, where the first step divides by √ᾱ: 1/√ᾱ is 20,291
# at 999, 34 at 980 and 13 here, and multiplies any error of the network. A small or briefly trained
# model then diverges, and so does a solver that uses the predicted x_0.
BELOW_SINGULARITY = 950


@dataclass(frozen=True)
class ReverseStep:
    """One step of a reverse process, from x at `timestep` to the next x.

    x ← from_x·x − from_noise·ε + from_previous·x_0' + τ·exp(log_std + v·log_std_v)·δ, the last term
    only if `random`. x_0' = start_from_x·x − start_from_noise·ε is from the previous step. `index`
    is the index of its draw δ.
    """

    timestep: float
    index: int
    from_x: float
    from_noise: float
    random: bool = False
    log_std: float = 0.0
    log_std_v: float = 0.0
    from_previous: float = 0.0
    start_from_x: float = 0.0
    start_from_noise: float = 0.0

    def start(self, x, predicted):
        """The x_0 predicted from x and ε, for the next step; None if that does not use it."""
        if self.start_from_x:
            return self.start_from_x * x - self.start_from_noise * predicted
        return None

    def __call__(self, x, predicted, v, noise=None, temperature=1.0, previous=None):
        """The next x, in float32, from x, ε, v and δ, each (..., C).

        noise: δ, not needed at temperature 0. previous: the result of `start` of the previous step.
        """
        result = self.from_x * x - self.from_noise * predicted
        if self.from_previous:
            result = result + self.from_previous * previous
        if not self.random or temperature == 0:
            return result
        return result + temperature * (self.log_std + self.log_std_v * v).exp() * noise


def reverse(steps, predict, x, noise=None, temperature=1.0):
    """The reverse process: from x (..., C), standard normal, to x_0.

    steps: ReverseSteps in execution order. predict(x, step): the network's noise ε and variance
    interpolation v, each (..., C), float32. noise: (n, ..., C), of which a step uses row `index`;
    not needed at temperature 0 or by steps that draw none.
    """
    previous = None
    for step in steps:
        predicted, v = predict(x, step)
        drawn = noise[step.index] if step.random and temperature else None
        before, x = x, step(x, predicted, v, drawn, temperature, previous)
        previous = step.start(before, predicted)
    return x


def ancestral(diffusion, i, first):
    """The step from x_i to x_{i−1} with noise: the posterior mean and the learned variance."""
    log_high = diffusion.betas[i].log().item()
    log_low = diffusion.posterior_log_variance_clipped[i].item()
    return ReverseStep(
        timestep=int(diffusion.timesteps[i]),
        index=i,
        from_x=diffusion.mean_from_x[i].item(),
        from_noise=diffusion.mean_from_noise[i].item(),
        random=i > 0,
        # half of log σ² for v in [−1, 1] (Nichol and Dhariwal 2021, eq. 15)
        log_std=(log_low + log_high) / 4,
        log_std_v=(log_high - log_low) / 4,
    )


def ddim(diffusion, i, first):
    """The step without noise: x_0 and ε of x_i, recombined at the previous timestep."""
    alpha, sigma = _level(diffusion, i)
    next_alpha, next_sigma = _level(diffusion, i - 1)
    return ReverseStep(
        timestep=int(diffusion.timesteps[i]),
        index=i,
        from_x=next_alpha / alpha,
        from_noise=next_alpha * sigma / alpha - next_sigma,
    )


def multistep(diffusion, i, first):
    """The step with x_0 extrapolated from it and the previous one; DDIM at both ends."""
    alpha, sigma = _level(diffusion, i)
    next_alpha, next_sigma = _level(diffusion, i - 1)
    weight = 0.0
    decay = 0.0  # exp(−h), h the step in log(α/σ); the last step's h is infinite
    if i > 0:
        decay = (alpha * next_sigma) / (sigma * next_alpha)
    if i > 0 and not first:
        last_alpha, last_sigma = _level(diffusion, i + 1)
        ratio = math.log((alpha * last_sigma) / (sigma * last_alpha)) / -math.log(decay)
        weight = 1 / (2 * ratio)
    of_start = next_alpha * (1 - decay) * (1 + weight)
    return ReverseStep(
        timestep=int(diffusion.timesteps[i]),
        index=i,
        from_x=next_sigma / sigma + of_start / alpha,
        from_noise=of_start * sigma / alpha,
        from_previous=-next_alpha * (1 - decay) * weight,
        start_from_x=1 / alpha,
        start_from_noise=sigma / alpha,
    )


def _level(diffusion, i):
    """√ᾱ and √(1 − ᾱ) at step i; −1 stands for x_0."""
    if i < 0:
        return 1.0, 0.0
    alpha = diffusion.alphas_cumprod[i].item()
    return math.sqrt(alpha), math.sqrt(1 - alpha)


@dataclass(frozen=True)
class Solver:
    """A row of SOLVERS.

    step: the function described at the top of this file. draws_noise: whether its steps draw noise;
    if not, the temperature scales the start instead. log_snr: whether its timesteps are evenly
    spaced in the log signal-to-noise ratio. start: default first timestep; None is the end of the
    process.
    """

    step: Callable
    draws_noise: bool = False
    log_snr: bool = False
    start: int | None = BELOW_SINGULARITY


SOLVERS = Table(
    "solver",
    {
        "ddpm": Solver(ancestral, draws_noise=True, start=None),
        "ddim": Solver(ddim),
        "dpm++": Solver(multistep, log_snr=True),
    },
)
