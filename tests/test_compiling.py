"""--compile and its verdict. Run: python -m pytest tests/test_compiling.py"""

import pytest
import torch

from models.mar import mar_tiny
from util.run.compiling import compile_model, verdict


def test_nothing_of_a_run_is_touched(monkeypatch, capsys):
    """Compiling compiles all, says so, and leaves weights, gradients and draws as they were."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compiled.append(self))
    model = mar_tiny(img_size=64, class_num=3)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    state = torch.get_rng_state()
    compile_model(model, 2, torch.device("cpu"), "bf16", 1000)
    assert {module for module, _ in model.to_compile()} == {*compiled}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.statistics() == {} and model.training
    assert "compiled in" in capsys.readouterr().out


def test_what_fits_only_if_compiled(monkeypatch, capsys):
    """Is compiled, and the line says so: less is kept for the backward pass."""
    compiled, model = [], mar_tiny(img_size=64, class_num=3)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compiled.append(self))
    forward = model.head.forward

    def fill(*args, **kw):
        loss = forward(*args, **kw)
        if not compiled:
            raise torch.OutOfMemoryError("out of memory")
        return loss

    monkeypatch.setattr(model.head, "forward", fill)
    compile_model(model, 2, torch.device("cpu"), "fp32", 1000)
    assert "more memory than there is without --compile" in capsys.readouterr().out
    assert compiled and model.statistics() == {}


@pytest.mark.parametrize(
    ("times", "batches", "end"),
    [
        ((10.0, 0.3, 0.2), 101, "which pays after 100 of the run's 101 batches"),
        (
            (10.0, 0.3, 0.2),
            99,
            "pays after 100 batches, and this run has 99 batches: leave out --comp",
        ),
        (
            (10.0, 0.2, 0.2),
            99,
            "It gains nothing, and this run has 99 batches: leave out --co",
        ),
    ],
)
def test_what_pays(times, batches, end):
    """What compiling took over what it saves a batch."""
    line = verdict(*times, batches)
    assert end in line and "compiled in 10.0 s so far" in line
    assert line.startswith("NOTE: ") == ("leave out" in line)
