"""Which library computes a float32 product on a CPU: torch's own choice, MKL, or oneDNN.

Neither is the faster one everywhere: on an AMD EPYC of Zen 5, oneDNN's products are more than twice
as fast as MKL's, on an Intel Xeon up to a quarter slower, except for few rows. So each class of
shapes is timed at its first use on a machine, for up to a tenth of a second, and oneDNN gets those
for which it is clearly faster. The two differ by rounding, and timings vary: choices are remembered
in a file, so that later runs get the same bits.
"""

import contextlib
import itertools
import json
import os
import time
from functools import cache
from pathlib import Path

import torch
from torch.nn import functional as F

from util import dist, processor
from util.dist import print0
from util.files import cache_folder, first_line, replacing

KINDS = "forward", "packed", "inputs", "weights"  # the last two are gradients
MODES = "auto", "torch", "onednn"
SMALLEST = 128 * 128  # with fewer weights, calling oneDNN costs more than the product
FEW, MANY = 8, 256  # rows of the products that are timed
NARROW, WIDE = 256, 1024  # their inputs and outputs
CLASSES = tuple(itertools.product(KINDS, (FEW, MANY), (NARROW, WIDE)))
MARGIN = 0.9  # of torch's time is what oneDNN may take
LEAST, MOST, BUDGET = 4, 64, 0.05  # rounds of timing, and the seconds after which they end
FILE = cache_folder() / "products.json"  # processor, threads, torch -> class -> choice

chosen = {}  # of CLASSES -> whether oneDNN computes it
_available = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
)
mode = os.environ.get("MAR_PRODUCTS") or "auto"  # a switch, for the user and for benchmarks
if mode not in MODES:
    raise ValueError(f"MAR_PRODUCTS={mode}: expected {', '.join(MODES)}")


def packs_bf16():
    """Whether oneDNN, by which torch computes products in bf16 anyway, is given packed weights."""
    return _available and mode != "torch" and _able_bf16()


@cache
def _able_bf16():
    """Whether it multiplies packed weights in bf16 here: a trial, since all of it is private."""
    weight = torch.ones(16, 16, dtype=torch.bfloat16, device="cpu")
    try:
        onednn(weight, pack(weight))
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError, TypeError):
        return False


def by_onednn(kind, rows, weights):
    """Whether oneDNN computes a product. kind: of KINDS. weights: how many numbers they are."""
    few, narrow = rows <= 4 * FEW, weights <= NARROW * WIDE
    if not rows or weights < SMALLEST:
        return False
    return _choice(
        kind, FEW if few else MANY, NARROW if narrow else WIDE, mode if _available else "torch"
    )


@torch.compiler.assume_constant_result
def _choice(kind, rows, width, mode):
    """Whether oneDNN computes the products of one of CLASSES."""
    if mode != "auto":
        return mode == "onednn"
    found = kind, rows, width
    if found not in chosen:
        _recall()
    if found not in chosen:
        try:
            rates = measure(kind, rows, width, width)
            chosen[found] = rates["torch"] < MARGIN * rates["onednn"]
            _remember()
        except (RuntimeError, TypeError) as error:  # its operators are private and may change
            print0(f"NOTE: all products by torch, those of oneDNN fail here ({first_line(error)})")
            chosen.update(dict.fromkeys(CLASSES, False))
    return chosen[found]


def _recall():
    """Take over the choices of earlier runs, where none is made yet."""
    known = _read().get(_machine(), {})
    for each in CLASSES:
        if isinstance(known, dict) and isinstance(known.get(_name(each)), bool):
            chosen.setdefault(each, known[_name(each)])


def _busy():
    """Whether other programs use the processor, so that timings are not to be relied on."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > os.cpu_count()


def _remember():
    """Write all choices to FILE, if it can be written, unless the machine is busy."""
    if _busy():
        return
    own = {_name(each): choice for each, choice in chosen.items()}
    with contextlib.suppress(OSError, ValueError), replacing(FILE) as path:
        Path(path).write_text(json.dumps({**_read(), _machine(): own}, indent=1))


def _read():
    """The content of FILE; {} if there is none that makes sense."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(FILE.read_text())
        return content if isinstance(content, dict) else {}
    return {}


def _machine():
    return ", ".join([*_here(), f"torch {torch.__version__}"])


def settle():
    """Make all choices, the same on every process; returns them as texts, for a checkpoint.

    A collective call.
    """
    found = dist.broadcast(_choices() if dist.is_main() else None)
    adopt(found)
    return found


def stored(checkpoint):
    """What `settle` returned to the run of a checkpoint; None if it is None or has none."""
    record = (checkpoint or {}).get("record")
    return record.get("products") if isinstance(record, dict) else None


def adopt(found):
    """Choose from now on as the run did to which `settle` returned `found`.

    Nothing happens for None, and for a run with another processor or number of threads.
    """
    if isinstance(found, list | tuple) and [*found[:2]] == _here():
        chosen.update({each: _name(each) in found for each in CLASSES})


def _choices():
    """The processor, the threads, and the names of the classes that are oneDNN's."""
    kind = mode if _available else "torch"
    return [*_here(), *(_name(each) for each in CLASSES if _choice(*each, kind))]


def _here():
    return [processor.name(), f"{torch.get_num_threads()} threads"]


def _name(each):
    return "{} {}x{}".format(*each)


# ---- the products of the two libraries -----------------------------------------------------------


def onednn(x, weight, bias=None):
    """x (..., I), weight (O, I), which may be packed, and bias (O,) give (..., O)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def pack(weight):
    """A copy of a weight (O, I) in oneDNN's own layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


@torch.no_grad()
def measure(kind, rows, inputs, outputs):
    """GFLOP/s of both libraries, "torch" and "onednn" -> number, for a layer (outputs, inputs).

    kind: of KINDS. rows: rows of its inputs.
    """
    pair = dict(zip(MODES[1:], _products(kind, rows, inputs, outputs), strict=True))
    seconds = {name: [] for name in pair}
    end = time.perf_counter() + BUDGET
    with torch.autocast("cpu", enabled=False):
        for turn in range(1 + MOST):
            if turn > LEAST and time.perf_counter() > end:
                break
            for name, product in pair.items():
                begin = time.perf_counter()
                product()
                seconds[name].append(time.perf_counter() - begin)
    flop = 2e-9 * rows * inputs * outputs
    return {name: flop / min(values[1:]) for name, values in seconds.items()}


def _products(kind, rows, inputs, outputs):
    """Functions that compute a product by torch and by oneDNN."""
    shapes = (rows, inputs), (rows, outputs), (outputs, inputs)
    x, grad, weight = (torch.ones(n, dtype=torch.float32, device="cpu") for n in shapes)
    if kind == "weights":
        return lambda: grad.t() @ x, lambda: onednn(grad.t().contiguous(), x.t())
    if kind == "inputs":
        return lambda: grad @ weight, lambda: onednn(grad, weight.t())
    held = pack(weight) if kind == "packed" else weight
    return lambda: F.linear(x, weight), lambda: onednn(x, held)
