"""Parts of networks in training on a CPU, each with a backward pass of its own.

The same mathematics as the modules they stand for, in fewer operations and passes over memory:
what autograd computes step by step is computed in place, and equal rows once. Results differ only
by rounding. They are differentiable once; elsewhere than in plain float32 training on a CPU the
modules compute as they are written.
"""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from diffusion.schedule import TRAIN_STEPS
from models.fast.linear import _chosen, _product, linear

ops = torch.ops.aten
SHORT = 32  # keys up to which `attend` is faster than torch's attention without dropout
enabled = True  # a switch for tests and benchmarks


def usable(*tensors):
    """Whether the functions of this file stand for modules that are given these tensors."""
    return (
        enabled
        and torch.is_grad_enabled()
        and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
    )


def of_distinct(function, t):
    """function(t) of timesteps t (...), computed once for each that occurs: (..., W)."""
    if t.numel() <= TRAIN_STEPS or not usable() or t.device.type != "cpu":
        return function(t)
    distinct, places = t.unique(return_inverse=True)
    return F.embedding(places, function(distinct))


def residual(block, x, y):
    """`block`, a ResBlock of the denoising MLP, at x (..., W) and its condition y (..., W)."""
    norm, layers = block.in_ln, (block.mlp[0], block.mlp[2], block.adaLN_modulation[1])
    weights = [p for layer in layers for p in (layer.weight, layer.bias)]
    rows = x.flatten(0, -2), y.flatten(0, -2)
    return _Residual.apply(*rows, norm.eps, norm.weight, norm.bias, *weights).view_as(x)


def modulated(layer, eps, x, y):
    """LN(x)·(1 + scale) + shift, where `layer` of y gives shift and scale: x and y (..., W)."""
    rows = x.flatten(0, -2), y.flatten(0, -2)
    return _Modulated.apply(*rows, eps, layer.weight, layer.bias).view_as(x)


def mlp(module, x):
    """`module`, timm's Mlp with GELU and no norm, at x (..., D)."""
    layers = module.fc1.weight, module.fc1.bias, module.fc2.weight, module.fc2.bias
    rate = module.drop1.p if module.training else 0.0
    return _MLP.apply(x.flatten(0, -2), *layers, rate).view_as(x)


def attend(q, k, v, rate, causal):
    """Attention with dropout of its weights: q (N, heads, m, d), k and v (N, heads, n, d).

    For dropout, which torch's fused attention does not have on a CPU, and for few keys.
    """
    out = _Attend.apply(*(x.flatten(0, 1) for x in (q, k, v)), rate, causal)
    return out.unflatten(0, q.shape[:2])


def dropout(x, rate):
    """Dropout of a tensor."""
    return _Dropout.apply(x, rate)


def drop(like, rate):
    """0 with probability `rate` and else 1, for each element of a contiguous tensor.

    From 16 random bits each, so that the rate is met up to 1 / 131,072. Torch takes 64, and with
    them a seventh of a training step.
    """
    bits = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    numbers = bits.view(torch.int16)[: like.numel()]  # even from −32,768 to 32,767
    end = min(round((1 - rate) * 2**16) - 2**15, 2**15 - 1)
    return numbers.lt_(end).to(like.dtype).view_as(like)


def _of_input(grad, x, weight):
    """The gradient of a linear layer's input x (R, I), given that of its output, (R, O)."""
    return _product(_chosen("inputs", x, weight), grad, weight.t())


def _of_layer(grad, x, weight):
    """The gradients of a linear layer's weight (O, I) and bias (O,)."""
    return _product(_chosen("weights", x, weight), grad.t(), x.t()), grad.sum(0)


class _Residual(Function):
    """x + gate·MLP(LN(x)·scale + shift), where a linear layer of y gives shift, scale − 1, gate."""

    @staticmethod
    def forward(ctx, x, y, eps, gain, bias, w1, b1, w2, b2, w3, b3):
        b3 = b3.clone()
        b3[len(b1) : 2 * len(b1)] += 1  # scales enter as 1 + scale
        modulation = linear(y, w3, b3)
        shift, scale, gate = modulation.chunk(3, dim=-1)
        normed, mean, rstd = torch.native_layer_norm(x, gain.shape, gain, bias, eps)
        inner = torch.addcmul(shift, normed, scale)
        hidden = linear(inner, w1, b1)
        active = F.silu(hidden)
        out = linear(active, w2, b2)
        held = x, y, modulation, normed, mean, rstd, inner, hidden, active, out
        ctx.save_for_backward(*held, gain, bias, w1, w2, w3)
        return torch.addcmul(x, gate, out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, y, modulation, normed, mean, rstd, inner, hidden, active, out, *weights = (
            ctx.saved_tensors
        )
        gain, bias, w1, w2, w3 = weights
        _, scale, gate = modulation.chunk(3, dim=-1)
        of_modulation = torch.empty_like(modulation)
        of_shift, of_scale, of_gate = of_modulation.chunk(3, dim=-1)
        torch.mul(grad, out, out=of_gate)
        g = grad * gate
        of_out = _of_layer(g, active, w2)
        g = _of_input(g, active, w2)
        ops.silu_backward.grad_input(g, hidden, grad_input=g)
        of_hidden = _of_layer(g, inner, w1)
        g = _of_input(g, inner, w1)
        of_shift.copy_(g)
        torch.mul(g, normed, out=of_scale)
        g.mul_(scale)
        of_x, of_gain, of_bias = ops.native_layer_norm_backward(
            g, x, gain.shape, mean, rstd, gain, bias, [True, True, True]
        )
        of_layers = *of_hidden, *of_out, *_of_layer(of_modulation, y, w3)
        of_y = _of_input(of_modulation, y, w3)
        return of_x.add_(grad), of_y, None, of_gain, of_bias, *of_layers


class _Modulated(Function):
    """LN(x)·scale + shift, where a linear layer of y gives shift and scale − 1."""

    @staticmethod
    def forward(ctx, x, y, eps, weight, bias):
        width = x.shape[-1:]
        bias = bias.clone()
        bias[width[0] :] += 1  # scales enter as 1 + scale
        modulation = linear(y, weight, bias)
        shift, scale = modulation.chunk(2, dim=-1)
        # with a gain torch's kernel is twice as fast
        gain, zero = x.new_ones(width), x.new_zeros(width)
        normed, mean, rstd = torch.native_layer_norm(x, width, gain, zero, eps)
        ctx.save_for_backward(x, y, modulation, normed, mean, rstd, weight)
        return torch.addcmul(shift, normed, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, y, modulation, normed, mean, rstd, weight = ctx.saved_tensors
        of_modulation = torch.empty_like(modulation)
        of_shift, of_scale = of_modulation.chunk(2, dim=-1)
        of_shift.copy_(grad)
        torch.mul(grad, normed, out=of_scale)
        g = grad * modulation.chunk(2, dim=-1)[1]
        of_x, _, _ = ops.native_layer_norm_backward(
            g, x, x.shape[-1:], mean, rstd, None, None, [True, False, False]
        )
        of_y = _of_input(of_modulation, y, weight)
        return of_x, of_y, None, *_of_layer(of_modulation, y, weight)


class _MLP(Function):
    """Two linear layers with GELU between them, each followed by dropout.

    Dropout multiplies by `scale` what it keeps: the second layer does so for both.
    """

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, rate):
        ctx.scale = 1 / (1 - rate)
        hidden = linear(x, w1, b1)
        active = F.gelu(hidden)
        masks = []
        if rate:
            masks = [drop(active, rate)]
            active.mul_(masks[0])
            w2, b2 = w2 * ctx.scale**2, b2 * ctx.scale
        out = linear(active, w2, b2)
        if rate:
            masks += [drop(out, rate)]
            out.mul_(masks[1])
        ctx.save_for_backward(x, w1, hidden, active, w2, *masks)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, w1, hidden, active, w2, *masks = ctx.saved_tensors
        grad = grad * masks[1] if masks else grad
        of_w2, of_b2 = _of_layer(grad, active, w2)
        if masks:
            of_w2, of_b2 = of_w2.mul_(ctx.scale**2), of_b2.mul_(ctx.scale)
        g = _of_input(grad, active, w2)
        if masks:
            g.mul_(masks[0])
        ops.gelu_backward.grad_input(g, hidden, grad_input=g)
        return _of_input(g, x, w1), *_of_layer(g, x, w1), of_w2, of_b2, None


class _Attend(Function):
    """dropout(softmax(q·kᵀ / √d))·v."""

    @staticmethod
    def forward(ctx, q, k, v, rate, causal):
        ctx.scales = q.shape[-1] ** -0.5, 1 / (1 - rate)
        q, v = q * ctx.scales[0], v * ctx.scales[1]
        scores = torch.bmm(q, k.mT)
        if causal:
            scores += torch.full(scores.shape[1:], -torch.inf).triu_(1)
        weights = scores.softmax(-1)
        kept = drop(weights, rate).mul_(weights) if rate else weights
        ctx.save_for_backward(q, k, v, weights, kept)
        return torch.bmm(kept, v)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, weights, kept = ctx.saved_tensors
        of_v = torch.bmm(kept.mT, grad).mul_(ctx.scales[1])
        g = torch.bmm(grad, v.mT).mul_(kept)
        g -= weights * g.sum(-1, keepdim=True)
        of_q, of_k = torch.bmm(g, k).mul_(ctx.scales[0]), torch.bmm(g.mT, q)
        return of_q, of_k, of_v, None, None


class _Dropout(Function):
    """Dropout of x."""

    @staticmethod
    def forward(ctx, x, rate):
        mask = drop(x, rate).mul_(1 / (1 - rate))
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        return grad * mask, None
