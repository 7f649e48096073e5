"""The configuration in a checkpoint is checked before anything is built from it.

It names sizes, and a size that is no size of these weights could take all memory, or for ever.
"""

from argparse import ArgumentTypeError
from inspect import signature
from typing import get_args

from models.settings import MODELS, TOKENIZERS, Model, Sampling
from util.data.settings import Reading
from util.files import first_line
from util.plain import is_count, is_number
from util.recipe import Recipe
from util.settings import destination
from util.stored import expect

PARTS = ("model", "tokenizer", "sampling")
KINDS = {int: (int,), float: (int, float), tuple: (list, tuple)}  # field -> stored values
TEXTS = ("precision", "flags", "title", "license", "data")  # what is said; all else are numbers
DEPTHS = ("diffloss_d", "depth", "encoder_depth", "decoder_depth")


# ---- what a checkpoint says besides --------------------------------------------------------------


def facts_of(checkpoint, config, weights):
    """What a checkpoint says besides its configuration: further entries of it, name -> value.

    tokenizer_sha256, encoder_sha256: of the weights of the tokenizer of the training, and of those
    that its latents depend on; training: numbers by name, with the rate or half-life of the EMA if
    these are the weights, and `flags`, those that are not the defaults. weights: their name.
    """
    record = checkpoint.get("record") or {}
    facts = digests_of(checkpoint)
    if checkpoint["args"]:
        facts["training"] = _training(checkpoint, record, config["model"])
        facts["training"] |= _average(checkpoint["args"], weights)
    return facts


def _average(args, weights):
    """The half-life in images, or the rate, of averaged weights by the flags of their run."""
    if weights == "raw":
        return {}
    if weights != "ema":
        return {"ema_images": int(weights.removeprefix("ema_"))}
    images = args.get("ema_images")
    said = {"ema_images": images[0]} if images else {"ema_rate": args.get("ema_rate")}
    return {name: value for name, value in said.items() if is_number(value)}


def digests_of(checkpoint):
    """tokenizer_sha256 and encoder_sha256 of a checkpoint, see `facts_of`, if it has them."""
    record, config = checkpoint.get("record") or {}, checkpoint["config"] or {}
    names = {"tokenizer_sha256": "tokenizer", "encoder_sha256": "encoder"}
    found = {name: record.get(entry, config.get(name)) for name, entry in names.items()}
    return {name: value for name, value in found.items() if _is_name(value)}


def _training(checkpoint, record, model):
    from util.checkpoint import steps_done  # which imports torch

    said = {"images": record.get("images"), "batch": record.get("total_batch")}
    said |= {"rate": record.get("lr"), "precision": record.get("precision")}
    if is_count(checkpoint.get("epoch")):
        said["epochs"] = checkpoint["epoch"] + 1
    if "optimizer" in checkpoint:
        said["steps"] = steps_done(checkpoint)
    said["flags"] = " ".join(_flags(checkpoint["args"], model))
    return {name: value for name, value in said.items() if _is_said(name, value)}


def _flags(args, model):
    """The flags of a training that are not the defaults, without those that weights fix."""
    if args.get("preset"):
        yield f"--preset {args['preset']}"
    fields = [f for f in Model.fields() if destination(f) and not f.metadata.get("fixed")]
    values = args | {destination(field): model.get(field.name) for field in fields}
    for field in [*fields, *Recipe.fields()]:
        value = values.get(destination(field))
        if field.metadata.get("nargs") == "+" and isinstance(value, list):
            value = " ".join(map(str, value))
        if value not in (None, field.default) and type(value) in (bool, int, float, str):
            flag = f"--{field.metadata['flag'] or field.name}"
            yield flag if isinstance(value, bool) else f"{flag} {value}"


# ---- the configuration ---------------------------------------------------------------------------


def check_config(config, weights, path):
    """Raises ValueError unless a configuration is one of a model with these weights.

    weights: name -> tensor.
    """
    for part in PARTS:
        values = config.get(part)
        fits = isinstance(values, dict) and all(isinstance(name, str) for name in values)
        expect(fits, path, f"config's {part}", values, "values by name")
    _check_settings(Model, config["model"], path, "model")
    _check_sampling(config["sampling"], path)
    _check_tokenizer(config["tokenizer"], config["model"].get("vae_embed_dim"), path)
    range_ = config.get("latent_range", 0.0)
    expect(is_number(range_) and range_ >= 0, path, "config's latent_range", range_, "a number")
    _check_data(config.get("data") or {}, config["model"].get("class_num"), path)
    origin = config.get("init_from") or {}
    fits = isinstance(origin, dict) and all(map(_is_name, [*origin, *origin.values()]))
    expect(fits, path, "config's init_from", origin, "texts by name")
    _check_said(config, path)
    _check_sizes(config["model"], weights, path)


def check_made(made, path):
    """Raises ValueError unless what a picture was made by, see util.provenance, is known here."""
    _check_sampling(made["sampling"], path)
    _check_tokenizer(made["tokenizer"], None, path)


def _check_sampling(values, path):
    _check_settings(Sampling, values, path, "sampling")
    for name in values:
        expect(name in Sampling.names(), path, "config's sampling", name, "a known setting")


def _check_data(data, class_num, path):
    """Check what a configuration says of the training data, see util.data.facts_of."""
    expect(isinstance(data, dict), path, "config's data", data, "values by name")
    classes, counts = data.get("classes") or [], data.get("counts") or []
    for entry, values, fits in (("classes", classes, _is_name), ("counts", counts, is_count)):
        good = isinstance(values, list) and len(values) in (0, class_num) and all(map(fits, values))
        expect(good, path, f"config's data {entry}", values, f"one for each of {class_num} classes")
    reading = data.get("reading", {})
    expect(isinstance(reading, dict), path, "config's data reading", reading, "values by name")
    _check_settings(Reading, reading, path, "data reading")


def _check_said(config, path):
    """Check the entries of `facts_of`, and what models that are passed on say besides."""
    for entry in ("tokenizer_sha256", "encoder_sha256", "weights_sha256"):
        value = config.get(entry)
        expect(value is None or _is_name(value), path, f"config's {entry}", value, "a text")
    for entry in ("training", "about"):
        values = config.get(entry, {})
        fits = isinstance(values, dict) and all(map(_is_name, values))
        fits = fits and all(_is_said(*each) for each in values.items())
        expect(fits, path, f"config's {entry}", values, "texts and numbers by name")


def _is_said(name, value):
    """Whether a value is of the kind that an entry of config's training or about has."""
    return _is_name(value) if name in TEXTS else is_number(value)


def _is_name(value):
    return isinstance(value, str)


def _check_settings(cls, values, path, part):
    """Check the values that have fields of a Settings class by the types of these."""
    for field in cls.fields():
        value = values.get(field.name)
        if value is None:
            continue
        entry, details = f"config's {part} {field.name}", field.metadata
        types = get_args(field.type) or (field.type,)
        kinds = [kind for each in types for kind in KINDS.get(each, (each,))]
        if field.name == "num_sampling_steps":
            kinds = (str, int)
        expected = " or ".join(each.__name__ for each in types)
        expect(type(value) in kinds, path, entry, value, f"a value of type {expected}")
        if count := details.get("nargs"):
            expect(len(value) == count, path, entry, value, f"{count} values")
        if "choices" in details:
            expect(value in details["choices"], path, entry, value, "a known name")
        for each in value if isinstance(value, list | tuple) else [value]:
            _check_by_flag(details.get("type", str), each, path, entry)


def _check_by_flag(convert, value, path, entry):
    """Check a value as its flag would be."""
    try:
        convert(str(value))
    except (ArgumentTypeError, ValueError) as error:
        raise ValueError(f"{path}: {entry}: {first_line(error)}") from None


def _check_tokenizer(own, channels, path):
    """Check the arguments of a tokenizer of latents with so many channels."""
    from models.scale import check_numbers

    name = own.get("name")
    known = isinstance(name, str) and name in TOKENIZERS
    expect(known, path, "config's tokenizer", name, "the name of a tokenizer")
    takes = {"name", "vae_path", "scale", "shift", *signature(TOKENIZERS[name]).parameters}
    for key, value in own.items():
        entry = f"config's tokenizer {key}"
        expect(key in takes, path, entry, value, f"no such argument of {name}")
        numbers = value if isinstance(value, list | tuple) else [value]
        fits = all(each is None or is_number(each) for each in numbers)
        if key in ("name", "vae_path"):
            fits = value is None or isinstance(value, str)
        expect(fits, path, entry, value, "a number, or one per channel")
        if key in ("scale", "shift"):
            entry = f"{path}: {entry}"
            check_numbers(entry, value, channels or len(numbers), positive=key == "scale")
        if key in ("channels", "patch_size", "stride"):
            expect(is_count(value, 1, 2**16), path, entry, value, "an integer, at least 1")


def _check_sizes(arguments, weights, path):
    """Check the arguments of a model by building it without memory, to compare it with weights."""
    import torch

    from util.weights import check_fits

    arguments = dict(arguments)
    name = arguments.pop("name", None)
    known = isinstance(name, str) and name in MODELS
    expect(known, path, "config's model", name, "the name of a model")
    largest = max(1024, sum(value.numel() for value in weights.values()))
    for key, value in arguments.items():
        for each in value if isinstance(value, list | tuple) else [value]:
            if type(each) is int:
                most = len(weights) if key in DEPTHS else largest
                expect(-1 <= each <= most, path, f"config's model {key}", each, f"at most {most}")
    try:
        with torch.device("meta"):
            model = MODELS[name](**arguments)
    except Exception as error:  # arguments without a field may be anything
        raise ValueError(
            f"{path}: no model can be built from its configuration ({first_line(error)})"
        ) from error
    check_fits(model, weights, path)
