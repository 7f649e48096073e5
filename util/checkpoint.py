"""Checkpoints: what a run needs to go on, and what sampling needs to rebuild model and tokenizer.

A file is a dict with the entries of the published code, which therefore loads it: `model`,
`model_ema`, `optimizer`, `epoch`, `args` and, in fp16 only, `scaler`. Beside them, `config` is a
plain dict that says how to build the model and the tokenizer and how to sample.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from util.files import replacing
from util.weights import read_file

LAST = "checkpoint-last.pth"


def save_checkpoint(path, model, ema, optimizer, scaler, epoch, config, args):
    """Write the state after `epoch` to `path`, in such a way that a crash leaves the old file."""
    state = {
        "model": model.state_dict(),
        "model_ema": ema.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": epoch,
        "args": dict(args),
        "config": config,
    }
    if scaler.is_enabled():  # the published code cannot load the state of a disabled one
        state["scaler"] = scaler.state_dict()
    with replacing(path) as beside:
        torch.save(state, beside)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())


def find_checkpoint(path):
    """The checkpoint file that `path` names: itself, or the last one in that folder; or None."""
    path = Path(path)
    path = path / LAST if path.is_dir() else path
    return path if path.is_file() else None


def load_checkpoint(path):
    """What is in a checkpoint: ours, a published one, or an EMA export. A dict.

    `model` and `model_ema` are always there, `args` is a dict, `config` is None in a published
    file. Raises ValueError where the file is missing, damaged or no such checkpoint.
    """
    if Path(path).suffix == ".safetensors":
        return _load_export(path)
    content = read_file(path)
    if not isinstance(content, dict) or "model" not in content:
        held = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: no MAR checkpoint: expected an entry 'model', found {held}")
    args = content.get("args", {})
    return {
        "model_ema": content["model"],
        "config": None,
        **content,
        "args": args if isinstance(args, dict) else vars(args),
    }


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
