"""Gaussian diffusion of single tokens. `create_diffusion` is the door."""

from diffusion.gaussian import GaussianDiffusion
from diffusion.schedule import cosine_betas

SCHEDULES = {"cosine": cosine_betas}


def create_diffusion(timestep_respacing="", noise_schedule="cosine", highest=None, log_snr=False):
    """A diffusion with learned-range variance that predicts noise.

    timestep_respacing: "" keeps every step (training), else as in
    `diffusion.schedule.spaced_timesteps`. highest, log_snr: see `GaussianDiffusion`. Raises
    ValueError for an unknown schedule or spacing.
    """
    if noise_schedule not in SCHEDULES:
        raise ValueError(
            f"noise_schedule {noise_schedule!r}: expected one of {', '.join(SCHEDULES)}"
        )
    return GaussianDiffusion(SCHEDULES[noise_schedule](), timestep_respacing, highest, log_snr)
