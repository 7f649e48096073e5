"""What a benchmark ran on: the processor, its instruction sets, the rates of both libraries."""

import torch

from benchmarks import work
from benchmarks.timing import table_lines
from models.fast import products
from util import processor

LARGEST = 6  # products that are shown


def describe(device):
    """The machine and torch, in a line."""
    torch_is = f"torch {torch.__version__}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {torch_is}"
    sets = ", ".join(processor.instructions()) or "instruction sets unknown"
    used = torch.backends.cpu.get_cpu_capability()
    return f"{processor.name()}, threads: {torch.get_num_threads()}; {sets}; {torch_is} with {used}"


# ---- products ------------------------------------------------------------------------------------


def product_lines(model, train_batch, batch_sizes, num_iter):
    """Lines of Markdown with the rates of torch and oneDNN for the products of a model."""
    masked = round((1 + model.mask_ratio_min) / 2 * model.seq_len)
    shapes = work.training_products(model, train_batch, masked)[:LARGEST]
    yield "GFLOP/s of float32, torch / oneDNN; the one that ours takes is bold:\n"
    kinds = "forward", "inputs", "weights"
    titles = ["rows × inputs → outputs", "forward", "inputs' gradient", "weights' gradient"]
    rows = [[_shown(shape), *(_rates(kind, *shape) for kind in kinds)] for shape in shapes]
    yield from table_lines(titles, rows)
    yield "\nFew rows, with weights packed once for all diffusion steps:\n"
    shapes = work.sampling_products(model, batch_sizes, num_iter)
    rows = [[_shown(shape), _rates("packed", *shape)] for shape in shapes]
    yield from table_lines([titles[0], "packed"], rows)


def _shown(shape):
    return "{:,} × {:,} → {:,}".format(*shape)


def _rates(kind, rows, inputs, outputs):
    """The rates of a product as text."""
    onednn = products.by_onednn(kind, rows, inputs * outputs)
    chosen = "onednn" if onednn else "torch"
    rates = products.measure(kind, rows, inputs, outputs).items()
    return " / ".join(f"**{x:.3g}**" if name == chosen else f"{x:.3g}" for name, x in rates)
