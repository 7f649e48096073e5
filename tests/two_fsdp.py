"""Run by torchrun from test_fsdp.py: the same training with DDP and with --fsdp."""

import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from sharing import CPU, Batches

import engine_mar
import main_mar
from models.ar import ar_tiny
from models.dit import dit_tiny
from models.mar import mar_tiny
from models.tokenizer import PixelTokenizer
from util import dist
from util.checkpoint import LAST
from util.recipe import Recipe
from util.run import loop

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
    "plain": ("mar", {}, {}),
    "fused": ("mar", {}, {}),
    "clipped": ("mar", {}, {"grad_clip": 0.5}),
    "accumulated": ("mar", {}, {"accum_iter": 2}),
    "fp16": ("mar", {}, {"precision": "fp16"}),
    "bf16": ("mar", {}, {"precision": "bf16"}),
    "checkpointed": ("mar", {"grad_checkpointing": True}, {}),
    "ar": ("ar", {}, {}),
    "dit": ("dit", {}, {}),
    "l2": ("l2", {}, {}),
    "options": ("mar", {"qk_norm": True, "rope": True, "swiglu": True, "known_noise": 0.5}, {}),
}
ADAMW = torch.optim.AdamW


class Log:
    """Keeps the metrics of every line."""

    def __init__(self):
        self.lines = []

    def scalars(self, metrics, step, epoch):
        self.lines.append({n: x for n, x in metrics.items() if n.startswith(("loss", "grad"))})


class Unfused(ADAMW):
    """Its result for a number does not depend on where in a vector this is."""

    def __init__(self, *args, fused, **how):
        super().__init__(*args, **how)


def start(name, options, precision, fsdp):
    """A TrainState with weights that are all used: many would start at 0."""
    torch.manual_seed(0)
    model = MODELS[name](**options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    recipe = Recipe(lr=1e-3, ema_images=(7, 13), fsdp=fsdp)
    state = engine_mar.new_state(model, recipe, CPU, precision, 1)
    state.scaler._init_scale = 2.0**21  # the first steps overflow, and are skipped
    return state


def train(state, **how):
    """Two epochs of six batches; returns the metrics of every step."""
    log, parallel = Log(), dist.wrap(state.model, CPU)
    for epoch in range(2):
        engine_mar.train_one_epoch(
            parallel,
            PixelTokenizer(1),
            Batches(6),
            state.optimizer,
            state.scaler,
            state.emas,
            epoch,
            learning_rate=lambda epoch: 1e-3,
            device=CPU,
            logger=log,
            log_every=1,
            **{"grad_clip": 0, **how},
        )
    return log.lines


def compare(folder, names):
    """Each case with DDP and sharded: its metrics, checkpoint and networks to sample from."""
    for case in names:
        name, options, how = CASES[case]
        torch.optim.AdamW = ADAMW if case == "fused" else Unfused
        for fsdp in (False, True):
            state = start(name, options, how.get("precision"), fsdp)
            lines = train(state, **how)
            state.save(folder / f"{case}-{fsdp}.pth", None, {})
            networks = {name: state.network(name).state_dict() for name in state.networks()}
            if dist.is_main():
                torch.save({"lines": lines, **networks}, folder / f"{case}-{fsdp}-rest.pth")


def check(folder, rest):
    """What shows only in the processes, each of which prints a line at the end."""
    state = start("mar", {}, "fp32", True)
    images, labels = Batches(1).parts[0]
    for last in (False, True):
        with nullcontext() if last else loop.unsynchronized(state.model):
            state.model(images, labels).backward()
        found = {parameter.grad is not None for parameter in state.model.parameters()}
        assert found == {last}, "gradients are reduced after the last batch, and only then"
    weight = state.ema.module.z_proj.bias
    if dist.rank() == 1:
        dist.own_part(weight.detach())[-1] = float("nan")
    try:
        state.save(folder / "nan.pth", None, {})
    except FloatingPointError as error:
        print(f"rank {dist.rank()}: {error}")


def resume(folder, common):
    """Runs from each other's checkpoints, from within an epoch: ddp, fsdp, ddp-fsdp, fsdp-ddp."""
    for first in ("ddp", "fsdp"):
        more = ["--save_steps", "3", "--keep", "9"] + ["--fsdp"] * (first == "fsdp")
        main_mar.main([*common, *more, "--output_dir", str(folder / first)])
    for first, then in (("ddp", "fsdp"), ("fsdp", "ddp")):
        other = folder / f"{first}-{then}"
        if dist.is_main():
            other.mkdir()
            shutil.copy(folder / first / "checkpoint-step00000006.pth", other / LAST)
        dist.barrier()
        more = ["--resume", str(other)] + ["--fsdp"] * (then == "fsdp")
        main_mar.main([*common, *more, "--output_dir", str(other)])


if __name__ == "__main__":
    dist.init("cpu")
    what, folder, *rest = sys.argv[1:]
    {"compare": compare, "check": check, "resume": resume}[what](Path(folder), rest)
    dist.cleanup()
