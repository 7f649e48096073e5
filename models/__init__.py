"""Names to constructors, and a model or tokenizer back from a checkpoint.

A configuration is a plain dict of three: `model` (name and keyword arguments), `tokenizer` (the
same) and `sampling` (how the model was sampled in training). It is what our checkpoints carry; for
a published one it is read off the weights and the stored flags.
"""

import math
from inspect import signature

from models.ar import ar_base, ar_huge, ar_large, ar_tiny
from models.dit import dit_tiny, dit_xl
from models.mar import MAR, mar_base, mar_huge, mar_large, mar_tiny
from models.tokenizer import TOKENIZERS
from util.checkpoint import load_checkpoint
from util.weights import load_strictly

MODELS = {
    "mar_tiny": mar_tiny,
    "mar_base": mar_base,
    "mar_large": mar_large,
    "mar_huge": mar_huge,
    "ar_tiny": ar_tiny,
    "ar_base": ar_base,
    "ar_large": ar_large,
    "ar_huge": ar_huge,
    "dit_tiny": dit_tiny,
    "dit_xl": dit_xl,
}


def build_model(name, **kwargs):
    """A new model. Raises ValueError for an unknown name."""
    return _look_up(MODELS, "model", name)(**kwargs)


def build_tokenizer(name, vae_path=None, **kwargs):
    """A tokenizer, its weights read from vae_path if it has any. Raises ValueError."""
    kwargs = {k: v for k, v in {"vae_path": vae_path, **kwargs}.items() if v is not None}
    build = _look_up(TOKENIZERS, "tokenizer", name)
    if "vae_path" in kwargs and "vae_path" not in signature(build).parameters:
        raise ValueError(f"vae_path {vae_path}: the tokenizer {name} has no weights")
    return build(**kwargs)


def load_model(path, weights="ema", **overrides):
    """(model in evaluation mode, configuration) from a checkpoint, ours or published.

    weights: "ema" or "raw". overrides: arguments of the model to replace, e.g. num_sampling_steps.
    """
    checkpoint = load_checkpoint(path)
    config = checkpoint_config(checkpoint, path)
    settings = {**config["model"], **{k: v for k, v in overrides.items() if v is not None}}
    model = build_model(**settings)
    if weights == "raw" and checkpoint["model"] is checkpoint["model_ema"]:
        raise ValueError(f"{path}: holds one set of weights only, expected --weights ema")
    load_strictly(model, checkpoint["model_ema" if weights == "ema" else "model"], path)
    return model.eval(), {**config, "model": settings}


def checkpoint_config(checkpoint, source):
    """The configuration of a loaded checkpoint. Raises ValueError where it cannot be told."""
    if checkpoint["config"]:
        return checkpoint["config"]
    args = checkpoint["args"]
    return {
        "model": _published_model(checkpoint["model"], args, source),
        "tokenizer": _published_tokenizer(args, source),
        "sampling": {
            "num_iter": args.get("num_iter", 64),
            "cfg": args.get("cfg", 1.0),
            "cfg_schedule": args.get("cfg_schedule", "linear"),
            "temperature": args.get("temperature", 1.0),
        },
    }


def _published_model(weights, args, source):
    """Name and arguments of a published MAR: sizes from its weights, the rest from its flags."""
    missing = {"z_proj.weight", "class_emb.weight", "diffloss.net.input_proj.weight"} - set(weights)
    if missing:
        raise ValueError(f"{source}: not the weights of a MAR: there is no {min(missing)}")
    width, token_dim = weights["z_proj.weight"].shape
    depth = _count(weights, "encoder_blocks") + _count(weights, "decoder_blocks")
    length = weights["diffusion_pos_embed_learned"].shape[1]
    stride, patch = args.get("vae_stride", 16), args.get("patch_size", 1)
    sizes = {
        name: (build.keywords["encoder_embed_dim"], 2 * build.keywords["encoder_depth"])
        for name, build in MODELS.items()
        if build.func is MAR
    }
    names = [name for name, size in sizes.items() if size == (width, depth)]
    if not names:
        raise ValueError(
            f"{source}: a MAR of width {width} with {depth} blocks is none of "
            f"{', '.join(sizes)}; its number of heads cannot be told from the weights"
        )
    return {
        "name": names[0],
        "img_size": math.isqrt(length) * stride * patch,
        "vae_stride": stride,
        "patch_size": patch,
        "vae_embed_dim": token_dim // patch**2,
        "class_num": weights["class_emb.weight"].shape[0],
        "buffer_size": weights["encoder_pos_embed_learned"].shape[1] - length,
        "diffloss_d": _count(weights, "diffloss.net.res_blocks"),
        "diffloss_w": weights["diffloss.net.input_proj.weight"].shape[0],
        "num_sampling_steps": args.get("num_sampling_steps", "100"),
    }


def _published_tokenizer(args, source):
    """The KL tokenizer that a published file's flags mean."""
    flags = args.get("vae_stride", 16), args.get("vae_embed_dim", 16)
    names = {(16, 16): "kl16", (8, 4): "kl8"}
    if flags not in names:
        raise ValueError(
            f"{source}: latents of stride {flags[0]} with {flags[1]} channels, expected those of "
            "kl16 (16, 16) or kl8 (8, 4)"
        )
    return {"name": names[flags], "vae_path": args.get("vae_path")}


def _count(weights, prefix):
    """How many blocks there are below `prefix`."""
    depth = prefix.count(".") + 1
    return len({name.split(".")[depth] for name in weights if name.startswith(prefix + ".")})


def _look_up(table, kind, name):
    if name not in table:
        raise ValueError(f"{kind} {name!r}: expected one of {', '.join(table)}")
    return table[name]
