"""Writing shards: every process encodes batches of each, and one of them joins these to the shard.

Until all batches of shard k are there, each is a file of its own,

    shard-00000.00128-00256.piece    a zip of the parts of its rows 128 to 255: moments, sources
                                     and, if the cache has mirror images, flips

so that a run goes on with those that are missing, also with another number of processes. A batch
holds the same images whichever process encodes it, and so finished shards have the same bytes.
"""

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

from util import dist
from util.data import rounds, shards
from util.data.cached import read_arrays
from util.data.manifest import AGAIN, read_manifest, read_part, write_manifest, write_part
from util.data.shards import checksums_of, damaged_parts, part_path, rows_of
from util.data.sources import Pictures, Recorded
from util.dist import all_gather, broadcast, is_main, rank, world_size
from util.files import check_room, file_sha256, first_few, replacing
from util.logger import Progress
from util.run import stop

THREADS = 16  # that compare pictures: a file system on a network answers slowly, but many at once


@dataclass(frozen=True)
class Plan:
    """A cache to write. pictures: see `write`."""

    folder: Path
    manifest: dict
    names: list
    labels: list
    pictures: Pictures | Recorded

    def shard(self, k):
        """The indices of the images of shard k, a range."""
        size = shards.SHARD_SIZE
        return range(k * size, min((k + 1) * size, len(self.names)))

    @property
    def rows(self):
        """The large parts: of the images and, unless the manifest says otherwise, mirror images."""
        return rows_of(self.manifest)

    def row_bytes(self):
        """Bytes of a row of one large part."""
        shape, dtype = self.manifest["shape"], np.dtype(self.manifest["dtype"])
        return int(np.prod(shape)) * dtype.itemsize


def write(folder, facts, names, labels, read, batch_size, pictures):
    """Write the shards of a data set that are missing or damaged, divided among the processes.

    facts: entries of the manifest: `tokenizer` (the sha256 of its weights), `img_size`, `shape` and
    `dtype` of the moments of an image, `classes`, `flips` (False without mirror images; otherwise
    absent), and others that may differ between runs. names,
    labels: names and labels of all images. read: function of a list of batches, each a list of
    indices, that yields their (moments, flips, sources), moments (n, C, h, w), sources (n, 3);
    (moments, sources) without mirror images.
    pictures: what the images are now, a Pictures or Recorded of util.data.sources. Returns the
    numbers of images (written, skipped) by all processes. Raises ValueError if the folder holds
    other latents or latents of other images, if there is no room, and for an image whose moments
    the dtype cannot hold; Stopped as util.run.stop says, with what was encoded kept.
    """
    folder, count = Path(folder), len(names)
    manifest = {"layout": "shards", **facts, "count": count, "shard_size": shards.SHARD_SIZE}
    manifest["names_sha256"] = hashlib.sha256(os.fsencode("\n".join(names))).hexdigest()
    known = broadcast(read_manifest(folder))
    if known:
        _check_same(folder, known, manifest, names)
    plan = Plan(folder, manifest, names, labels, pictures)
    every = range(-(-count // shards.SHARD_SIZE))
    # without a manifest, the origin of a shard is unknown
    kept = _kept_shards(plan, every, known.get("shards")) if known else {}
    todo = [k for k in every if k not in kept]
    gaps = _gaps(plan, todo, known)
    batches = [(k, part) for k in todo for gap in gaps[k] for part in _batches(gap, batch_size)]
    written = sum(len(indices) for _, indices in batches)
    check_room(folder, _bytes_needed(plan, todo, written))
    if todo and is_main():
        write_manifest(folder, manifest)  # without `shards`, as not all are complete
    with stop.deferred():
        _write_shards(plan, todo, batches, read)
    if is_main():
        _finish(plan, [kept.get(k) for k in every])
    dist.wait()
    return written, count - written


def _finish(plan, records):
    """Write the manifest. records: of the shards that were there already, else None."""
    for path in plan.folder.glob(
        "shard-*.piece"
    ):  # of a run that was killed when these were joined
        path.unlink()
    found = [_read_record(plan, k) for k in range(len(records))]
    for k, record in enumerate(records):
        if record and record != found[k]:
            _write_record(plan.folder, k, record)
    records = [record or new for record, new in zip(records, found, strict=True)]
    write_manifest(plan.folder, {**plan.manifest, "shards": records})


def _check_same(folder, known, ours, names):
    of_images = ("count", "names_sha256", "classes")
    of_latents = ("layout", "tokenizer", "img_size", "shape", "dtype", "shard_size")
    for name in (*of_latents, *of_images):
        if known.get(name) != ours[name]:
            changed = name in of_images
            raise ValueError(
                f"{folder}: {'the data set has changed: ' if changed else ''}its latents are of "
                f"{name} {str(known.get(name))[:40]}, here it is {str(ours[name])[:40]}"
                f"{_difference(folder, known, names) if changed else ''}; pass another "
                "--cached_path"
            )


def _difference(folder, known, names):
    """Which images were added and removed, as far as the shards say."""
    try:
        parts = [(part_path(folder, k, "names"), s) for k, s in enumerate(known["shards"])]
        held = {
            name for path, s in parts for name in read_part(path, s["sha256"]["names"]).tolist()
        }
    except (KeyError, ValueError):
        return ""
    lists = {"added": sorted({*names} - held), "removed": sorted(held - {*names})}
    return "".join(f"; {what}: {first_few(those)}" for what, those in lists.items() if those)


def _record_path(folder, k):
    return folder / f"shard-{k:05d}.json"


def _write_record(folder, k, record):
    with replacing(_record_path(folder, k)) as path:
        path.write_text(json.dumps(record))


def _read_record(plan, k):
    """The record of shard k; None if there is none, or one that cannot be read."""
    try:
        record = json.loads(_record_path(plan.folder, k).read_bytes())
        return record if {*plan.rows, "labels", "names"} <= record["sha256"].keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


# ---- what is there -------------------------------------------------------------------------------


def _kept_shards(plan, every, trusted):
    """Shard -> record of those that are whole and of these pictures, read by all processes.

    trusted: records of the manifest, or None.
    """
    mine = every[rank() :: world_size()]
    records = {k: trusted[k] if trusted else _read_record(plan, k) for k in mine}
    records = {k: r for k, r in records.items() if r and r["count"] == len(plan.shard(k))}
    total = sum(sum(record["bytes"].values()) for record in records.values())
    progress = Progress(max(1, total), "checking what is there", "B")
    kept = {k: _keep(plan, k, record, progress) for k, record in records.items()}
    progress.close()
    dist.wait()
    return {k: record for each in all_gather(kept) for k, record in each.items() if record}


def _keep(plan, k, record, progress):
    """The record of shard k, with the parts that earlier versions did not write; None if damaged,
    or if a picture has changed."""
    if damaged_parts(plan.folder, record, progress):
        return None
    indices, known = plan.shard(k), None
    if "sources" in record["sha256"]:
        known = np.load(part_path(plan.folder, k, "sources"))
    time = part_path(plan.folder, k, "moments").stat().st_mtime_ns
    if not _all_same(plan, indices, known, time):
        return None
    return record if known is not None else _completed(plan, k, record)


def _all_same(plan, indices, sources, time):
    """Whether images are the pictures of the sources (n, 3), or, if None, older than a time."""
    sources = np.full((len(indices), 3), -1) if sources is None else sources
    with ThreadPool(THREADS) as pool:
        told = zip(indices, sources, strict=True)
        return all(pool.starmap(lambda i, source: plan.pictures.is_same(i, source, time), told))


def _completed(plan, k, record):
    """The record of a shard without checksums and sources, once these are written."""
    rows = [np.load(part_path(plan.folder, k, part), mmap_mode="r") for part in plan.rows]
    _add_part(plan, k, record, "checksums", np.stack([_sums(part) for part in rows], 1))
    with ThreadPool(THREADS) as pool:
        sources = pool.map(plan.pictures.source, plan.shard(k))
    _add_part(plan, k, record, "sources", np.array(sources, np.int64))
    _write_record(plan.folder, k, record)
    return record


def _sums(rows, at_once=1024):
    parts = range(0, len(rows), at_once)
    return np.concatenate([checksums_of(rows[i : i + at_once]) for i in parts])


def _add_part(plan, k, record, part, values):
    path = part_path(plan.folder, k, part)
    record["sha256"][part] = write_part(path, values)
    record["bytes"][part] = path.stat().st_size


def _gaps(plan, todo, known):
    """Shard -> the ranges of its indices of which there is no piece; other pieces are deleted."""
    mine = todo[rank() :: world_size()]
    found = {k: _gaps_of(plan, k, bool(known)) for k in mine}
    dist.wait()
    return {k: gaps for each in all_gather(found) for k, gaps in each.items()}


def _gaps_of(plan, k, known):
    """The ranges of indices of shard k without a piece. known: whether pieces may be used."""
    _record_path(plan.folder, k).unlink(missing_ok=True)
    first, reached, gaps = plan.shard(k).start, 0, []
    for start, end, path in _pieces(plan.folder, k):
        if known and start >= reached and _is_usable(plan, k, start, end, path):
            gaps.append(range(first + reached, first + start))
            reached = end
        else:
            path.unlink()
    gaps.append(range(first + reached, plan.shard(k).stop))
    return [gap for gap in gaps if gap]


def _pieces(folder, k):
    """The pieces of shard k in order, (start, end, path)."""
    found = []
    for path in folder.glob(f"shard-{k:05d}.*.piece"):
        if numbers := re.fullmatch(r"shard-\d+\.(\d+)-(\d+)\.piece", path.name):
            found.append((int(numbers[1]), int(numbers[2]), path))
    return sorted(found)


def _is_usable(plan, k, start, end, path):
    """Whether a piece is whole and of these pictures."""
    indices = plan.shard(k)[start:end]
    try:
        held = _read_piece(plan, path, end - start)
    except ValueError:
        return False
    return len(indices) == end - start and _all_same(
        plan, indices, held["sources"], path.stat().st_mtime_ns
    )


def _read_piece(plan, path, count):
    held = {name: array for name, (array, _) in read_arrays(path, (*plan.rows, "sources")).items()}
    shape = (count, *plan.manifest["shape"])
    shapes = dict.fromkeys(plan.rows, shape) | {"sources": (count, 3)}
    if any(held[part].shape != expected for part, expected in shapes.items()):
        raise ValueError(f"{path}: not of this cache; delete it and {AGAIN}")
    return held


def _batches(indices, size):
    return [list(indices[i : i + size]) for i in range(0, len(indices), size)]


def _bytes_needed(plan, todo, written):
    """Room for the shards, and for the pieces of those that are not joined yet."""
    images = sum(len(plan.shard(k)) for k in todo)
    waiting = (2 + world_size()) * shards.SHARD_SIZE
    return (images + min(written, waiting)) * len(plan.rows) * plan.row_bytes()


# ---- writing -------------------------------------------------------------------------------------


def _write_shards(plan, todo, batches, read):
    """Encode batches, (shard, indices), dealt to all processes in turns, and join each shard's.

    A process joins in the background, as the others would wait for it.
    """
    mine = batches[rank() :: world_size()]
    source = iter(read([indices for _, indices in mine]))
    progress = Progress(max(1, sum(len(indices) for _, indices in mine)), "caching", "img")
    joined = []
    with ThreadPoolExecutor(1) as background:
        for k in todo:
            rounds.check(plan.folder)
            common = sum(shard == k for shard, _ in batches) // world_size()
            own = [indices for shard, indices in mine if shard == k]
            for indices in rounds.in_rounds(own, common, plan.folder):
                _write_piece(plan, k, indices, *next(source))
                progress.update(len(indices))
            dist.wait()
            if k % world_size() == rank():
                for last in joined[-1:]:
                    last.result()  # so that pieces take the room of a few shards at most
                joined.append(background.submit(_join, plan, k))
        for each in joined:
            each.result()
    progress.close()
    dist.wait()


def _write_piece(plan, k, indices, *parts):
    *views, sources = parts
    start = indices[0] - plan.shard(k).start
    path = plan.folder / f"shard-{k:05d}.{start:05d}-{start + len(indices):05d}.piece"
    names = [plan.names[i] for i in indices]
    rows = [_cast(values, plan.manifest["dtype"], names) for values in views]
    held = dict(zip(plan.rows, rows, strict=True))
    with replacing(path, len(rows) * rows[0].nbytes) as beside, beside.open("wb") as file:
        np.savez(file, **held, sources=np.asarray(sources, np.int64))


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


def _join(plan, k):
    """Write shard k of its pieces, and delete them."""
    pieces = _pieces(plan.folder, k)
    ends = [0, *(end for _, end, _ in pieces)]
    starts = [*(start for start, _, _ in pieces), len(plan.shard(k))]
    assert starts == ends, f"{plan.folder}: pieces of shard {k} from {starts} to {ends}"
    small = {part: [] for part in ("checksums", "sources")}
    with ExitStack() as stack:
        paths = [part_path(plan.folder, k, part) for part in plan.rows]
        needed = len(plan.shard(k)) * plan.row_bytes()
        beside = [stack.enter_context(replacing(path, needed)) for path in paths]
        files = [stack.enter_context(path.open("wb")) for path in beside]
        for file in files:
            _write_header(
                file, (len(plan.shard(k)), *plan.manifest["shape"]), plan.manifest["dtype"]
            )
        for start, end, path in pieces:
            held = _read_piece(plan, path, end - start)
            small["sources"].append(held["sources"])
            small["checksums"].append(np.stack([checksums_of(held[part]) for part in plan.rows], 1))
            for file, part in zip(files, plan.rows, strict=True):
                file.write(held[part].tobytes())
    _finish_shard(plan, k, {part: np.concatenate(values) for part, values in small.items()})
    for _, _, path in pieces:
        path.unlink()


def _write_header(file, shape, dtype):
    """Write the header of np.save: the values follow in batches, as a shard may exceed memory, and
    through a file, as a memory map would crash without a message on a full disk."""
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _finish_shard(plan, k, small):
    """Write the small parts of shard k, and its record."""
    record = {"file": f"shard-{k:05d}", "count": len(plan.shard(k)), "bytes": {}, "sha256": {}}
    for part in plan.rows:
        path = part_path(plan.folder, k, part)
        record["bytes"][part], record["sha256"][part] = path.stat().st_size, file_sha256(path)
    names, labels = ([of[i] for i in plan.shard(k)] for of in (plan.names, plan.labels))
    small = {
        "labels": np.array(list(map(int, labels)), np.int64),
        "names": np.array(names),
        **small,
    }
    for part, values in small.items():
        _add_part(plan, k, record, part, values)
    _write_record(plan.folder, k, record)
