"""Run by torchrun from test_fsdp.py: the same training with DDP and with sharded weights."""

import sys
from pathlib import Path

import torch
from sharing import CPU, Batches

import engine_mar
from models.ar import ar_tiny
from models.dit import dit_tiny
from models.mar import mar_tiny
from models.tokenizer import PixelTokenizer
from util import dist
from util.checkpoint import TrainState
from util.ema import EMA
from util.run import fsdp

SIZES = {"img_size": 8, "vae_stride": 1, "patch_size": 2, "vae_embed_dim": 1, "class_num": 10}
HEAD = {"diffloss_d": 1, "diffloss_w": 32}
MODELS = {
    "mar": lambda **more: mar_tiny(**SIZES, **HEAD, buffer_size=4, **more),
    "ar": lambda **more: ar_tiny(**SIZES, **HEAD, **more),
    "dit": lambda **more: dit_tiny(**SIZES, **more),
    "l2": lambda **more: mar_tiny(**SIZES, buffer_size=4, head="l2", **more),
}
# name -> (model, its further options, arguments of train_one_epoch)
CASES = {
    "plain": ("mar", {}, {"grad_clip": 0}),
    "clipped": ("mar", {}, {"grad_clip": 0.5}),
    "accumulated": ("mar", {}, {"accum_iter": 2, "grad_clip": 0}),
    "checkpointed": ("mar", {"grad_checkpointing": True}, {"grad_clip": 0}),
    "bf16": ("mar", {}, {"precision": "bf16", "grad_clip": 0}),
    "fp16": ("mar", {}, {"precision": "fp16", "grad_clip": 0}),
    "ar": ("ar", {}, {"grad_clip": 0}),
    "dit": ("dit", {}, {"grad_clip": 0}),
    "l2": ("l2", {}, {"grad_clip": 0}),
}


class Log:
    """Keeps the metrics of every line."""

    def __init__(self):
        self.lines = []

    def scalars(self, metrics, step, epoch):
        self.lines.append({n: x for n, x in metrics.items() if n.startswith(("loss", "grad"))})


def start(name, options, precision, sharded):
    """(model to call, TrainState) with weights that are all used: many would start at 0."""
    torch.manual_seed(0)
    model = MODELS[name](**options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ema = EMA(model, 0.9)
    if sharded:
        fsdp.shard(model, ema.module)
    groups = engine_mar.parameter_groups(model, 0.02)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    if sharded:
        fsdp.accept_whole(optimizer)
    # the first steps overflow, and are skipped
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**21, enabled=precision == "fp16")
    return dist.wrap(model, CPU), TrainState(model, ema, optimizer, scaler)


def train(parallel, state, epochs, **how):
    """Train for epochs of six batches; returns the metrics of every step."""
    log = Log()
    for epoch in epochs:
        engine_mar.train_one_epoch(
            parallel,
            PixelTokenizer(1),
            Batches(6),
            state.optimizer,
            state.scaler,
            state.ema,
            epoch,
            learning_rate=lambda epoch: 1e-3,
            device=CPU,
            logger=log,
            log_every=1,
            **how,
        )
    return log.lines


def content(state):
    """The tensors of a TrainState, whole, on rank 0."""
    return fsdp.gathered(
        {
            "model": state.model.state_dict(),
            "ema": state.ema.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
        }
    )


def compare(folder):
    """Every case, with DDP and sharded: its metrics and all that it ends with."""
    for case, (name, options, how) in CASES.items():
        found = []
        for sharded in (False, True):
            parallel, state = start(name, options, how.get("precision"), sharded)
            found.append((train(parallel, state, range(2), **how), content(state)))
        if dist.is_main():
            torch.save(found, folder / f"{case}.pth")


if __name__ == "__main__":
    dist.init("cpu")
    compare(Path(sys.argv[1]))
    dist.cleanup()
