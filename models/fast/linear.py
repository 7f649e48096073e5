"""Linear layers whose float32 products on a CPU are computed by the faster of two libraries.

models/fast/products.py chooses which. On other devices this is plain torch.
"""

import torch
from torch import nn
from torch.nn import functional as F

from models.fast import products
from models.fast.products import by_onednn


class Linear(nn.Linear):
    """nn.Linear, with `linear` for its product."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def speed_up(model):
    """Turn the linear layers of a model into those of this file; parameters and names stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def linear(x, weight, bias=None):
    """x (..., I) with weight (O, I) and bias (O,) gives (..., O); differentiable once."""
    if not _fits(x, weight):
        return F.linear(x, weight, bias)
    wanted = any(t is not None and t.requires_grad for t in (x, weight, bias))
    if torch.is_grad_enabled() and wanted:
        if any(_chosen(kind, x, weight) for kind in ("forward", "inputs", "weights")):
            return _Linear.apply(x, weight, bias)
        return F.linear(x, weight, bias)
    return _product(_chosen("forward", x, weight), x, weight, bias)


def pack(weight):
    """A weight for `packed_linear`; where that is faster, with a copy in oneDNN's layout."""
    weight = weight.detach()
    if _fits_bf16(weight) or (
        _fits(weight, weight)
        and any(by_onednn("packed", rows, weight.numel()) for rows in (products.FEW, products.MANY))
    ):
        weight.packed = products.pack(weight)
    return weight


def packed_linear(x, weight, bias=None):
    """`linear` without a gradient, for a weight from `pack`."""
    packed = getattr(weight, "packed", None)
    if packed is not None and (x.dtype == torch.bfloat16 or _chosen("packed", x, weight)):
        return products.onednn(x, packed, bias)
    return linear(x, weight, bias)


def _fits(x, weight):
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and x.ndim > 1
        and not torch._C._are_functorch_transforms_active()
        and not torch.is_autocast_enabled("cpu")
    )


def _fits_bf16(weight):
    """Whether a weight in bf16 is packed, for any number of rows."""
    return weight.dtype == torch.bfloat16 and weight.is_cpu and products.packs_bf16()


def _chosen(kind, x, weight):
    """Whether oneDNN computes a product of a layer's weight for inputs x."""
    compiling = torch.compiler.is_compiling()  # for training, where rows are many
    rows = products.MANY if compiling else x.numel() // x.shape[-1]
    return by_onednn(kind, rows, weight.numel())


def _product(onednn, a, b, bias=None):
    """a (..., I) times b (O, I), transposed, plus bias. onednn: whether oneDNN computes it."""
    if not onednn:
        return F.linear(a, b, bias)
    compute = _opaque_product if torch.compiler.is_compiling() else products.onednn
    return compute(a.contiguous(), b, bias)


@torch.library.custom_op("mar::linear", mutates_args=())
def _opaque_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """A product for torch.compile, which would otherwise treat the weight as a constant."""
    return products.onednn(x, weight, bias)


@_opaque_product.register_fake
def _(x, weight, bias=None):
    return x.new_empty((*x.shape[:-1], len(weight)))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(_chosen("forward", x, weight), x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, grads = x.flatten(0, -2), grad.flatten(0, -2)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(_chosen("inputs", x, weight), grads, weight.t()).view_as(x)
        if ctx.needs_input_grad[1]:
            grad_weight = _product(_chosen("weights", x, weight), grads.t(), rows.t())
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grads.sum(0)
        return grad_x, grad_weight, grad_bias
