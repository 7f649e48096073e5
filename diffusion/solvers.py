"""Reverse processes in closed form: what each step does to x, as numbers of the host.

`ddpm` is the ancestral sampling of the paper. `ddim` (Song et al. 2021, η = 0) and `dpm++` (Lu et
al. 2022, DPM-Solver++(2M)) solve the same process without noise, in fewer steps; they go by x_0 as
the network sees it, whose error is multiplied by 1/sqrt(ᾱ), so start them below t = 999. `dpm++`
wants timesteps at even steps of the log signal-to-noise ratio.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ReverseStep:
    """One step of a reverse process.

    x ← from_x·x − from_noise·ε + from_previous·x_0' + τ·exp(log_deviation + v·log_deviation_v)·δ,
    the last term only if `random`. x_0' = start_from_x·x − start_from_noise·ε of the step before.
    `timestep` is what the network is told, `index` which of the draws δ is.
    """

    timestep: int
    index: int
    from_x: float
    from_noise: float
    random: bool = False
    log_deviation: float = 0.0
    log_deviation_v: float = 0.0
    from_previous: float = 0.0
    start_from_x: float = 0.0
    start_from_noise: float = 0.0

    def start(self, x, predicted):
        """x_0 as it looks from x and ε, for the step after; None where that does not use it."""
        if self.start_from_x:
            return self.start_from_x * x - self.start_from_noise * predicted
        return None

    def __call__(self, x, predicted, v, noise=None, temperature=1.0, previous=None):
        """x, ε, v and δ, each (..., C), to the next x, in float32. noise: not needed at τ = 0.

        previous: what `start` of the step before gave.
        """
        result = self.from_x * x - self.from_noise * predicted
        if self.from_previous:
            result = result + self.from_previous * previous
        if not self.random or temperature == 0:
            return result
        return result + temperature * (self.log_deviation + self.log_deviation_v * v).exp() * noise


def ancestral(diffusion, i, first=False):
    """From x_i to x_{i−1} with noise, x_i being the diffusion's kept timestep i."""
    log_high = diffusion.betas[i].log().item()
    log_low = diffusion.posterior_log_variance_clipped[i].item()
    return ReverseStep(
        timestep=int(diffusion.timesteps[i]),
        index=i,
        from_x=diffusion.mean_from_x[i].item(),
        from_noise=diffusion.mean_from_noise[i].item(),
        random=i > 0,
        # half of log σ² for v in [−1, 1] (Nichol and Dhariwal 2021, eq. 15)
        log_deviation=(log_low + log_high) / 4,
        log_deviation_v=(log_high - log_low) / 4,
    )


def ddim(diffusion, i, first=False):
    """The same without noise: x_0 and ε of x_i, put together again at the timestep before."""
    alpha, sigma = _level(diffusion, i)
    next_alpha, next_sigma = _level(diffusion, i - 1)
    return ReverseStep(
        timestep=int(diffusion.timesteps[i]),
        index=i,
        from_x=next_alpha / alpha,
        from_noise=next_alpha * sigma / alpha - next_sigma,
    )


def multistep(diffusion, i, first):
    """With x_0 extrapolated from this step and the one before; the first and last are DDIM's."""
    alpha, sigma = _level(diffusion, i)
    next_alpha, next_sigma = _level(diffusion, i - 1)
    share = 0.0
    decay = 0.0  # exp(−h), h the step in log(α/σ); its last step is infinite
    if i > 0:
        decay = (alpha * next_sigma) / (sigma * next_alpha)
    if i > 0 and not first:
        last_alpha, last_sigma = _level(diffusion, i + 1)
        ratio = math.log((alpha * last_sigma) / (sigma * last_alpha)) / -math.log(decay)
        share = 1 / (2 * ratio)
    previous = -next_alpha * (1 - decay) * share
    of_start = next_alpha * (1 - decay) * (1 + share)
    return ReverseStep(
        timestep=int(diffusion.timesteps[i]),
        index=i,
        from_x=next_sigma / sigma + of_start / alpha,
        from_noise=of_start * sigma / alpha,
        from_previous=previous,
        start_from_x=1 / alpha,
        start_from_noise=sigma / alpha,
    )


def _level(diffusion, i):
    """sqrt(ᾱ) and sqrt(1 − ᾱ) at kept timestep i; −1 is x_0 itself."""
    if i < 0:
        return 1.0, 0.0
    alpha = diffusion.alphas_cumprod[i].item()
    return math.sqrt(alpha), math.sqrt(1 - alpha)


SOLVERS = {"ddpm": ancestral, "ddim": ddim, "dpm++": multistep}
