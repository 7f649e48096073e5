"""Pictures are found whole before training, and what is known of them is remembered.

Data are known by their content: the names of the pictures, their sizes and their CRC32s, wherever
they lie. In the user's cache folder is, for each list of names and sizes,

    KEY.at-PLACE.npz      CRC32s of the pictures in a folder, and their times when they were read
    KEY.as-READING.npz    what was found of whole pictures, and their CRC32s

A picture whose time in this folder is the same is not read again. Of others, such as a copy, the
CRC32s are compared, and only those with another one are decoded. What cannot be written there is
not remembered.
"""

import hashlib
import io
import os
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

from util.data.pictures import Probe, described, probe, sentences, warned
from util.dist import all_gather, broadcast, is_main, print0, rank, world_size
from util.files import cache_folder, first_few, replacing
from util.logger import Progress
from util.run.record import agree
from util.sizes import shown, sides

PLACES = 4  # folders of the same data whose times are remembered
UNKNOWN = -1


# ---- what is remembered --------------------------------------------------------------------------


class Memory:
    """What is known of the N pictures of a data set, as their files are now; on one process.

    sizes, times: (N,) int64, in bytes and ns; UNKNOWN where there is no file. crcs: (N,) int64;
    UNKNOWN where a file may be another by now. found: a Found, for this way to read them.
    """

    def __init__(self, dataset, workers):
        indices = range(len(dataset))
        self.paths = [dataset.where(i) for i in indices]
        with ThreadPool(max(1, workers)) as pool:
            found = pool.map(dataset.stat, indices, 256)
        self.sizes, self.times = np.array(found, np.int64).reshape(-1, 2).T
        names = map("{} {}".format, dataset.listing.paths, self.sizes.tolist())
        self.key = _sha256("\n".join(names))
        self.folder = cache_folder() / "pictures"
        place = _sha256(os.path.realpath(dataset.root))
        reading = _sha256(f"1{described(dataset.reading)}")
        self.place = self.folder / f"{self.key}.at-{place}.npz"
        self.probes = self.folder / f"{self.key}.as-{reading}.npz"
        self.crcs, self.found = self._load_crcs(), self._load_found()

    def _load_crcs(self):
        held = self._load(self.place, ("times", "crcs"))
        if not held:
            return np.full(len(self.paths), UNKNOWN)
        return np.where((held["times"] == self.times) & (self.sizes >= 0), held["crcs"], UNKNOWN)

    def _load_found(self):
        held = self._load(self.probes, ("crcs", "sides", "index"))
        own = Found.of_nothing(len(self.paths))
        return Found(**held) if held.keys() == vars(own).keys() else own

    def _load(self, path, rows):
        """Name -> array of a file; {} if there is none or it is damaged. rows: those of N rows."""
        try:
            with np.load(path) as file:
                held = {name: file[name] for name in file.files}
            fits = all(len(held[name]) == len(self.paths) for name in rows)
        except Exception:  # numpy and zipfile raise several types
            return {}
        return held if fits else {}

    def keep(self, with_found=False):
        """Remember the CRC32s and, if asked to, what was found."""
        with suppress(OSError, ValueError):  # a folder that is not ours, or full
            _save(self.place, times=self.times, crcs=self.crcs)
            if with_found:
                _save(self.probes, **vars(self.found))
            others = self.folder.glob(f"{self.key}.at-*.npz")
            for old in sorted(others, key=lambda path: -path.stat().st_mtime)[PLACES:]:
                old.unlink()

    def listing(self, dataset):
        """What earlier versions call the same files; below, how they are read now."""
        rows = zip(self.paths, self.sizes.tolist(), self.times.tolist(), strict=True)
        lines = (f"{p} {size} {time}" if size >= 0 else f"{p} missing" for p, size, time in rows)
        text = "\n".join((str(dataset.img_size), *lines))
        lines = hashlib.sha256(os.fsencode(text)).hexdigest(), described(dataset.reading)
        return "\n".join(filter(None, lines))


@dataclass
class Found:
    """What was found of N pictures when they were decoded.

    crcs: (N,) int64; UNKNOWN if one was not decoded. sides: (N, 2), width and height. index: (N,),
    which of the texts in `kinds` names its kinds, see `util.data.pictures.probe`.
    """

    crcs: np.ndarray
    sides: np.ndarray
    index: np.ndarray
    kinds: np.ndarray

    @classmethod
    def of_nothing(cls, count):
        """Of pictures of which nothing is known."""
        unknown = np.full(count, UNKNOWN)
        return cls(unknown, np.zeros((count, 2), np.int32), unknown * 0, np.array([""]))

    def update(self, indices, crcs, probes):
        """Add what was found of some pictures; nothing new where the Probe is None."""
        texts = self.kinds[self.index].tolist()
        for i, crc, one in zip(indices, crcs, probes, strict=True):
            if one:
                self.crcs[i], self.sides[i], texts[i] = crc, one.size, ",".join(one.kinds)
        self.kinds, self.index = np.unique(np.array(texts), return_inverse=True)

    def counts(self):
        """How many pictures are of each kind, a Counter."""
        numbers = np.bincount(self.index, minlength=len(self.kinds)).tolist()
        found = Counter()
        for text, n in zip(self.kinds.tolist(), numbers, strict=True):
            found.update(dict.fromkeys(filter(None, text.split(",")), n))
        return found


def _save(path, **arrays):
    with replacing(path) as beside, open(beside, "wb") as file:
        np.savez(file, **arrays)


def _sha256(text):
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:32]


# ---- checking ------------------------------------------------------------------------------------


def check_pictures(dataset, workers=4, record=None):
    """Find out whether the pictures of a PictureSet are whole, as its reading.check_data says.

    workers: number of threads. record: file that says which pictures a run has found whole, as
    earlier versions do; None for none. What the user should know of the pictures is printed. A
    collective call, which divides the work. Raises ValueError for damaged pictures.
    """
    how, paths = dataset.reading.check_data, dataset.listing.paths
    names = _sha256("\n".join(paths))  # nodes may have disks of their own
    text = f"{len(paths)} in {dataset.root}, sha256 of names {names[:12]}"
    agree({"pictures": names}, {"pictures": text})
    memory = Memory(dataset, workers) if is_main() and how != "none" else None
    if how == "sizes":
        _check_sizes(dataset, memory)
    elif how == "full":
        _check_content(dataset, memory, workers, record)


def _check_sizes(dataset, memory):
    sizes = broadcast(memory and memory.sizes)
    if bad := [dataset.where(i) for i in np.flatnonzero(sizes <= 0)]:
        raise ValueError(f"{dataset.root}: {len(bad)} missing or empty images: {first_few(bad)}")


def _check_content(dataset, memory, workers, record):
    plan = broadcast(memory and _plan(memory, dataset, record))
    if plan is None:
        return
    indices, read, probes, warnings = _read(dataset, *plan, workers)
    if bad := sorted(one.problem for one in probes if one and one.problem):
        raise ValueError(
            f"{dataset.root}: {len(bad)} unreadable or truncated images: {first_few(bad)}; "
            "repair or delete them"
        )
    if memory:
        memory.crcs[indices] = read
        memory.found.update(indices, read, probes)
        if indices:
            memory.keep(with_found=True)
        if record:
            with replacing(record) as beside:
                beside.write_text(memory.listing(dataset))
        _say(dataset, memory.found)
    if warnings:
        print0(f"{dataset.root}: PIL warns about {first_few(warnings)}")
    dataset.crcs = broadcast(memory and memory.crcs)


def _plan(memory, dataset, record):
    """(indices of pictures to read, the CRC32s of what was decoded before); None for none at all.

    That is where only a run's own record knows that the pictures are whole.
    """
    todo = np.flatnonzero((memory.crcs < 0) | (memory.crcs != memory.found.crcs))
    own = Path(record).read_text() if record and Path(record).is_file() else None
    if len(todo) and own == memory.listing(dataset):
        return None
    return todo.tolist(), memory.found.crcs[todo].tolist()


def _say(dataset, found):
    for line in sentences(found.counts(), len(dataset), dataset.reading):
        print0(f"{dataset.root}: {line}")
    height, width = sides(dataset.img_size)
    small = found.sides[(found.sides < (width, height)).any(1)].tolist()
    if small:
        width, height = min(small, key=min)
        print0(
            f"{dataset.root}: {len(small)} of {len(dataset)} images are smaller than "
            f"--img_size {shown(dataset.img_size)} (the smallest is {height}×{width}, height "
            "first) and will be enlarged"
        )


def read_crcs(dataset, workers=4):
    """The CRC32s (N,) int64 of the pictures of a PictureSet; those that are known are not read.

    A collective call. Raises ValueError for a picture that is not there.
    """
    memory = Memory(dataset, workers) if is_main() else None
    todo = broadcast(memory and np.flatnonzero(memory.crcs < 0).tolist())
    indices, read, probes, _ = _read(dataset, todo, None, workers)
    if bad := [one.problem for one in probes if one]:
        raise ValueError(f"{dataset.root}: {len(bad)} unreadable images: {first_few(bad)}")
    if memory and todo:
        memory.crcs[indices] = read
        memory.keep()
    return broadcast(memory and memory.crcs)


def _read(dataset, indices, decoded, workers):
    """(indices, CRC32s, Probes, warnings) of pictures, read by all processes.

    decoded: the CRC32s that they had when they were decoded: only others are decoded again, and
    have a Probe in place of None; None: nothing is decoded.
    """
    if not indices:
        return [], [], [], []
    mine = range(rank(), len(indices), world_size())
    progress, done = Progress(max(1, len(mine)), "checking images", "img"), []

    def read(k):
        return _read_one(dataset, indices[k], decoded and decoded[k])

    with ThreadPool(max(1, workers)) as pool, warned() as warnings:
        for one in pool.imap(read, mine, chunksize=16):
            done.append(one)
            progress.update()
    progress.close()
    done, warnings = (list(chain.from_iterable(all_gather(x))) for x in (done, warnings))
    return *([one[k] for one in done] for k in range(3)), sorted(warnings)


def _read_one(dataset, index, decoded):
    path = dataset.where(index)
    try:
        content = dataset.read(index)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        return index, UNKNOWN, Probe(None, f"{path} ({reason})", [])
    crc = zlib.crc32(content)
    if decoded is None or crc == decoded:
        return index, crc, None
    return index, crc, probe(io.BytesIO(content), dataset.reading, path)
