"""Verify a cache of latents, or convert it to the other layout, without its tokenizer."""

import math
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

from util import dist
from util.data import shard_writer, shards
from util.data.cached import (
    VIEWS,
    CachedFolder,
    FolderWriter,
    check_cache,
    check_views,
    read_moments,
    views_of,
)
from util.data.manifest import AGAIN, has_flips, layout_of, read_manifest
from util.data.rounds import in_rounds
from util.data.shards import ShardedCache
from util.data.sources import UNKNOWN, Pictures, Recorded
from util.dist import all_gather, is_main, rank, world_size
from util.files import first_few
from util.logger import Progress
from util.run import stop

FACTS = (
    "tokenizer",
    "img_size",
    "tokenizer_name",
    "scale",
    "crop",
)  # manifest entries of both layouts
OPTIONAL = ("vae_path", "shift", "reading")  # likewise, if present: older caches have none
BATCH = 64  # images read at once
AT_ONCE = 1024  # images converted between two looks at requests to stop


# ---- verifying -----------------------------------------------------------------------------------


def verify(folder, workers=4):
    """Read all of a cache, divided among the processes; returns (its layout, number of images).

    Shards must match the sha256 in their manifest and be finite; files of single images must be
    intact, finite, of one shape, and those that the manifest knows. workers: number of threads.
    Raises ValueError that lists damaged files.
    """
    layout = layout_of(folder)
    if layout is None:
        raise ValueError(f"--cached_path {folder}: expected a cache of latents, found none")
    images, bad = (
        shards.find_damage(folder) if layout == "shards" else _damaged_files(folder, workers)
    )
    dist.wait()
    bad = sorted(chain.from_iterable(all_gather(bad)))
    if bad:
        raise ValueError(
            f"{folder}: {len(bad)} damaged files: {first_few(bad)}; {AGAIN} to repair them"
        )
    return layout, images


def describe_checks(folder):
    """What `verify` has compared, given what a cache says of itself: a line."""
    manifest = read_manifest(folder)
    if manifest.get("layout") == "shards":
        rows = all("checksums" in shard["sha256"] for shard in manifest["shards"])
        more = (
            ", the checksum of each row" if rows else "; rows have no checksums, training adds them"
        )
        return f"complete, the sha256 of all files, finite, labels of the classes{more}"
    if "parts" in manifest:
        return (
            "complete, the CRC32s of all arrays as cached, finite, of one shape, names and classes"
        )
    return (
        "the CRC32s inside the files, finite, of one shape; not known to this cache, which an "
        "earlier version or the published code made: whether it is complete, and of which pictures"
    )


def compare_pictures(folder, dataset, workers=4):
    """Compare a cache with the images of a data set; returns how many pictures were compared.

    Every picture whose source the cache knows is read, divided among the processes. Raises
    ValueError that names images that were added, removed or edited, or are of another class.
    """
    sharded = read_manifest(folder).get("layout") == "shards"
    cache = ShardedCache(folder) if sharded else CachedFolder(folder)
    names = cache.names() if sharded else [cache.name(i) for i in range(len(cache))]
    rows, ours = {name: row for row, name in enumerate(names)}, Pictures(dataset)
    known = cache.sources() if sharded else cache.sources
    shown = [dataset.name(i) for i in range(len(dataset))]
    bad = [f"{name} (not cached)" for name in shown if name not in rows]
    bad += [f"{name} (no such picture)" for name in sorted({*names} - {*shown})]

    def holds(index):
        row = rows.get(shown[index])
        return None if known is None or row is None else ours.holds(index, known[row])

    mine = range(rank(), len(shown), world_size())
    with ThreadPool(max(1, workers)) as pool:
        same = pool.map(holds, mine, 64)
    dist.wait()
    edited = [shown[i] for i, it_is in zip(mine, same, strict=True) if it_is is False]
    bad += [f"{name} (edited)" for name in sorted(chain.from_iterable(all_gather(edited)))]
    if bad:
        raise ValueError(
            f"{folder}: not of these pictures: {len(bad)} differ: {first_few(bad)}; cache again"
        )
    return sum(all_gather(sum(it_is is not None for it_is in same)))


def _damaged_files(folder, workers):
    """The number of images and messages about damaged files, as in shards.find_damage."""
    dataset = CachedFolder(folder)
    shapes = (_probe(path, dataset.arrays)[1] for path, _ in dataset.samples)
    shape = next((shape for shape in shapes if shape), None)  # the same on every process
    mine = range(rank(), len(dataset), world_size())
    progress, bad = Progress(max(1, len(mine)), "verifying", "img"), []

    def probe(index):
        known = dataset.checksums
        path, checksums = dataset.samples[index][0], None if known is None else known[index]
        return _probe(path, dataset.arrays, checksums)

    with ThreadPool(max(1, workers)) as pool:
        for path, found, problem in pool.imap_unordered(probe, mine, chunksize=16):
            if found and found != shape:
                problem = f"of shape {found}, others have {shape}"
            if problem:
                bad.append(f"{Path(path).relative_to(folder)} ({problem})")
            progress.update()
    progress.close()
    return len(dataset), bad


def _probe(path, names, checksums=None):
    """(path, shape of its moments or None, problem or None). names: of its arrays."""
    try:
        one, *others = read_moments(path, names, checksums).values()
    except ValueError as error:
        return path, None, _problem(str(error))
    if any(one.shape != other.shape for other in others):
        return path, None, "of two shapes"
    return path, one.shape, None


def _problem(message):
    problems = {"is not finite": "not finite", "not the latents": "not those that were cached"}
    return next((told for part, told in problems.items() if part in message), "not readable")


# ---- converting ----------------------------------------------------------------------------------


def convert(source, folder, layout, workers=4, flip=True):
    """Write the latents of the cache `source` into `folder`, in the other layout, "shards" or
    "images". Existing files are not rewritten.

    flip: whether to write those of mirror images, too, if `source` has them. Shards are float16
    (see util.data.shards), so moments converted from them are rounded. Returns the numbers of
    images (written, skipped). Raises ValueError if `source` is no cache, has that layout already or
    is damaged, or if `folder` holds other latents.
    """
    found = layout_of(source)
    if found in (None, layout):
        raise ValueError(
            f"--convert_from {source}: holds {'no cache' if found is None else f'{found} already'},"
            f" expected a cache in the layout other than --layout {layout}"
        )
    known = read_manifest(source)
    facts = {name: known.get(name) for name in FACTS}  # null where unknown
    facts |= {name: known[name] for name in OPTIONAL if name in known}
    flip = flip and views_of(source, known) == VIEWS
    facts |= {} if flip else {"flips": False}
    check_views(folder, flip)
    write = _to_shards if layout == "shards" else _to_images
    return write(source, Path(folder), facts, workers)


def _to_shards(source, folder, facts, workers):
    dataset = CachedFolder(source)
    first = read_moments(dataset.samples[0][0], VIEWS[:1])["moments"]
    # a single channel of integers: code indices, exact in float16 only up to 2,048
    numbers = len(first) == 1 and np.array_equal(first, first.round())
    facts |= {"shape": list(first.shape), "dtype": "int32" if numbers else "float16"}
    sources, count = _sources(dataset.sources, len(dataset)), 1 + has_flips(facts)

    def load(index):
        views = dataset.views(index)[:count]
        if any(moments.shape != first.shape for moments in views):
            shapes = " and ".join(str(moments.shape) for moments in views)
            raise ValueError(
                f"{dataset.samples[index][0]}: moments of shape {shapes}, expected {first.shape}"
            )
        return views

    def read(batches):
        with ThreadPool(max(1, workers)) as pool:
            for batch in batches:
                moments = [np.stack(part) for part in zip(*pool.map(load, batch), strict=True)]
                yield *moments, sources[batch]

    return shard_writer.write(
        folder,
        {**facts, "classes": dataset.classes},
        [dataset.name(i) for i in range(len(dataset))],
        dataset.targets,
        read,
        BATCH,
        Recorded(sources),
    )


def _sources(known, count):
    return np.full((count, 3), UNKNOWN) if known is None else known


def _to_images(source, folder, facts, workers):
    verify(source, workers)  # otherwise, damaged latents would look intact once converted
    dataset = ShardedCache(source)
    names = dataset.names()
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{source}: {name!r} is no name of an image of a class")
    tokenizer, size = facts.pop("tokenizer"), facts.pop("img_size")
    # a cache of the published code does not say these, nor does one converted from it
    known = is_main() and tokenizer is not None
    check_cache(folder, tokenizer, size, write=known, **facts, finished=False)
    writer = FolderWriter(folder, names, dataset.classes, VIEWS[: 1 + has_flips(facts)])
    sources = _sources(dataset.sources(), len(names))

    def write(index):
        writer.write(index, _views(dataset, index, writer), sources[index])

    with ThreadPool(max(1, workers)) as pool, stop.deferred():
        todo = _missing(writer, dataset, sources, pool)
        writer.begin(len(todo), dataset.shape)
        mine = todo[rank() :: world_size()]
        progress = Progress(max(1, len(mine)), "converting", "img")
        parts = [mine[i : i + AT_ONCE] for i in range(0, len(mine), AT_ONCE)]
        common = math.ceil(len(todo) // world_size() / AT_ONCE)
        for part in in_rounds(parts, common, folder):
            pool.map(write, part)
            progress.update(len(part))
        progress.close()
        dist.wait()
        writer.finish()
    return len(todo), len(names) - len(todo)


def _views(dataset, index, writer):
    views = dataset.views(index)[: len(writer.views)]
    return [moments.astype(np.float32) for moments in views]


def _missing(writer, dataset, sources, pool):
    """The indices of the images, of all processes, that are not there, or damaged.

    Raises ValueError if a file holds other moments.
    """
    mine = range(rank(), len(dataset), world_size())
    whole = pool.map(lambda i: writer.holds(i, _views(dataset, i, writer), sources[i]), mine, 16)
    dist.wait()
    todo = [i for i, is_whole in zip(mine, whole, strict=True) if not is_whole]
    return sorted(chain.from_iterable(all_gather(todo)))
