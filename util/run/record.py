"""What a run depends on: recorded in its checkpoints, and compared when one is resumed.

A record, the entry `record` of a checkpoint, is a dict of plain data; None stands for what is not
known. Published checkpoints and those of earlier versions have none: of them, flags and
configuration are compared.
"""

import hashlib
import os
import re
from importlib import metadata
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from util.data import labels_of
from util.dist import all_gather, is_main, world_size
from util.files import HOST, first_few
from util.weights import digest

# Flags of the machine and of places on it; results do not depend on them.
PLACES = (
    *("output_dir", "log_dir", "resume", "stats_dir", "val_path"),
    *("extractor_weights", "inception_weights", "perceptual_weights"),
    *("device", "num_workers", "pin_mem"),
    *("dist_on_itp", "dist_url", "dist_timeout", "world_size", "local_rank"),
)
# Flags that a resumed run does not follow, or that stand for others.
NO_SETTINGS = (
    *("preset", "list_presets"),  # the flags that a preset sets are compared
    *("init_from", "start_epoch", "resume_anyway", "dry_run"),
    *("evaluate", "out"),  # nothing is trained
    "check_data",  # results do not depend on it
    "model_kwargs",  # refused where the weights are of other ones
)
# Settings that a flag can leave open, and the value that does; the record has what was used.
OPEN = {"lr": None, "precision": "auto", "vae_scale": None, "vae_shift": None}
LABELS = {
    "images": "images in the data",
    "layout": "data as",
    "processes": "processes",
    "total_batch": "images per step",
    "library": "version of this library",
    "torch": "torch",
}


# ---- the record ----------------------------------------------------------------------------------


def describe(tokenizer, loader, recipe, optimizer, *, precision, cached, listing):
    """The record of a run. A collective call; raises ValueError if processes differ in it.

    tokenizer: a module; None where it is what is trained. loader: of the training data. recipe: a
    resolved util.recipe.Recipe. cached: whether the data are latents. listing: a file whose first
    line changes with the files of the data; it need not exist.
    """
    dataset = getattr(loader, "dataset", None)
    record = {
        "layout": "latents" if cached else "images",
        "processes": world_size(),
        "total_batch": recipe.total_batch(world_size()),
        "lr": recipe.lr,
        "precision": precision,
        "optimizer": type(optimizer).__name__,
        "library": library_version(),
        "torch": str(torch.__version__),
        "tokenizer": tokenizer and digest(tokenizer.state_dict()),
        "encoder": tokenizer and tokenizer.encoder_sha256(),
        "classes": [str(name) for name in getattr(dataset, "classes", ())] or None,
        "images": loader.images,
        "names": _sha256("\n".join(names)) if (names := names_of(dataset)) else None,
        "labels": _sha256(" ".join(map(str, labels))) if (labels := labels_of(dataset)) else None,
    }
    record["contents"] = contents_of(dataset)
    agree(record, {name: _in_short(record[name] or []) for name in ("classes", "contents")})
    return {**record, "files": _sha256_of_line(listing) if is_main() else None}


def names_of(dataset):
    """The names class/name of all images, without the ending of cached latents; None if unknown."""
    if hasattr(dataset, "samples"):
        start = len(str(dataset.root))
        names = (path[start:].replace(os.sep, "/").lstrip("/") for path, _ in dataset.samples)
        return [name.removesuffix(".npz") for name in names]
    return dataset.names() if hasattr(dataset, "names") else None


def contents_of(dataset):
    """A hash of the content of the pictures of each class, a list; None if it is not known."""
    crcs, labels = getattr(dataset, "crcs", None), labels_of(dataset)
    if crcs is None:
        return None
    order = np.lexsort((crcs, labels))
    ends = np.bincount(labels, minlength=len(dataset.classes)).cumsum()
    parts = np.split(np.asarray(crcs)[order].astype("<u4"), ends[:-1])
    return [hashlib.sha256(part.tobytes()).hexdigest()[:16] for part in parts]


def library_version():
    """The version of this library: of its source, or as installed."""
    source = Path(__file__).parents[2] / "pyproject.toml"
    if source.is_file():
        found = re.search(r'^version = "(.*)"', source.read_text(encoding="utf-8"), re.MULTILINE)
        return found and found[1]
    try:
        return metadata.version("mar-diffloss")
    except metadata.PackageNotFoundError:
        return None


def _in_short(texts):
    return f"{len(texts)} classes, sha256 {_sha256(' '.join(texts))[:12]}"


def _sha256(text):
    return hashlib.sha256(os.fsencode(text)).hexdigest()


def _sha256_of_line(path):
    """Of the first line of a file: those below are not on the files of the data."""
    if not Path(path).is_file():
        return None
    return hashlib.sha256(Path(path).read_bytes().split(b"\n")[0]).hexdigest()


def agree(values, shown=None):
    """Raises ValueError, on all processes, that says who has what, unless all have the same.

    values: name -> value. shown: name -> text in place of the value. A collective call.
    """
    held = all_gather((HOST, values, shown or {}))
    for name in dict.fromkeys(chain.from_iterable(theirs for _, theirs, _ in held)):
        first = {}
        for rank, (host, theirs, texts) in enumerate(held):
            value = theirs.get(name)
            first.setdefault(repr(value), f"rank {rank} on {host}: {texts.get(name, value)}")
        if len(first) > 1:
            found = "; ".join([*first.values()][:4])
            raise ValueError(f"{name}: expected the same on all processes; {found}")


# ---- comparing -----------------------------------------------------------------------------------


def check_resumed(source, now, before, ignored=(), anyway=False):
    """Sentences on what is not as in the checkpoint that a run resumes.

    source: path of the checkpoint. now, before: each (settings, record): all flags as they are in
    effect, name -> value, and the record, which may be None for `before`. ignored: names of
    settings not to compare. Raises ValueError for what would spoil the run, unless `anyway`.
    """
    spoiling, others = compare(now, before, ignored)
    if spoiling and not anyway:
        raise ValueError(
            f"{source}: its run had another configuration, and this one would spoil it: "
            f"{'; '.join(spoiling)}; to resume all the same, pass --resume_anyway"
        )
    if spoiling:
        yield f"resumed although this may spoil the run: {'; '.join(spoiling)}"
    if others:
        yield f"not as before: {', '.join(others)}"


def compare(now, before, ignored=()):
    """(what would spoil a run, what else differs), two lists of texts. See `check_resumed`."""
    (settings, record), (old_settings, old) = now, before
    old = old if isinstance(old, dict) else {}
    old = {k: v for k, v in old.items() if type(v) is type(record.get(k))}  # None is not known
    changed = _changed(_known(settings, record), _known(old_settings, old))
    changed = {k: v for k, v in changed.items() if k not in {*PLACES, *NO_SETTINGS, *ignored}}
    scales = [name for name in ("vae_scale", "vae_shift") if name in changed]
    spoiling = [f"--{name} {_shown(*changed.pop(name))}" for name in scales]
    moved = "data_path" in changed or "cached_path" in changed
    facts, classes = _changed(record, old), record.get("classes") or []
    if record.get("contents") and record["contents"] == old.get("contents"):
        facts.pop("files", None)  # a copy
    spoiling += _spoiling(facts, old, classes)
    return spoiling, [*_flags(changed), *_facts(facts, moved, classes)]


def _known(settings, record):
    """The settings, but for those that are open; what the record has takes their place."""
    settings = {**settings, **{k: record[k] for k in OPEN if record.get(k) is not None}}
    return {k: v for k, v in settings.items() if k not in OPEN or v != OPEN[k]}


def _changed(now, before):
    """Name -> (now, before) of the values that both have and that differ."""
    both = {name: (value, before[name]) for name, value in sorted(now.items()) if name in before}
    return {k: pair for k, pair in both.items() if _plain(pair[0]) != _plain(pair[1])}


def _plain(value):
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, int | float | str | None) else repr(value)


def _spoiling(facts, old, classes):
    """Texts on the entries that would spoil a run. facts: those that differ from the `old` ones.

    classes: names of those of now.
    """
    if "tokenizer" in facts:
        now, before = facts["tokenizer"]
        yield f"another tokenizer: the sha256 of its weights is {now[:12]} (was {before[:12]})"
    if "classes" in facts:
        yield _other_classes(*facts["classes"])
    elif "contents" in facts and (pair := _exchanged(*facts["contents"], classes)):
        yield f"the pictures of class {pair[0]} are those that class {pair[1]} had"
    elif "labels" in facts and old.get("names") and "names" not in facts:
        yield "the same images have other labels"
    if "optimizer" in facts:
        yield f"optimizer {_shown(*facts['optimizer'])}"


def _other_classes(now, before):
    same = sorted(now) == sorted(map(str, before))
    what = "the classes are in another order" if same else "other classes"
    pairs = enumerate(zip(now, before, strict=False))
    first = next((f"class {i} is {_shown(*pair)}" for i, pair in pairs if pair[0] != pair[1]), "")
    return f"{what}: {first}" if first else f"{len(now)} classes (was {len(before)})"


def _exchanged(now, before, classes):
    """A pair of classes of which the first has all pictures that the second had; None if none."""
    had = {str(content): name for content, name in zip(before, classes, strict=False)}
    pairs = zip(now, before, classes, strict=False)
    return next(((c, had[new]) for new, old, c in pairs if new != old and new in had), None)


def _flags(changed):
    for name, pair in changed.items():
        # some flags switch off what they are stored as, such as --no_vlb
        yield f"{name if isinstance(pair[0], bool) else f'--{name}'} {_shown(*pair)}"


def _facts(facts, moved, classes):
    """Texts on the other entries. moved: whether the data are in another place."""
    for name, label in LABELS.items():
        if name in facts:
            yield f"{label} {_shown(*facts[name])}"
    if "images" in facts or "layout" in facts:
        return
    if "names" in facts:
        yield "other images, by their names"
    elif "contents" in facts:
        pairs = zip(*facts["contents"], classes, strict=False)
        others = [name for now, before, name in pairs if now != before]
        yield f"other content of pictures, of the classes {first_few(others)}"
    elif "files" in facts and not moved:
        yield "other files of the data, by their sizes or times"


def _shown(now, before):
    return f"{_text(now)} (was {_text(before)})"


def _text(value):
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value))
    words = {None: "not given", True: "on", False: "off"}
    return words[value] if value is None or isinstance(value, bool) else str(value)
