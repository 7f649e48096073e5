"""What the page of demo/app.py does, as plain functions: settings read, pictures drawn and kept."""

import math
import re
import tempfile
import time
from argparse import ArgumentTypeError
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import engine_mar as engine
import models
from models.settings import USUAL, Sampling
from util.checkpoint import find_checkpoint
from util.data.classes import are_none, find_labels, known_names, spoken
from util.data.crop import center_crop_arr
from util.data.pictures import read_picture
from util.data.settings import plain_reading
from util.flags import integer
from util.images import grid, hide_unknown, save_image
from util.precision import autocast_steps, pick_precision
from util.provenance import KEY, describe, dumps
from util.provenance import read as read_provenance
from util.rng import image_generators
from util.sizes import sides
from util.weights import digest

MOST = 64  # pictures at once: a batch of sample.py, which makes the same bits again
ON_PAGE = 512  # pixels: the least side of what is shown
WIDE = 1024  # pixels: about the largest side of what is shown at each step
PAINTED = 127  # opacity of a brush's stroke above which it counts


class Studio:
    """A model with its tokenizer, at work for the page.

    ckpt: a checkpoint, ours or published. folder: where pictures are kept. vae_path: file of the
    tokenizer, or None for that of the training. Raises ValueError.
    """

    def __init__(self, ckpt, folder, device="cpu", precision="auto", vae_path=None):
        self.ckpt, self.folder = str(find_checkpoint(ckpt) or ckpt), folder
        own = {"vae_path": vae_path} if vae_path else {}
        self.model, self.tokenizer, self.config = models.load(self.ckpt, **own)
        self.config["tokenizer"] |= own
        self.device = torch.device(device)
        self.precision = pick_precision(precision, self.device)
        self.model.to(self.device)
        self.tokenizer.to(self.device)
        self.sampling = models.sampling_of(self.model, self.config)
        self.size = sides(self.config["model"]["img_size"])
        self.names = known_names(self.config)
        self.said = names_to_show(self.names, self.model.class_num)
        self.fields, self.choices = self.choose_from()

    def about(self):
        """One line of Markdown on the model."""
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        parts = [f"{self.config['model']['name']}, {millions:.3g}M parameters"]
        parts += ["{}×{} pixels".format(*self.size), f"{self.model.seq_len} tokens"]
        if self.said:
            parts += [f"{self.model.class_num} classes"]
        return f"`{self.ckpt}` · {' · '.join(parts)}"

    # ---- settings ------------------------------------------------------------------------------

    def choose_from(self):
        """The fields of Sampling that make a difference to this model, and name -> the choices of
        each that it accepts."""
        used = [field for field in Sampling.fields() if field.name not in self.model.without_effect]
        choosing = [field for field in used if "choices" in field.metadata]
        choices = {
            field.name: [v for v in field.metadata["choices"] if self._accepts(field, v)]
            for field in choosing
        }
        return [field for field in used if len(choices.get(field.name, ())) != 1], choices

    def _accepts(self, field, value):
        try:
            self.model.check(self.sampling.but(**{field.name: value}))
        except ValueError:
            return False
        return True

    def class_choices(self):
        """(what is shown, text for `labels`) of what can be drawn; [] if there is one class."""
        if not self.said:
            return []
        texts = self.names or self.said
        choices = [("all in turn", "all"), *zip(self.said, texts, strict=True)]
        return choices + [("none", "none")] * (self.model.label_drop_prob > 0)

    def few(self):
        """How many pictures to begin with: one of each class, if these are few."""
        return self.model.class_num if 1 < self.model.class_num <= 16 else 4

    def labels(self, text, count):
        """A class index, or None, for each picture: as --labels of sample.py. Raises ValueError."""
        count = read("pictures", integer(1, MOST), count)
        chosen = find_labels(text, self.model.class_num, self.names) if text else [0]
        return [chosen[i % len(chosen)] for i in range(count)]

    def settings(self, values):
        """The Sampling of field name -> value on the page; an empty one is the checkpoint's.

        Raises ValueError.
        """
        given = {
            field.name: read_field(field, values[field.name])
            for field in self.fields
            if values.get(field.name) not in (None, "")
        }
        sampling = models.sampling_of(self.model, self.config, **given)
        self.model.check(sampling)
        return sampling

    # ---- pictures ------------------------------------------------------------------------------

    def generate(self, labels, sampling, seed):
        """Yield images uint8 (N, H, W, 3) with the tokens still unknown (N, h, w), 1 each.

        None are in the last. Decoding takes at most about half of the time. Raises ValueError.
        """
        indices = range(len(labels))
        generators = image_generators(seed, indices)
        steps = self.model.sample_steps(
            len(labels),
            labels=None if labels[0] is None else torch.tensor(labels, device=self.device),
            generator=generators,
            **sampling.asdict(),
        )
        pace = Pace()
        for latents, mask in autocast_steps(steps, self.device, self.precision):
            hidden = mask.view(-1, self.model.seq_h, self.model.seq_w)
            if hidden.any() and pace.due():
                fresh = image_generators(seed, indices)  # the others are for the result
                yield engine.decode(self.tokenizer, latents, fresh), hidden
                pace.done()
        yield engine.decode(self.tokenizer, latents, generators), hidden

    def inpaint(self, picture, mask, labels, sampling, seed):
        """Yield images as `generate` does: `picture` uint8 (H, W, 3), drawn anew where the mask
        (H, W) is above 0, once for each of the labels. Raises ValueError."""
        from models.editing import inpaint_steps

        count = len(labels)
        copies = [np.repeat(array[None], count, 0) for array in (picture, mask)]
        labels = None if labels[0] is None else labels
        drawn = self.model, self.tokenizer, *copies, labels, sampling
        generators = image_generators(seed, range(count))
        yield from inpaint_steps(*drawn, generators, precision=self.precision)

    def keep(self, images, labels, sampling, seed, edited=None):
        """Write a PNG of each image, which says what it was made by; [(path, caption)].

        edited: as in util.provenance.describe.
        """
        made = {**self.identity, "sampling": sampling.asdict(), "seed": seed, "edited": edited}
        folder, kept = Path(tempfile.mkdtemp(dir=self.folder)), []
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            name = self.name(label)
            stem = re.sub(r"[^0-9A-Za-z]+", "_", name)[:60]
            path = folder / f"{stem}-seed{seed}-{index}.png"
            text = dumps(describe(**made, labels=labels, index=index))
            save_image(path, image, {KEY: text})
            kept.append((str(path), name))
        return kept

    @cached_property
    def identity(self):
        """What util.provenance says alike of all pictures."""
        return {
            **engine.source_of(self.ckpt, self.config["tokenizer"], self.tokenizer),
            "weights": "ema",
            "weights_sha256": digest(self.model.state_dict()),
            "tokenizer_sha256": digest(self.tokenizer.state_dict()),
            "precision": self.precision,
        }

    def name(self, label):
        """The name of a class, for people."""
        if not self.said:
            return "picture"
        return "no class" if label is None else self.said[label]

    def text_of(self, path):
        """The text for `labels` of the class of a picture that `keep` wrote."""
        made = read_provenance(path)
        label = made["labels"][made["index"]]
        if label is None:
            return "none"
        return self.names[label] if self.names else str(label)

    def open(self, path):
        """A picture of the user's as the model's data are: uint8 (H, W, 3). Raises ValueError."""
        reading = plain_reading(self.config.get("data"), {}).but(orientation="exif")
        picture = read_picture(path, reading, Path(path).name)
        return np.asarray(center_crop_arr(picture, self.size).convert("RGB"))


def names_to_show(names, count):
    """A name of each class for people, no two alike; [] if there is one class, or none.

    names: of the classes, or None if these are not known.
    """
    if count == 1 or are_none(names or ()):
        return []
    said = spoken(names or [str(i) for i in range(count)])
    if len(set(said)) == count:
        return said
    return [f"{name} ({i})" for i, name in enumerate(said)]  # two of ImageNet's are cranes


class Pace:
    """When to show what is there: so that it takes no longer than what is between."""

    def __init__(self):
        self.cost, self.since = 0.0, time.monotonic()

    def due(self):
        """Whether to show something now; `done` is to be called after it."""
        self.start = time.monotonic()
        return self.start - self.since >= self.cost

    def done(self):
        self.since = time.monotonic()
        self.cost = self.since - self.start


# ---- what fields of the page hold ----------------------------------------------------------------


def read(name, kind, text):
    """The value of a field, by an argparse type. Raises ValueError."""
    text = "" if text is None else str(text)
    try:
        return kind(text)
    except ArgumentTypeError as error:  # of which some name the setting themselves
        raise ValueError(f"{name} {error}" if str(error).startswith(text) else error) from None


def read_field(field, value):
    """The value of a field of Sampling. Raises ValueError."""
    if field.metadata.get("choices"):
        return value
    kind = field.metadata["type"]
    count = field.metadata.get("nargs")
    if not count:
        return read(field.name, kind, value)
    parts = str(value).split()
    if len(parts) != count:
        raise ValueError(f"{field.name} {value}: expected {count} numbers, separated by a space")
    return tuple(read(field.name, kind, part) for part in parts)


def shown_field(value):
    """A value as a field of the page holds it."""
    return " ".join(f"{part:g}" for part in value) if isinstance(value, tuple) else value


def read_seed(value):
    """The seed in a field. Raises ValueError."""
    return read("seed", integer(0, 2**32 - 1), value)


# ---- what the page shows -------------------------------------------------------------------------


def zoom(picture):
    """A picture (H, W, C) enlarged by an integer, so that small ones can be seen and painted."""
    factor = -(-ON_PAGE // min(picture.shape[:2]))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def frame(images, hidden):
    """Images (N, H, W, 3) side by side, with hidden tokens (N, h, w) in gray; and a few words.

    Many large images are reduced by an integer.
    """
    hidden = torch.as_tensor(hidden)
    columns = columns_of(len(images))
    shown = grid(hide_unknown(images, hidden), columns, min_side=ON_PAGE // columns)
    factor = max(1, round(max(shown.shape) / WIDE))
    shown = np.asarray(Image.fromarray(shown).reduce(factor))
    return shown, f"{int((hidden == 0).sum())} of {hidden.numel()} tokens"


def columns_of(count):
    """Columns of a grid nearly square, with no empty places if that is possible."""
    nearly = math.ceil(count**0.5)
    return next((n for n in range(nearly, 2 * nearly) if count % n == 0), nearly)


def summary(path):
    """What the picture at `path` was made by, without the settings that are the usual ones."""
    made = read_provenance(path)
    parts = [f"picture {made['index'] + 1} of {len(made['labels'])}", f"seed {made['seed']}"]
    plain = {**Sampling().asdict(), "solver": USUAL["solver"]}
    changed = {k: v for k, v in made["sampling"].items() if v != plain.get(k)}
    parts += [f"{name} {value}" for name, value in changed.items()]
    return " · ".join(parts)


def painted(layers, size):
    """The mask (H, W), 1 where a brush touched the enlarged picture. Raises ValueError if nowhere.

    layers: arrays (h, w, 4). size: (H, W).
    """
    height, width = size
    mask = np.zeros(size, np.uint8)
    for layer in layers:
        rows, columns = np.nonzero(layer[..., 3] > PAINTED)
        mask[rows * height // layer.shape[0], columns * width // layer.shape[1]] = 1
    if not mask.any():
        raise ValueError("nothing is painted: expected a mask, brushed over what is to be replaced")
    return mask
