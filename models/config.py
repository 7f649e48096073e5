"""The arguments of a model, resolved from the flags, the tokenizer and a checkpoint."""

import math
from inspect import signature

import models
from models import arguments_of_tokenizer, presets
from models.autoregressive import HEAD_DEFAULTS
from models.fitting import Facts, patch_for
from models.options import options_of
from models.settings import HEADS, MODELS, USUAL, Model, Sampling
from util.data import kind_or_folder, match_channels
from util.data.classes import are_none
from util.dist import print0, world_size
from util.run.record import check_resumed
from util.settings import destination
from util.sizes import sides

FLAGS = {field.name: field.metadata["flag"] or field.name for field in Model.fields()}
FIXED = {destination(f) for f in Model.fields() if f.metadata.get("fixed")} - {""}  # by weights


def as_flags(config):
    """What flags a configuration (see models) stands for: destination -> value."""
    own = config["tokenizer"]
    values = {"tokenizer": own["name"], "vae_path": own.get("vae_path")}
    values |= {"vae_scale": own.get("scale"), "vae_shift": own.get("shift")}
    plain = {**Sampling().asdict(), **usual_of(config["model"])}
    values |= {**plain, **config["sampling"]}  # of newer fields, the default
    model = {destination(f) or f.name: config["model"].get(f.name) for f in Model.fields()}
    return {k: v for k, v in (values | model).items() if v is not None}


def settled(model):
    """Destinations of the flags that a resumed run cannot change: those that its weights fix, which
    are refused, and those that a model with these arguments does not have."""
    fields = [f for f in Model.fields() if f.metadata.get("fixed") or f.name not in model]
    return {destination(field) for field in fields}


def compare_with(checkpoint, source, settings, config, record):
    """Sentences on what is not as in the checkpoint at `source`, which a run resumes; a list.

    settings: all flags, name -> value. config: the run's configuration. record: see
    util/run/record.py. Raises ValueError for what would spoil the run, unless `resume_anyway` is
    among the flags.
    """
    stored = as_flags(models.checkpoint_config(checkpoint, source))
    now = {**settings, **as_flags(config)}, record
    before = {**Model().asdict(), **checkpoint["args"], **stored}, checkpoint.get("record")
    ignored = settled(config["model"])
    return list(check_resumed(source, now, before, ignored, settings["resume_anyway"]))


def resolve_model(requested, given, extra, tokenizer, stored=None, source=None):
    """Name and arguments of a model, as a checkpoint holds them. Raises ValueError.

    requested: a Model. given: names of the fields that the user set. extra: arguments without a
    field, name -> value. tokenizer: the tokenizer whose latents the model must fit. stored: name
    and arguments of the model in the checkpoint at `source`, whose weights fix the architecture; a
    field that contradicts it is refused.
    """
    fitting = "ce" if tokenizer.num_codes else "diffloss"
    if stored:
        stored = {"head": fitting, **{k: v for k, v in stored.items() if v is not None}}
        if "name" not in given:
            requested = requested.but(name=stored["name"])
    head = requested.head or (stored or {}).get("head") or fitting
    used = takes(requested.name, head)
    _check_used(requested, given, extra, used)
    if tokenizer.num_codes and "num_codes" not in used:
        raise ValueError(f"{requested.name}: expected a continuous tokenizer, this one has codes")
    found = {**requested.asdict(), **_from_tokenizer(requested, given, tokenizer), "head": head}
    found["diffloss_w"] = requested.diffloss_w or default_of(requested.name, "diffloss_w")
    found = {name: value for name, value in found.items() if name in used or name == "name"}
    found |= {k: v for k, v in usual_of(found).items() if k in found and found[k] is None}
    return _keep_stored(found | extra, stored, given, extra, source) if stored else found | extra


def drop_prob(args, given, stored, classes):
    """--label_drop_prob or, if it is not given, 0 for a model that is to have one mode only.

    That is a model whose checkpoint was trained with 0, or a new one of pictures without classes.
    given: names of the flags that the user set. stored: its configuration in the checkpoint that is
    resumed, or {}. classes: names of those of the training data.
    """
    before = stored["model"].get("label_drop_prob") if stored else None
    one_mode = before == 0 if stored else are_none(classes)
    return 0.0 if one_mode and "label_drop_prob" not in given else args.label_drop_prob


def build_checked(arguments, extra):
    """A new model. Raises ValueError where `extra` arguments, unchecked so far, do not fit it."""
    try:
        return models.build_model(**arguments)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        if not extra:
            raise
        passed = " ".join(f"{name}={value}" for name, value in extra.items())
        reason = str(error).splitlines()[0][:100]
        raise ValueError(f"--model_kwargs {passed}: {reason}") from error


def takes(name, head):
    """The names of the arguments that a model of this name uses, with this head."""
    build = MODELS[name]
    names = set(signature(build).parameters)
    for part in build.func.parts(head):
        names |= set(options_of(part))
    return names


def default_of(name, argument):
    """The default of a head's argument in a model of this name."""
    return {**HEAD_DEFAULTS, **MODELS[name].keywords}.get(argument)


def usual_of(model):
    """Field of Sampling -> its value where none is given. model: its name and arguments."""
    return HEADS[model["head"]].usual if model.get("head") else USUAL


def _from_tokenizer(requested, given, tokenizer):
    """Fields that follow from the tokenizer. Raises ValueError if the user set another value."""
    derived = {"vae_stride": tokenizer.stride, "vae_embed_dim": tokenizer.channels}
    for name, value in derived.items():
        if name in given and getattr(requested, name) != value:
            raise ValueError(f"--{name} {getattr(requested, name)}: the tokenizer has {value}")
    derived |= {"num_codes": tokenizer.num_codes, "token_norm": tokenizer.token_norm}
    derived["patch_size"] = requested.patch_size or tokenizer.patch_size
    return derived


def _check_used(requested, given, extra, used):
    """Raises ValueError for an argument that was given but that the model does not use.

    An argument that only another head uses is reported and ignored.
    """
    of_heads = {name for head in HEADS for name in takes(requested.name, head)}
    for name in sorted(given - {"name"}):
        unused = (
            f"--{FLAGS[name]} {getattr(requested, name)}: {requested.name} has no such argument"
        )
        if name not in of_heads:
            raise ValueError(unused)
        if name not in used:
            print0(f"NOTE: {unused} with this head")
    for name, value in extra.items():
        if name in FLAGS or name not in used:
            why = "has a flag of its own" if name in FLAGS else f"{requested.name} has none such"
            raise ValueError(f"--model_kwargs {name}={value}: {why}")


def _keep_stored(found, stored, given, extra, source):
    """The arguments, with those fixed by weights taken from the checkpoint. Raises ValueError."""
    fixed = {name for name in Model.names(fixed=True) if name in found}
    fixed |= {name for name in {**stored, **extra} if name not in FLAGS}
    # a field that is newer than the checkpoint takes its default
    of_weights = {**Model().asdict(), **stored}
    for name in fixed:
        requested, value = name in given or name in extra, of_weights.get(name)
        if requested and found[name] != value:
            raise ValueError(
                f"--{FLAGS.get(name, name)} {_text(found[name])}: {source} holds {_text(value)}; "
                "leave the flag out to take it from there"
            )
        found[name] = value
    if found.get("max_timestep") is None and "max_timestep" in found:
        found["max_timestep"] = stored.get("max_timestep")
    return found


def _text(value):
    return " ".join(map(str, value)) if isinstance(value, list) else value


def fit_preset(args, given, tokenizer, data, stored, before):
    """Set the flags that --preset derives from the data set; prints them. Raises ValueError.

    stored: name and arguments of the model of the checkpoint that is resumed, or {}. before: the
    flags of its run, or {}. What weights fix, its own or those of --init_from, counts as given.
    """
    if args.preset not in presets.FITTED:
        return
    if data is None:  # an evaluation samples as the run did
        for name in presets.PRESETS[args.preset].keys() & before.keys() - given:
            setattr(args, name, before[name])
        return
    args.model = stored.get("name", args.model)
    given = given | FIXED if args.init_from or stored else given
    size = (stored or vars(args))["img_size"]
    patch = stored.get("patch_size") or args.patch_size
    patch = patch or patch_for(sides(size, tokenizer.stride), tokenizer.channels)
    args.patch_size = patch
    facts = Facts(
        images=len(data),
        length=math.prod(sides(size, tokenizer.stride * patch)),
        channels=tokenizer.channels * patch**2,
        processes=world_size(),
        accum_iter=args.accum_iter,
        has_classes=not are_none(data.classes),
        **{name: getattr(args, name) for name in {"batch_size", "epochs", "model"} & given},
    )
    shown = f"{facts.images} images of {facts.length} tokens of {facts.channels} numbers"
    print0(f"NOTE: {presets.fit(args, given, facts, before)} (for {shown})")


def check_same_latents(name, stored, source):
    """Raises ValueError for a tokenizer of other latents than the checkpoint's."""
    if not models.may_share_latents(name, stored):
        raise ValueError(
            f"--tokenizer {name}: {source} was trained with {stored}; leave the flag out to take "
            "it from there"
        )


def fit_steps(sampling, model, given):
    """The Sampling with a num_iter that the model can take, and its usual settings where none are
    given. Raises ValueError.

    model: name and arguments of the model. given: whether the user set num_iter.
    """
    usual = usual_of(model).items()
    sampling = sampling.but(**{k: v for k, v in usual if getattr(sampling, k) is None})
    length = math.prod(sides(model["img_size"], model["vae_stride"] * model["patch_size"]))
    one_at_a_time = MODELS[model["name"]].func.one_at_a_time
    num_iter = sampling.num_iter
    if not given:
        num_iter = length if one_at_a_time else min(num_iter, length)
    if one_at_a_time and num_iter != length:
        raise ValueError(
            f"--num_iter {num_iter}: {model['name']} generates one of its {length} tokens per "
            "step; leave the flag out"
        )
    if not 1 <= num_iter <= length:
        raise ValueError(f"--num_iter {num_iter}: expected 1 to {length}, the number of tokens")
    return sampling.but(num_iter=num_iter)


def open_tokenizer(args, given, stored, source, data=None):
    """The tokenizer, and its name and arguments for the checkpoint. Raises ValueError.

    args: all flags. given: the names of those on the command line. stored: name and arguments in
    the checkpoint that is resumed, at `source`, or None. data: the data set to train on, whose
    images are then read with as many channels as the tokenizer takes.
    """
    chosen = {"name": "tokenizer", "vae_path": "vae_path"}
    chosen |= {"scale": "vae_scale", "shift": "vae_shift"}
    if stored:
        passed = {key: getattr(args, flag) for key, flag in chosen.items() if flag in given}
        own = {**stored, **passed}
        check_same_latents(own["name"], stored["name"], source)
    else:
        channels = getattr(data, "channels", None) or kind_or_folder(args.data_path).channels
        fitting = arguments_of_tokenizer(args.tokenizer, vae_path=args.vae_path, channels=channels)
        own = {"name": args.tokenizer, **fitting, "scale": args.vae_scale, "shift": args.vae_shift}
    tokenizer = models.build_tokenizer(**own)
    if data is not None:
        match_channels(data, tokenizer, args.channels, follow=bool(stored))
    own |= {"scale": tokenizer.scale, "shift": tokenizer.shift}  # as used, should the file change
    return tokenizer, own
