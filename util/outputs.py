"""Outputs of sampling: a grid, folders and .npz files; a stopped run resumes with what is missing.

Images are kept as they are sampled: as PNGs if a folder is among the outputs, else in a hidden
folder beside the first file, `.NAME.parts`, removed when the files are complete. `sampling.json`
in the folder says what its images depend on. Whole batches are sampled or read back, never a part
of one: the rest of a batch, sampled alone, would be rounded differently.
"""

import json
import math
import shutil
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from util import dist
from util.data.listing import pictures_below
from util.dist import print0
from util.files import (
    check_room,
    check_writable,
    check_zip,
    first_few,
    is_foreign,
    make_folder,
    remove_leftovers,
    replacing,
)
from util.images import MAX_GRID, GridWriter, NpzWriter, read_png, save_image
from util.provenance import KEY, describe, dumps
from util.run import lock
from util.run.stop import Stopped
from util.sizes import sides

RECORD = "sampling.json"


# ---- folders that keep images --------------------------------------------------------------------


class ImageFolder:
    """A folder that is an output: a PNG per image, named by its index."""

    hidden = False
    text = None  # function that returns the text of a PNG, see `_text`

    def __init__(self, path, img_size):
        self.path, self.img_size = Path(path), img_size

    def add(self, indices, images):
        """Write images uint8 (n, H, W, 3) with their indices."""
        for place, (index, image) in enumerate(zip(indices, images, strict=True)):
            text = self.text and self.text(indices, place)
            save_image(self.path / _png(index), image, text)

    def read(self, indices):
        """The images of a batch, uint8 (n, H, W, 3); None unless all are there and intact."""
        images = []
        for index in indices:
            image = read_png(self.path / _png(index), self.img_size)
            if image is None:
                return None
            images.append(image)
        return np.stack(images)

    def count(self):
        """Number of images there."""
        return sum(1 for _ in self.path.glob("*.png"))

    def check_names(self, num_images):
        """Raises ValueError for other PNGs than those of num_images images."""
        ours = {_png(index) for index in range(num_images)}
        found = pictures_below(self.path)[0] if self.path.is_dir() else []
        others = sorted(path.name for path in map(Path, found) if path.name not in ours)
        if others:
            raise ValueError(
                f"--out {self.path}: holds {len(others)} other images, such as {others[0]}, which "
                "would be measured with these; expected an empty folder"
            )


class BatchFolder:
    """A hidden folder beside an output: an .npz per batch, until the output is complete.

    owner: path of the output.
    """

    hidden = True

    def __init__(self, owner, img_size):
        self.owner, self.path = owner, owner.with_name(f".{owner.name}.parts")
        self.img_size = img_size

    def add(self, indices, images):
        """Write a batch of images uint8 (n, H, W, 3)."""
        if len(indices):
            with replacing(self._file(indices)) as beside, open(beside, "wb") as file:
                np.savez(file, images=images)

    def read(self, indices):
        """The images of a batch, uint8 (n, H, W, 3); None unless they are there and intact."""
        path = self._file(indices)
        try:
            check_zip(path)
            with np.load(path) as file:
                images = file["images"]
        except Exception:  # a damaged file can raise nearly anything
            return None
        shape = len(indices), *sides(self.img_size), 3
        return images if (images.shape, images.dtype) == (shape, np.uint8) else None

    def count(self):
        """Number of images there."""
        ranges = [path.stem.split("-") for path in self.path.glob("[0-9]*-[0-9]*.npz")]
        return sum(int(stop) - int(start) for start, stop in ranges)

    def clear(self):
        """Delete the images."""
        for path in self.path.glob("*.npz"):
            path.unlink()

    def check_names(self, num_images):
        """Other names mean nothing."""

    def _file(self, indices):
        return self.path / f"{indices.start:06d}-{indices.stop:06d}.npz"


def _png(index):
    return f"{index:06d}.png"


# ---- the record of what images depend on ---------------------------------------------------------


def claim(folder, num_images, settings, machine, disposable=False):
    """Make a folder ready for images that depend on `settings`; returns the number there.

    settings: name -> value, as plain data. machine: the same, of what may change the last bit of an
    image. disposable: whether images of other settings are deleted. Raises ValueError for a folder
    with images of other settings, or of unknown ones.
    """
    there = folder.count()
    if not there:
        folder.check_names(num_images)  # another's photographs
    try:
        if there:
            found = _read_record(folder, there)
            _check_same(folder, there, settings, found["settings"])
            folder.check_names(num_images)
            _note_machine(folder, machine, found.get("machine"))
            return there
    except ValueError as error:
        if not disposable:
            raise
        print0(f"NOTE: {error}; they are deleted")
        folder.clear()
    with replacing(folder.path / RECORD) as beside:
        beside.write_text(json.dumps({"settings": settings, "machine": machine}, indent=1))
    return 0


def _read_record(folder, there):
    """The content of sampling.json. Raises ValueError."""
    path = folder.path / RECORD
    try:
        record = json.loads(path.read_text())
        if isinstance(record["settings"], dict):
            return record
        reason = "no settings"
    except FileNotFoundError:
        reason = "missing"
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"not readable, {type(error).__name__}"
    raise ValueError(
        f"--out {_named(folder)}: what its {there} images depend on is not known "
        f"({RECORD}: {reason}); expected {_advice(folder)}"
    )


def changes(settings, before):
    """Texts on the entries in which two dicts of settings differ."""
    return [
        f"{name} {_short(settings.get(name))} (was {_short(before.get(name))})"
        for name in {**settings, **before}
        if settings.get(name) != before.get(name)
    ]


def _check_same(folder, there, settings, before):
    """Raises ValueError if the images of a folder depend on other settings."""
    if changed := changes(settings, before):
        raise ValueError(
            f"--out {_named(folder)}: holds {there} images of other settings: "
            f"{first_few(changed)}; expected those settings, or {_advice(folder)}"
        )


def _note_machine(folder, machine, before):
    changed = [
        f"{name} {value} (was {before[name]})"
        for name, value in machine.items()
        if isinstance(before, dict) and before.get(name, value) != value
    ]
    if changed:
        print0(
            f"NOTE: {folder.path}: not as before: {', '.join(changed)}; the images there and those "
            "to come may differ in rounding from what either would give alone"
        )


def _named(folder):
    """A folder as messages name it."""
    return f"{folder.owner}: a stopped run's {folder.path.name}" if folder.hidden else folder.path


def _advice(folder):
    return f"another name, or {folder.path} deleted" if folder.hidden else "an empty folder"


def _short(value):
    """A value for a message: hashes are shortened."""
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 40 else value


# ---- all outputs of a run ------------------------------------------------------------------------


class Outputs:
    """Where the images of a run go. By default nowhere, and none are there.

    folders: receive images of each process. files: writers that receive all, in order, on rank 0.
    Attributes: `found`, number of images that this process read back; `seconds`, the time it took;
    `complete`, whether all images were kept.
    """

    def __init__(self, folders=(), files=(), num_images=0):
        self.folders, self.files, self.num_images = list(folders), list(files), num_images
        self.found, self.seconds, self.complete, self._last = 0, 0.0, False, None

    def read(self, indices):
        """The images of a batch if they were kept, uint8 (n, H, W, 3), else None."""
        start = time.perf_counter()
        images = self.folders[0].read(indices) if self.folders else None
        if images is not None:
            self.found += len(images)
            self.seconds += time.perf_counter() - start
            self._last = indices
        return images

    def keep(self, indices, images):
        """Keep a batch, sampled or read back. A collective call if there are files."""
        for folder in self.folders:
            if folder is not self.folders[0] or indices != self._last:
                folder.add(indices, images)
        for batch in in_order(indices, images) if self.files else ():
            for writer in self.files:
                writer.add(*batch)

    def describe(self):
        """How many images are kept, for a message. A collective call."""
        if not self.folders:
            return "images are kept with --out only"
        there = dist.broadcast(self.folders[0].count())
        return f"{there} of {self.num_images} images are there, the same command resumes"


def in_order(indices, images):
    """On rank 0, the batches of all processes in a round of `generate_images`; else none."""
    return [batch for batch in dist.gather((indices, images)) or [] if len(batch[0])]


def _text(labels, source, settings, indices, index=None, **grid):
    """The text of a PNG: what image number `index` of a batch was made by, or a grid of all.

    source, settings: see `open_outputs`. grid: columns of a grid.
    """
    names = ["weights", "weights_sha256", "tokenizer_sha256", "seed", "precision"]
    names += ["batch_size"] if grid else []
    entries = {name: settings[name] for name in names} | grid | source
    entries["first"] += indices.start
    entries["labels"] = labels[indices.start : indices.stop]
    return {KEY: dumps(describe(**entries, index=index))}


@contextmanager
def open_outputs(paths, labels, img_size, settings, device, columns=None, only=None, source=None):
    """The Outputs of a run with one image per label; complete at the end. A collective call.

    .png is a grid, or image number `only`; .npz is one file, any other name a folder of PNGs.
    settings: function that returns what the images depend on, as plain data. device: where they are
    sampled. columns: columns of the grid. source: if given, PNGs say what they were made by: the
    entries of util.provenance.describe that are neither among the settings nor labels.
    Raises ValueError for a grid of too many images, for a folder in use or with other images, and
    where there is no room; Stopped, with the number of images that are there, if the run is.
    """
    outputs = _check_paths([Path(path) for path in paths], labels, img_size, columns, only)
    machine = {"torch": torch.__version__, "device": torch.device(device).type}
    with _held(outputs):
        known = _claim_all(outputs, settings, machine)
        if source:
            for each in (*outputs.folders, *outputs.files):
                each.text = partial(_text, labels, source, known)
        try:
            with ExitStack() as stack:
                for writer in outputs.files if dist.is_main() else ():
                    stack.enter_context(writer)
                yield outputs
        except Stopped as request:
            raise Stopped(f"{request}; {outputs.describe()}") from None
        dist.wait()
        outputs.complete = True


@contextmanager
def _held(outputs):
    """Create and hold the folders of Outputs; hidden ones are deleted when they are of no use."""
    held = []
    try:
        with ExitStack() as stack:
            for folder in outputs.folders:
                make_folder(folder.path, "--out")
                stack.enter_context(lock.folder(folder.path, "--out"))
                held.append(folder)
            yield
    finally:
        for folder in held if dist.is_main() else ():
            if folder.hidden and (outputs.complete or not folder.count()):
                shutil.rmtree(folder.path, ignore_errors=True)


def _check_paths(paths, labels, img_size, columns, only):
    """Outputs of these names. Raises ValueError."""
    folders, files = [], []
    for path in paths:
        _check_path(path)
        if path.suffix == ".png" and only is None and len(labels) > MAX_GRID:
            raise ValueError(
                f"--out {path}: a grid of {len(labels)} images, expected at most {MAX_GRID}; "
                "name a folder or an .npz"
            )
        if path.suffix == ".png":
            files.append(GridWriter(path, labels, columns, only))
        elif path.suffix == ".npz":
            files.append(NpzWriter(path, len(labels), img_size))
        else:
            folders.append(ImageFolder(path, img_size))
    if files and not folders:
        folders = [BatchFolder(files[0].path, img_size)]
    return Outputs(folders, files, len(labels))


def _check_path(path):
    """Raises ValueError unless a name is one of an output, and it can be written there."""
    if is_foreign(path, (".png", ".npz")) or path == Path():
        raise ValueError(f"--out {path}: expected a name in .png or .npz, or a folder")
    is_file = path.suffix in (".png", ".npz")
    make_folder(path.parent if is_file else path, "--out")
    check_writable(path if is_file else path / RECORD, f"--out {path}")
    if is_file and path.is_dir():
        raise ValueError(f"--out {path}: is a folder, expected a name for a file")


def _claim_all(outputs, settings, machine):
    """Make the folders of Outputs ready, on rank 0; returns the settings on every process.

    Raises ValueError, on every process.
    """
    problem, known, count = None, None, outputs.num_images
    if dist.is_main() and outputs.folders:
        try:
            known = json.loads(json.dumps(settings()))
            disposable = not any(writer.bytes for writer in outputs.files)
            for folder in outputs.folders:
                there = claim(folder, count, known, machine, disposable and folder.hidden)
                _make_room(outputs, folder, there)
                if there:
                    print0(f"{folder.path}: {there} of {count} images are there: resuming")
        except (ValueError, OSError) as error:
            problem = str(error)
    problem, known = dist.broadcast((problem, known))
    if problem:
        raise ValueError(problem)
    return known


def _make_room(outputs, folder, there):
    """Remove what a killed run left, and compare free space with what is still to be written."""
    for path in {folder.path, *(writer.path.parent for writer in outputs.files)}:
        remove_leftovers(path)
    if folder.hidden:
        missing = (outputs.num_images - there) * 3 * math.prod(sides(folder.img_size))
        check_room(folder.path, missing + sum(writer.bytes for writer in outputs.files))
