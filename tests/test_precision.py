"""Number types. Run: python -m pytest tests/test_precision.py"""

import pytest
import torch
from rule import by_rule, rule_input

from models.mar import mar_tiny
from util import processor
from util.flags import PRECISIONS
from util.precision import DTYPES, NEEDED, autocast, full_precision, pick_precision

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restored():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


@pytest.mark.parametrize("name", ["auto", *PRECISIONS])
def test_what_float32_is_made_of(name):
    """Products of TF32 only for tf32; convolutions as torch has them, but for fp32."""
    assert pick_precision(name, CPU) == ("fp32" if name == "auto" else name)
    assert torch.get_float32_matmul_precision() == ("high" if name == "tf32" else "highest")
    assert torch.backends.cudnn.allow_tf32 == (name != "fp32")


@pytest.mark.parametrize("name", PRECISIONS)
def test_autocast_and_full_precision(name):
    """Products are in the type of the precision, within full_precision in that of their factors."""
    pick_precision(name, CPU)
    before, x = torch.get_float32_matmul_precision(), torch.ones(2, 2)
    with autocast(CPU, name):
        assert (x @ x).dtype == (DTYPES.get(name, torch.float32))
        with full_precision("cpu"):
            assert (x @ x).dtype == torch.float32
            assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("name", NEEDED)
def test_a_cpu_without_instructions_for_a_precision_is_noted(monkeypatch, capsys, name):
    """In one line, if the precision is asked for; nothing is said of a CPU that has them."""
    monkeypatch.setattr(processor, "instructions", lambda: ["AVX-512"])
    pick_precision("auto", CPU)
    assert not capsys.readouterr().out
    assert pick_precision(name, CPU) == name
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and f"NOTE: --precision {name} is slower than fp32" in lines[0]
    monkeypatch.setattr(processor, "instructions", lambda: [NEEDED[name][1]])
    pick_precision(name, CPU)
    assert not capsys.readouterr().out


@pytest.fixture(scope="module")
def model():
    return by_rule(mar_tiny(img_size=64, class_num=10, buffer_size=8, num_sampling_steps="10"))


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_bf16_trains_and_samples_as_float32_does(model):
    """With the same draws: gradients and samples differ by rounding, weights stay float32."""
    latents, labels = rule_input("latents", (4, 16, 4, 4)), torch.arange(4)
    grads, samples = [], []
    for name in ("bf16", "fp32"):
        model.zero_grad(set_to_none=True)
        with autocast(CPU, name):
            loss = model(latents, labels, torch.Generator().manual_seed(0))
        assert loss.dtype == torch.float32
        loss.backward()
        grads.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
        settings = {"num_iter": 4, "cfg": 2.0, "labels": labels}
        with autocast(CPU, name), torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            samples.append(model.sample_tokens(4, generator=generator, **settings))
    assert grads[0].dtype == samples[0].dtype == torch.float32
    assert 0 < relative(*grads) < 0.03  # 0.011 was measured
    assert 0 < relative(*samples) < 0.03  # 0.010
