"""Cached latents in a few large files, from which whole batches are gathered.

Such a cache is a folder with, for every SHARD_SIZE images,

    shard-00000.moments.npy    (n, C, h, w): float16, or int32 for code indices
    shard-00000.flips.npy      the same, of the mirror images; absent if the cache has none
    shard-00000.labels.npy     (n,) int64
    shard-00000.names.npy      (n,) str, class/name.ext
    shard-00000.checksums.npy  (n, 2) uint64, of the rows of the first two, see `checksums_of`;
                               (n, 1) without mirror images
    shard-00000.sources.npy    (n, 3) int64, the pictures, see util/data/sources.py
    shard-00000.json           its size, and bytes and sha256 of the others; written last

and a manifest, `cache.json`: what the latents depend on and, once all shards are complete, the
content of their .json files. Earlier versions wrote neither checksums nor sources. They are written
by util/data/shard_writer.py.
"""

import copy
import math
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from util.data.manifest import AGAIN, MANIFEST, fingerprint, has_flips, read_manifest, read_part
from util.dist import all_gather, is_main, rank, wait, world_size
from util.files import file_sha256, first_few, replacing
from util.logger import Progress

SHARD_SIZE = 16384  # images: 0.5 GB of KL-16's latents at 256 pixels, which are 16 KB each
PARTS = ("moments", "flips", "labels", "names", "checksums", "sources")
ROWS = ("moments", "flips")  # the large ones, a row per image


def rows_of(manifest):
    """The large parts that a cache has: those in ROWS, or only the first."""
    return ROWS if has_flips(manifest) else ROWS[:1]


def part_path(folder, k, part):
    """The file of a part of shard k."""
    return Path(folder) / f"shard-{k:05d}.{part}.npy"


def checksums_of(rows):
    """Checksums (N,) uint64 of rows (N, …): the sums of their 64-bit words.

    A flipped bit changes a sum, as does any change within 32 bits in a row; larger damage passes
    with a probability of 2^-64. It takes a sixth of the time of a CRC32.
    """
    rows = np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint8)
    width = math.gcd(rows.shape[1], 8)  # bytes of the largest words that fill a row
    return rows.view(f"<u{width}").sum(1, dtype=np.uint64)


# ---- verifying -----------------------------------------------------------------------------------


def find_damage(folder):
    """Read each file of each shard, divided among the processes.

    Returns the number of images of the cache and a message for each damaged file that this process
    read. Raises ValueError if the cache is incomplete.
    """
    folder, manifest = Path(folder), whole_manifest(folder)
    mine = range(rank(), len(manifest["shards"]), world_size())
    shards = [manifest["shards"][k] for k in mine]
    progress = Progress(max(1, sum(sum(s["bytes"].values()) for s in shards)), "verifying", "B")
    bad = []
    for k, shard in zip(mine, shards, strict=True):
        damaged = damaged_parts(folder, shard, progress)
        bad += [f"{shard['file']}.{part}.npy ({why})" for part, why in damaged.items()]
        if not damaged:
            bad += _contradictions(folder, k, shard, manifest)
    progress.close()
    return manifest["count"], bad


def damaged_parts(folder, shard, progress=None):
    """Part -> why it is damaged, by the sha256 of all parts of a shard."""
    found = {}
    for part, expected in shard["sha256"].items():
        path = Path(folder) / f"{shard['file']}.{part}.npy"
        if not path.is_file():
            found[part] = "missing"
        elif file_sha256(path, progress) != expected:
            found[part] = f"not the sha256 of {MANIFEST}"
    return found


def _contradictions(folder, k, shard, manifest):
    """What a shard whose files are as they were written holds that cannot be; messages."""
    bad, read = [], {p: np.load(part_path(folder, k, p), mmap_mode="r") for p in shard["sha256"]}
    for column, part in enumerate(rows_of(manifest)):
        finite, sums = _scan(read[part])
        if not finite.all():
            bad.append(f"{shard['file']}.{part}.npy (not finite, in row {int(finite.argmin())})")
        if "checksums" in read and not np.array_equal(sums, read["checksums"][:, column]):
            bad.append(f"{shard['file']}.checksums.npy (not those of {part})")
    folders = [Path(name).parts[0] for name in read["names"].tolist()]
    labels, classes = read["labels"].tolist(), manifest["classes"]
    if not all(0 <= n < len(classes) for n in labels) or [classes[n] for n in labels] != folders:
        bad.append(f"{shard['file']}.labels.npy (not the classes of its names)")
    return bad


def _scan(rows, at_once=256):
    """(whether each row is finite, checksums) of memory-mapped rows, each (n,)."""
    parts = [np.array(rows[i : i + at_once]) for i in range(0, len(rows), at_once)]
    finite = [np.isfinite(part).reshape(len(part), -1).all(1) for part in parts]
    return np.concatenate(finite), np.concatenate(list(map(checksums_of, parts)))


def whole_manifest(folder):
    """The manifest of a complete cache. Raises ValueError for another."""
    manifest = read_manifest(folder)
    if "shards" not in manifest:
        raise ValueError(
            f"{folder}: not all shards are there, as the run that wrote them was stopped; {AGAIN}"
        )
    expected = {"shape", "dtype", "classes", "count", "shard_size"}
    if expected - manifest.keys() or not _add_up(manifest):
        raise ValueError(f"{Path(folder) / MANIFEST}: not the manifest of a whole cache; {AGAIN}")
    return manifest


def _add_up(manifest):
    if any({*rows_of(manifest)} - shard["sha256"].keys() for shard in manifest["shards"]):
        return False
    counts, size = [shard["count"] for shard in manifest["shards"]], manifest["shard_size"]
    cut = [len(range(manifest["count"])[i : i + size]) for i in range(0, manifest["count"], size)]
    return len(counts) * size < manifest["count"] + size and counts == cut


# ---- reading -------------------------------------------------------------------------------------


class ShardedCache(Dataset):
    """The moments of a folder of shards; those of the mirror image half the time, with `flip`.

    `__getitems__(indices)` gathers a batch: moments (N, C, h, w) in the dtype of the shards, labels
    (N,) int64; it raises ValueError for a damaged row. shape: expected shape (C, h, w) of the
    moments; None for any. record: file that remembers the checksums of shards that have none, so
    that they are read once only; None for none. Attributes: `classes`, their names; `labels`,
    int64, of all images; `flip`, as given, but False if the cache has no mirror images. Raises
    ValueError for an incomplete folder, damaged labels or names, or another shape. A collective
    call.
    """

    def __init__(self, folder, shape=None, record=None, flip=True):
        self._open(folder, shape, flip)
        for shard in self.shards:
            self._read_part(shard, "names")  # its sha256
        self.passed_on = None  # to workers: checksums that no file holds
        if all("checksums" in shard["sha256"] for shard in self.shards):
            self.checksums = self._read("checksums", len(self.maps))
        else:
            self.checksums = self.passed_on = _checksums_of_old(self.folder, self.shards, record)

    def _open(self, folder, shape, flip):
        self.folder = Path(folder)
        manifest = whole_manifest(self.folder)
        self.shape, self.classes = tuple(manifest["shape"]), manifest["classes"]
        if shape is not None:
            self.expect(shape)
        self.shards, self.shard_size = manifest["shards"], manifest["shard_size"]
        self.labels = self._read("labels")
        if not (self.labels.min() >= 0 and self.labels.max() < len(self.classes)):
            raise ValueError(f"{folder}: labels of other classes than its {len(self.classes)}")
        self.dtype = np.dtype(manifest["dtype"])
        self.row_bytes = math.prod(self.shape) * self.dtype.itemsize
        self.maps = [self._map(part) for part in rows_of(manifest)]
        self.flip = flip and has_flips(manifest)

    def expect(self, shape):
        """Raises ValueError unless moments have this shape."""
        if self.shape != tuple(shape):
            raise ValueError(
                f"{self.folder}: moments of shape {self.shape}, expected {tuple(shape)} for this "
                "tokenizer and --img_size"
            )

    def __reduce__(self):  # spawned workers receive the names of the files, not the data
        return _reopen, (self.folder, self.shape, self.flip, self.passed_on, self.classes)

    def unflipped(self):
        """The same moments, none of them of mirror images."""
        plain = copy.copy(self)
        plain.flip = False
        return plain

    def follow(self, classes):
        """Take another order of the same classes."""
        self.labels = np.array([classes.index(name) for name in self.classes])[self.labels]
        self.classes = classes

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
        count = len(indices)
        flips = (torch.rand(count) < 0.5).tolist() if self.flip else [False] * count
        # joining bytes takes two thirds of the time of copying array rows one by one
        rows = bytearray().join([self._row(i, f) for i, f in zip(indices, flips, strict=True)])
        moments = np.frombuffer(rows, self.dtype).reshape(count, *self.shape)
        indices = np.asarray(indices)
        self._check(moments, indices, np.asarray(flips, np.intp))
        return torch.from_numpy(moments), torch.from_numpy(self.labels[indices])

    def views(self, index):
        """The moments of an image and, if there, of its mirror image, a list of (C, h, w)."""
        count = len(self.maps)
        rows = b"".join([self._row(index, flip) for flip in range(count)])
        moments = np.frombuffer(rows, self.dtype).reshape(count, *self.shape)
        self._check(moments, np.full(count, index), np.arange(count))
        return list(moments)

    def _row(self, index, flip):
        shard, place = divmod(index, self.shard_size)
        start = place * self.row_bytes
        return self.maps[flip][shard][start : start + self.row_bytes]

    def _check(self, moments, indices, flips):
        """Raises ValueError, with names, unless rows have their checksums."""
        wrong = checksums_of(moments) != self.checksums[indices, flips]
        if wrong.any():
            shown = first_few([self.name(i) for i in indices[wrong].tolist()])
            k, flip = indices[wrong][0] // self.shard_size, flips[wrong][0]
            path = part_path(self.folder, k, ROWS[flip])
            raise ValueError(f"{path}: damaged: the latents of {shown}; {AGAIN} to repair them")

    def name(self, index):
        """The name class/name.ext of an image."""
        shard, place = divmod(index, self.shard_size)
        return str(self._read_part(self.shards[shard], "names")[place])

    def names(self):
        """The names class/name.ext of all images, a list."""
        return self._read("names").tolist()

    def sources(self):
        """The sources (N, 3) of all images, see util.data.sources; None if they are not known."""
        known = all("sources" in shard["sha256"] for shard in self.shards)
        return self._read("sources", 3) if known else None

    @property
    def crcs(self):
        """The CRC32s (N,) of the pictures, or None if they are not known."""
        sources = self.sources()
        known = sources is not None and bool((sources[:, 0] >= 0).all())
        return sources[:, 2] if known else None

    def _read(self, part, *shape):
        return np.concatenate([self._read_part(shard, part, *shape) for shard in self.shards])

    def _read_part(self, shard, part, *shape):
        path, sha256 = self.folder / f"{shard['file']}.{part}.npy", shard["sha256"][part]
        return read_part(path, sha256, (shard["count"], *shape))

    def _map(self, part):
        """The bytes of the rows of each shard, memory-mapped."""
        arrays = [self._load(shard, part) for shard in self.shards]
        return [memoryview(array.reshape(-1).view(np.uint8)) for array in arrays]

    def _load(self, shard, part):
        path = self.folder / f"{shard['file']}.{part}.npy"
        try:
            array = np.load(path, mmap_mode="r")
        except Exception as error:  # numpy raises several types for a damaged file
            raise ValueError(f"{path}: not a part of a shard ({error}); {AGAIN}") from None
        found, expected = (array.dtype, array.shape), (self.dtype, (shard["count"], *self.shape))
        if found != expected or not array.flags.c_contiguous:
            raise ValueError(f"{path}: {array.dtype} of shape {array.shape}, expected {expected}")
        return array


def _reopen(folder, shape, flip, checksums, classes):
    """A ShardedCache in a worker, with what was checked when it was opened."""
    cache = ShardedCache.__new__(ShardedCache)
    cache._open(folder, shape, flip)
    cache.follow(classes)
    cache.passed_on = checksums
    width = len(cache.maps)
    cache.checksums = cache._read("checksums", width) if checksums is None else checksums
    return cache


def _checksums_of_old(folder, shards, record):
    """Checksums (N, 2) of shards without any, once their sha256 has been checked.

    record: file that remembers them, or None. Raises ValueError, on every process, for damage.
    """
    of = fingerprint({"shards": shards})
    known = _remembered(record, of, (sum(shard["count"] for shard in shards), 2))
    if all(all_gather(known is not None)):
        return known
    mine = range(rank(), len(shards), world_size())
    progress = Progress(
        max(1, sum(sum(shards[k]["bytes"].values()) for k in mine)), "checking", "B"
    )
    found = {k: _checked(folder, k, shards[k], progress) for k in mine}
    progress.close()
    wait()
    found = {k: value for each in all_gather(found) for k, value in each.items()}
    if bad := [value for _, value in sorted(found.items()) if isinstance(value, str)]:
        raise ValueError(f"{folder}: damaged: {first_few(bad)}; {AGAIN} to repair it")
    checksums = np.concatenate([found[k] for k in range(len(shards))])
    if record and is_main():
        with replacing(record) as beside, beside.open("wb") as file:
            np.savez(file, of=np.array(of), checksums=checksums)
    return checksums


def _checked(folder, k, shard, progress):
    """Checksums (n, 2) of a shard's rows, or a message if it is damaged."""
    damaged = damaged_parts(folder, shard, progress)
    if damaged:
        return first_few([f"{shard['file']}.{part}.npy ({why})" for part, why in damaged.items()])
    scans = [_scan(np.load(part_path(folder, k, part), mmap_mode="r")) for part in ROWS]
    if not all(finite.all() for finite, _ in scans):
        return f"{shard['file']} (not finite)"
    return np.stack([sums for _, sums in scans], 1)


def _remembered(record, of, shape):
    try:
        with np.load(record) as file:
            known = {name: file[name] for name in file.files}
    except Exception:  # none was asked for, or written yet, or it is damaged: all is read again
        return None
    fits = str(known.get("of")) == of and known["checksums"].shape == shape
    return known["checksums"] if fits else None
