"""Folders of the diffusers library: their weights, and the config.json that describes them.

A network's folder holds config.json and diffusion_pytorch_model.*, and a pipeline's has one of
these in vae/. A config.json beside a single file describes it too, if it fits.
"""

import json
from pathlib import Path

from util.dist import print0
from util.files import first_line

STEM = "diffusion_pytorch_model"
WEIGHTS = tuple(
    f"{STEM}{kind}.{ending}" for kind in ("", ".fp16", ".bf16") for ending in ("safetensors", "bin")
)


def weights_file(path):
    """The file of the weights at `path`: itself, or the one in this folder, or in its vae/.

    In a folder without any, the first that was expected.
    """
    if not Path(path).is_dir():
        return path
    places = [Path(path, folder, name) for folder in ("", "vae") for name in WEIGHTS]
    return next((place for place in places if place.is_file()), places[0])


def read_config(path, kind):
    """The config.json beside the weights at `path`; {} if there is none. kind: name of their class.

    Raises ValueError for that of another class. Only a file that has not the name of diffusers may
    have another's beside it, which is ignored.
    """
    source = _config_file(path)
    if not source.is_file():
        return {}
    try:
        config = json.loads(source.read_text("utf-8"))
        found = config.get("_class_name")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        config, found = {}, f"unknown ({first_line(error)})"
    if found == kind:
        return config
    if _is_named_by_diffusers(path):
        raise ValueError(f"{source}: the configuration of class {found!s:.80}, expected {kind}")
    return {}


def check_config(config, path, model):
    """Whether the config.json beside the weights at `path` is of an Autoencoder like this one.

    One without entries is. Raises ValueError, with the first entry that differs, if it has to be,
    or if weights do not show what differs.
    """
    source = _config_file(path)
    if shown := _difference(config, model.as_diffusers()):
        if _is_named_by_diffusers(path):
            raise ValueError(f"{source}: {shown}")
        print0(f"NOTE: {source} is not of {Path(path).name}, and not used: {shown}")
        return False
    if hidden := _difference(config, model.as_diffusers_hidden()):
        raise ValueError(f"{source}: {hidden}")
    return True


def _config_file(path):
    return Path(weights_file(path)).parent / "config.json"


def _is_named_by_diffusers(path):
    return Path(weights_file(path)).name in WEIGHTS


def _difference(config, expected):
    """The first entry that is there and not as expected, in words, or None."""
    for name, value in expected.items():
        if config.get(name, value) != value:
            return f"{name} {config[name]!s:.200}, expected {value}"
    return None
