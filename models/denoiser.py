"""The reverse process of Diffusion Loss, with all that does not depend on x out of its loop.

Of the denoising MLP, more than half of the weights are AdaLN layers, whose input is made of the
timestep and z alone. So they are joined to one layer, and where rows are few, so that reading them
is what costs, applied to many steps at once. The result is that of `DenoisingMLP` to rounding.
"""

import torch
from torch.nn import functional as F

from models.linear import pack, packed_linear
from util.precision import full_precision

ROWS_AT_ONCE = 256  # of the joined layer: enough to make its product cost more than its weights


def guided(both, cfg):
    """Outputs (2N, ..., 2C), conditional then unconditional ones, to noise and v, each (N, ..., C).

    The guided noise is ε_u + ω(ε_c − ε_u) (paper, appendix B); v is the conditional one's.
    """
    cond, uncond = both.float().chunk(2)
    noise, v = cond.chunk(2, dim=-1)
    noise_uncond = uncond.chunk(2, dim=-1)[0]
    return noise_uncond + cfg * (noise - noise_uncond), v


class Denoiser:
    """The weights of a DenoisingMLP arranged for sampling, and the loop over its steps.

    net: a DenoisingMLP. dtype: that the products are made in. The arranged weights are copies:
    make a new one when the weights have changed.
    """

    def __init__(self, net, dtype):
        self.net, self.dtype = net, dtype
        layers = [block.adaLN_modulation[1] for block in net.res_blocks]
        last = net.final_layer.adaLN_modulation[1]
        biases = [layer.bias.float().clone() for layer in (*layers, last)]
        width = net.input_proj.out_features
        for bias in biases:
            bias[width : 2 * width] += 1  # the scales are wanted as 1 + scale
        self.joined_weight = self._pack(torch.cat([layer.weight for layer in (*layers, last)]))
        self.joined_bias = torch.cat(biases).to(dtype)
        self.sizes = [3 * width] * len(layers) + [2 * width]
        self.blocks = [
            (
                block.in_ln.weight.to(dtype),
                block.in_ln.bias.to(dtype),
                *self._arrange(block.mlp[0]),
                *self._arrange(block.mlp[2]),
            )
            for block in net.res_blocks
        ]
        self.input = self._arrange(net.input_proj)
        self.output = self._arrange(net.final_layer.linear)
        self.condition = self._arrange(net.cond_embed)

    def take_over(self, other):
        """Copy the weights of another one in place, for those who remember where these are."""
        torch._foreach_copy_(self._tensors(), other._tensors())

    def _tensors(self):
        layers = [self.input, self.output, self.condition, *self.blocks]
        return [self.joined_weight, self.joined_bias, *(x for layer in layers for x in layer)]

    def _arrange(self, layer):
        return self._pack(layer.weight), layer.bias.to(self.dtype)

    def _pack(self, weight):
        return pack(weight.to(self.dtype))

    def embed_times(self, steps):
        """The embedded timesteps (S, W) of a list of ReverseSteps."""
        device = self.joined_bias.device
        times = torch.tensor([step.timestep for step in steps], device=device)
        return self.net.time_embed(times).to(self.dtype)

    def run(self, steps, times, z, noise, cfg=None, temperature=1.0):
        """Tokens (R, C) for z (R, D), or (2R, D) where there is guidance, from noise (S + 1, R, C).

        steps, times: as of `embed_times`. cfg: the scale of the guidance, with the conditional z in
        the first half; None without.
        """
        x, previous = noise[0], None
        full = self.dtype == self.net.input_proj.weight.dtype
        if not (full and torch.get_float32_matmul_precision() == "highest"):
            # the first step magnifies the network's error by hundreds
            output = self._first(steps[0], x, z)
            x, previous = self._step(steps[0], x, output, noise, cfg, temperature, previous)
            steps, times = steps[1:], times[1:]
        condition = packed_linear(z.to(self.dtype), *self.condition)
        at_once = max(1, ROWS_AT_ONCE // len(z))
        for start in range(0, len(steps), at_once):
            y = F.silu(times[start : start + at_once, None] + condition)
            modulations = packed_linear(y, self.joined_weight, self.joined_bias)
            for step, modulation in zip(steps[start : start + at_once], modulations, strict=False):
                output = self._network(x, modulation, repeat=len(z) // len(x))
                x, previous = self._step(step, x, output, noise, cfg, temperature, previous)
        return x

    def _network(self, x, modulation, repeat):
        """Noise and v (repeat·R, 2C) for x (R, C), modulations (repeat·R, (3·depth + 2)·W)."""
        modulations = modulation.split(self.sizes, dim=-1)
        x = packed_linear(x.to(self.dtype), *self.input).repeat(repeat, 1)
        width = x.shape[-1]
        for (gain, bias, *mlp), modulation in zip(self.blocks, modulations, strict=False):
            shift, scale, gate = modulation.chunk(3, dim=-1)
            h = torch.addcmul(shift, F.layer_norm(x, (width,), gain, bias, 1e-6), scale)
            h = F.silu(packed_linear(h, *mlp[:2]), inplace=True)
            x = torch.addcmul(x, gate, packed_linear(h, *mlp[2:]))
        shift, scale = modulations[-1].chunk(2, dim=-1)
        h = torch.addcmul(shift, F.layer_norm(x, (width,), eps=1e-6), scale)
        return packed_linear(h, *self.output)

    def _first(self, step, x, z):
        """The network in the precision of its weights, for the step that magnifies its error."""
        t = torch.full((1,), step.timestep, device=x.device)
        with full_precision(x.device.type):
            return self.net.forward(x.repeat(len(z) // len(x), 1), t, z)

    def _step(self, step, x, output, noise, cfg, temperature, previous):
        """x after a step, and what the next one needs to know of x_0."""
        predicted, v = output.float().chunk(2, dim=-1) if cfg is None else guided(output, cfg)
        drawn = noise[1 + step.index] if step.random else None
        return step(x, predicted, v, drawn, temperature, previous), step.start(x, predicted)
