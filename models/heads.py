"""Heads turn z into a loss or into tokens. Here: the base class, cross-entropy and L2.

A new head is a subclass of Head and a row of models.settings.HEADS; each new option is an argument
of its constructor and a field of models.settings.Model with the same name.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from models.fast.linear import speed_up
from models.settings import USUAL
from util.rng import rand


class Head(nn.Module):
    """p(token | z), for one token and the vector z that the backbone computes for its position.

    Constructed as Head(out_channels, z_channels, **options): out_channels is the number of channels
    of a token, or the number of codes if the head is `discrete`; options are any other arguments.
    """

    discrete = False  # whether tokens are code indices, floats (..., 1)
    without_effect = ()  # fields of models.settings.Sampling that the head does not use
    aliases = {}  # field of models.settings.Model -> argument, where their names differ
    usual = USUAL  # field of models.settings.Sampling -> its value where none is given
    confidence = None  # method (tokens, z, cfg, z_uncond, guide) -> log p (...), if there is one

    def forward(self, target, z, mask=None, generator=None):
        """The training loss, a scalar: target (..., C), z (..., D), mask (...), 1 = included."""
        raise NotImplementedError

    def held_out_losses(self, target, z, generators):
        """Losses of each image to compare models by: name -> (N,).

        target: (N, n, C); z: (N, n, D); generators: one per image. `loss` is what `forward` gives
        for an image alone.
        """
        rows = zip(target.split(1), z.split(1), generators, strict=True)
        return {"loss": torch.stack([self(x, y, generator=g).float() for x, y, g in rows])}

    def sampler(self, sampling, guide=None):
        """A function that draws tokens with the settings `sampling`, a models.settings.Sampling.

        Returns draw(z, cfg=1.0, z_uncond=None, generator=None, done=0.0) -> tokens (..., C), for z
        and z_uncond (..., D), the conditional and unconditional vectors of guidance; generator as
        in util.rng; done, the fraction of autoregressive steps before this one. guide: the head of
        another model, whose z is then z_uncond (autoguidance); a head whose sampler does not name
        this argument is refused there. Raises ValueError for settings that this head does not
        support.
        """
        raise NotImplementedError

    def statistics(self, reduce=None):
        """Values to log since the last call, name -> number.

        reduce: function that sums a tensor over processes.
        """
        return {}

    def to_compile(self):
        """Modules that torch.compile speeds up in training."""
        return []

    def to_shard(self):
        """Modules whose weights --fsdp gathers one after the other; the rest is one more."""
        return []

    def advice(self, sampling):
        """A sentence on what to try if samples diverge."""
        return "Train the model for longer"


class LinearHead(Head):
    """One linear layer on z and no diffusion: the baselines of Diffusion Loss.

    A subclass has `pick`, and `forward` as any head.
    """

    without_effect = ("num_sampling_steps", "max_timestep", "solver", "anneal")

    def __init__(self, out_channels, z_channels):
        super().__init__()
        self.linear = nn.Linear(z_channels, out_channels)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        speed_up(self)

    def sampler(self, sampling, guide=None):
        """See Head. Raises ValueError for settings of a diffusion process."""
        check_no_diffusion(self, sampling)

        def draw(z, cfg=1.0, z_uncond=None, generator=None, done=0.0):
            return self.sample(z, sampling.temperature, cfg, z_uncond, generator, guide)

        return draw

    @torch.no_grad()
    def sample(self, z, temperature=1.0, cfg=1.0, z_uncond=None, generator=None, guide=None):
        """Tokens (..., C) for z (..., D), by `pick`. guide: see `Head.sampler`."""
        return self.pick(self.guided(z, cfg, z_uncond, guide), temperature, generator)

    def pick(self, outputs, temperature, generator):
        """Tokens (..., C) for the outputs (..., K) of the layer; see `Head.sampler`."""
        raise NotImplementedError

    def guided(self, z, cfg=1.0, z_uncond=None, guide=None):
        """The outputs o (..., K) for z (..., D), in float32: o_u + ω(o_c − o_u) under guidance.

        guide: the head of z_uncond, if it is another.
        """
        outputs = self.linear(z).float()
        if cfg == 1.0:
            return outputs
        uncond = (guide or self).linear(z_uncond).float()
        return uncond + cfg * (outputs - uncond)


class CrossEntropy(LinearHead):
    """A categorical distribution over the codes of a VQ tokenizer (paper, table 1).

    Tokens are code indices (..., 1), stored as floats. Guidance and temperature act on the logits.
    """

    discrete = True

    def forward(self, target, z, mask=None, generator=None):
        """The mean cross-entropy in nats: target (..., 1), z (..., D), mask (...), 1 = included."""
        logits = self.linear(z).float()
        losses = F.cross_entropy(
            logits.flatten(0, -2), target.long().flatten(), reduction="none"
        ).view(z.shape[:-1])
        return masked_mean(losses, mask)

    def held_out_losses(self, target, z, generators):
        """See Head. The same in bits, too."""
        found = super().held_out_losses(target, z, generators)
        return {**found, "bits_per_token": found["loss"] / math.log(2)}

    def pick(self, logits, temperature, generator):
        """Code indices (..., 1) drawn from softmax(logits / τ), logits (..., K); argmax at τ = 0.

        One uniform number per token is drawn and looked up in the cumulative probabilities.
        """
        if temperature == 0:
            return logits.argmax(-1, keepdim=True).float()
        cumulated = (logits / temperature).softmax(-1).cumsum(-1)
        u = rand((*logits.shape[:-1], 1), generator, logits.device) * cumulated[..., -1:]
        indices = torch.searchsorted(cumulated, u, right=True)
        return indices.clamp(max=logits.shape[-1] - 1).float()

    def confidence(self, indices, z, cfg=1.0, z_uncond=None, guide=None):
        """log p of code indices (..., 1) given z (..., D), at temperature 1: (...)."""
        logits = self.guided(z, cfg, z_uncond, guide)
        return logits.log_softmax(-1).gather(-1, indices.long()).squeeze(-1)


class L2(LinearHead):
    """Regression of the token: a baseline that models no distribution.

    The paper reports that it fails (FID above 100). Temperature has no effect.
    """

    without_effect = (*LinearHead.without_effect, "temperature")

    def forward(self, target, z, mask=None, generator=None):
        """The mean squared error: target (..., C), z (..., D), mask (...), 1 = included."""
        return masked_mean((self.linear(z).float() - target).square().mean(-1), mask)

    def pick(self, means, temperature, generator):
        """The predicted mean of each token (..., C)."""
        return means


def check_no_diffusion(head, sampling):
    """Raises ValueError for settings of a diffusion process, and for a negative temperature."""
    if sampling.temperature < 0:
        raise ValueError(f"temperature {sampling.temperature}: expected 0 or more")
    for name, usual in (("solver", head.usual["solver"]), ("anneal", "none")):
        value = getattr(sampling, name)
        if value not in (usual, None):
            raise ValueError(f"{name} {value!r}: {type(head).__name__} has no diffusion")


def masked_mean(losses, mask=None):
    """The mean of losses (...), only where mask (...) is 1 if it is given."""
    return losses.mean() if mask is None else (losses * mask).sum() / mask.sum()
