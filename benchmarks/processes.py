"""A training step alone and together with other processes, timed: run by `benchmarks.growth`.

torchrun --nproc_per_node=2 -m benchmarks.processes '{"model": "mar_small", …}'
"""

import json
import statistics
import sys
from types import SimpleNamespace

import torch
from torch import distributed

from benchmarks.timing import in_turns
from engine_mar import new_state, optimizer_step
from models import build_model
from models.fast import products
from util import dist
from util.flags import run
from util.precision import autocast, pick_precision
from util.recipe import Recipe
from util.run.loop import unsynchronized


def main(argv=None):
    """Run the script. Its argument: the flags of `benchmarks.growth` as JSON."""
    (flags,) = sys.argv[1:] if argv is None else argv
    found = measure(SimpleNamespace(**json.loads(flags)))
    dist.print0(json.dumps(found))


def measure(args):
    """Median seconds of a step of process 0 alone, of all without and with all-reduce, and of an
    all-reduce by itself, in turns; all processes call this. Also the numbers of parameters and of
    threads of a process."""
    device = dist.init(args.device)
    precision = precision_of(device)
    products.settle()
    model = build_model(args.model, img_size=args.sides[0], vae_stride=1).to(device)
    together = dist.wrap(model, device)
    count = sum(p.numel() for p in model.parameters())
    gradients = torch.zeros(count, device=device)
    how = args.batch_size, device, precision
    alone, step = training_step(model, *how), training_step(together, *how)

    def unsynced():
        with unsynchronized(together):
            step()

    functions = {
        "alone": lambda: dist.is_main() and alone(),
        "without": unsynced,
        "together": step,
        "all_reduce": lambda: dist.world_size() > 1 and distributed.all_reduce(gradients),
    }
    functions = {name: _in_step(function) for name, function in functions.items()}
    seconds = in_turns(functions, args.rounds, device)
    counts = {"parameters": count, "threads": torch.get_num_threads()}
    return {name: statistics.median(x) for name, x in seconds.items()} | counts


def precision_of(device):
    """The precision that is timed: bf16 on a GPU."""
    return pick_precision("bf16" if device.type == "cuda" else "fp32", device)


def _in_step(function):
    """A function that all processes begin, and end, at the same time."""

    def call():
        dist.barrier()
        function()
        dist.barrier()

    return call


def training_step(network, bsz, device, precision):
    """A function that takes a whole training step: forward, backward, clipping, AdamW, EMA.

    network: a model, or a `dist.wrap` of one. Each call draws the same.
    """
    model = dist.unwrap(network)
    state = new_state(model, Recipe().resolved(1), device, precision, bsz)
    shape = bsz, model.vae_embed_dim, *(n * model.patch_size for n in (model.seq_h, model.seq_w))
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.arange(bsz, device=device) % model.class_num

    def step():
        model.train()
        generators = torch.Generator(device).manual_seed(0), torch.Generator().manual_seed(0)
        with autocast(device, precision):
            loss = network(latents, labels, *generators)
        loss.backward()
        optimizer_step(model, state.optimizer, state.scaler, 3.0)
        state.ema.update(model)

    return step


if __name__ == "__main__":
    run(main)
