"""References that generated images are compared with: a folder, an .npz, or a data set."""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Subset

from util import dist
from util.data import describe_paths, has_images, is_reference_set, kind_of
from util.data.classes import are_imagenet
from util.data.settings import PLAIN
from util.dist import print0
from util.evaluation.accumulator import WORKERS, Accumulator, summarize
from util.evaluation.features import pick_extractors
from util.evaluation.image_sets import RealImages, open_images, open_npz
from util.evaluation.kept import kept_path
from util.evaluation.metrics import INCEPTION
from util.files import replacing
from util.sizes import shown

MANIFOLD_IMAGES = 10_000  # of a data set, for precision and recall, as in ADM's reference
TRAINING_IMAGES = 100_000  # of a data set, in which copies are looked for


@dataclass
class Reference:
    """A reference in the features of one extractor. Its arrays are on rank 0 only."""

    name: str
    sha256: str  # of mu
    num_images: int | None  # used for the statistics, if known
    has_images: bool  # whether there are features of images, for precision and recall
    accuracy: float | None = None  # of the extractor's classifier on the images
    statistics: dict | None = field(default=None, repr=False)
    features: torch.Tensor | None = field(default=None, repr=False)  # (M, D)
    has_training: bool = False  # whether there are features of training images, other than these
    training: torch.Tensor | None = field(default=None, repr=False)  # (T, D)


def find_reference(settings, data_path, img_size, open_set, classes):
    """(the reference denoted by --reference, why): a path, a data set, or None; a sentence.

    settings: an Evaluation. open_set: function that opens the data set at a path. classes: names of
    the classes that the model was trained on, or None; those at data_path matter, if there are any.
    """
    source = settings.reference
    if source != "auto":
        return (None, "") if source in (None, "none") else (str(source), "")
    published = Path("fid_stats") / f"adm_in{shown(img_size)}_stats.npz"
    images = str(data_path) if has_images(data_path) else None
    if INCEPTION not in pick_extractors(settings, data_path)[:1]:
        return images, "ADM's statistics are of Inception's features"
    if not published.is_file():
        return images, f"there is no {published}"
    if kind_of(data_path):
        classes = open_set(str(data_path)).classes
    if are_imagenet(classes or ()):
        return str(published), "the data are ImageNet"
    return images, f"the data are not known to be ImageNet, of which {published} is"


def load_reference(
    source, extractor, img_size, cache, workers=WORKERS, dataset=None, own=True, reading=PLAIN
):
    """The Reference that `source` names, in the features of an Extractor. Raises ValueError.

    img_size: required size of its images, or None for any. cache: folder for statistics of data
    sets, named by all that they depend on. dataset: the images of a data set, if already open.
    own: whether the extractor is the main one, to which statistics in a file refer; for others, the
    reference must contain images. reading: how its pictures are read.
    """
    check_reference(source)
    if dataset or is_reference_set(source):
        dataset = dataset or RealImages(source, kind_of(source).held_out, img_size, reading)
        held = _data_features(source, dataset, extractor, cache, workers)
    else:
        held = _path_reference(Path(source), extractor, img_size, workers, own, reading)
    if not dist.is_main():
        held = {}
    arrays = {name: held.pop(name, None) for name in ("statistics", "features")}
    if arrays["statistics"]:
        held["sha256"] = hashlib.sha256(arrays["statistics"]["mu"].tobytes()).hexdigest()
        held["has_images"] = arrays["features"] is not None
    return Reference(name=str(source), **dist.broadcast(held), **arrays)


def add_training(reference, source, dataset, extractor, cache, workers=WORKERS):
    """The Reference, with the features of the training images of the data set at `source`.

    Unchanged if they are the images of the reference. dataset: its RealImages, of which about
    TRAINING_IMAGES are taken, spread evenly.
    """
    held = _data_features(source, dataset, extractor, cache, workers, most=TRAINING_IMAGES)
    same = held and np.array_equal(held["statistics"]["mu"], reference.statistics["mu"])
    if dist.broadcast(same):
        return reference
    return replace(reference, has_training=True, training=held.get("features"))


def check_reference(source):
    """Raises ValueError for an invalid --reference."""
    path = Path(source)
    if path.suffix == ".npz":
        held = open_npz(path)
        if not {"mu", "sigma"} <= set(held) and "arr_0" not in held:
            raise ValueError(
                f"{path}: expected arrays mu and sigma, or images in arr_0; found "
                f"{', '.join(held) or 'nothing'}"
            )
    elif not (is_reference_set(source) or path.is_dir()):
        raise ValueError(
            f"--reference {source}: expected a folder of images, an .npz, a data set "
            f"({describe_paths()})"
        )


def _path_reference(path, extractor, img_size, workers, own, reading):
    held = open_npz(path) if path.suffix == ".npz" else {}
    statistics, features, count = None, None, None
    names = extractor.stored or (("mu", "sigma") if own else ())
    if names and {*names} <= {*held}:
        statistics, count = _stored_statistics(path, held, names, extractor)
    if path.is_dir() or "arr_0" in held:
        images = open_images(path, img_size, reading)
        accumulator = Accumulator(extractor, len(images), keep_features=True)
        summary = summarize(images, accumulator, f"features of {path.name}", workers=workers)
        features = summary.features
        if statistics is None:
            statistics, count = summary.statistics, summary.num_images
    elif statistics is None:
        raise ValueError(
            f"{path}: has statistics of one extractor only, expected images for {extractor.name}"
        )
    return {"statistics": statistics, "features": features, "num_images": count}


def _stored_statistics(path, held, names, extractor):
    """(statistics, number of images or None) of an .npz, from the arrays of these names.

    Raises ValueError if they do not fit.
    """
    mu, sigma = (_numbers(path, held, name) for name in names)
    mu = np.asarray(mu, np.float64).reshape(-1)
    if mu.shape != (extractor.width,) or sigma.shape != (extractor.width, extractor.width):
        raise ValueError(
            f"{path}: statistics of {mu.shape[0]} features, those of {extractor.name} have "
            f"{extractor.width}: they are from another extractor"
        )
    if names[0] == "mu" and "sha256" in held and str(held["sha256"]) != extractor.sha256:
        raise ValueError(
            f"{path}: statistics from other weights than those of this {extractor.name} "
            f"(sha256 {str(held['sha256'])[:12]}…, here {extractor.sha256[:12]}…)"
        )
    count = int(_numbers(path, held, "count", ())) if "count" in held else None
    return {"mu": mu, "sigma": sigma}, count


def _numbers(path, held, name, shape=None):
    """An array of an .npz. Raises ValueError if it is not of finite numbers and of this shape."""
    array = held[name]
    if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise ValueError(f"{path}: {name} of type {array.dtype}, expected finite numbers")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{path}: {name} of shape {array.shape}, expected {shape}")
    return array


def _data_features(source, dataset, extractor, cache, workers, most=MANIFOLD_IMAGES):
    """Kept statistics of a data set, with features of some images; computed if missing. On rank 0,
    else {}. most: about how many of them have features."""
    depends = f"{dataset.description}|{extractor.name}|{extractor.sha256}"
    if most != MANIFOLD_IMAGES:
        depends += f"|features of {most}"
    path = kept_path(cache, source, extractor.name, depends, "npz")
    held = _kept(path, depends, extractor.width) if dist.is_main() else None
    if dist.broadcast(held is None):
        arrays = _measure_data(source, dataset, extractor, workers, most)
        if dist.is_main():
            size = sum(np.asarray(array).nbytes for array in arrays.values())
            with replacing(path, size) as beside, open(beside, "wb") as file:
                np.savez(file, **arrays, sha256=extractor.sha256, depends=depends)
            held = _kept(path, depends, extractor.width)
    return held or {}


def _kept(path, depends, width):
    """What a file of kept statistics holds; None if there is none, or if it is damaged."""
    if not path.is_file():
        return None
    try:
        held = open_npz(path)
        if missing := {"mu", "sigma", "features", "count", "depends"} - set(held):
            raise ValueError(f"{path}: without {' and '.join(sorted(missing))}")
        if str(held["depends"]) != depends:
            raise ValueError(f"{path}: statistics of other images or of another extractor")
        shapes = {"mu": (width,), "sigma": (width, width), "count": ()}
        statistics = {name: _numbers(path, held, name, shape) for name, shape in shapes.items()}
        features = _numbers(path, held, "features", (*held["features"].shape[:1], width))
        accuracy = float(_numbers(path, held, "accuracy", ())) if "accuracy" in held else None
    except ValueError as error:
        print0(f"NOTE: {error}: computed again")
        return None
    return {
        "num_images": int(statistics.pop("count")),
        "statistics": statistics,
        "features": torch.from_numpy(features),
        "accuracy": accuracy,
    }


def _measure_data(source, dataset, extractor, workers, most):
    """mu, sigma, count of a data set; features, accuracy of some images. On rank 0, else {}."""
    some = Subset(dataset, range(0, len(dataset), max(1, len(dataset) // most)))
    every = Accumulator(extractor, len(dataset))
    few = Accumulator(extractor, len(some), keep_features=True)
    every = summarize(dataset, every, f"statistics of {source}", workers=workers)
    few = summarize(some, few, f"features of {source}", workers=workers)
    if not dist.is_main():
        return {}
    arrays = {**every.statistics, "features": few.features.numpy()}
    return arrays if few.accuracy is None else {**arrays, "accuracy": few.accuracy}
