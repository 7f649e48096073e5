"""Linear layers in float32 on a CPU, by oneDNN.

Torch uses MKL for them, whose kernels are slow on processors other than Intel's, and for few rows
on any: `benchmarks/RESULTS.md` has the ratio. On other devices this is plain torch. Results differ
only by rounding.
"""

import torch
from torch import nn
from torch.nn import functional as F

SMALLEST = 128 * 128  # below this many weights, the call costs more than the product
AVAILABLE = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
)
enabled = True  # a benchmark turns it off, to measure the rest


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
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def pack(weight):
    """A weight for `packed_linear`: a copy in oneDNN's layout where oneDNN is used."""
    if _fits(weight, weight):
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
    return weight.detach()


def packed_linear(x, weight, bias=None):
    """`linear` without a gradient, for a weight from `pack`."""
    return _product(x, weight, bias) if weight.is_mkldnn else F.linear(x, weight, bias)


def _fits(x, weight):
    return (
        enabled
        and AVAILABLE
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.numel() >= SMALLEST
        and x.numel() > 0
        and x.ndim > 1
        and not torch._C._are_functorch_transforms_active()
        and not torch.is_autocast_enabled("cpu")
    )


def _product(x, weight, bias=None):
    if torch.compiler.is_compiling():
        return _opaque_product(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.custom_op("mar::linear", mutates_args=())
def _opaque_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`_product` for torch.compile, which would otherwise treat the weight as a constant."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@_opaque_product.register_fake
def _(x, weight, bias=None):
    return x.new_empty((*x.shape[:-1], len(weight)))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, grads = x.flatten(0, -2), grad.flatten(0, -2)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(grads, weight.t()).view_as(x)
        if ctx.needs_input_grad[1]:
            grad_weight = _product(grads.t().contiguous(), rows.t())
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grads.sum(0)
        return grad_x, grad_weight, grad_bias
