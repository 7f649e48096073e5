"""The model card, README.md of a model that is passed on: what is known of it, and nothing else.

It is made of the configuration in config.json, facts of the model and lines of results.jsonl.
"""

import json
import re
import shlex
from pathlib import Path

from util.data.classes import are_imagenet, are_none, spoken
from util.evaluation.metrics import numbers_in
from util.files import first_few
from util.hub import LIBRARY

ABOUT = ("title", "license", "data")
MOST_NAMED, MOST_RESULTS = 20, 50  # classes, rows
MEASURED = ("reference", "reference_images", "extractor", "labels", "seed", "dtype")
PAPER = "https://arxiv.org/abs/2406.11838"
CITATION = """@inproceedings{li2024autoregressive,
  title={Autoregressive Image Generation without Vector Quantization},
  author={Li, Tianhong and Tian, Yonglong and Li, He and Deng, Mingyang and He, Kaiming},
  booktitle={NeurIPS},
  year={2024}
}"""
USE = """import torch

import models
from util.images import grid, save_image, to_uint8
from util.rng import image_generators

model, tokenizer, config = models.load({name})
labels = torch.tensor({labels})
latents = model.sample_tokens(
    len(labels),
    labels=labels,
    generator=image_generators(0, range(len(labels))),
    **models.sampling_of(model, config).asdict(),
)
save_image("images.png", grid(to_uint8(tokenizer.decode(latents)), min_side=64))"""


def check_about(about):
    """Raises ValueError for texts that a card has no place for. about: name -> text or None."""
    for name, text in about.items():
        if name not in ABOUT:
            raise ValueError(f"{name}: no text of a card, expected some of {', '.join(ABOUT)}")
        if text is not None and not (isinstance(text, str) and text.strip()):
            raise ValueError(f"{name} {text!r}: expected a text")
    if not (about.get("title") or "").isprintable():
        raise ValueError(f"title {about['title']!r}: expected one line")
    license = about.get("license")
    if license and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise ValueError(
            f"license {license!r}: expected an identifier such as mit, apache-2.0 or other"
        )


def card(name, config, *, facts, table=None, picture=None, tokenizer=""):
    """The text of a model card.

    name: what its commands load. config: as in config.json. facts: of the model, label -> text.
    table: of metrics, see `metrics_table`. picture: file name of a grid of samples. tokenizer: a
    sentence on how to get it, if it is elsewhere.
    """
    about, data = config.get("about", {}), config.get("data") or {}
    model = config["model"]
    labels = [*range(min(4, model.get("class_num", 4)))]
    parts = [
        _front_matter(about, model, data),
        f"# {about.get('title') or name}",
        f"{_kind(data)} generator of images, trained and sampled with {LIBRARY}, an implementation "
        f"of [Autoregressive Image Generation without Vector Quantization]({PAPER}).",
        f"![samples]({picture})" if picture else "",
        _rows(("", ""), facts.items()),
        "## Use",
        f"With {LIBRARY} installed" + (f". {tokenizer}:" if tokenizer else ":"),
        _code(USE.format(name=json.dumps(name), labels=labels), "python"),
        "or from a command line:",
        _code(f"python -m sample --ckpt {shlex.quote(name)} --per_class 2 --out samples.png"),
        "## Data",
        *_data(about, data, model),
        "## Training",
        *_training(config),
        "## Metrics",
        table or "No metrics of these weights are recorded beside the checkpoint.",
        "## Licence",
        about.get("license") or "Not stated by who passed the model on: ask before you use it.",
        "## Citation",
        _code(CITATION),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _kind(data):
    return "An unconditional" if are_none(data.get("classes") or []) else "A class-conditional"


def _front_matter(about, model, data):
    """What the hub reads, in YAML."""
    lines = [f"license: {about['license']}"] if "license" in about else []
    lines += [f"library_name: {LIBRARY}", "pipeline_tag: unconditional-image-generation"]
    kind = model["name"].split("_")[0]
    lines += ["tags:", *(f"- {tag}" for tag in (kind, "image-generation", "pytorch"))]
    if are_imagenet(data.get("classes") or []):
        lines += ["datasets:", "- imagenet-1k"]
    return "\n".join(["---", *lines, "---"])


def _code(text, kind=""):
    return f"```{kind}\n{text}\n```"


def _rows(head, rows):
    """A table. head: titles of its columns. rows: each a text per column."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(text) for text in line)} |" for line in lines)


def _cell(text):
    return str(text).replace("|", r"\|").replace("\n", " ")


def _data(about, data, model):
    """Sentences on the training data."""
    if "data" in about:
        yield about["data"]
    names, counts = data.get("classes") or [], data.get("counts") or []
    if are_none(names):
        yield "Images without classes."
    elif names:
        shown = first_few([" ".join(name.split()) for name in spoken(names)], MOST_NAMED)
        yield f"{len(names)} classes: {shown}."
    else:
        yield f"{model.get('class_num')} classes, whose names the checkpoint does not have."
    if counts:
        each = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        yield f"{sum(counts):,} images, {each} of a class."
    if reading := data.get("reading"):
        mirrored = "half of them mirrored at random" if reading.get("flip") else "never mirrored"
        said = f", {mirrored}" if "flip" in reading else ""
        pairs = {k: v for k, v in reading.items() if k in ("orientation", "background", "channels")}
        read = ", ".join(f"{k} {v}" for k, v in pairs.items() if v is not None)
        yield f"Pictures were read with {read or 'the defaults'}{said}."


def _training(config):
    """Sentences on the training."""
    training = config.get("training") or {}
    words = {
        "epochs": "{:,} epochs",
        "steps": "{:,} steps",
        "batch": "{:,} images per step",
        "images": "{:,} images",
        "rate": "peak learning rate {:.2e}",
        "precision": "precision {}",
        "ema_rate": "averaged weights (EMA, decay {})",
        "ema_images": "averaged weights (EMA, half-life {:,} images)",
    }
    known = [text.format(training[k]) for k, text in words.items() if k in training]
    yield f"{', '.join(known)}." if known else "Not known: the file has weights only."
    if training.get("flags"):
        yield "Settings that are not the defaults of `main_mar.py`:"
        yield _code(training["flags"])
    if origin := config.get("init_from"):
        yield f"It began with the weights of `{origin.get('file')}`, sha256 {origin.get('sha256')}."
    yield f"The sha256 of the weights is {config.get('weights_sha256')}."


# ---- metrics -------------------------------------------------------------------------------------


def metrics_table(results, sampling):
    """Metrics as a table, with the settings that they were measured with; None without results.

    results: lines of results.jsonl, all of one model. sampling: names of the settings of sampling.
    What was measured again takes the place of the earlier line.
    """
    names = numbers_in(name for each in results for name in each)
    settings = ["images", *sampling, *MEASURED]
    results = {tuple(map(str, (each.get(k) for k in settings))): each for each in results}
    results = [each for each in results.values() if any(name in each for name in names)]
    results = results[-MOST_RESULTS:]
    if not results:
        return None
    names = [name for name in names if any(name in each for each in results)]
    texts = [{k: _setting(each.get(k)) for k in settings} for each in results]
    varied = [k for k in settings if k == "images" or len({text[k] for text in texts}) > 1]
    rows = [
        [*(text[k] for k in varied), *(_number(each.get(name)) for name in names)]
        for text, each in zip(texts, results, strict=True)
    ]
    rows += _real(results, varied, names)
    same = ", ".join(f"{k} {texts[0][k]}" for k in settings if k not in varied and texts[0][k])
    notes = {note for each in results for note in each.get("notes", ()) if "/" not in note}
    head = [*varied, *names]
    return "\n\n".join(
        [_rows(head, rows), f"With {same}.", *(f"Note: {n}." for n in sorted(notes))]
    )


def _real(results, varied, names):
    """A row of the metrics of real images, if they are the same for all results."""
    real = [each.get("real") for each in results]
    if not isinstance(real[-1], dict) or any(each != real[-1] for each in real):
        return []
    first = f"real images, {real[-1].get('images')}"
    return [[first, *[""] * (len(varied) - 1), *(_number(real[-1].get(name)) for name in names)]]


def _setting(value):
    """A setting as a text; of a path, its name: the rest is of another machine."""
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return Path(value).name if isinstance(value, str) and "/" in value else str(value)


def _number(value):
    return f"{value:.4g}" if isinstance(value, int | float) else "–"
