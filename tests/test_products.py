"""Which library computes products on a CPU. Run: python -m pytest tests/test_products.py"""

import json
import runpy

import pytest
import torch
from torch.nn import functional as F

from models.fast import linear, products

THERE = products._available


@pytest.fixture(autouse=True)
def undecided(monkeypatch, tmp_path):
    """No choice made yet, and none stays."""
    monkeypatch.setattr(products, "FILE", tmp_path / "cache" / "products.json")
    monkeypatch.setattr(products, "_busy", lambda: False)
    monkeypatch.setattr(products, "chosen", {})
    monkeypatch.setattr(products, "mode", "auto")
    monkeypatch.setattr(products, "_available", True)


@pytest.fixture
def both():
    """Skips where there is no oneDNN."""
    if not THERE:
        pytest.skip("this build of torch has no oneDNN")


@pytest.fixture
def rates(monkeypatch):
    """GFLOP/s that a measurement finds, and the classes that were measured."""
    found, measured = {"torch": 100.0, "onednn": 100.0}, []

    def measure(kind, rows, inputs, outputs):
        assert inputs == outputs
        measured.append((kind, rows, inputs))
        return found

    monkeypatch.setattr(products, "measure", measure)
    return found, measured


@pytest.mark.parametrize(("rate", "wins"), [(50, False), (100, False), (110, False), (120, True)])
def test_onednn_must_be_clearly_faster(rates, rate, wins):
    """Else torch computes: a small lead would be decided by chance."""
    rates[0]["onednn"] = rate
    assert products.by_onednn("forward", 1000, 1 << 20) is wins


def test_a_class_is_measured_once(rates):
    """Shapes share few classes, of each kind; those of small weights are never measured."""
    _, measured = rates
    for rows in (1, 8, 32, 33, 10_000):
        for weights in (64 * 64, 128 * 128, 256 * 1024, 768 * 768, 4096 * 4096):
            for kind in products.KINDS:
                products.by_onednn(kind, rows, weights)
    assert sorted(measured) == sorted(products.CLASSES)
    assert len(measured) == 16


def test_the_switch(rates, monkeypatch):
    """MAR_PRODUCTS: torch or oneDNN for all, without a measurement; another value is refused."""
    for mode, expected in (("torch", False), ("onednn", True)):
        monkeypatch.setattr(products, "mode", mode)
        assert products.by_onednn("weights", 100, 1 << 20) is expected
        assert len(products.settle()) == 2 + 16 * expected
    assert not rates[1]
    for value, mode in (("torch", "torch"), ("", "auto")):
        monkeypatch.setenv("MAR_PRODUCTS", value)
        assert runpy.run_path(products.__file__)["mode"] == mode
    monkeypatch.setenv("MAR_PRODUCTS", "mkl")
    with pytest.raises(ValueError, match="MAR_PRODUCTS=mkl: expected auto, torch, onednn"):
        runpy.run_path(products.__file__)


def test_a_resumed_run_keeps_its_choices(rates, monkeypatch):
    """They are texts, adopted without a measurement; those of another machine are not."""
    rates[0]["onednn"] = 200.0
    found = products.settle()
    assert len(found) == 18 and products.by_onednn("packed", 8, 1 << 20)
    rates[0]["onednn"] = 10.0
    rates[1].clear()
    products.chosen.clear()
    products.FILE.unlink()
    products.adopt(found)
    assert products.settle() == found and not rates[1]
    products.chosen.update(dict.fromkeys(products.CLASSES, False))  # as by the file, or before
    products.adopt(found)
    assert products.settle() == found
    for torn in (None, {}, {"record": None}, {"record": [1]}):
        assert products.stored(torn) is None
    assert products.stored({"record": {"products": found}}) is found
    for other in (["6502", *found[1:]], [found[0], "999 threads", *found[2:]], None, "torn", [1]):
        products.chosen.clear()
        products.FILE.unlink(missing_ok=True)
        products.adopt(other)
        assert products.settle() == found[:2]


def test_later_runs_choose_the_same(rates, monkeypatch):
    """From a file, by processor, threads and torch; one that makes no sense counts for nothing."""
    rates[0]["onednn"] = 200.0
    assert products.by_onednn("forward", 100, 1 << 20)
    rates[0]["onednn"] = 10.0
    products.chosen.clear()
    assert products.by_onednn("forward", 100, 1 << 20)
    assert not products.by_onednn("packed", 100, 1 << 20)  # not measured before
    assert len(rates[1]) == 2
    monkeypatch.setattr(products.torch, "get_num_threads", lambda: 999)
    with monkeypatch.context() as patch:
        patch.setattr(products, "_busy", lambda: True)
        assert not products.by_onednn("inputs", 100, 1 << 20)
    assert len(json.loads(products.FILE.read_text())) == 1  # not what was timed on a busy machine
    products.chosen.clear()
    assert not products.by_onednn("forward", 100, 1 << 20)
    assert len(json.loads(products.FILE.read_text())) == 2
    monkeypatch.undo()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"MACHINE": 5}', '{"MACHINE": {"a": 1}}'])
def test_a_broken_file_is_no_error(rates, monkeypatch, content):
    """Nor one that cannot be written: then every run measures anew."""
    products.FILE.parent.mkdir()
    products.FILE.write_text(content.replace("MACHINE", products._machine()))
    assert not products.by_onednn("forward", 100, 1 << 20) and len(rates[1]) == 1
    monkeypatch.setattr(products, "FILE", products.FILE / "below a file")
    products.chosen.clear()
    assert not products.by_onednn("forward", 100, 1 << 20) and len(rates[1]) == 2


def test_operators_that_fail_are_given_up(monkeypatch, capsys):
    """With a note, once: they are private to torch, and may change."""

    def fail(*args):
        raise RuntimeError("no such overload")

    monkeypatch.setattr(products, "onednn", fail)
    assert not products._able_bf16.__wrapped__()
    layer = linear.Linear(256, 256)
    x = torch.randn(5, 256)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer(x).sum().backward()
    assert capsys.readouterr().out.count("no such overload") == 1
    monkeypatch.setattr(products, "_available", False)
    assert len(products.settle()) == 2


def test_whatever_the_defaults_are(both):
    """A measurement is of float32 on the CPU, also where tensors are made as something else."""
    with torch.device("meta"):
        pair = products._products("forward", 4, 6, 8)
    assert {(y.device.type, y.dtype) for y in (f() for f in pair)} == {("cpu", torch.float32)}


@pytest.mark.parametrize("kind", products.KINDS)
def test_measured_products_are_those_of_a_layer(both, kind):
    """Both libraries compute the same, of the shape that the layer has; rates are positive."""
    pair = products._products(kind, 6, 128, 192)
    ours, theirs = (product() for product in pair)
    assert torch.equal(ours, theirs)
    shapes = {"inputs": (6, 128), "weights": (192, 128)}
    assert ours.shape == shapes.get(kind, (6, 192))
    assert all(rate > 0 for rate in products.measure(kind, 6, 128, 192).values())


def test_a_mixture(both, monkeypatch):
    """Each of the three products of a layer may come from another library."""
    torch.manual_seed(0)
    x, results = torch.randn(40, 192), []
    for winner in ("forward", "inputs", "weights", None):
        monkeypatch.setattr(products, "_choice", lambda kind, *rest, winner=winner: kind == winner)
        leaves = [x.clone().requires_grad_(), torch.ones(150, 192).requires_grad_()]
        linear.linear(*leaves).square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
    for found in results[:-1]:
        for ours, theirs in zip(found, results[-1], strict=True):
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
