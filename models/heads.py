"""What turns z into a loss or into tokens. A head has two verbs, `forward` and `sample`.

A tokenizer is continuous or discrete; each head serves one kind. A new head is a row of `HEADS`.
"""

import torch
from torch import nn
from torch.nn import functional as F

from models.diffloss import DiffLoss
from models.linear import speed_up
from util.rng import rand


class Head(nn.Module):
    """The baselines of Diffusion Loss: one linear layer on z, and no diffusion."""

    max_timestep = None

    def __init__(self, out_channels, z_channels):
        super().__init__()
        self.linear = nn.Linear(z_channels, out_channels)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        speed_up(self)

    def start_sampling(self, temperature=1.0, max_timestep=None, solver="ddpm", anneal=None):
        """`sample` as the sampling loop calls it; see `DiffLoss`. Raises ValueError for settings of
        a diffusion, which is not there."""
        if solver != "ddpm" or anneal:
            raise ValueError(
                f"solver {solver!r}, anneal {anneal!r}: {type(self).__name__} has no diffusion"
            )

        def draw(z, cfg=1.0, z_uncond=None, generator=None, progress=0.0):
            return self.sample(z, temperature, cfg, z_uncond, generator)

        return draw

    def respace(self, num_sampling_steps):
        """There are no diffusion steps to change."""

    def pop_statistics(self, reduce=None):
        """No loss by timestep."""
        return {}

    def guided(self, z, cfg=1.0, z_uncond=None):
        """The outputs (..., K) for z (..., D), in float32: o_u + ω(o_c − o_u)."""
        outputs = self.linear(z).float()
        if cfg == 1.0:
            return outputs
        uncond = self.linear(z_uncond).float()
        return uncond + cfg * (outputs - uncond)


class CrossEntropy(Head):
    """A categorical distribution over the codes of a VQ tokenizer (paper, table 1).

    Tokens are ids as numbers (..., 1). Guidance and temperature act on the logits.
    """

    discrete = True

    def forward(self, target, z, mask=None, generator=None):
        """Mean cross-entropy in nats over tokens: target (..., 1), z (..., D), mask (...)."""
        logits = self.linear(z).float()
        losses = F.cross_entropy(
            logits.flatten(0, -2), target.long().flatten(), reduction="none"
        ).view(z.shape[:-1])
        return losses.mean() if mask is None else (losses * mask).sum() / mask.sum()

    @torch.no_grad()
    def sample(self, z, temperature=1.0, cfg=1.0, z_uncond=None, generator=None):
        """Ids (..., 1) drawn from softmax(logits / τ) for z (..., D); at τ = 0 the likeliest.

        One uniform number a token is drawn, and looked up in the cumulated probabilities.
        """
        logits = self.guided(z, cfg, z_uncond)
        if temperature == 0:
            return logits.argmax(-1, keepdim=True).float()
        cumulated = (logits / temperature).softmax(-1).cumsum(-1)
        u = rand((*z.shape[:-1], 1), generator, z.device) * cumulated[..., -1:]
        ids = torch.searchsorted(cumulated, u, right=True)
        return ids.clamp(max=logits.shape[-1] - 1).float()

    def confidence(self, ids, z, cfg=1.0, z_uncond=None):
        """log p of ids (..., 1) under z (..., D), at temperature 1: (...)."""
        logits = self.guided(z, cfg, z_uncond)
        return logits.log_softmax(-1).gather(-1, ids.long()).squeeze(-1)


class L2(Head):
    """The token itself, regressed: a baseline that cannot express a distribution.

    The paper reports that it fails (FID above 100). Temperature has no meaning here.
    """

    discrete = False

    def forward(self, target, z, mask=None, generator=None):
        """Mean squared error over channels and tokens: target (..., C), z (..., D), mask (...)."""
        losses = (self.linear(z).float() - target).square().mean(-1)
        return losses.mean() if mask is None else (losses * mask).sum() / mask.sum()

    @torch.no_grad()
    def sample(self, z, temperature=1.0, cfg=1.0, z_uncond=None, generator=None):
        """The mean of the token, (..., C), for z (..., D)."""
        return self.guided(z, cfg, z_uncond)


HEADS = {"diffloss": DiffLoss, "ce": CrossEntropy, "l2": L2}
