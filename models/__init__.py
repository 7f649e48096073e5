"""Builds models and tokenizers by name, and restores a model from a checkpoint.

A configuration is a plain dict with three entries: `model` (name and keyword arguments),
`tokenizer` (the same) and `sampling` (a models.settings.Sampling). Our checkpoints contain it; for
a published one it is inferred from the weights and the stored flags. Importing this module does not
import torch.
"""

from inspect import signature

from models.settings import MODELS, Sampling
from models.settings import TOKENIZERS as TOKENIZERS


def build_model(name, **kwargs):
    """A new model. Raises ValueError for an unknown name, and for unknown arguments."""
    model = MODELS[name](**kwargs)
    model.config = {"model": {"name": name, **kwargs}}
    return model


def arguments_of_tokenizer(name, **offered):
    """The offered arguments that a tokenizer of this name takes, such as vae_path or channels."""
    known = signature(TOKENIZERS[name]).parameters
    return {key: value for key, value in offered.items() if key in known}


def build_tokenizer(name=None, vae_path=None, scale=None, shift=None, **kwargs):
    """A new tokenizer. Raises ValueError for an unknown name, or for arguments that do not fit.

    name: a row of TOKENIZERS; None for what the file says of itself. vae_path: file with its
    weights, if it has any. scale, shift: each a number or one per channel; None for the values in
    the file, else the tokenizer's defaults.
    """
    if name is None and vae_path:
        from models.tokenizer_file import read_own

        name = read_own(vae_path)["tokenizer"]
    build = TOKENIZERS[name]
    kwargs |= {"vae_path": vae_path, "scale": scale, "shift": shift}
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    if "vae_path" in kwargs and not arguments_of_tokenizer(name, vae_path=vae_path):
        raise ValueError(f"vae_path {vae_path}: the tokenizer {name} has no weights")
    if "vae_path" not in kwargs and arguments_of_tokenizer(name, vae_path=None):
        raise ValueError(f"tokenizer {name}: expected vae_path, the file of its weights")
    tokenizer = build(**kwargs)
    tokenizer.config = {"name": name, **kwargs}
    return tokenizer


def load_model(path, weights="ema", **overrides):
    """(model in evaluation mode, configuration) from one of our checkpoints or a published one.

    path: a file, a folder that holds one or was written by `save_pretrained`, or the name of a
    repository of the Hugging Face hub. weights: "ema", "raw", or the name of a further average, see
    util/averages.py. overrides: arguments of the model to replace, e.g. num_sampling_steps; those
    that are settings of sampling replace the stored ones, too. The model's attribute `config` is
    the configuration. Raises ValueError for weights that are not there, and for a file that is no
    such checkpoint.
    """
    from models.fast import products
    from models.stored import facts_of
    from util.checkpoint import find_weights, load_checkpoint, weights_in
    from util.weights import load_strictly

    path = find_weights(path)
    checkpoint = load_checkpoint(path)
    held = weights_in(checkpoint)
    if weights not in held:
        raise ValueError(f"weights {weights!r}: expected {' or '.join(map(repr, held))}")
    products.adopt(products.stored(checkpoint))
    config = checkpoint_config(checkpoint, path)
    own = {name: value for name, value in overrides.items() if value is not None}
    arguments = {**config["model"], **own}
    model = build_model(**arguments)
    if weights == "raw" and checkpoint["model"] is checkpoint["model_ema"]:
        raise ValueError(f"{path}: holds one set of weights only, expected --weights ema")
    load_strictly(model, held[weights], path)
    sampling = config["sampling"] | {k: v for k, v in own.items() if k in Sampling.names()}
    config = {**config, "model": arguments, "sampling": sampling}
    model.config = {**config, **facts_of(checkpoint, config, weights)}
    return model.eval(), model.config


def load(path, weights="ema", **tokenizer):
    """(model in evaluation mode, its tokenizer, configuration) from a checkpoint, see `load_model`.

    tokenizer: arguments of `build_tokenizer` that replace those in the checkpoint, such as
    vae_path. Raises ValueError.
    """
    model, config = load_model(path, weights)
    own = {name: value for name, value in tokenizer.items() if value is not None}
    trained = config["tokenizer"]["name"]
    if not may_share_latents(own.get("name", trained), trained):
        raise ValueError(f"tokenizer {own['name']}: {path} is a model of latents of {trained}")
    tokenizer = build_tokenizer(**{**config["tokenizer"], **own})
    compare_tokenizer(tokenizer, config)
    return model, tokenizer, config


def may_share_latents(name, trained):
    """Whether a model of one tokenizer's latents may be decoded by another: autoencoders alone can
    share them, such as KL-8 and the Consistency Decoder."""
    return name == trained or all(arguments_of_tokenizer(n, vae_path=None) for n in (name, trained))


def compare_tokenizer(tokenizer, config):
    """Say it if a tokenizer is not the one of the training, as far as that is known.

    config: `tokenizer_sha256` and `encoder_sha256` of the training, where they are known, and its
    `tokenizer`, whose file the message names. Raises ValueError if the encoder is another, as the
    model's latents are then not this tokenizer's.
    """
    from util.dist import print0
    from util.weights import digest

    trained, own = config.get("tokenizer_sha256"), digest(tokenizer.state_dict())
    if trained in (None, own):
        return
    encoders = tokenizer.encoder_sha256(), config.get("encoder_sha256")
    path, both = tokenizer.config.get("vae_path"), f"sha256 {own[:12]}, in training {trained[:12]}"
    if None in encoders:
        print0(
            f"NOTE: {path}: the model was trained with other weights of a tokenizer, whose latents "
            f"these may not decode ({both})"
        )
    elif encoders[0] == encoders[1]:
        print0(f"NOTE: {path}: another decoder of the same latents than in training ({both})")
    else:
        file = config.get("tokenizer", {}).get("vae_path")
        file = "the file that it was trained with" if file in (None, path) else file
        raise ValueError(
            f"{path}: not the tokenizer of the model's latents ({both}); expected {file}, or "
            "another decoder of the same latents"
        )


def sampling_of(model, config, **given):
    """The models.settings.Sampling of a loaded model, with `given` settings in place of its own.

    A number of steps that is not given is at most the number of tokens. Raises ValueError.
    """
    own = {name: config["model"].get(name) for name in ("num_sampling_steps", "max_timestep")}
    known = dict(model.usual)
    for values in (own, config["sampling"]):
        known |= {name: value for name, value in values.items() if value is not None}
    sampling = Sampling.of(**{**known, **given})
    if "num_iter" in given:
        return sampling
    return sampling.but(num_iter=min(sampling.num_iter, model.seq_len))


def _data_of_record(record, config):
    """What the record of an earlier version says of the data; {} if that makes no sense."""
    names = record.get("classes") if isinstance(record, dict) else None
    model = config.get("model")
    fits = isinstance(names, list) and isinstance(model, dict)
    if not fits or len(names) != model.get("class_num"):
        return {}
    return {"classes": names, "reading": {"orientation": "stored"}}


def checkpoint_config(checkpoint, source):
    """The configuration of a loaded checkpoint. Raises ValueError if it cannot be determined."""
    from models.published import published_config
    from models.stored import check_config

    config = checkpoint["config"] or published_config(checkpoint, source)
    data = config.get("data") or _data_of_record(checkpoint.get("record"), config)
    if data:
        config = {**config, "data": data}
    check_config(config, checkpoint["model_ema"], source)
    if checkpoint["config"] and config["tokenizer"].get("scale") is not None:
        config["tokenizer"].setdefault("shift", 0.0)  # older files have a scale but no shift
    return config
