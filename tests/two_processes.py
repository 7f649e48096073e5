"""Run by torchrun from test_train.py: main_mar.py with something to look at, or to break."""

import os
import sys
from pathlib import Path

import torch

import main_mar
from util.flags import run

what, argv = sys.argv[1], sys.argv[2:]
rank = int(os.environ["RANK"])
folder = Path(argv[argv.index("--output_dir") + 1])
train = main_mar.train


def dump(this, model, *rest):
    """Train, then write what this rank holds, and a loss that only its own images gave."""
    losses, states = [], []
    model.register_forward_hook(lambda module, inputs, output: losses.append(output.item()))
    start = main_mar.start_state
    main_mar.start_state = lambda *args: states.append(start(*args)) or states[0]
    train(this, model, *rest)
    state = {"model": model.state_dict(), "ema": states[0].ema.state_dict(), "loss": losses[0]}
    torch.save(state, folder / f"rank{rank}.pth")


def nan(this, model, *rest):
    """Train with a loss of NaN in the fourth batch of rank 1."""
    calls = []

    def break_loss(module, inputs, output):
        calls.append(1)
        return output * float("nan") if rank == 1 and len(calls) == 4 else output

    model.register_forward_hook(break_loss)
    train(this, model, *rest)


main_mar.train = {"dump": dump, "nan": nan}[what]
run(main_mar.main, argv)
