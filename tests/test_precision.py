"""Number types. Run: python -m pytest tests/test_precision.py"""

import pytest
import torch

from util.flags import PRECISIONS
from util.precision import DTYPES, autocast, full_precision, pick_precision

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
