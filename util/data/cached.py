"""Caches of latents: one file per image, the published layout, or a few shards for all.

A cache stores moments (2C, h, w), from which a tokenizer's `sample` draws latents.
"""

from pathlib import Path

import numpy as np
import torch
from torchvision import datasets

from util.data import check_classes
from util.data.shards import ShardedCache, read_manifest, write_manifest
from util.files import replacing


class CachedFolder(datasets.DatasetFolder):
    """Moments from `root`/class/name.npz, written by main_cache.py; flipped half the time.

    A file holds float32 `moments` and `moments_flip`, each (2C, h, w): the published layout. shape:
    expected shape of the moments; None for any.
    """

    def __init__(self, root, shape=None):
        try:
            super().__init__(str(root), loader=self._load, extensions=(".npz",))
        except FileNotFoundError as error:
            raise ValueError(
                f"--cached_path {str(root)!r}: expected one folder of latents per class ({error})"
            ) from None
        self.shape = shape and tuple(shape)
        if shape:
            self._load(self.samples[0][0])

    def name(self, index):
        """The path of an image below its folder of images, class/name.ext."""
        return str(Path(self.samples[index][0]).relative_to(self.root)).removesuffix(".npz")

    def _load(self, path):
        name = "moments_flip" if torch.rand(()) < 0.5 else "moments"
        moments = read_moments(path, (name,))[name]
        if self.shape and moments.shape != self.shape:
            raise ValueError(
                f"{path}: moments of shape {moments.shape}, expected {self.shape} for this "
                "tokenizer and --img_size"
            )
        return torch.from_numpy(moments)


def open_cache(path, shape, class_num):
    """The data set of (moments, label) of a cache in either layout. Raises ValueError.

    shape: expected shape (2C, h, w) of the moments. class_num: expected number of classes.
    """
    sharded = read_manifest(path).get("layout") == "shards"
    dataset = (ShardedCache if sharded else CachedFolder)(path, shape)
    check_classes(dataset, class_num, path)
    return dataset


def check_cache(folder, tokenizer, img_size, write=False, **more):
    """Raises ValueError if the manifest in `folder` states another tokenizer or image size.

    Latents of two tokenizers or sizes must not be mixed. write: if there is no manifest, write one
    with these values and `more`. A cache of the published code has none; in shards converted from
    it the values are null.
    """
    ours, theirs = {"tokenizer": tokenizer, "img_size": img_size}, read_manifest(folder)
    for name, value in ours.items():
        if theirs.get(name) not in (None, value):
            raise ValueError(
                f"{folder}: latents of {name} {str(theirs[name])[:12]}, here it is "
                f"{str(value)[:12]}; pass another --cached_path"
            )
    if write and not theirs:
        write_manifest(folder, {**ours, **more})


def read_moments(path, names=("moments", "moments_flip")):
    """The named arrays of one cached image. Raises ValueError for a damaged file."""
    try:
        with np.load(path) as file:
            return {name: file[name] for name in names}
    except Exception as error:
        raise ValueError(
            f"{path}: not a cached latent ({error}); delete it and cache again"
        ) from None


def write_moments(path, moments, moments_flip):
    """Write one cached image for `read_moments`, atomically."""
    # numpy appends .npz to names without it, so it gets an open file
    with replacing(path) as beside, open(beside, "wb") as file:
        np.savez(file, moments=moments, moments_flip=moments_flip)
