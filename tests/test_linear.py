"""Linear layers by oneDNN against torch's own. Run: python -m pytest tests/test_linear.py"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.fast import linear, products
from models.mar import mar_tiny


@pytest.fixture
def used(monkeypatch):
    """The shapes that oneDNN, which computes everything, was called with."""
    calls, product = [], products.onednn

    def counted(x, *args):
        calls.append(x.shape)
        return product(x, *args)

    monkeypatch.setattr(products, "onednn", counted)
    monkeypatch.setattr(products, "mode", "onednn")
    if not products._available:
        pytest.skip("this build of torch has no oneDNN")
    return calls


@pytest.mark.parametrize("shape", [(5, 192), (2, 3, 192), (2, 3, 4, 192)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(used, shape, bias):
    """To float tolerance, for x of any number of dimensions, and for slices of a weight."""
    torch.manual_seed(0)
    x, whole = torch.randn(shape), torch.randn(400, 192)
    results = []
    for function in (linear.linear, F.linear):
        leaves = [x.clone().requires_grad_(), whole.clone().requires_grad_()]
        leaves += [torch.ones(300).requires_grad_()] if bias else []
        y = function(leaves[0], leaves[1][100:], *leaves[2:])
        (y * torch.arange(300)).square().sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves)])
    assert len(used) == 3  # forward, and one for x and for the weight each
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_only_float32_on_a_cpu(used):
    """Other types, autocast and small weights are torch's business."""
    x, weight = torch.randn(4, 192), torch.randn(192, 192)
    linear.linear(x.double(), weight.double())
    linear.linear(x[:, :16], weight[:16, :16])
    linear.linear(x[:0], weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear.linear(x, weight).dtype == torch.bfloat16
    assert not used
    linear.linear(x, weight)
    assert used


def test_what_is_left_to_torch(used):
    """A vector, and transforms of functions; a bias that alone is trained gets its gradient."""
    weight, bias = torch.randn(192, 192), torch.randn(192, requires_grad=True)
    x = torch.randn(192, requires_grad=True)
    linear.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0))
    grad = torch.func.grad(lambda w: linear.linear(torch.ones(2, 192), w).sum())(weight)
    torch.testing.assert_close(grad, torch.full_like(weight, 2.0))
    assert not used
    linear.linear(torch.randn(5, 192), weight, bias).sum().backward()
    assert used and torch.equal(bias.grad, torch.full((192,), 5.0))


@pytest.mark.parametrize("mode", products.MODES)
def test_packed_is_the_same(monkeypatch, tmp_path, mode):
    """A packed weight gives what the weight gives, and holds a copy if oneDNN uses it."""
    monkeypatch.setattr(products, "FILE", tmp_path / "products.json")
    monkeypatch.setattr(products, "chosen", {})
    monkeypatch.setattr(products, "mode", mode)
    x, weight, bias = torch.randn(7, 192), torch.randn(256, 192), torch.randn(256)
    packed = linear.pack(weight)
    before = F.linear(x, weight, bias)
    torch.testing.assert_close(linear.packed_linear(x, packed, bias), before, atol=1e-4, rtol=1e-5)
    if mode != "auto":
        assert hasattr(packed, "packed") == (products._available and mode == "onednn")


@pytest.mark.parametrize("mode", ["auto", "torch"])
def test_packed_in_bf16(monkeypatch, mode):
    """The product in float32 of the same numbers, but for rounding; packed if the CPU can."""
    monkeypatch.setattr(products, "mode", "auto")
    able = products.packs_bf16()
    monkeypatch.setattr(products, "mode", mode)
    x, weight, bias = (torch.randn(n).bfloat16() for n in ((7, 192), (256, 192), (256,)))
    packed = linear.pack(weight)
    assert hasattr(packed, "packed") == (able and mode == "auto")
    expected = F.linear(x.float(), weight.float(), bias.float())
    found = linear.packed_linear(x, packed, bias)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=1e-2, rtol=2**-7)


def test_models_use_it():
    """Every linear layer of a model, its head's too; a frozen one takes no gradient."""
    model = mar_tiny(img_size=64, class_num=10)
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.Linear)}
    assert kinds == {linear.Linear}
    layer = linear.Linear(192, 192).requires_grad_(False)
    x = torch.randn(3, 192, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, -1), atol=1e-4, rtol=1e-4)
