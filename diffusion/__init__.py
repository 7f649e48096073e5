"""Gaussian diffusion of single tokens. `create_diffusion` is the entry point."""

from util.table import Table

SCHEDULES = Table("noise_schedule", {"cosine": "diffusion.gaussian:cosine_betas"})


def create_diffusion(timestep_respacing="", noise_schedule="cosine", highest=None, log_snr=False):
    """A GaussianDiffusion with learned-range variance whose network predicts the noise.

    timestep_respacing: "" uses every step (training), else as in
    `diffusion.schedule.spaced_timesteps`. highest, log_snr: see `GaussianDiffusion`. Raises
    ValueError for an unknown schedule or spacing.
    """
    from diffusion.gaussian import GaussianDiffusion  # torch is not needed to parse flags

    return GaussianDiffusion(SCHEDULES[noise_schedule](), timestep_respacing, highest, log_snr)
