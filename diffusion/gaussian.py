"""The diffusion process of one token: noising, training loss, reverse process.

It knows nothing of sequences or images: it maps rows to rows, and the denoising network is a
function `network(x, t)` of noisy rows x (..., C) and their timesteps t (...), giving (..., 2C):
the predicted noise and the interpolation v between two log-variances. All arithmetic here is in
float32, whatever the precision of the network; the tables are computed in float64.
"""

import math

import torch

from diffusion.schedule import TRAIN_STEPS, spaced_timesteps
from diffusion.solvers import SOLVERS, reverse


def cosine_betas(steps=TRAIN_STEPS):
    """β_i of the cosine schedule (Nichol and Dhariwal 2021, eq. 17): (steps,), float64."""

    def alpha_bar(s):
        return math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps) for i in range(steps)]
    return torch.tensor(betas, dtype=torch.float64, device="cpu").clamp(max=0.999)


def even_log_snr(count, alphas_cumprod, highest):
    """`count` timesteps from `highest` to 0 at even steps of log(ᾱ/(1 − ᾱ)), ascending.

    For solvers of higher order (Lu et al. 2022). alphas_cumprod: (T,). Fewer if several steps fall
    on the same timestep.
    """
    log_snr = (alphas_cumprod / (1 - alphas_cumprod)).log()
    wanted = torch.linspace(0, 1, count, dtype=log_snr.dtype, device=log_snr.device)
    wanted = log_snr[highest] + (log_snr[0] - log_snr[highest]) * wanted
    return sorted({int((log_snr - value).abs().argmin()) for value in wanted})


class GaussianDiffusion:
    """A (possibly respaced) Gaussian diffusion with learned-range variance.

    betas: (T,), of the trained process. spacing: as in `spaced_timesteps`. highest: upper limit to
    which timesteps are clipped (None: no limit). log_snr: use equally many timesteps, but at even
    steps of the log signal-to-noise ratio. Step i of this object, 0 ≤ i < num_steps, is the trained
    process's timestep `timesteps[i]`. The tables below are those of the respaced process (Nichol
    and Dhariwal 2021, eq. 19), each (num_steps,), float64, on the CPU.
    """

    def __init__(self, betas, spacing="", highest=None, log_snr=False):
        kept = spaced_timesteps(spacing, len(betas))
        if highest is not None:
            kept = sorted({min(t, highest) for t in kept})
        # on the host, whatever torch's default device: each step reads plain numbers
        alphas_cumprod = torch.cumprod(1 - betas.double(), 0)
        if log_snr:
            kept = even_log_snr(len(kept), alphas_cumprod, kept[-1])
        self.timesteps = torch.tensor(kept, device="cpu")
        self.num_steps = len(self.timesteps)
        self.alphas_cumprod = alphas_cumprod[self.timesteps]
        previous = torch.cat(
            [torch.ones(1, dtype=torch.float64, device="cpu"), self.alphas_cumprod[:-1]]
        )
        self.betas = 1 - self.alphas_cumprod / previous
        # recomputed from the rounded betas, so that all tables describe the same process
        self.alphas_cumprod = torch.cumprod(1 - self.betas, 0)

        # q(x_{t-1} | x_t, x_0), Ho et al. 2020, eqs. 6 and 7
        alphas, unknown = 1 - self.betas, 1 - self.alphas_cumprod
        self.posterior_mean_coef1 = self.betas * previous.sqrt() / unknown
        self.posterior_mean_coef2 = (1 - previous) * alphas.sqrt() / unknown
        variance = self.betas * (1 - previous) / unknown
        # the first is zero, without a logarithm: the second replaces it
        variance[0] = variance[1] if self.num_steps > 1 else self.betas[0]
        self.posterior_log_variance_clipped = variance.log()

        # x_0 = from_x·x_t − from_noise·ε, and the same substituted into the posterior mean
        self.x_start_from_x = self.alphas_cumprod.rsqrt()
        self.x_start_from_noise = (1 / self.alphas_cumprod - 1).sqrt()
        self.mean_from_x = self.posterior_mean_coef1 * self.x_start_from_x
        self.mean_from_x = self.mean_from_x + self.posterior_mean_coef2
        self.mean_from_noise = self.posterior_mean_coef1 * self.x_start_from_noise
        self._on_device = {}

    def q_sample(self, x_start, t, noise):
        """x_t for rows x_start (..., C) at steps t (...): sqrt(ᾱ)·x_0 + sqrt(1 − ᾱ)·ε."""
        alpha = self._at("alphas_cumprod", t, x_start)
        return alpha.sqrt() * x_start + (1 - alpha).sqrt() * noise

    def training_losses(self, network, x_start, t, noise, vlb=True, weights=None):
        """Loss of each row: x_start and noise (..., C), t (...) give a dict of tensors (...).

        `mse` is the mean over channels of (ε − ε_θ)² (paper, eq. 1), `vb` the variational term in
        bits, `loss` their sum, of which `mse` counts `weights` (...) times if these are given. The
        gradient of `vb` reaches v alone, the predicted noise being detached there (Nichol and
        Dhariwal 2021, section 3.1). With vlb=False there is no `vb` and v is left untrained: at its
        initial 0, log σ² is midway between its two bounds.
        """
        x_start, noise = x_start.float(), noise.float()
        x = self.q_sample(x_start, t, noise)
        predicted, v = network(x, self._on("timesteps", t.device)[t]).float().chunk(2, dim=-1)
        losses = {"mse": (noise - predicted).square().mean(-1)}
        losses["loss"] = losses["mse"] if weights is None else weights * losses["mse"]
        if vlb:
            losses["vb"] = self._variational_bound(x_start, t, predicted.detach() - noise, v)
            losses["loss"] = losses["loss"] + losses["vb"]
        return losses

    def log_snr(self, device=None):
        """log(ᾱ/(1 − ᾱ)) of each step: (num_steps,), float32."""
        return self._on("alphas_cumprod", device or "cpu").logit()

    def sample(self, network, x, noise=None, temperature=1.0, max_timestep=None, solver="ddpm"):
        """The whole reverse process from x (..., C), standard normal, to x_0.

        noise: (num_steps, ..., C), one draw per step; not needed at temperature 0. max_timestep:
        start at the largest timestep that does not exceed it. See `diffusion.solvers`.
        """
        if temperature and noise is None and SOLVERS[solver].draws_noise:
            raise ValueError(f"temperature {temperature} needs noise; without it expected 0")

        def predict(x, step):
            t = self._on("timesteps", x.device)[step.index].expand(x.shape[:-1])
            return network(x, t).float().chunk(2, dim=-1)

        return reverse(self.steps(max_timestep, solver), predict, x.float(), noise, temperature)

    def steps(self, max_timestep=None, solver="ddpm"):
        """The reverse process in execution order: a tuple of `ReverseStep`.

        solver: a row of `diffusion.solvers.SOLVERS`. Raises ValueError for another.
        """
        step, count = SOLVERS[solver].step, self.first_step(max_timestep)
        return tuple(step(self, i, i == count - 1) for i in reversed(range(count)))

    def first_step(self, max_timestep=None):
        """The number of reverse steps when starting at `max_timestep` (None: all)."""
        if max_timestep is None:
            return self.num_steps
        count = int((self.timesteps <= max_timestep).sum())
        if not count:
            raise ValueError(
                f"max_timestep {max_timestep}: expected at least {int(self.timesteps[0])}, "
                "the first timestep"
            )
        return count

    def _variational_bound(self, x_start, t, error, v):
        """L_{t−1} of Ho et al. 2020, eq. 5, in bits, averaged over channels: (...).

        error: ε_θ − ε. The two means differ by a multiple of it; subtracting the means would lose
        significant digits at small t.
        """
        shift = self._at("mean_from_noise", t, error) * error
        log_variance = self._log_variance(v, t)
        true_log_variance = self._at("posterior_log_variance_clipped", t, error)
        kl = normal_kl(shift, true_log_variance, log_variance).mean(-1)
        last, values = t == 0, (shift, x_start.expand_as(shift), log_variance)
        if t.device.type != "cpu":  # where picking rows would wait for the device
            return torch.where(last, _likelihood_bound(*values), kl) / math.log(2)
        last = last.nonzero(as_tuple=True)
        if len(last[0]):
            kl = kl.index_put(last, _likelihood_bound(*(x[last] for x in values)))
        return kl / math.log(2)

    def _log_variance(self, v, t):
        """log σ² for v in [−1, 1] (Nichol and Dhariwal 2021, eq. 15)."""
        low = self._at("posterior_log_variance_clipped", t, v)
        high = self._at("betas", t, v).log()
        return torch.lerp(low, high, (v + 1) / 2)

    def _at(self, table, t, like):
        """A table at steps t: a host integer gives (1,), a tensor (...) gives (..., 1)."""
        return self._on(table, like.device)[t].unsqueeze(-1)

    def _on(self, name, device):
        """A table on a device, floats in float32; copied only once."""
        if (name, device) not in self._on_device:
            table = getattr(self, name)
            table = table.float() if table.is_floating_point() else table
            self._on_device[name, device] = table.to(device)
        return self._on_device[name, device]


def normal_kl(shift, log_variance1, log_variance2):
    """KL(N₁ ‖ N₂) of diagonal Gaussians whose means differ by `shift`, in nats, elementwise."""
    ratio = log_variance1 - log_variance2
    distance = shift.square() * (-log_variance2).exp()
    return 0.5 * (ratio.exp() + distance - 1 - ratio)


def discretized_nll(shift, x, log_scale):
    """−log P(x) of a Gaussian with mean x − shift on the 256 gray levels of [−1, 1], in nats."""
    per_scale = (-log_scale).exp()
    upper = _normal_cdf((shift + 1 / 255) * per_scale)
    lower = _normal_cdf((shift - 1 / 255) * per_scale)
    upper = torch.where(x > 0.999, 1.0, upper)
    lower = torch.where(x < -0.999, 0.0, lower)
    return -(upper - lower).clamp(min=1e-12).log()


def _likelihood_bound(shift, x, log_variance):
    return discretized_nll(shift, x, 0.5 * log_variance).mean(-1)


def _normal_cdf(x):
    # the tanh approximation that the released weights were trained with
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
