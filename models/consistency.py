"""The Consistency Decoder (OpenAI 2023) of the diffusers library, an optional dependency.

It decodes the latents of KL-8 in two steps of a consistency model instead of one pass of a decoder.
The network and its two steps are those of the library; our code reads and checks the weights.
"""

import json
from pathlib import Path

from util.weights import load_strictly, read_weights

NAME = "ConsistencyDecoderVAE"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def load_consistency_decoder(path):
    """diffusers' ConsistencyDecoderVAE with the weights at `path`, including the encoder of KL-8.

    path: a folder written by diffusers (config.json beside diffusion_pytorch_model.*), or a weight
    file; without a config.json beside it, the published architecture is assumed.
    Raises ValueError if diffusers is not installed, or the file is missing or does not fit.
    """
    try:
        from diffusers import ConsistencyDecoderVAE
    except ImportError as error:
        raise ValueError(
            "the tokenizer consistency needs the diffusers library "
            f"({error}): pip install 'mar-diffloss[consistency]'"
        ) from None
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in WEIGHTS if (path / name).is_file()]
        path = found[0] if found else path / WEIGHTS[0]
    state = read_weights(path, missing="Expected openai/consistency-decoder as diffusers saves it")
    model = ConsistencyDecoderVAE.from_config(_config(path.parent / "config.json"))
    load_strictly(model, state, path)
    return model


def _config(path):
    """The arguments in a config.json, or {} if there is none."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
        name = config.get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a configuration of diffusers ({error})") from None
    if name != NAME:
        raise ValueError(f"{path}: the configuration of a {name}, expected a {NAME}")
    return config
