"""The data to train on, and what a cache and a tokenizer's file say where flags do not."""

from pathlib import Path

from models import fitting, presets
from models.tokenizer_file import read
from util.data import CACHE_CHECKED, follow_classes, kind_or_folder, open_data
from util.data.held_out import WithoutShare
from util.data.settings import PLAIN, Reading
from util.dist import print0
from util.settings import from_flags


def complete(args, given):
    """Set tokenizer, its file and the image size, where they are not among the flags given.

    They are those of the cache that is used and of the file that --vae_path names, if
    main_tokenizer.py wrote it; a preset that fits itself to the pictures takes their size, unless
    --init_from has one. Another network has its own scale and shift. given: names of the flags on
    the command line, which win. Raises ValueError for a cache, a file or a picture that is damaged.
    """
    preset = getattr(args, "preset", None)
    fits = preset in presets.FITTED and not args.init_from
    cached = getattr(args, "use_cached", False)
    path = args.vae_path if "vae_path" in given else None
    said, own = of_data(args, given, fits), of_file(path) if path else {}
    chosen = given | (set() if fits else presets.PRESETS.get(preset, {}).keys() - own.keys())
    if not cached:  # data that have one size only
        chosen |= kind_or_folder(args.data_path).defaults.keys() & {"img_size"}
    own = {k: v for k, v in own.items() if k not in settled(args, path, said)}
    source = dict.fromkeys(said, args.cached_path if cached else args.data_path)
    said = {name: value for name, value in {**said, **own}.items() if name not in chosen}
    tell(args, said, source | dict.fromkeys(own, path))
    before = str(Path(args.vae_path or "").absolute())
    another = said.get("tokenizer", args.tokenizer) != args.tokenizer
    if another and "patch_size" not in given:
        args.patch_size = None  # that of the data's usual tokenizer
    if another or said.get("vae_path", before) != before:
        said |= dict.fromkeys({"vae_scale", "vae_shift"} - given)
    for name, value in said.items():
        setattr(args, name, value)


def fit_tokenizer(args, given):
    """Set the flags of main_tokenizer.py that its --preset derives from the pictures.

    given: names of the flags on the command line, which win. Raises ValueError.
    """
    reading = from_flags(Reading, args)
    if "img_size" not in given:
        args.img_size = of_pictures(args.data_path, reading).get("img_size", args.img_size)
    data = open_data(args.data_path, "train", args.img_size, reading)
    own = {name: getattr(args, name) for name in {"tokenizer", "batch_size", "epochs"} & given}
    chosen = fitting.small_tokenizer(len(data), data.channels, args.img_size, **own)
    print0(f"NOTE: {presets.choose(args, given, chosen)} (for {len(data)} images)")


def tell(args, said, source):
    """Say which flags change. said: flag -> value. source: flag -> where that is from."""
    if told := {name: value for name, value in said.items() if value != getattr(args, name)}:
        by = dict.fromkeys(source[name] for name in told)
        print0(f"NOTE: {as_text(told)}, by {' and '.join(by)}")


def settled(args, path, said):
    """Names of what the latents or weights that there are say better than the tokenizer's file.

    path: of that file. said: what the cache says, flag -> value.
    """
    from util.data.manifest import read_manifest

    if getattr(args, "init_from", None):
        return {"img_size"}
    if not (path and getattr(args, "use_cached", False)):
        return set()
    made_by = read_manifest(args.cached_path).get("tokenizer")
    same = made_by is not None and made_by == read(path).get("sha256")
    return said.keys() & ({"img_size", "tokenizer"} if same else {"img_size"})


def open_training_data(args, given, stored):
    """The data set to train on: its images are listed, but not read before `check_data`.

    stored: the configuration in the checkpoint that is resumed, or {}. Raises ValueError.
    """
    from util.data.cached import open_cache

    if not stored:
        complete(args, given)
    if args.use_cached:
        record = Path(args.output_dir) / CACHE_CHECKED
        how = {"record": record, "data_path": args.data_path, "flip": args.flip}
        data = open_cache(args.cached_path, **how)
        check_noted(args, given, data.noted)
        if args.label_file:
            print0(f"NOTE: --label_file {args.label_file} is not used: the cache has its labels")
    else:
        size = stored["model"]["img_size"] if stored else args.img_size
        follow_reading(args, given, (stored.get("data") or {}).get("reading") or {})
        data = open_data(args.data_path, "train", size, from_flags(Reading, args))
    classes = (stored.get("data") or {}).get("classes")
    if stored and not classes:  # of the published code, which sorts names as texts
        classes = sorted(map(str, data.classes))
    follow_classes(data, classes, "the checkpoint")
    before = (stored.get("data") or {}).get("val_share", 0.0) if stored else None
    return without_share(data, args, given, before)


def without_share(data, args, given, before):
    """The data without what --val_share holds out. before: that of the checkpoint, if there is one,
    which was trained on some of the images of another share."""
    if before and "val_share" not in given and not args.val_path:
        print0(f"NOTE: --val_share {before:g}, by the checkpoint")
        args.val_share = before
    if args.val_share and before not in (None, args.val_share):
        print0(
            f"NOTE: --val_share {args.val_share:g}: the checkpoint's run held out {before:g}; if "
            "these are the data of that run, it was trained on images of this share"
        )
    return WithoutShare(data, args.val_share) if args.val_share else data


def follow_reading(args, given, read):
    """Read pictures as in the run that is resumed, where flags do not say how.

    read: name -> value, of that run.
    """
    for name in {"orientation", "background", "flip"} & read.keys() - given:
        setattr(args, name, read[name])


def check_noted(args, given, noted):
    """Raises ValueError for flags that contradict how the pictures of a cache were read.

    noted: name -> value, as far as the cache says.
    """
    from util.data.pictures import pixel_settings

    said = {name: getattr(args, name) for name in Reading.names(pixels=True) if name in given}
    for name, value in pixel_settings(PLAIN.but(**said)).items():
        if said.get(name, "auto") != "auto" and noted.get(name, value) != value:
            raise ValueError(
                f"--{name} {said[name]}: {args.cached_path} holds latents of pictures read with "
                f"{noted[name]}; leave the flag out"
            )


def of_data(args, given, fits):
    """What the data say: flag -> value. fits: whether a preset fits itself to the pictures."""
    if getattr(args, "use_cached", False):
        said = of_cache(args.cached_path)
    else:
        said = of_pictures(args.data_path, from_flags(Reading, args)) if fits else {}
    if "tokenizer" in given and said.get("tokenizer") != args.tokenizer:
        said.pop("vae_path", None)  # the file of another one
    return said


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
    said = read(path)
    return {name: said[name] for name in ("tokenizer", "img_size") if said}


def as_text(flags):
    """Flags, name -> value, as they are given."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in flags.items()}
    return " ".join(f"--{name} {' '.join(map(str, values))}" for name, values in lists.items())
