"""The configuration of a published checkpoint, inferred from its weights and stored flags."""

import math

from models.settings import MODELS

NEEDED = ("z_proj.weight", "class_emb.weight", "diffloss.net.input_proj.weight")


def published_config(checkpoint, source):
    """See `models.checkpoint_config`. Raises ValueError if it cannot be determined."""
    args = checkpoint["args"]
    return {
        "model": _model(checkpoint["model"], args, source),
        "tokenizer": _tokenizer(args, source),
        "sampling": {
            "num_iter": args.get("num_iter", 64),
            "cfg": args.get("cfg", 1.0),
            "cfg_schedule": args.get("cfg_schedule", "linear"),
            "temperature": args.get("temperature", 1.0),
        },
    }


def _model(weights, args, source):
    """Name and arguments of a published MAR: sizes from its weights, the rest from its flags."""
    missing = set(NEEDED) - set(weights)
    if missing:
        raise ValueError(f"{source}: not the weights of a MAR: there is no {min(missing)}")
    token_dim = weights["z_proj.weight"].shape[1]
    length = weights["diffusion_pos_embed_learned"].shape[1]
    stride, patch = args.get("vae_stride", 16), args.get("patch_size", 1)
    return {
        "name": _name(weights, source),
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


def _name(weights, source):
    """The name of the MAR with this width and number of blocks."""
    width = weights["z_proj.weight"].shape[0]
    depth = _count(weights, "encoder_blocks") + _count(weights, "decoder_blocks")
    sizes = {
        (build.keywords["encoder_embed_dim"], 2 * build.keywords["encoder_depth"]): name
        for name, build in MODELS.rows()
        if "encoder_embed_dim" in build.keywords  # of MAR
    }
    if (width, depth) not in sizes:
        raise ValueError(
            f"{source}: a MAR of width {width} with {depth} blocks is none of "
            f"{', '.join(sizes.values())}; its number of heads cannot be inferred from the weights"
        )
    return sizes[width, depth]


def _tokenizer(args, source):
    """The KL tokenizer that the flags of a published file imply."""
    flags = args.get("vae_stride", 16), args.get("vae_embed_dim", 16)
    names = {(16, 16): "kl16", (8, 4): "kl8"}
    if flags not in names:
        raise ValueError(
            f"{source}: latents of stride {flags[0]} with {flags[1]} channels, expected those of "
            "kl16 (16, 16) or kl8 (8, 4)"
        )
    return {"name": names[flags], "vae_path": args.get("vae_path")}


def _count(weights, prefix):
    """The number of blocks below `prefix`."""
    depth = prefix.count(".") + 1
    return len({name.split(".")[depth] for name in weights if name.startswith(prefix + ".")})
