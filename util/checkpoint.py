"""Checkpoints, for resuming a run and for rebuilding model and tokenizer to sample.

A file is a dict with the entries of the published code, which can therefore load it: `model`,
`model_ema`, `optimizer`, `epoch`, `args` and, in fp16 only, `scaler`. In addition, `config` is a
plain dict that describes how to build the model and the tokenizer and how to sample, and `format`
is the version of the layout.
"""

import json
import os
from itertools import count
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from util.dist import is_main, print0
from util.files import replacing
from util.weights import load_strictly, read_file

LAST = "checkpoint-last.pth"
FORMAT = 1


def _from_published(content):
    """Convert format 0, of the published code and our first files, to format 1."""
    args = content.get("args", {})
    return {
        "model_ema": content["model"],
        "config": None,
        **content,
        "args": args if isinstance(args, dict) else vars(args),
    }


# n -> function that converts the content of a file from format n to format n + 1
MIGRATIONS = {0: _from_published}


class TrainState:
    """The state of a run between epochs. `epoch` is the next one to train."""

    def __init__(self, model, ema, optimizer, scaler, epoch=0):
        self.model, self.ema, self.optimizer, self.scaler = model, ema, optimizer, scaler
        self.epoch = epoch

    def save(self, path, config, args):
        """Write the state to `path` atomically: after a crash, the old file is still there.

        config: the configuration (see models). args: all flags, name -> value.
        """
        content = {
            "model": self.model.state_dict(),
            "model_ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch - 1,  # the last epoch done, as published
            "args": dict(args),
            "config": config,
            "format": FORMAT,
        }
        if self.scaler.is_enabled():  # the published code cannot load the state of a disabled one
            content["scaler"] = self.scaler.state_dict()
        with replacing(path) as beside:
            torch.save(content, beside)
            with open(beside, "rb") as file:
                os.fsync(file.fileno())

    def load(self, checkpoint, source):
        """Restore a loaded checkpoint: weights alone, or everything if it holds an optimizer.

        source: its path, for messages. Peak learning rate and weight decay remain those of the
        current optimizer. Raises ValueError for weights that do not fit.
        """
        load_strictly(self.model, checkpoint["model"], source)
        load_strictly(self.ema.module, checkpoint["model_ema"], source)
        if "optimizer" not in checkpoint:
            return
        decay = [group["weight_decay"] for group in self.optimizer.param_groups]
        for group in checkpoint["optimizer"]["param_groups"]:
            group |= {
                "fused": True,
                "foreach": None,
            }  # implementation choices, whoever wrote the file
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for group, value in zip(self.optimizer.param_groups, decay, strict=True):
            group["weight_decay"] = value
        self.epoch = checkpoint["epoch"] + 1
        if self.scaler.is_enabled() and checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])


def find_checkpoint(path):
    """The checkpoint file at `path`, or the last one in that folder; None if there is none."""
    path = Path(path)
    path = path / LAST if path.is_dir() else path
    return path if path.is_file() else None


def keep_other(folder, resumed):
    """Rename a checkpoint in `folder` that a run would overwrite without having resumed it.

    resumed: path of the checkpoint that the run resumed, or None.
    """
    path = Path(folder) / LAST
    same = resumed and Path(resumed).resolve() == path.resolve()
    if is_main() and path.is_file() and not same:
        names = (path.with_name(f"{path.stem}-before{n}{path.suffix}") for n in count(1))
        other = next(name for name in names if not name.exists())
        os.replace(path, other)
        print0(f"NOTE: {path} is from another run, not resumed here: it is now {other.name}")


def steps_done(checkpoint):
    """Number of optimizer steps of a loaded checkpoint; its epoch if they are not recorded."""
    states = checkpoint.get("optimizer", {}).get("state", {})
    return int(next(iter(states.values()))["step"]) if states else checkpoint.get("epoch", 0)


def load_checkpoint(path):
    """The content of a checkpoint: ours, a published one, or an EMA export. A dict.

    `model` and `model_ema` are always present, `args` is a dict, `config` is None in a published
    file. Raises ValueError if the file is missing, damaged, not a MAR checkpoint, or of a newer
    format.
    """
    if Path(path).suffix == ".safetensors":
        return _load_export(path)
    content = read_file(path)
    if not isinstance(content, dict) or "model" not in content:
        held = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: no MAR checkpoint: expected an entry 'model', found {held}")
    found = content.get("format", 0)
    if found not in range(FORMAT + 1):
        raise ValueError(
            f"{path}: a checkpoint of format {found}, expected at most {FORMAT}: it was written by "
            "a newer version of this library"
        )
    for number in range(found, FORMAT):
        content = MIGRATIONS[number](content)
    return content


def export_ema(source, path, config):
    """Write the EMA weights of a loaded checkpoint, and `config`, as safetensors."""
    weights = {name: value.contiguous() for name, value in source["model_ema"].items()}
    with replacing(path) as beside:
        save_file(weights, beside, metadata={"config": json.dumps(config)})


def _load_export(path):
    weights = read_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    config = json.loads(metadata["config"]) if "config" in metadata else None
    return {"model": weights, "model_ema": weights, "config": config, "args": {}}
