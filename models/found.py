"""The data to train on, and what a cache and a tokenizer's file say where flags do not."""

from pathlib import Path

from models import fitting, presets
from util.data import CACHE_CHECKED, follow_classes, kind_or_folder, open_data
from util.data.settings import Reading
from util.settings import from_flags


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
        said = of_pictures(args.data_path, from_flags(Reading, args)) if fits else {}
    if "tokenizer" in given and said.get("tokenizer") != args.tokenizer:
        said.pop("vae_path", None)  # the file of another one
    path = args.vae_path if "vae_path" in given else None
    said |= of_file(path) if path else {}
    if said.get("tokenizer", args.tokenizer) != args.tokenizer and "patch_size" not in given:
        args.patch_size = None  # that of the data's usual tokenizer
    for name in said.keys() - given:
        setattr(args, name, said[name])


def open_training_data(args, given, stored):
    """The data set to train on: its images are listed, but not read before `check_data`.

    stored: the configuration in the checkpoint that is resumed, or {}. Raises ValueError.
    """
    from util.data.cached import open_cache

    if not stored:
        complete(args, given)
    if args.use_cached:
        record = Path(args.output_dir) / CACHE_CHECKED
        data = open_cache(args.cached_path, record=record, data_path=args.data_path)
    else:
        size = stored["model"]["img_size"] if stored else args.img_size
        data = open_data(args.data_path, "train", size, from_flags(Reading, args))
    classes = (stored.get("data") or {}).get("classes")
    if stored and not classes:  # of the published code, which sorts names as texts
        classes = sorted(map(str, data.classes))
    follow_classes(data, classes, "the checkpoint")
    return data


def of_pictures(path, reading):
    """Image size and tokenizer for pictures, if no file says more: flag -> value; {} where the kind
    of data has its own."""
    if "img_size" in kind_or_folder(path).defaults:
        return {}
    data = open_data(path, "train", fitting.SIDE, reading)
    smallest = data.smallest_side() if hasattr(data, "smallest_side") else fitting.SIDE
    return {"img_size": fitting.side_for(smallest), "tokenizer": "pixels"}


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
