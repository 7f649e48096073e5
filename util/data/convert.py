"""Verify a cache of latents, or convert it to the other layout, without its tokenizer."""

from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

from util.data import shards
from util.data.cached import CachedFolder, check_cache, read_moments, write_moments
from util.data.shards import ShardedCache, layout_of, read_manifest
from util.dist import all_gather, barrier, is_main, rank, world_size
from util.files import first_few
from util.logger import Progress

FACTS = (
    "tokenizer",
    "img_size",
    "tokenizer_name",
    "scale",
    "crop",
)  # manifest entries of both layouts
OPTIONAL = ("shift",)  # likewise, if present: only shifts other than 0 are
BATCH = 64  # images read at once


def verify(folder, workers=4):
    """Read all of a cache, divided among the processes; returns (its layout, number of images).

    Shards must match the sha256 in their manifest; files of single images must be intact, finite
    and of one shape. workers: number of threads. Raises ValueError that lists damaged files.
    """
    layout = layout_of(folder)
    if layout is None:
        raise ValueError(f"--cached_path {folder}: expected a cache of latents, found none")
    images, bad = (
        shards.find_damage(folder) if layout == "shards" else _damaged_files(folder, workers)
    )
    bad = sorted(chain.from_iterable(all_gather(bad)))
    if bad:
        raise ValueError(
            f"{folder}: {len(bad)} damaged files: {first_few(bad)}; delete them and cache again"
        )
    return layout, images


def _damaged_files(folder, workers):
    """The number of images and messages about damaged files, as in shards.find_damage."""
    dataset = CachedFolder(folder)
    shapes = (_probe(path)[1] for path, _ in dataset.samples)
    shape = next((shape for shape in shapes if shape), None)  # the same on every process
    paths = [path for path, _ in dataset.samples[rank() :: world_size()]]
    progress, bad = Progress(max(1, len(paths)), "verifying", "img"), []
    with ThreadPool(max(1, workers)) as pool:
        for path, found, problem in pool.imap_unordered(_probe, paths, chunksize=16):
            if found and found != shape:
                problem = f"of shape {found}, others have {shape}"
            if problem:
                bad.append(f"{Path(path).relative_to(folder)} ({problem})")
            progress.update()
    progress.close()
    return len(dataset), bad


def _probe(path):
    """(path, shape of its moments or None, problem or None)."""
    try:
        one, other = read_moments(path).values()
    except ValueError:
        return path, None, "not readable"
    if one.shape != other.shape or not (np.isfinite(one).all() and np.isfinite(other).all()):
        return path, None, "not finite, or of two shapes"
    return path, one.shape, None


def convert(source, folder, layout, workers=4):
    """Write the latents of the cache `source` into `folder`, in the other layout, "shards" or
    "images". Existing files are not rewritten.

    Shards are float16 (see util.data.shards), so moments converted from them are rounded.
    Returns the numbers of images (written, skipped). Raises ValueError if `source` is no cache, has
    that layout already or is damaged, or if `folder` holds other latents.
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
    write = _to_shards if layout == "shards" else _to_images
    return write(source, Path(folder), facts, workers)


def _to_shards(source, folder, facts, workers):
    dataset = CachedFolder(source)
    first = read_moments(dataset.samples[0][0])["moments"]
    # a single channel of integers: code indices, exact in float16 only up to 2,048
    numbers = len(first) == 1 and np.array_equal(first, first.round())
    facts |= {"shape": list(first.shape), "dtype": "int32" if numbers else "float16"}

    def load(index):
        path = dataset.samples[index][0]
        one, other = read_moments(path).values()
        if not one.shape == other.shape == first.shape:
            raise ValueError(
                f"{path}: moments of shape {one.shape} and {other.shape}, expected {first.shape}"
            )
        return one, other

    def read(batches):
        with ThreadPool(max(1, workers)) as pool:
            for batch in batches:
                yield [np.stack(part) for part in zip(*pool.map(load, batch), strict=True)]

    return shards.write(
        folder,
        {**facts, "classes": dataset.classes},
        [dataset.name(i) for i in range(len(dataset))],
        dataset.targets,
        read,
        BATCH,
    )


def _to_images(source, folder, facts, workers):
    verify(source, workers)  # otherwise, damaged latents would look intact once converted
    dataset = ShardedCache(source)
    names = dataset.names()
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{source}: {name!r} is no name of an image of a class")
    # a cache of the published code has no manifest, nor has one converted from it
    known = is_main() and facts["tokenizer"] is not None
    check_cache(folder, facts.pop("tokenizer"), facts.pop("img_size"), write=known, **facts)
    mine = range(rank(), len(dataset), world_size())
    progress = Progress(max(1, len(mine)), "converting", "img")

    def write(index):
        path = folder / f"{names[index]}.npz"
        one, other = (x.astype(np.float32) for x in dataset.pair(index))
        if new := not _holds(path, one, other):
            write_moments(path, one, other)
        return new

    written = 0
    with ThreadPool(max(1, workers)) as pool:
        for new in pool.imap_unordered(write, mine, chunksize=16):
            written += new
            progress.update()
    progress.close()
    barrier()
    written = sum(all_gather(written))
    return written, len(dataset) - written


def _holds(path, one, other):
    """Whether the file exists and is intact. Raises ValueError if it holds other moments."""
    try:
        found = list(read_moments(path).values()) if path.is_file() else []
    except ValueError:
        return False
    if found and not all(map(np.array_equal, found, (one, other))):
        raise ValueError(f"{path}: holds other moments; pass another --cached_path")
    return bool(found)
