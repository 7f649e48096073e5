"""What a cache of latents and a tokenizer's file say of themselves, where flags do not say it."""

from pathlib import Path

from models import fitting, presets
from util.data import kind_or_folder


def complete(args, given):
    """Set tokenizer, its file and the image size, where they are not among the flags given.

    They are those of the cache that is used and of the file that --vae_path names, if
    main_tokenizer.py wrote it; a preset that fits itself to the pictures takes their size. given:
    names of the flags on the command line, which win. Raises ValueError for a cache, a file or a
    picture that is damaged.
    """
    fits = getattr(args, "preset", None) in presets.FITTED
    if getattr(args, "use_cached", False):
        said = of_cache(args.cached_path)
    else:
        said = of_pictures(args.data_path) if fits else {}
    if "tokenizer" in given and said.get("tokenizer") != args.tokenizer:
        said.pop("vae_path", None)  # the file of another one
    path = args.vae_path if "vae_path" in given else None
    said |= of_file(path) if path else {}
    if said.get("tokenizer", args.tokenizer) != args.tokenizer and "patch_size" not in given:
        args.patch_size = None  # that of the data's usual tokenizer
    for name in said.keys() - given:
        setattr(args, name, said[name])


def of_pictures(path):
    """Image size and tokenizer for pictures, if no file says more: flag -> value; {} where the kind
    of data has its own."""
    from util.data import open_data

    if "img_size" in kind_or_folder(path).defaults:
        return {}
    data = open_data(path, "train", 1)
    if not hasattr(data, "smallest_side"):
        return {}
    return {"img_size": fitting.side_for(data.smallest_side()), "tokenizer": "pixels"}


def of_cache(folder):
    """What the manifest of the cache in `folder` says: flag -> value; {} for a published one."""
    from util.data.manifest import read_manifest

    manifest = read_manifest(folder)
    flags = {"tokenizer_name": "tokenizer", "vae_path": "vae_path", "img_size": "img_size"}
    return {flag: manifest[name] for name, flag in flags.items() if manifest.get(name) is not None}


def of_file(path):
    """What the file of a network that main_tokenizer.py trained says: flag -> value; else {}."""
    from util.weights import read_file

    content = read_file(path) if Path(path).is_file() else {}
    config = content.get("config")
    if not isinstance(config, dict) or "network" not in config:
        return {}
    kind = "vq" if "num_codes" in config["network"] else "kl"  # older files do not say it
    return {"tokenizer": config.get("tokenizer", kind), "img_size": config["img_size"]}
