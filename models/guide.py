"""The guide of autoguidance, a weaker model of the same tokens (Karras et al. 2024), from a file.

How it guides is in models/sampling.py.
"""

from models import load_model, may_share_latents
from util.checkpoint import find_weights
from util.weights import digest


def open_guide(path):
    """The model in evaluation mode, with EMA weights, of a checkpoint. Raises ValueError.

    path: as that of models.load_model. To be called before the model itself is loaded, whose
    choices of products then win, see models/fast/products.py.
    """
    try:
        return load_model(find_weights(path))[0]
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"--guide {path}: {reason}") from None


def check_latents(guide, config, path):
    """Raises ValueError if the guide at `path` is known to be of other latents than a model.

    config: configuration of the model (see models).
    """
    ours, theirs = config["tokenizer"], guide.config["tokenizer"]
    if not may_share_latents(theirs["name"], ours["name"]):
        raise ValueError(
            f"--guide {path}: a model of latents of {theirs['name']}, expected {ours['name']}"
        )
    pairs = {name: (ours.get(name), theirs.get(name)) for name in ("scale", "shift")}
    pairs["encoder_sha256"] = config.get("encoder_sha256"), guide.config.get("encoder_sha256")
    for name, (own, other) in pairs.items():
        if None not in (own, other) and own != other:
            raise ValueError(
                f"--guide {path}: its tokenizer's {name} is {other}, expected the model's, {own}"
            )


def facts_of(guide, path):
    """What a PNG says of a guide, see util.provenance.describe. path: as it was given."""
    return {"ckpt": str(path), "sha256": digest(guide.state_dict())}
