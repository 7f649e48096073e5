"""The reverse process of Diffusion Loss, with all that does not depend on x out of its loop.

More than half of the denoising MLP's weights are AdaLN layers, whose only inputs are the timestep
and z. They are joined into one layer and, for few rows, where reading the weights dominates the
cost, applied to many steps at once. On a GPU the whole loop is one graph. The result equals that
of `DenoisingMLP` up to rounding.
"""

from functools import partial

import torch
from torch.nn import functional as F

from diffusion.solvers import reverse
from models.fast.graphs import Graphs, padded
from models.fast.linear import pack, packed_linear
from util.precision import full_precision

ROWS_AT_ONCE = (
    256  # of the joined layer: enough for its product to cost more than reading its weights
)


def split(output, channels=None):
    """Noise and v from outputs (..., 2C), or a velocity and an empty v from (..., C).

    channels: C; half of the outputs if not given.
    """
    channels = channels or output.shape[-1] // 2
    return output[..., :channels], output[..., channels:]


def guided(both, cfg, channels=None):
    """Noise and v, each (N, ..., C), from outputs (2N, ..., 2C), the conditional ones first.

    The guided noise is ε_u + ω(ε_c − ε_u) (paper, appendix B); v is the conditional one.
    """
    cond, uncond = both.float().chunk(2)
    (noise, v), (noise_uncond, _) = split(cond, channels), split(uncond, channels)
    return noise_uncond + cfg * (noise - noise_uncond), v


class FastSampler:
    """Runs the reverse process of a DenoisingMLP, with weights prepared once per sampling call."""

    def __init__(self):
        self.graphs, self.arranged = Graphs(), None

    def start(self, net, guide=None):
        """denoise(key, steps, z, z_uncond, noise, cfg, temperature), with the current weights.

        It returns tokens (R, C) for z and z_uncond (R, D) and noise (S + 1, R, C), the start and a
        draw per step. key: identifies the steps. guide: the DenoisingMLP for z_uncond, if it is
        another than `net`. It computes in the dtype of an enabled autocast.
        """
        weight = net.input_proj.weight
        kind = weight.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else weight.dtype
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            denoiser = self._arrange(net, dtype)
            other = guide and Denoiser(guide, dtype)
        times = {}

        def denoise(key, steps, z, z_uncond, noise, cfg, temperature):
            with torch.autocast(kind, enabled=False):
                if guide and cfg != 1.0:
                    return run_two((denoiser, other), steps, (z, z_uncond), noise, cfg, temperature)
                if key not in times:
                    times[key] = denoiser.embed_times(steps)
                run = partial(denoiser.run, steps, temperature=temperature)
                both = [z] if cfg == 1.0 else [z, z_uncond]
                return self._replay((key, temperature), run, times[key], both, noise, cfg)

        return denoise

    def _replay(self, key, run, times, both, noise, cfg):
        """run(times, z, noise[, cfg]); on a GPU as one graph, with rows padded to a few sizes."""
        rows = noise.shape[1]
        inputs = [times, torch.cat(both), noise]
        if self.graphs.usable(noise.device):
            more = padded(rows) - rows
            z = torch.cat([F.pad(z, (0, 0, 0, more)) for z in both])
            inputs = [times, z, F.pad(noise, (0, 0, 0, more))]
        if len(both) > 1:
            inputs.append(torch.full((), cfg, device=noise.device))
        key = key, torch.get_float32_matmul_precision()
        return self.graphs(key, run, *inputs)[:rows]

    def _arrange(self, net, dtype):
        """A Denoiser with the current weights, stored where recorded graphs read them."""
        fresh = Denoiser(net, dtype)
        if not self.graphs.usable(net.input_proj.weight.device):
            return fresh
        # recordings read the weights where they were
        places = (dtype, *(p.data_ptr() for p in net.parameters()))
        if self.arranged and self.arranged[0] == places:
            self.arranged[1].take_over(fresh)
        else:
            self.arranged, self.graphs = (places, fresh), Graphs()
        return self.arranged[1]


def run_two(denoisers, steps, zs, noise, cfg, temperature):
    """Tokens (R, C) of one Denoiser guided by another, for the z (R, D) of each: autoguidance.

    See `Denoiser.run` for the rest. A plain loop on any device.
    """
    pairs = zip(denoisers, zs, strict=True)
    networks = [each.follow(steps, each.embed_times(steps), z) for each, z in pairs]

    def predict(x, step):
        outputs = torch.cat([network(x, step) for network in networks])
        return guided(outputs, cfg, noise.shape[-1])

    return reverse(steps, predict, noise[0], noise[1:], temperature)


class Denoiser:
    """The weights of a DenoisingMLP prepared for sampling, and its reverse process.

    dtype: dtype of the products. The prepared weights are copies: make a new Denoiser when the
    weights have changed.
    """

    def __init__(self, net, dtype):
        self.net, self.dtype = net, dtype
        layers = [block.adaLN_modulation[1] for block in net.res_blocks]
        last = net.final_layer.adaLN_modulation[1]
        biases = [layer.bias.float().clone() for layer in (*layers, last)]
        width = net.input_proj.out_features
        for bias in biases:
            bias[width : 2 * width] += 1  # scales enter as 1 + scale
        self.joined_weight = self._pack(torch.cat([layer.weight for layer in (*layers, last)]))
        self.joined_bias = torch.cat(biases).to(dtype)
        self.sizes = [3 * width] * len(layers) + [2 * width]
        self.blocks = [
            (
                block.in_ln.weight.to(dtype),
                block.in_ln.bias.to(dtype),
                *self._layer(block.mlp[0]),
                *self._layer(block.mlp[2]),
            )
            for block in net.res_blocks
        ]
        self.input = self._layer(net.input_proj)
        self.output = self._layer(net.final_layer.linear)
        self.condition = self._layer(net.cond_embed)

    def take_over(self, other):
        """Copy the weights of another Denoiser in place, for graphs that read them here."""
        torch._foreach_copy_(self._tensors(), other._tensors())

    def _tensors(self):
        layers = [self.input, self.output, self.condition, *self.blocks]
        return [self.joined_weight, self.joined_bias, *(x for layer in layers for x in layer)]

    def _layer(self, layer):
        return self._pack(layer.weight), layer.bias.to(self.dtype)

    def _pack(self, weight):
        return pack(weight.to(self.dtype))

    def embed_times(self, steps):
        """The embedded timesteps (S, W) of a sequence of ReverseSteps."""
        device = self.joined_bias.device
        times = torch.tensor([step.timestep for step in steps], device=device)
        return self.net.time_embed(times).to(self.dtype)

    def run(self, steps, times, z, noise, cfg=None, temperature=1.0):
        """Tokens (R, C) for z (R, D), or (2R, D) under guidance, from noise (S + 1, R, C).

        times: result of `embed_times`. cfg: the guidance scale, with the conditional z in the first
        half; None without guidance.
        """
        network, channels = self.follow(steps, times, z), noise.shape[-1]

        def predict(x, step):
            output = network(x, step)
            return split(output.float(), channels) if cfg is None else guided(output, cfg, channels)

        return reverse(steps, predict, noise[0], noise[1:], temperature)

    def follow(self, steps, times, z):
        """Noise and v (len(z), 2C), or a velocity (len(z), C): a function of x (R, C) and each
        of the steps in turn."""
        full = self.dtype == self.net.input_proj.weight.dtype
        careful = not (full and torch.get_float32_matmul_precision() == "highest")
        modulations = self._modulations(times[1:] if careful else times, z)

        def network(x, step):
            if careful and step is steps[0]:  # it amplifies the network's error several hundredfold
                return self._first(step, x, z)
            return self._network(x, next(modulations), repeat=len(z) // len(x))

        return network

    def _modulations(self, times, z):
        """For each step, shifts, scales and gates of all layers (len(z), (3·depth + 2)·W)."""
        condition = packed_linear(z.to(self.dtype), *self.condition)
        for part in times.split(max(1, ROWS_AT_ONCE // len(z))):
            y = F.silu(part[:, None] + condition)
            yield from packed_linear(y, self.joined_weight, self.joined_bias)

    def _network(self, x, modulation, repeat):
        """Noise and v (repeat·R, 2C), or a velocity (repeat·R, C), for x (R, C)."""
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
        """The network in the precision of its weights, for the step that amplifies its error."""
        t = torch.full((1,), step.timestep, device=x.device)
        with full_precision(x.device.type):
            return self.net.forward(x.repeat(len(z) // len(x), 1), t, z)
