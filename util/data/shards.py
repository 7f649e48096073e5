"""Cached latents in a few large files, from which whole batches are gathered.

Such a cache is a folder with, for every SHARD_SIZE images,

    shard-00000.moments.npy  (n, C, h, w): float16, or int32 for code indices
    shard-00000.flips.npy    the same, of the mirror images
    shard-00000.labels.npy   (n,) int64
    shard-00000.names.npy    (n,) str, class/name.ext
    shard-00000.json         its size, and bytes and sha256 of the four; written last

and a manifest, `cache.json`: what the latents depend on and, once all shards are complete, the
content of their .json files. Shard k holds the same images whichever process writes it, so an
interrupted run can resume with another number of processes.
"""

import hashlib
import json
import math
import os
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from util.dist import all_gather, barrier, broadcast, is_main, rank, world_size
from util.files import replacing
from util.logger import Progress

MANIFEST = "cache.json"
SHARD_SIZE = 16384  # images: 0.5 GB of KL-16's latents at 256 pixels, which are 16 KB each
PARTS = ("moments", "flips", "labels", "names")


def read_manifest(folder):
    """The manifest of the cache in `folder`, in either layout; {} if it has none."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not the manifest of a cache ({error})") from None


def write_manifest(folder, manifest):
    with replacing(Path(folder) / MANIFEST) as beside:
        beside.write_text(json.dumps(manifest))


def layout_of(folder):
    """The layout of the cache in `folder`: "shards", "images" (one file each), or None."""
    manifest = read_manifest(folder)
    if manifest or any(Path(folder).rglob("*.npz")):
        return manifest.get("layout", "images")
    return None


def write(folder, facts, names, labels, read, batch_size):
    """Write the missing shards of a data set, divided among the processes.

    facts: entries of the manifest: `tokenizer` (the sha256 of its weights), `img_size`, `shape` and
    `dtype` of the moments of an image, `classes`, and others that may differ between runs. names,
    labels: names and labels of all images. read: function of a list of batches, each a list of
    indices, that yields their (moments, flips), each (n, C, h, w). Returns the numbers of images
    (written, skipped) by all processes. Raises ValueError if the folder holds other latents or
    latents of other images, and for an image whose moments the dtype cannot hold.
    """
    folder, count = Path(folder), len(names)
    manifest = {"layout": "shards", **facts, "count": count, "shard_size": SHARD_SIZE}
    manifest["names_sha256"] = hashlib.sha256(os.fsencode("\n".join(names))).hexdigest()
    known = broadcast(read_manifest(folder))
    if known:
        _check_same(folder, known, manifest)
    shards = [range(i, min(i + SHARD_SIZE, count)) for i in range(0, count, SHARD_SIZE)]
    mine = range(rank(), len(shards), world_size())
    # without a manifest, the origin of a shard is unknown
    todo = [k for k in mine if not (known and _is_whole(folder, k))]
    if any(all_gather(bool(todo))) and is_main():
        write_manifest(folder, manifest)  # without `shards`, as not all are complete

    plan = {k: _batches(shards[k], batch_size) for k in todo}
    batches = iter(read(list(chain.from_iterable(plan.values()))))
    written = sum(len(shards[k]) for k in todo)
    progress = Progress(max(1, written), "caching", "img")
    for k, indices in plan.items():
        _write_shard(folder, k, manifest, indices, names, labels, batches, progress)
    progress.close()
    barrier()
    if is_main():
        records = [_record(folder, k).read_text() for k in range(len(shards))]
        manifest["shards"] = list(map(json.loads, records))
        write_manifest(folder, manifest)
    written = sum(all_gather(written))
    return written, count - written


def _check_same(folder, known, ours):
    of_images = ("count", "names_sha256", "classes")
    of_latents = ("layout", "tokenizer", "img_size", "shape", "dtype", "shard_size")
    for name in (*of_latents, *of_images):
        if known.get(name) != ours[name]:
            why = "the data set has changed: " if name in of_images else ""
            raise ValueError(
                f"{folder}: {why}its latents are of {name} {str(known.get(name))[:40]}, here it is "
                f"{str(ours[name])[:40]}; pass another --cached_path"
            )


def _batches(indices, size):
    return [list(indices[i : i + size]) for i in range(0, len(indices), size)]


def _path(folder, k, part):
    return folder / f"shard-{k:05d}.{part}.npy"


def _record(folder, k):
    return folder / f"shard-{k:05d}.json"


def _is_whole(folder, k):
    if not _record(folder, k).is_file():
        return False
    sizes = json.loads(_record(folder, k).read_text())["bytes"]
    paths = {part: _path(folder, k, part) for part in PARTS}
    return all(path.is_file() and path.stat().st_size == sizes[p] for p, path in paths.items())


def _write_shard(folder, k, manifest, batches, names, labels, source, progress):
    """Write shard k. batches: lists of indices. source: iterator of their (moments, flips)."""
    indices = list(chain.from_iterable(batches))
    _record(folder, k).unlink(missing_ok=True)
    with ExitStack() as stack:
        beside = {p: stack.enter_context(replacing(_path(folder, k, p))) for p in PARTS}
        with beside["moments"].open("wb") as moments, beside["flips"].open("wb") as flips:
            for file in (moments, flips):
                _write_header(file, (len(indices), *manifest["shape"]), manifest["dtype"])
            for batch in batches:
                for file, values in zip((moments, flips), next(source), strict=True):
                    shown = [names[i] for i in batch]
                    file.write(_cast(values, manifest["dtype"], shown).tobytes())
                progress.update(len(batch))
        small = {"labels": [int(labels[i]) for i in indices], "names": [names[i] for i in indices]}
        for part, values in small.items():
            with beside[part].open("wb") as file:  # np.save appends .npy to names without it
                np.save(file, np.array(values))
        record = {
            "file": f"shard-{k:05d}",
            "count": len(indices),
            "bytes": {part: path.stat().st_size for part, path in beside.items()},
            "sha256": {part: file_sha256(path) for part, path in beside.items()},
        }
    with replacing(_record(folder, k)) as path:
        path.write_text(json.dumps(record))


def _write_header(file, shape, dtype):
    """Write the header of np.save: the values follow in batches, as a shard may exceed memory, and
    through a file, as a memory map would crash without a message on a full disk."""
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _cast(values, dtype, names):
    """Values (n, ...) cast to the dtype. Raises ValueError with the first name that fails."""
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(dtype)
    fits = np.isfinite(cast) if cast.dtype.kind == "f" else cast == values
    bad = ~fits.reshape(len(names), -1).all(1)
    if bad.any():
        first = int(bad.argmax())
        raise ValueError(
            f"{names[first]}: moments as large as {np.abs(values[first]).max():g}, expected "
            f"values that {dtype} can hold; --layout images uses float32"
        )
    return cast


def file_sha256(path, progress=None):
    """The sha256 of a file. progress: a Progress that counts its bytes."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
            if progress:
                progress.update(len(chunk))
    return sha.hexdigest()


def find_damage(folder):
    """Hash each file of each shard, divided among the processes.

    Returns the number of images of the cache and a message for each damaged file that this process
    read. Raises ValueError if the cache is incomplete.
    """
    folder, manifest = Path(folder), _whole_manifest(folder)
    mine = manifest["shards"][rank() :: world_size()]
    total = sum(sum(shard["bytes"].values()) for shard in mine)
    progress, bad = Progress(max(1, total), "verifying", "B"), []
    for shard in mine:
        for part, expected in shard["sha256"].items():
            path = folder / f"{shard['file']}.{part}.npy"
            if not path.is_file():
                bad.append(f"{path.name} (missing)")
            elif file_sha256(path, progress) != expected:
                bad.append(f"{path.name} (not the sha256 of {MANIFEST})")
    progress.close()
    return manifest["count"], bad


def _whole_manifest(folder):
    manifest = read_manifest(folder)
    if "shards" not in manifest:
        raise ValueError(
            f"{folder}: not all shards are there, as the run that wrote them was stopped; call "
            "main_cache.py again as before"
        )
    return manifest


class ShardedCache(Dataset):
    """The moments of a folder of shards; those of the mirror image half the time.

    `__getitems__(indices)` gathers a batch: moments (N, C, h, w) in the dtype of the shards, labels
    (N,) int64. shape: expected shape (C, h, w) of the moments; None for any. Attributes: `classes`,
    their names; `labels`, int64, of all images. Raises ValueError for an incomplete folder, or
    another shape.
    """

    def __init__(self, folder, shape=None):
        self.folder = Path(folder)
        manifest = _whole_manifest(self.folder)
        self.shape, self.classes = tuple(manifest["shape"]), manifest["classes"]
        if shape is not None and self.shape != tuple(shape):
            raise ValueError(
                f"{folder}: moments of shape {self.shape}, expected {tuple(shape)} for this "
                "tokenizer and --img_size"
            )
        self.shards, self.shard_size = manifest["shards"], manifest["shard_size"]
        self.labels = self._read("labels")
        self.dtype = np.dtype(manifest["dtype"])
        self.row_bytes = math.prod(self.shape) * self.dtype.itemsize
        self.maps = [self._map("moments"), self._map("flips")]

    def __reduce__(self):  # spawned workers receive the names of the files, not the data
        return ShardedCache, (self.folder, self.shape)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        moments, labels = self.__getitems__([index])
        return moments[0], int(labels[0])

    @staticmethod
    def collate(batch):
        """The batch unchanged: `__getitems__` has collated it."""
        return batch

    def __getitems__(self, indices):
        flips = (torch.rand(len(indices)) < 0.5).tolist()
        # joining bytes takes two thirds of the time of copying array rows one by one
        rows = bytearray().join([self._row(i, f) for i, f in zip(indices, flips, strict=True)])
        moments = np.frombuffer(rows, self.dtype).reshape(len(indices), *self.shape)
        return torch.from_numpy(moments), torch.from_numpy(self.labels[indices])

    def pair(self, index):
        """The moments of an image and of its mirror image, arrays (C, h, w)."""
        rows = [self._row(index, flip) for flip in (False, True)]
        return [np.frombuffer(row, self.dtype).reshape(self.shape) for row in rows]

    def _row(self, index, flip):
        shard, place = divmod(index, self.shard_size)
        start = place * self.row_bytes
        return self.maps[flip][shard][start : start + self.row_bytes]

    def names(self):
        """The names class/name.ext of all images, a list."""
        return self._read("names").tolist()

    def _read(self, part):
        return np.concatenate([self._load(shard, part) for shard in self.shards])

    def _map(self, part):
        """The bytes of the rows of each shard, memory-mapped."""
        arrays = [self._load(shard, part, self.shape, "r") for shard in self.shards]
        return [memoryview(array.reshape(-1).view(np.uint8)) for array in arrays]

    def _load(self, shard, part, shape=(), mode=None):
        path, expected = self.folder / f"{shard['file']}.{part}.npy", (shard["count"], *shape)
        try:
            array = np.load(path, mmap_mode=mode)
        except Exception as error:  # numpy raises several types for a damaged file
            raise ValueError(
                f"{path}: not a part of a shard ({error}); delete it and cache again"
            ) from None
        if array.shape != expected:
            raise ValueError(f"{path}: of shape {array.shape}, expected {expected}")
        return array
