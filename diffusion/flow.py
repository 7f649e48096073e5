"""Rectified flow: straight paths from data to noise (Liu et al. 2022, Lipman et al. 2023).

    x_t = (1 − t)·x_0 + t·ε,    dx_t/dt = ε − x_0,    0 ≤ t ≤ 1

The network predicts this velocity from x_t; sampling follows it from noise at t = 1 to t = 0. A new
solver is a function (t, after) that returns the ReverseSteps from t to an earlier time, and a row
of FLOW_SOLVERS.
"""

from itertools import pairwise

from diffusion.schedule import TRAIN_STEPS
from diffusion.solvers import ReverseStep
from util.table import Table


class RectifiedFlow:
    """Training of a flow. Its time is that of one of `num_steps` steps: step i is at (i + 1)/T.

    The network gets T·t, so that its embedding is the one of a diffusion's timesteps.
    """

    num_steps = TRAIN_STEPS

    def training_losses(self, network, x_start, t, noise):
        """Loss of each row: x_start and noise (..., C), steps t (...) give a dict of tensors (...).

        `mse`, which is the `loss`, is the mean over channels of (ε − x_0 − u)². network: a function
        (x, T·t) that gives the velocity u (..., C).
        """
        x_start, noise, timesteps = x_start.float(), noise.float(), t + 1.0
        time = (timesteps / self.num_steps).unsqueeze(-1)
        velocity = network((1 - time) * x_start + time * noise, timesteps).float()
        mse = (noise - x_start - velocity).square().mean(-1)
        return {"mse": mse, "loss": mse}

    def log_snr(self, device=None):
        """log((1 − t)²/t²) of each step: (T,)."""
        import torch  # not needed to parse flags

        times = torch.arange(1, self.num_steps + 1, device=device) / self.num_steps
        return 2 * (1 - times).logit()


def euler(t, after):
    """x ← x − (t − after)·u(x, t)."""
    return (_step(t, from_noise=t - after),)


def heun(t, after):
    """Euler's step with the mean of the velocities at its two ends, of which it is the predictor:
    of second order, with two evaluations."""
    half = (t - after) / 2
    # the predictor hands on x − half·u(x, t), which takes the place of x_0'
    predictor = _step(t, from_noise=2 * half, start_from_x=1.0, start_from_noise=half)
    return predictor, _step(after, from_noise=half, from_x=0.0, from_previous=1.0)


def _step(t, from_x=1.0, **numbers):
    return ReverseStep(TRAIN_STEPS * t, index=0, from_x=from_x, **numbers)


FLOW_SOLVERS = Table("solver", {"euler": euler, "heun": heun})


def flow_steps(solver, count):
    """The ReverseSteps from t = 1 to 0 in `count` even steps, a tuple.

    solver: a row of FLOW_SOLVERS. count: "25", or 25. Raises ValueError for any other spacing.
    """
    if not str(count).isdigit() or int(count) < 1:
        raise ValueError(f"diffusion steps {count!r}: a flow takes even steps, expected a count")
    times = [1 - i / int(count) for i in range(int(count))] + [0.0]
    return tuple(step for pair in pairwise(times) for step in solver(*pair))
