"""The file of a tokenizer that was trained here: a network and its description.

A dict, written by `torch.save`:

    model          state dict of the network
    scale, shift   of its latents: a number, or a list of one per channel; without a shift it is 0
    config         network: arguments of its constructor
                   tokenizer: kl, vq, vq_latent or pca
                   img_size: of the images of the training, an integer or [height, width]
                   sha256: fingerprint, the same as in checkpoints, caches and reports
                   data: name (the last part of its path), images, classes
                   training: numbers by name; `flags` that are not the defaults, and `library`
                   metrics: numbers by name; `extractor`, the name of its features

Those of earlier versions have other entries on data and training and no fingerprint; networks from
elsewhere have no such config.
"""

import math
from inspect import signature
from pathlib import Path

from models.scale import check_numbers
from models.settings import TOKENIZERS
from util.checkpoint import write_content
from util.plain import is_count, is_number
from util.run.record import library_version
from util.settings import destination
from util.sizes import sides
from util.stored import expect
from util.weights import digest, read_file

LARGEST = 2**24  # of a side in pixels, and of the arguments of a network
TEXTS = ("name", "flags", "library", "precision", "extractor")  # what is said; all else are numbers
PLACES = ("FILE", "DIR", "PATH")  # metavars of flags, whose values are paths of one machine
OLD = ("epochs", "lr", "batch_size", "seed")  # of the training, in files of earlier versions


# ---- writing -------------------------------------------------------------------------------------


def write(
    path,
    network,
    scale,
    shift,
    *,
    tokenizer,
    img_size,
    data,
    training,
    metrics=None,
    check=None,
):
    """Write a network with all that is known of it, for `models.build_tokenizer`.

    network: an AutoencoderKL, VQModel or PatchPCA. scale, shift: of its latents, each a number, a
    list of one per channel, or None. tokenizer: name of a row of TOKENIZERS. data: see
    `data_facts`. training: see `training_facts`. metrics: numbers by name, and the name of their
    `extractor`. check: see `write_content`. Raises ValueError if there is no room.
    """
    config = {
        "network": dict(network.config),
        "tokenizer": tokenizer,
        "img_size": img_size,
        "sha256": fingerprint(network),
        "data": data,
        "training": training,
        "metrics": _finite(metrics or {}),
    }
    content = {"model": network.state_dict(), "config": config}
    content |= {k: v for k, v in {"scale": scale, "shift": shift}.items() if v not in (None, 0)}
    _check(content, path)
    write_content(path, content, check)


def add_metrics(path, metrics):
    """Write metrics into a file of `write`, in place of those that it has of the same names."""
    content = read_file(path)
    held = _check(content, path)["metrics"]
    content["config"]["metrics"] = held | _finite(metrics)
    _check(content, path)
    write_content(path, content)


def fingerprint(network):
    """The sha256 of a network's weights, under the names that they have in a tokenizer."""
    return digest({f"vae.{name}": value for name, value in network.state_dict().items()})


def data_facts(dataset, data_path):
    """What a file says of a training set, without the places of a machine: name -> plain data."""
    facts = {"name": Path(data_path).name or str(data_path)}
    facts |= {"images": len(dataset)} if hasattr(dataset, "__len__") else {}
    return facts | {"classes": len(dataset.classes)}


def training_facts(*settings, **numbers):
    """What a file says of a training by these Settings, with numbers such as its steps."""
    return {**numbers, "flags": flags_of(*settings), "library": library_version()}


def flags_of(*settings):
    """The flags of Settings that are not the defaults, a text; of a path only its last part."""
    return " ".join(flag for each in settings for flag in _flags(each))


def _flags(settings):
    for field in settings.fields():
        value = getattr(settings, field.name)
        if value == field.default or not destination(field):
            continue
        flag = f"--{field.metadata['flag'] or field.name}"
        if field.metadata.get("metavar") in PLACES:
            value = Path(value).name
        yield flag if isinstance(value, bool) else f"{flag} {value}"


def _finite(metrics):
    """Without floats that are not finite, as the PSNR of equal images is."""
    return {k: v for k, v in metrics.items() if type(v) is not float or math.isfinite(v)}


# ---- reading -------------------------------------------------------------------------------------


def read(path):
    """What the file at `path` says of itself: the entries of its config, its scale and its shift.

    {} for a file from elsewhere, for a folder, and if there is none. Of older files, entries that
    they do not have are {}, and `sha256` is None. Raises ValueError for a damaged or malformed
    file.
    """
    content = read_file(path) if Path(path).is_file() else None
    config = content.get("config") if isinstance(content, dict) else None
    if not isinstance(config, dict) or "network" not in config:
        return {}
    if "optimizer" in content:
        raise ValueError(
            f"{path}: a checkpoint of a tokenizer's training, expected the tokenizer.ckpt beside it"
        )
    return _check(content, path)


def read_own(path):
    """As `read`, of a file that main_tokenizer.py wrote. Raises ValueError for any other."""
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file")
    if said := read(path):
        return said
    raise ValueError(f"{path}: says nothing of itself, expected a file of main_tokenizer.py")


def describe(path):
    """What the file at `path` says of itself, a list of lines. Raises ValueError for a file that
    cannot be used, and for one from elsewhere."""
    said = read_own(path)
    tokenizer = TOKENIZERS[said["tokenizer"]](vae_path=path)
    found = digest(tokenizer.state_dict())
    size, latents = ("×".join(map(str, sides(said["img_size"], n))) for n in (1, tokenizer.stride))
    channels, codes = tokenizer.channels, tokenizer.num_codes
    kind = f"{codes} codes" if codes else f"{channels} channels"
    count = sum(value.numel() for value in tokenizer.state_dict().values())
    parts = {name: said[name] for name in ("network", "data", "training", "metrics")}
    lines = [
        f"{path}: {said['tokenizer']}, {count:,} weights",
        f"images of {size} pixels as {latents} latents of {kind}, stride {tokenizer.stride}",
        f"scale {_text(said['scale'])}, shift {_text(said['shift'])}",
        *(f"{name}: {_listed(values)}" for name, values in parts.items() if values),
        f"sha256 {found}",
    ]
    if said["sha256"] not in (None, found):
        lines.append(f"NOTE: it describes other weights, of sha256 {said['sha256']}")
    return lines


def _listed(values):
    return ", ".join(f"{name} {_text(value)}" for name, value in values.items())


def _text(value):
    if isinstance(value, list | tuple):
        return ",".join(map(_text, value))
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _check(content, path):
    """See `read`."""
    config, network = content["config"], content["config"]["network"]
    fits = isinstance(network, dict) and all(map(_is_argument, network, network.values()))
    expect(fits, path, "config's network", network, "its arguments by name")
    return {
        "tokenizer": _name(config, path),
        "img_size": _size(config.get("img_size"), path),
        "network": network,
        "scale": _numbers("scale", content.get("scale"), network, path),
        "shift": _numbers("shift", content.get("shift", 0.0), network, path),
        "sha256": _sha256(config.get("sha256"), path),
        **{part: _said(part, config, path) for part in ("data", "training", "metrics")},
    }


def _name(config, path):
    usual = "vq" if "num_codes" in config["network"] else "kl"  # older files do not say it
    name = config.get("tokenizer", usual)
    known = isinstance(name, str) and name in TOKENIZERS
    known = known and "vae_path" in signature(TOKENIZERS[name]).parameters
    expect(known, path, "config's tokenizer", name, "the name of one that has weights")
    return name


def _size(value, path):
    try:
        fits = max(sides(value)) <= LARGEST
    except ValueError:
        fits = False
    expect(fits, path, "config's img_size", value, "an integer, or height and width")
    return value


def _sha256(value, path):
    fits = value is None or (isinstance(value, str) and len(value) == 64)
    expect(fits, path, "config's sha256", value, "64 digits")
    return value


def _numbers(name, value, network, path):
    channels = network.get("embed_dim", len(value) if isinstance(value, list) else 1)
    return check_numbers(f"{path}: {name}", value, channels, positive=name == "scale")


def _said(part, config, path):
    """The entry of this name. Raises ValueError unless it is of texts and numbers by name."""
    values = config.get(part, _of_older(config).get(part, {}))
    fits = isinstance(values, dict) and all(map(_is_said, values, values.values()))
    expect(fits, path, f"config's {part}", values, "texts and numbers by name")
    return values


def _of_older(config):
    """What a file of an earlier version says of its data and its training."""
    path = config.get("data_path")
    data = {"name": Path(path).name} if isinstance(path, str) else {}
    return {"data": data, "training": {name: config[name] for name in OLD if name in config}}


def _is_argument(name, value):
    values = value if isinstance(value, list | tuple) else [value]
    return isinstance(name, str) and all(map(_is_plain, values))


def _is_plain(value):
    return isinstance(value, str | bool | float | None) or is_count(value, 0, LARGEST)


def _is_said(name, value):
    if name in TEXTS:
        return isinstance(value, str)
    values = value if isinstance(value, list | tuple) else [value]
    return isinstance(name, str) and all(map(is_number, values))
