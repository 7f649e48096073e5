"""Neon: weights led away from a short training on own samples (Alemohammad et al. 2025).

    θ_neon = (1 + w)·θ_base − w·θ_tuned = θ_base + w·(θ_base − θ_tuned)

θ_tuned is θ_base after some training on images that the model sampled. Samplers prefer what the
model holds likely, and so does this training; the way back from it leads nearer to the data.
"""

import json
from pathlib import Path

import numpy as np
import torch

from util.data import shard_writer
from util.data.manifest import read_manifest
from util.data.sources import UNKNOWN, Pictures
from util.files import first_few
from util.outputs import changes
from util.sizes import sides
from util.weights import digest, write_safetensors


def cache_samples(folder, draw, labels, config, tokenizer, sampled, batch_size):
    """Write a sample for each label into a cache of latents without variance, as shards.

    draw: function of a list of indices that gives their latents (n, C, h, w). config: configuration
    of the model (see models). sampled: all that the samples depend on, as plain data. Returns the
    numbers of samples (written, skipped) by all processes. Raises ValueError if the folder holds
    others; Stopped as util.run.stop says, with what was sampled kept.
    """
    if before := read_manifest(folder):
        _compare(folder, sampled, before.get("sampled", {}))
    classes, size = config["data"]["classes"], config["model"]["img_size"]
    facts = {
        "tokenizer": digest(tokenizer.state_dict()),
        "tokenizer_name": config["tokenizer"]["name"],
        "img_size": size,
        "shape": [tokenizer.moment_channels, *sides(size, tokenizer.stride)],
        "dtype": "int32" if tokenizer.num_codes else "float32",
        "classes": classes,
        "flips": False,
        "reading": {"channels": tokenizer.image_channels} if tokenizer.image_channels else {},
        "sampled": sampled,
    }
    if path := config["tokenizer"].get("vae_path"):
        facts["vae_path"] = str(Path(path).absolute())

    def read(batches):
        for indices in batches:
            moments = tokenizer.moments_of(draw(indices).float())
            yield moments.cpu().numpy(), np.full((len(indices), 3), UNKNOWN)

    names = [f"{classes[label]}/{i:06d}" for i, label in enumerate(labels)]
    return shard_writer.write(folder, facts, names, labels, read, batch_size, Pictures(None))


def _compare(folder, sampled, before):
    """Raises ValueError if the samples in a folder depend on other settings."""
    if changed := changes(sampled, before):
        raise ValueError(
            f"{folder}: holds samples of other settings: {first_few(changed)}; expected those, or "
            "another --output_dir"
        )


@torch.no_grad()
def extrapolate(base, tuned, weight):
    """θ_base + w·(θ_base − θ_tuned), name -> tensor; base itself at w = 0.

    Raises ValueError unless both have tensors of the same names and shapes.
    """
    if {k: v.shape for k, v in base.items()} != {k: v.shape for k, v in tuned.items()}:
        raise ValueError("Neon: the tuned weights are of another model than the base")
    return {name: value + weight * (value - tuned[name]) for name, value in base.items()}


def write_merged(path, base, tuned, weight, config):
    """Write extrapolated weights as an export, see util.checkpoint.export_ema.

    config: configuration of the base; its entry `neon` says how it was made.
    """
    about = {**config["neon"], "weight": weight, "base_sha256": digest(base)}
    config = {**config, "neon": {**about, "tuned_sha256": digest(tuned)}}
    weights = extrapolate(base, tuned, weight)
    write_safetensors(path, weights, {"config": json.dumps(config)})
