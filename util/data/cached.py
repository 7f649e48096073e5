"""Caches of latents: one file per image, the published layout, or a few shards for all.

A cache stores moments (2C, h, w), from which a tokenizer's `sample` draws latents.

The published layout is a file class/name.ext.npz for each image. Beside them `cache.json` says what
the latents depend on and, once all files are there, that they are, with the sha256 of

    cache.names.npy      (N,) str, class/name.ext
    cache.checksums.npy  (N, 2) uint32, the CRC32s of `moments` and `moments_flip` in each file;
                         (N, 1) without mirror images
    cache.sources.npy    (N, 3) int64, the pictures, see util/data/sources.py

Earlier versions wrote a manifest without these; the published code wrote none.
"""

import copy
import math
import zipfile
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets

from util import dist
from util.data import check_classes
from util.data.classes import are_none, in_order
from util.data.listing import class_folders, data_folder
from util.data.manifest import (
    AGAIN,
    MANIFEST,
    has_flips,
    layout_of,
    parse_array,
    read_manifest,
    read_part,
    write_manifest,
    write_part,
)
from util.data.shards import ShardedCache
from util.data.sources import UNKNOWN, find_exchanged
from util.files import check_room, first_few, replacing

VIEWS = ("moments", "moments_flip")
INDEX = ("names", "checksums", "sources")
LARGEST = 1 << 28  # bytes of an array in a file; anything larger is no latent


# ---- files ---------------------------------------------------------------------------------------


def read_arrays(path, names=None):
    """The arrays of an .npz, all or those named, each with its CRC32: name -> (array, CRC32).

    Members are read whole, so that their CRC32s are verified. Raises ValueError for a damaged file.
    """
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            return {name: _read_member(archive, members[name]) for name in names or members}
    except Exception as error:  # zipfile and numpy raise several types
        raise ValueError(f"{path}: not a cached latent ({error}); {AGAIN} to repair it") from None


def _read_member(archive, info):
    if info.file_size > LARGEST:
        raise ValueError(f"{info.file_size} bytes")
    return parse_array(archive.read(info)), info.CRC


def read_moments(path, names=VIEWS, checksums=None):
    """The named arrays of one cached image. Raises ValueError for a damaged file.

    checksums: the CRC32s that the cache has of them; None if it has none.
    """
    found = read_arrays(path, names)
    if checksums is not None and [crc for _, crc in found.values()] != list(checksums):
        raise ValueError(
            f"{path}: not the latents that main_cache.py wrote there: of another image, another "
            f"time or another tokenizer; {AGAIN} to repair it"
        )
    for name, (array, _) in found.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{path}: {name} is not finite; delete it, and {AGAIN}")
    return {name: array for name, (array, _) in found.items()}


def write_moments(path, *views):
    """Write one cached image for `read_moments`, atomically; returns the CRC32s of its arrays.

    views: moments of the image and, if wanted, of its mirror image.
    """
    arrays = dict(zip(VIEWS, views, strict=False))
    needed = sum(moments.nbytes for moments in views)
    # numpy appends .npz to names without it, so it gets an open file
    with replacing(path, needed) as beside:
        with open(beside, "wb") as file:
            np.savez(file, **arrays)
        with zipfile.ZipFile(beside) as archive:
            return [archive.getinfo(f"{name}.npy").CRC for name in arrays]


# ---- one file per image --------------------------------------------------------------------------


class CachedFolder(datasets.DatasetFolder):
    """Moments from `root`/class/name.npz, written by main_cache.py; with `flip`, those of the
    mirror image half the time.

    A file holds float32 `moments` and `moments_flip`, each (2C, h, w): the published layout; or, if
    the cache was made without mirror images, only `moments`, and `flip` is False then. shape:
    expected shape of the moments; None for any. Raises ValueError if the cache is known not to be
    finished, if images are missing or were added, and for a damaged file of the first image of a
    class; items raise ValueError for damaged files.
    """

    def __init__(self, root, shape=None, flip=True):
        manifest = _finished_manifest(root)
        self.order = manifest.get("classes")
        self.arrays = views_of(root, manifest)
        self.flip = flip and self.arrays == VIEWS
        try:
            super().__init__(str(root), loader=None, extensions=(".npz",))
        except FileNotFoundError as error:
            raise ValueError(
                f"--cached_path {str(root)!r}: expected one folder of latents per class ({error})"
            ) from None
        self.shape = None
        self.checksums, self.sources = self._open_index(manifest)
        if shape:
            self.expect(shape)

    def find_classes(self, directory):
        """(names, name -> index) of the classes, in the manifest's order."""
        names = in_order(super().find_classes(directory)[0])
        names = self.order if sorted(self.order or ()) == sorted(names) else names
        return names, {name: i for i, name in enumerate(names)}

    @property
    def crcs(self):
        """The CRC32s (N,) of the pictures, or None if they are not known."""
        known = self.sources is not None and bool((self.sources[:, 0] >= 0).all())
        return self.sources[:, 2] if known else None

    def unflipped(self):
        """The same moments, none of them of mirror images."""
        plain = copy.copy(self)
        plain.flip = False
        return plain

    def follow(self, classes):
        """Take another order of the same classes."""
        self.targets = [classes.index(self.classes[label]) for label in self.targets]
        self.samples = [(path, i) for (path, _), i in zip(self.samples, self.targets, strict=True)]
        self.classes = classes

    def expect(self, shape):
        """Raises ValueError unless moments, of the first image of each class, have this shape."""
        self.shape = tuple(shape)
        for index in np.unique(self.targets, return_index=True)[1].tolist():
            self._read(index, self.arrays)

    def __getitem__(self, index):
        name = "moments_flip" if self.flip and torch.rand(()) < 0.5 else "moments"
        return torch.from_numpy(self._read(index, (name,))[name]), self.targets[index]

    def name(self, index):
        """The path of an image below its folder of images, class/name.ext."""
        return Path(self.samples[index][0]).relative_to(self.root).as_posix().removesuffix(".npz")

    def views(self, index):
        """The moments of an image and, if there, of its mirror image, a list of (2C, h, w)."""
        return list(self._read(index, self.arrays).values())

    def _read(self, index, names):
        path, known = self.samples[index][0], self.checksums
        expected = known is not None and [known[index][VIEWS.index(name)] for name in names]
        found = read_moments(path, names, expected or None)
        for moments in found.values():
            if self.shape and moments.shape != self.shape:
                raise ValueError(
                    f"{path}: moments of shape {moments.shape}, expected {self.shape} for this "
                    "tokenizer and --img_size"
                )
        return found

    def _open_index(self, manifest):
        """(checksums, sources) of the images; None if the cache does not say."""
        index = read_index(self.root, manifest)
        if index is None:
            return None, None
        rows = {name: row for row, name in enumerate(index["names"].tolist())}
        names = [self.name(i) for i in range(len(self))]
        _check_names(self.root, names, rows.keys())
        if self.classes != manifest.get("classes"):
            raise ValueError(f"{self.root}: other classes than those of {MANIFEST}; {AGAIN}")
        order = [rows[name] for name in names]
        return index["checksums"][order], index["sources"][order]


def views_of(folder, manifest):
    """The names of the arrays in each file: VIEWS, or only the first if there are no mirror images.

    Without a manifest, those of a first file that can be read.
    """
    if manifest or not (path := next(Path(folder).rglob("*.npz"), None)):
        return VIEWS if has_flips(manifest) else VIEWS[:1]
    try:
        return VIEWS[: 1 + (VIEWS[1] in read_arrays(path))]
    except ValueError:
        return VIEWS


def _finished_manifest(folder):
    """The manifest. Raises ValueError if it is known that images are missing."""
    manifest = read_manifest(folder)
    if manifest.get("finished") is False:
        raise ValueError(
            f"{folder}: not all images are there, as the run that cached them was stopped; {AGAIN}"
        )
    if not manifest and index_path(folder, "names").exists():
        raise ValueError(f"{folder}: {MANIFEST} is missing; {AGAIN}")
    return manifest


def _check_names(folder, found, expected):
    for what, names in (
        ("missing", sorted(expected - {*found})),
        ("there that main_cache.py did not finish", sorted({*found} - expected)),
    ):
        if names:
            raise ValueError(
                f"{folder}: latents of {len(names)} images are {what}: {first_few(names)}; {AGAIN}"
            )


def index_path(folder, part):
    """The file of a part of the index of a cache with one file per image."""
    return Path(folder) / f"cache.{part}.npy"


def read_index(folder, manifest):
    """Part -> array of the index; None if the cache has none. Raises ValueError if damaged."""
    if "parts" not in manifest:
        return None
    if {*INDEX} - manifest["parts"].keys():
        raise ValueError(f"{Path(folder) / MANIFEST}: names no {', '.join(INDEX)}; {AGAIN}")
    index = {p: read_part(index_path(folder, p), manifest["parts"][p]) for p in INDEX}
    count = len(index["names"])
    expected = (count, len(views_of(folder, manifest)))
    if index["checksums"].shape != expected or index["sources"].shape != (count, 3):
        raise ValueError(f"{folder}: parts of its index are of other images; {AGAIN}")
    return index


class FolderWriter:
    """Writes a cache with one file per image, and then what its manifest says of them.

    names, classes: of all images. views: names of the arrays in each file. For each image one
    process calls `write`, unless `is_whole` or `holds` has found its file; then all call `finish`.
    Raises ValueError if the folder holds latents of other images.
    """

    def __init__(self, folder, names, classes, views=VIEWS):
        self.folder, self.names, self.classes = Path(folder), names, classes
        self.views = views
        self.checksums = np.zeros((len(names), len(views)), np.uint32)
        self.sources = np.full((len(names), 3), UNKNOWN, np.int64)
        self.said = np.zeros(len(names), bool)
        if dist.is_main():
            self._check_others()
        try:
            self.index = read_index(folder, read_manifest(folder)) or {"names": np.array([])}
        except ValueError:  # damaged: all files are looked at anew
            self.index = {"names": np.array([])}
        self.rows = {name: row for row, name in enumerate(self.index["names"].tolist())}

    def _check_others(self):
        found = {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*.npz")}
        if others := sorted(found - {f"{name}.npz" for name in self.names}):
            raise ValueError(
                f"{self.folder}: the data set has changed: latents of {len(others)} other images "
                f"are there: {first_few(others)}; delete them, or pass another --cached_path"
            )

    def path(self, index):
        """The file of an image."""
        return self.folder / f"{self.names[index]}.npz"

    def is_whole(self, index, shape, pictures):
        """Whether the latents of an image are there, and of its picture; if so, they are kept.

        shape: of the moments. pictures: see util.data.sources. Raises ValueError for latents of
        another shape.
        """
        path = self.path(index)
        try:
            found = read_arrays(path, self.views) if path.is_file() else {}
        except ValueError:
            return False
        shapes = [moments.shape for moments, _ in found.values()]
        if any(other != shape for other in shapes):
            raise ValueError(
                f"{path}: holds latents of shape {shapes[0]}, these are {shape}; pass another "
                "--cached_path"
            )
        if not found or not all(np.isfinite(moments).all() for moments, _ in found.values()):
            return False
        return self._keep(index, [crc for _, crc in found.values()], pictures)

    def _keep(self, index, checksums, pictures):
        known, source = self._known(index) or (checksums, UNKNOWN)
        written = self.path(index).stat().st_mtime_ns
        if list(known) != checksums or not pictures.is_same(index, source, written):
            return False
        self._say(index, checksums, source if source[0] >= 0 else pictures.source(index))
        return True

    def holds(self, index, views, source):
        """Whether a file holds these moments; if so, it is kept, as of the picture `source`.

        views: as for `write_moments`. Raises ValueError if it holds other moments.
        """
        path = self.path(index)
        try:
            found = read_arrays(path, self.views) if path.is_file() else {}
        except ValueError:
            return False
        arrays = [array for array, _ in found.values()]
        if found and not all(map(np.array_equal, arrays, views)):
            raise ValueError(f"{path}: holds other moments; pass another --cached_path")
        if found:
            self._say(index, [crc for _, crc in found.values()], source)
        return bool(found)

    def _known(self, index):
        """(checksums, source) as the last run that was finished says; None if none does."""
        row = self.rows.get(self.names[index])
        return None if row is None else [self.index[p][row] for p in INDEX[1:]]

    def write(self, index, views, source):
        """Write the latents of an image. views: as for `write_moments`; source: of its picture."""
        self._say(index, write_moments(self.path(index), *views), source)

    def _say(self, index, checksums, source):
        self.checksums[index], self.sources[index], self.said[index] = checksums, source, True

    def begin(self, count, shape):
        """To be called before `count` images with moments of a shape are written."""
        moments = 4 * math.prod(shape) * len(self.views)
        check_room(self.folder, count * (moments + 4096))  # headers, whole blocks
        if count and dist.is_main():
            self._write_manifest(finished=False)
        dist.barrier()

    def finish(self):
        """Write the manifest, once all images are there. A collective call."""
        rows = np.flatnonzero(self.said)
        for others, checksums, sources in (
            dist.gather((rows, self.checksums[rows], self.sources[rows])) or ()
        ):
            self.checksums[others], self.sources[others], self.said[others] = (
                checksums,
                sources,
                True,
            )
        if dist.is_main():
            assert self.said.all(), f"{self.folder}: not all images were written"
            parts = {"names": np.array(self.names)}
            parts |= {"checksums": self.checksums, "sources": self.sources}
            sha = {p: write_part(index_path(self.folder, p), x) for p, x in parts.items()}
            more = {"count": len(self.names), "classes": self.classes, "parts": sha}
            self._write_manifest(finished=True, **more)
        dist.wait()

    def _write_manifest(self, **more):
        flips = {} if self.views == VIEWS else {"flips": False}
        write_manifest(self.folder, {**read_manifest(self.folder), **flips, **more})


# ---- either layout -------------------------------------------------------------------------------


def open_cache(path, shape=None, class_num=None, record=None, data_path=None, flip=True):
    """The data set of (moments, label) of a cache in either layout. A collective call.

    shape: expected shape (2C, h, w) of the moments, and class_num: expected number of classes; None
    for any. record: see ShardedCache. data_path: folder of the images, whose classes are compared,
    or None; a data set with another number of classes is not that of these latents. flip: whether
    to take the mirror image half the time; if the cache has none, this is said. Raises ValueError.
    """
    if read_manifest(path).get("layout") == "shards":
        dataset = ShardedCache(path, shape, record, flip)
    else:
        dataset = CachedFolder(path, shape, flip)
        if dataset.checksums is None:
            dist.print0(
                f"NOTE: {path} does not say whether it is complete, as an earlier version or the "
                "published code made it: main_cache.py --verify --data_path compares it"
            )
    if flip and not dataset.flip:
        dist.print0(f"NOTE: {path}: this cache has no mirrored images, so none are flipped")
    if class_num is not None:
        check_classes(dataset, class_num, path)
    dataset.noted = read_manifest(path).get("reading", {})  # how its pictures were read
    dataset.channels = dataset.noted.get("channels")
    if problem := dist.broadcast(_other_classes(dataset, data_path) if dist.is_main() else None):
        raise ValueError(
            f"--data_path {data_path}: its classes are not those of the latents in {path}: "
            f"{problem}; pass the folder of their images"
        )
    return dataset


def _other_classes(dataset, data_path):
    """What differs between the classes of a cache and those of a folder of images, or None."""
    found = class_folders(data_path) if data_path else []
    if not found or len(found) != len(dataset.classes) or are_none(dataset.classes):
        return None  # another data set, not these images
    if others := sorted({*found} ^ {*dataset.classes}):
        return first_few(others)
    pair = find_exchanged(dataset, data_folder(data_path, "train"))
    return pair and f"{pair[0]} is a picture of {pair[1]}"


def check_cache(folder, tokenizer, img_size, write=False, **more):
    """Raises ValueError if the manifest in `folder` states another tokenizer or image size.

    Latents of two tokenizers or sizes must not be mixed. write: if there is no manifest, write one
    with these values and `more`, of which the message takes tokenizer_name and vae_path. A cache of
    the published code has none; in shards converted from it the values are null.
    """
    ours, theirs = {"tokenizer": tokenizer, "img_size": img_size}, read_manifest(folder)
    shown = {"tokenizer": _tokenizer_of, "img_size": lambda facts: facts["img_size"]}
    for name, value in ours.items():
        if theirs.get(name) not in (None, value):
            raise ValueError(
                f"{folder}: latents of {name} {shown[name](theirs)}, here it is "
                f"{shown[name](ours | more)}; pass another --cached_path"
            )
    if write and not theirs:
        write_manifest(folder, {**ours, **more})


def _tokenizer_of(facts):
    """The tokenizer that a manifest names, in words."""
    name, path = (facts.get(entry) for entry in ("tokenizer_name", "vae_path"))
    parts = [*([path] if path else []), f"sha256 {str(facts['tokenizer'])[:12]}"]
    return f"{name or ''} ({', '.join(parts)})".lstrip()


def check_views(folder, flip):
    """Raises ValueError if the cache in `folder` is with mirror images, and `flip` says without, or
    the other way round. An empty folder holds none."""
    manifest = read_manifest(folder)
    if layout_of(folder) is None or (views_of(folder, manifest) == VIEWS) == flip:
        return
    held, way = ("no", "add --no_flip") if flip else ("also", "leave out --no_flip")
    raise ValueError(
        f"{folder}: its images are cached with {held} mirrored ones, expected the same for all: "
        f"{way}, or pass another --cached_path"
    )
