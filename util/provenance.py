"""What a picture was made by, in the metadata of its PNG: enough to make it again.

A plain dict, written as JSON into a text chunk: the text {KEY: dumps(made)} of
util.images.save_image. Imports neither torch nor models.

    made = describe(ckpt="run/checkpoint-last.pth", labels=[3, 5], index=1, seed=1, …)
    save_image("a.png", image, text={KEY: dumps(made)})
    read("a.png") == made
"""

import json
import re
from functools import partial
from pathlib import Path

from util.averages import FURTHER
from util.files import first_line
from util.flags import PRECISIONS
from util.plain import is_count, is_number

KEY = "mar"  # keyword of the text chunk
FORMAT = 2  # 1: without a guide
MOST_LABELS = 2**16  # images of a grid
LARGEST_BATCH = 2**12  # images of the batch of one
LONGEST = 2**20  # characters of the whole text
LONGEST_NAME = 4096  # of a path

_is_index = partial(is_count, high=2**63)


def describe(
    *,
    ckpt,
    weights,
    weights_sha256,
    tokenizer,
    tokenizer_sha256,
    labels,
    seed,
    precision,
    sampling,
    first=0,
    index=None,
    batch_size=None,
    columns=None,
    edited=None,
    guide=None,
):
    """What a picture was made by, as plain data.

    Args:
        ckpt: path of the checkpoint.
        weights: "ema", "raw", or the name of a further average.
        weights_sha256, tokenizer_sha256: util.weights.digest of the two state dicts.
        tokenizer: arguments of models.build_tokenizer, with its name.
        labels: class indices of all images of the batch (of the grid), or None each: the same bits
            need the same batch.
        seed: that of util.rng.image_generators.
        precision: one of util.flags.PRECISIONS.
        sampling: asdict() of a models.settings.Sampling.
        first: index of the first of the images for the generators.
        index: which of the images the picture is; None if it is a grid of all, as that of
            util.images.GridWriter.
        batch_size: images per batch, if a grid is of several batches.
        columns: columns of a grid; None if it is nearly square.
        edited: if the picture was edited, a few words that say how: it cannot be made again from
            this alone.
        guide: `ckpt` and `sha256`, path and digest of the EMA weights of the model that guided it
            (autoguidance).
    """
    made = {"format": FORMAT, **locals()}
    if guide is None:  # as before there were guides, which an earlier version would ignore
        made["format"] = 1
        del made["guide"]
    made["labels"], made["tokenizer"], made["sampling"] = list(labels), {**tokenizer}, {**sampling}
    return json.loads(json.dumps(made))  # tuples are lists, as in the file


def dumps(made):
    """The text of a dict that `describe` returned."""
    return json.dumps(made, separators=(",", ":"))


def read(path):
    """The dict that `describe` returned, from the PNG at `path`.

    Nothing in it is trusted but its form: a PNG can be anyone's. Raises ValueError for a PNG
    without it or damaged, for what is no PNG, and for a newer format.
    """
    text = _text_in(path)
    if not isinstance(text, str):
        raise ValueError(
            f"{path}: does not say what it was made by: expected a PNG that this library wrote, "
            "not edited or converted since"
        )
    try:
        made = json.loads(text) if len(text) <= LONGEST else None
    except (ValueError, RecursionError):
        made = None
    if not isinstance(made, dict):
        raise ValueError(f"{path}: what it was made by cannot be read: it is damaged")
    _check(made, path)
    return {"guide": None, **made}


def _text_in(path):
    """The text under KEY; None if there is none. The image itself is not decoded."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file, expected a PNG")

    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(KEY)
            image.verify()  # all checksums
        return text
    except Exception as error:  # PIL can raise nearly anything for a damaged file
        reason = first_line(error).removesuffix(f" {str(path)!r}")
        raise ValueError(f"{path}: not a whole PNG ({reason})") from None


def _check(made, path):
    """Raises ValueError unless all entries are there and of their types and ranges."""
    found = made.get("format")
    if _is_index(found, FORMAT + 1):
        raise ValueError(
            f"{path}: made by a newer version of this library (format {found}, expected {FORMAT})"
        )
    for name, (fits, expected) in _ENTRIES.items():
        value = made.get(name)
        if not fits(value):
            shown = value if isinstance(value, str | int | float | None) else type(value).__name__
            raise ValueError(
                f"{path}: what it was made by: {name} is {repr(shown)[:60]}, expected {expected}"
            )
    if made["index"] is not None and len(made["labels"]) > LARGEST_BATCH:
        raise ValueError(
            f"{path}: what it was made by: one of a batch of {len(made['labels'])} images, "
            f"expected at most {LARGEST_BATCH}"
        )
    if made["index"] is not None and made["index"] >= len(made["labels"]):
        raise ValueError(
            f"{path}: what it was made by: index is {made['index']}, expected one of "
            f"{len(made['labels'])} images"
        )


def _is_name(value):
    """Whether a value is text that can be shown in one line, a path perhaps."""
    return isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and value.isprintable()


def _is_digest(value):
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _are_labels(value):
    """Whether a value is a list of class indices, or of None alone."""
    if not isinstance(value, list) or not 0 < len(value) <= MOST_LABELS:
        return False
    return all(each is None for each in value) or all(is_count(each, high=2**31) for each in value)


def _are_settings(value):
    """Whether a value is names with plain values, or lists of numbers."""
    return isinstance(value, dict) and all(
        _is_name(name) and (_is_plain(each) or _are_numbers(each)) for name, each in value.items()
    )


def _is_plain(value):
    return value is None or isinstance(value, bool) or _is_name(value) or is_number(value)


def _are_numbers(value):
    return isinstance(value, list) and len(value) <= LONGEST_NAME and all(map(is_number, value))


def _are_weights(value):
    return value in ("ema", "raw") or (_is_name(value) and bool(FURTHER.fullmatch(value)))


def _or_none(fits):
    return lambda value: value is None or fits(value)


def _is_guide(value):
    own = value if isinstance(value, dict) else {}
    return _is_name(own.get("ckpt")) and _is_digest(own.get("sha256"))


def _is_tokenizer(value):
    return _are_settings(value) and _is_name(value.get("name"))


# name -> (function: does a value fit?, what is expected in words)
_ENTRIES = {
    "format": (lambda value: is_count(value, 1, FORMAT), f"{FORMAT}"),
    "ckpt": (_is_name, "a path"),
    "weights": (_are_weights, "ema, raw or ema_N"),
    "weights_sha256": (_is_digest, "a sha256"),
    "tokenizer": (_is_tokenizer, "settings with a name"),
    "tokenizer_sha256": (_is_digest, "a sha256"),
    "labels": (_are_labels, "class indices"),
    "seed": (_is_index, "an integer, at least 0"),
    "precision": (lambda value: value in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
    "sampling": (_are_settings, "settings by name"),
    "first": (_is_index, "an integer, at least 0"),
    "index": (_or_none(_is_index), "an integer, at least 0"),
    "batch_size": (_or_none(lambda value: is_count(value, 1, MOST_LABELS)), "at least 1"),
    "columns": (_or_none(lambda value: is_count(value, 1, MOST_LABELS)), "at least 1"),
    "edited": (_or_none(_is_name), "a few words"),
    "guide": (_or_none(_is_guide), "a path and a sha256"),
}
