"""Which timesteps are drawn in training, and how much the loss of each counts.

The rows of TIMESTEPS and LOSS_WEIGHTS in models/settings.py. `diffusion` is the process that is
trained: a GaussianDiffusion or a RectifiedFlow, with `num_steps` and `log_snr(device)`.
"""

import torch

from util.rng import rand, randn

SNR_LIMIT = 5.0  # γ of Hang et al. 2023
LOG_SNR_LIMIT = 10.0  # beyond, x_t is nearly data or nearly noise: the last step alone takes 7


def uniform(diffusion, shape, generator=None, device=None):
    """Timesteps of this shape, all equally often."""
    return _floor(rand(shape, generator, device), diffusion.num_steps)


def logit_normal(diffusion, shape, generator=None, device=None):
    """The middle of the process more often: sigmoids of normal numbers (Esser et al. 2024, eq. 19,
    with mean 0 and standard deviation 1)."""
    return _floor(randn(shape, generator, device).sigmoid(), diffusion.num_steps)


def log_snr(diffusion, shape, generator=None, device=None):
    """Timesteps at which log(α²/σ²) is even from −10 to 10."""
    wanted = LOG_SNR_LIMIT * (2 * rand(shape, generator, device) - 1)
    levels = -diffusion.log_snr(device)  # ascending
    return torch.searchsorted(levels, wanted).clamp(max=diffusion.num_steps - 1)


def unweighted(diffusion, t):
    """None: every timestep counts the same (paper, eq. 1)."""


def min_snr(diffusion, t):
    """min(SNR, γ) / SNR of timesteps t (...): for a network that predicts ε, it limits the weight
    of little noise in terms of x_0 (Hang et al. 2023, section 3.4)."""
    snr = diffusion.log_snr(t.device)[t].exp()
    return snr.clamp(max=SNR_LIMIT) / snr


def _floor(fractions, count):
    return (fractions * count).long().clamp(max=count - 1)
