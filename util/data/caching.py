"""Encoding of a data set's images into a cache of latents, in either layout."""

import math
from itertools import chain
from multiprocessing.pool import ThreadPool

import torch
from torch.utils.data import Subset

from util import dist
from util.data import shard_writer
from util.data.cached import VIEWS, FolderWriter
from util.data.folder import Sources
from util.data.loader import batch_loader, plain_loader
from util.data.manifest import has_flips, layout_of, read_manifest, write_manifest
from util.data.pictures import CHANGED, count_kinds, pixel_settings, sentences
from util.data.rounds import in_rounds
from util.data.sources import Pictures, Sourced
from util.logger import Progress
from util.run import stop
from util.sizes import sides


def cache_latents(tokenizer, dataset, folder, *, batch_size, num_workers, device, flip=True):
    """Write the moments of each image of an ImageFolder, and of its mirror image, below `folder`.

    One `class/name.ext.npz` per image, with float32 `moments` and `moments_flip` (2C, h, w), or
    only the first without `flip`. Images whose file exists, is intact and of the same picture are
    skipped. Returns the numbers of images (written, skipped) by all processes. Raises ValueError if
    the folder holds latents of other images; Stopped as util.run.stop says.
    """
    shape = (tokenizer.moment_channels, *sides(dataset.img_size, tokenizer.stride))
    names = [dataset.name(i) for i in range(len(dataset))]
    writer = FolderWriter(folder, names, dataset.classes, VIEWS if flip else VIEWS[:1])
    todo = missing(writer, shape, Pictures(dataset), num_workers)
    writer.begin(len(todo), shape)
    mine = todo[dist.rank() :: dist.world_size()]
    common = math.ceil(len(todo) // dist.world_size() / batch_size)
    loader = plain_loader(Subset(Sourced(dataset), mine), batch_size, num_workers)
    progress = Progress(max(1, len(mine)), "caching", "img")
    with stop.deferred():
        for start, (images, sources) in enumerate(in_rounds(loader, common, folder)):
            moments = moments_and_flips(tokenizer, images.to(device), flip)
            indices = mine[start * batch_size : (start + 1) * batch_size]
            for index, *views, source in zip(indices, *moments, sources.numpy(), strict=True):
                writer.write(index, views, source)
            progress.update(len(images))
        progress.close()
        dist.wait()
        writer.finish()
    return len(todo), len(dataset) - len(todo)


def note_reading(dataset, folder, workers):
    """Note in the manifest of `folder`'s cache what of a Reading changes pixels; returns it.

    It is an entry of manifests. A collective call. Raises ValueError if the folder has latents of
    pictures that were read otherwise; an earlier version did so where one is turned, transparent
    or of 16 bits.
    """
    if not hasattr(dataset, "reading"):
        return {}
    ours = pixel_settings(dataset.reading)
    found = dist.broadcast((layout_of(folder), read_manifest(folder)) if dist.is_main() else None)
    theirs = found[1].get("reading")
    if theirs is None and found[0]:
        sources = Sources(dataset)
        counts = count_kinds(sources, dataset.reading, workers)
        if changed := [*sentences(counts, len(dataset), dataset.reading, CHANGED)]:
            raise ValueError(
                f"{folder}: latents by an earlier version, which read otherwise: {changed[0]}; "
                "pass another --cached_path"
            )
    for name, value in (theirs or {}).items():
        if value != ours.get(name):
            raise ValueError(
                f"{folder}: latents of pictures read with --{name} {value}, here it is "
                f"{ours.get(name)}; pass --{name} {value}, or another --cached_path"
            )
    if found[1] and theirs is None and dist.is_main():
        write_manifest(folder, {**found[1], "reading": ours})
    dist.barrier()
    return {"reading": ours}


def missing(writer, shape, pictures, workers):
    """The indices of the images, of all processes, whose latents are not there or not of these."""
    mine = range(dist.rank(), len(writer.names), dist.world_size())
    progress = Progress(max(1, len(mine)), "checking what is there", "img")
    with ThreadPool(max(1, workers)) as pool:
        todo = []
        for index, whole in zip(
            mine, pool.imap(lambda i: writer.is_whole(i, shape, pictures), mine, 64), strict=True
        ):
            todo += [] if whole else [index]
            progress.update()
    progress.close()
    dist.wait()
    return sorted(chain.from_iterable(dist.all_gather(todo)))


def cache_shards(tokenizer, dataset, folder, facts, *, batch_size, num_workers, device):
    """Like `cache_latents`, but into a few large files, see util/data/shards.py.

    facts: entries of the manifest that identify the latents; `flips` is False for no mirror images.
    """
    facts = {
        **facts,
        "shape": [tokenizer.moment_channels, *sides(dataset.img_size, tokenizer.stride)],
        "dtype": "int32" if tokenizer.num_codes else "float16",  # too coarse for 16,384 codes
        "classes": dataset.classes,
    }

    def read(batches):
        for images, sources in batch_loader(Sourced(dataset), batches, num_workers):
            moments = moments_and_flips(tokenizer, images.to(device), has_flips(facts))
            yield *moments, sources.numpy()

    names = [dataset.name(i) for i in range(len(dataset))]
    pictures = Pictures(dataset)
    return shard_writer.write(folder, facts, names, dataset.targets, read, batch_size, pictures)


@torch.no_grad()
def moments_and_flips(tokenizer, images, flip=True):
    """Moments of images (N, I, H, W) and, with `flip`, of their mirror images: a list of arrays
    (N, 2C, h, w), float32."""
    views = (images, images.flip(-1)) if flip else (images,)
    return [tokenizer.encode(x).float().cpu().numpy() for x in views]
