"""Data sets: a folder of images, a cache of its latents, the built-in digits.

Each gives (x, label): x is an image (C, H, W) in [-1, 1], or the moments (2C, h, w) of a cached
latent. What is wrong with the data is said before any training, in one line.
"""

import hashlib
import os
from functools import partial
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchvision import datasets, transforms

from util.crop import center_crop_arr
from util.dist import all_gather, is_main, print0, rank, world_size
from util.files import replacing
from util.logger import Progress
from util.shards import ShardedCache, read_manifest, write_manifest

DIGITS = "digits"
SHOWN = 3  # files that a message names


def read_image(path):
    """An RGB PIL image. Raises ValueError with the path where that fails."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # PIL raises nearly anything for a damaged file
        raise ValueError(f"{path}: not a readable image ({error})") from error


def to_tensor(image):
    """A PIL image to (3, H, W) in [-1, 1]."""
    return transforms.functional.to_tensor(image) * 2 - 1


class ImageFolder(datasets.ImageFolder):
    """Images of `root`/class/name, centre-cropped to img_size and, with `flip`, flipped at random.

    Raises ValueError where there is no such folder or a class has no image.
    """

    def __init__(self, root, img_size, flip=True):
        steps = [partial(center_crop_arr, size=img_size)]
        steps += [transforms.RandomHorizontalFlip()] if flip else []
        try:
            super().__init__(str(root), transforms.Compose([*steps, to_tensor]), loader=read_image)
        except FileNotFoundError as error:
            raise ValueError(
                f"{root}: expected a folder of images for each class. {error}"
            ) from None
        self.img_size = img_size

    def name(self, index):
        """The path of an image below the root, class/name.ext."""
        return str(Path(self.samples[index][0]).relative_to(self.root))


class CachedFolder(datasets.DatasetFolder):
    """Moments of `root`/class/name.npz as main_cache.py writes them, the flipped one half the time.

    A file has float32 `moments` and `moments_flip`, each (2C, h, w): the published layout. shape:
    the one that is expected, None for any.
    """

    def __init__(self, root, shape=None):
        try:
            super().__init__(str(root), loader=self._load, extensions=(".npz",))
        except FileNotFoundError as error:
            raise ValueError(
                f"--cached_path {str(root)!r}: expected a folder of latents a class ({error})"
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


def check_cache(folder, tokenizer_sha256, img_size, write=False, **more):
    """Compare what made the latents in `folder`, if it says so, with what would use them.

    write: say it from now on, and `more`. A cache of the published code says nothing, one that was
    made of it has null. Raises ValueError where they differ: latents of two tokenizers or sizes
    must not be mixed.
    """
    ours, theirs = {"tokenizer": tokenizer_sha256, "img_size": img_size}, read_manifest(folder)
    for name, value in ours.items():
        if theirs.get(name) not in (None, value):
            raise ValueError(
                f"{folder}: latents of {name} {str(theirs[name])[:12]}, here it is "
                f"{str(value)[:12]}; pass another --cached_path"
            )
    if write and not theirs:
        write_manifest(folder, {**ours, **more})


def read_moments(path, names=("moments", "moments_flip")):
    """The arrays of these names of one cached image. Raises ValueError for a damaged file."""
    try:
        with np.load(path) as file:
            return {name: file[name] for name in names}
    except Exception as error:
        raise ValueError(
            f"{path}: not a cached latent ({error}); delete it and cache again"
        ) from None


def write_moments(path, moments, moments_flip):
    """One cached image, as `read_moments` reads it; whole or not at all."""
    # numpy adds .npz to a name that lacks it, so it is given an open file
    with replacing(path) as beside, open(beside, "wb") as file:
        np.savez(file, moments=moments, moments_flip=moments_flip)


def digits(split):
    """scikit-learn's handwritten digits, 8×8, as images (1, 8, 8): a fixed 80/20 split.

    split: "train" (1,437 images) or "test" (360, held out), stratified by class. Raises ValueError
    for another.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if split not in ("train", "test"):
        raise ValueError(f"split {split!r}: the digits have train and test")
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1  # 0..16 to [-1, 1]
    labels = torch.from_numpy(data.target).long()
    parts = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=data.target, random_state=0
    )
    indices = parts[("train", "test").index(split)]
    dataset = TensorDataset(images[indices], labels[indices])
    dataset.classes = [str(digit) for digit in range(10)]
    return dataset


def training_set(data_path, img_size, class_num, workers=4, record=None):
    """The images of `data_path`/train (or the digits), checked. Raises ValueError.

    record: a file that remembers which images were found to be whole, so that a run that goes on
    does not read them all again.
    """
    if str(data_path) == DIGITS:
        if img_size != 8:
            raise ValueError(f"img_size {img_size}: the digits are 8×8, expected 8")
        return _checked(digits("train"), class_num, data_path)
    dataset = _checked(ImageFolder(Path(data_path) / "train", img_size), class_num, data_path)
    check_images(dataset, workers, record)
    return dataset


def image_folder(data_path, img_size, workers=4, record=None, flip=True, split="train"):
    """The images of `data_path`/`split`, each read once to see that it is whole."""
    dataset = ImageFolder(Path(data_path) / split, img_size, flip)
    check_images(dataset, workers, record)
    return dataset


def cached_set(cached_path, shape, class_num):
    """The cached latents below `cached_path`, in either layout, of moments with this shape.

    Raises ValueError.
    """
    sharded = read_manifest(cached_path).get("layout") == "shards"
    kind = ShardedCache if sharded else CachedFolder
    return _checked(kind(cached_path, shape), class_num, cached_path)


def _checked(dataset, class_num, source):
    if len(dataset.classes) != class_num:
        raise ValueError(
            f"{source}: found {len(dataset.classes)} classes, --class_num is {class_num}: "
            f"pass --class_num {len(dataset.classes)}"
        )
    return dataset


def check_images(dataset, workers=4, record=None):
    """Read every image of an ImageFolder once, shared among the processes. Raises ValueError.

    Images smaller than img_size are enlarged by the crop, as in the published code: said once.
    """
    digest = listing(dataset, workers) if record and is_main() else ""
    known = bool(digest) and Path(record).is_file() and Path(record).read_text() == digest
    if any(all_gather(known)):
        return
    paths = [path for path, _ in dataset.samples[rank() :: world_size()]]
    progress, bad, sizes = Progress(len(paths), "checking images", "img"), [], []
    with ThreadPool(max(1, workers)) as pool:
        for path, size, problem in pool.imap_unordered(_probe, paths, chunksize=16):
            if problem:
                bad.append(f"{path} ({problem})")
            elif min(size) < dataset.img_size:
                sizes.append(size)
            progress.update()
    progress.close()
    bad = sorted(chain.from_iterable(all_gather(bad)))
    if bad:
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise ValueError(
            f"{dataset.root}: {len(bad)} unreadable or truncated images: "
            f"{', '.join(bad[:SHOWN])}{more}; repair or delete them"
        )
    sizes = list(chain.from_iterable(all_gather(sizes)))
    if sizes:
        smallest = "×".join(map(str, min(sizes, key=min)))
        print0(
            f"{dataset.root}: {len(sizes)} of {len(dataset)} images are smaller than "
            f"--img_size {dataset.img_size} (the smallest is {smallest}) and will be enlarged"
        )
    if digest:
        with replacing(record) as beside:
            beside.write_text(digest)


def listing(dataset, workers=4):
    """A hash of the files as they are: paths, sizes, times, and the size asked for."""

    def line(sample):
        try:
            status = Path(sample[0]).stat()
        except OSError:  # which is said when it is read
            return f"{sample[0]} missing"
        return f"{sample[0]} {status.st_size} {status.st_mtime_ns}"

    with ThreadPool(max(1, workers)) as pool:
        lines = "\n".join(pool.imap(line, dataset.samples, chunksize=256))
    return hashlib.sha256(f"{dataset.img_size}\n{lines}".encode()).hexdigest()


def _probe(path):
    """(path, size, what is wrong or None). A JPEG is decoded at 1/8: truncation still shows."""
    try:
        with Image.open(path) as image:
            size = image.size
            image.draft("RGB", (1, 1))
            image.load()
        return path, size, None
    except Exception as error:
        return path, None, str(error).replace(f" {path!r}", "").splitlines()[0]


def plain_loader(dataset, batch_size, num_workers):
    """A loader of everything once, in order."""
    return DataLoader(dataset, batch_size, num_workers=_fitting(num_workers))


def batch_loader(dataset, batches, num_workers):
    """A loader of these batches, lists of indices, in order."""
    return DataLoader(dataset, batch_sampler=batches, num_workers=_fitting(num_workers))


def training_loader(dataset, batch_size, num_workers, seed, pin_memory):
    """A shuffled loader of this process's share: call `loader.sampler.set_epoch` each epoch."""
    sampler = DistributedSampler(dataset, world_size(), rank(), shuffle=True, seed=seed)
    if len(sampler) < batch_size:
        raise ValueError(
            f"batch_size {batch_size} on {world_size()} process(es): the data set has only "
            f"{len(dataset)} images; pass a smaller --batch_size"
        )
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=_fitting(num_workers),
        pin_memory=pin_memory,
        drop_last=True,
        collate_fn=_as_it_is if isinstance(dataset, ShardedCache) else None,
    )


def _as_it_is(batch):
    return batch


def _fitting(num_workers):
    """No more workers than cores: the published default of 10 would slow a laptop down."""
    return min(num_workers, os.cpu_count() or 1)
