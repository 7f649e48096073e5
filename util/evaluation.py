"""Figures of generated images against a reference, and a door to them that needs no model:

    python -m util.evaluation IMAGES --reference REFERENCE

IMAGES is a folder of pictures or an .npz; REFERENCE one of these, an .npz of statistics (`mu`,
`sigma`: ADM's, or the official repository's), or a data set: a folder with train/class/image.
"""

import hashlib
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Subset

from util import dist
from util.data import DIGITS, plain_loader
from util.dist import print0
from util.features import INCEPTION, Extractor, pick_extractor
from util.files import make_folder, replacing
from util.flags import Parser, add_device_flag, add_evaluation_flags, positive_int, run
from util.image_sets import is_data_set, open_images, open_npz, real_images
from util.logger import Progress
from util.metrics import (
    NEIGHBOURS,
    RunningInceptionScore,
    RunningStatistics,
    frechet_distance,
    precision_recall,
)
from util.precision import full_precision

WORKERS = 4
MANIFOLD_IMAGES = 10_000  # of a data set, for precision and recall: as many as ADM's reference has


@dataclass
class Summary:
    """What is known of a set of images: enough for every figure, and far less than the images."""

    count: int
    statistics: dict  # mu, sigma, count
    inception_score: tuple | None = None  # mean, deviation over the splits
    accuracy: float | None = None
    features: torch.Tensor | None = field(default=None, repr=False)  # (count, D), where kept


class Accumulator:
    """Gathers a Summary from batches of images, on each process from its own.

    keep_features: for precision and recall, which compare images one by one. splits: of the
    Inception Score; None for none.
    """

    def __init__(self, extractor, num_images, keep_features=False, splits=None):
        self.extractor, self.keep_features = extractor, keep_features
        self.statistics = RunningStatistics(extractor.width, extractor.device)
        self.score = None
        if splits and extractor.classes:
            self.score = RunningInceptionScore(
                num_images, extractor.classes, extractor.device, splits
            )
        self.features = []
        self.correct = torch.zeros(2, dtype=torch.float64, device=extractor.device)

    def add(self, indices, images, labels=None):
        """Images uint8 (n, H, W, 3) with their indices and, where known, classes."""
        if not len(images):
            return
        features, logits = self.extractor(images)
        self.statistics.add(features)
        if self.score:
            self.score.add(indices, logits)
        if logits is not None and labels is not None:
            labels = torch.as_tensor(labels, device=logits.device)
            right = (logits.argmax(1) == labels).sum()
            self.correct += torch.stack([right, torch.tensor(len(labels), device=right.device)])
        if self.keep_features:
            self.features.append(features.float().cpu())

    def summary(self):
        """The Summary of all processes' images; features on rank 0 only."""
        self.statistics.reduce()
        right, seen = dist.all_reduce(self.correct).tolist()
        if self.score:
            self.score.reduce()
        features = None
        if self.keep_features:
            none = torch.empty(0, self.extractor.width)
            parts = dist.gather(torch.cat([none, *self.features]))
            features = torch.cat(parts) if parts else None
        return Summary(
            int(self.statistics.count),
            self.statistics.result(),
            self.score.result() if self.score else None,
            right / seen if seen else None,
            features,
        )


@dataclass
class Reference:
    """What generated images are compared with. Its arrays are on rank 0 only."""

    name: str
    sha256: str  # of mu
    count: int | None  # images behind the statistics, where known
    has_images: bool  # whether there are features of images, for precision and recall
    accuracy: float | None = None  # of the extractor's classifier on them
    statistics: dict | None = field(default=None, repr=False)
    features: torch.Tensor | None = field(default=None, repr=False)  # (M, D)


def compare(summary, reference, extractor):
    """Figures of a Summary against a Reference (or None): name -> float. On rank 0."""
    figures = {}
    if reference:
        name = "fid" if extractor.name == INCEPTION else "frechet_distance"
        figures[name] = frechet_distance(summary.statistics, reference.statistics)
    if summary.inception_score:
        figures["inception_score"], figures["inception_score_std"] = summary.inception_score
    if reference and reference.has_images:
        generated, real = (x.features.to(extractor.device) for x in (summary, reference))
        with full_precision(real.device.type):  # distances are differences of products
            found = precision_recall(generated=generated, real=real)
        figures["precision"], figures["recall"] = found
    if summary.accuracy is not None and extractor.name != INCEPTION:
        figures["accuracy"] = summary.accuracy
    return figures


def caveats(summary, reference, extractor):
    """What a reader of the figures should know."""
    if reference:
        yield from few_images(summary.count, extractor)
    if reference and reference.count is not None and reference.count <= extractor.width:
        yield f"the reference has only {reference.count} images for {extractor.width} features"
    if reference and not reference.has_images:
        yield "no precision and recall: the reference has statistics only, no images"


def few_images(count, extractor):
    """What a distance of so few images means."""
    if count <= extractor.width:
        yield (
            f"{count} images for {extractor.width} features: the covariance is singular and the "
            "distance too large; compare it only with distances of as many images"
        )


# ---- references -----------------------------------------------------------------------------


def load_reference(source, extractor, img_size, cache, workers=WORKERS, dataset=None):
    """The Reference that `source` names; see the top of this file. Raises ValueError.

    img_size: what its images must be, or None for any. cache: a folder for statistics of data
    sets, which are kept under a name of all that they depend on. dataset: the images of a data set,
    if they are open already.
    """
    path = Path(source)
    check_reference(source)
    if is_data_set(source):
        dataset = dataset or real_images(source, img_size, "test" if source == DIGITS else "train")
        held = _data_reference(source, dataset, extractor, cache, workers)
    else:
        held = _path_reference(path, extractor, img_size, workers)
    if not dist.is_main():
        held = {}
    arrays = {name: held.pop(name, None) for name in ("statistics", "features")}
    if arrays["statistics"]:
        held["sha256"] = hashlib.sha256(arrays["statistics"]["mu"].tobytes()).hexdigest()
        held["has_images"] = arrays["features"] is not None
    return Reference(name=str(source), **dist.broadcast(held), **arrays)


def check_reference(source):
    """Raises ValueError for a --reference that cannot be one."""
    path = Path(source)
    if path.suffix == ".npz":
        held = open_npz(path)
        if not {"mu", "sigma"} <= set(held) and "arr_0" not in held:
            raise ValueError(
                f"{path}: expected arrays mu and sigma, or images in arr_0; found "
                f"{', '.join(held) or 'nothing'}"
            )
    elif not (is_data_set(source) or path.is_dir()):
        raise ValueError(
            f"--reference {source}: expected a folder of images, an .npz, a data set (a folder "
            f"with train/) or {DIGITS}"
        )


def _path_reference(path, extractor, img_size, workers):
    held = open_npz(path) if path.suffix == ".npz" else {}
    statistics, features, count = None, None, None
    if "mu" in held and "sigma" in held:
        mu = np.asarray(held["mu"], np.float64).reshape(-1)
        statistics = {"mu": mu, "sigma": held["sigma"]}
        _check_statistics(path, statistics, held, extractor)
        count = int(held["count"]) if "count" in held else None
    if path.is_dir() or "arr_0" in held:
        images = open_images(path, img_size)
        label = f"features of {path.name}"
        summary = summarize(images, extractor, label, True, workers=workers)
        features = summary.features
        if statistics is None:
            statistics, count = summary.statistics, summary.count
    return {"statistics": statistics, "features": features, "count": count}


def _check_statistics(path, statistics, held, extractor):
    mu, sigma = statistics["mu"], statistics["sigma"]
    if mu.shape != (extractor.width,) or sigma.shape != (extractor.width, extractor.width):
        raise ValueError(
            f"{path}: statistics of {mu.shape[0]} features, those of {extractor.name} have "
            f"{extractor.width}: they are from another extractor"
        )
    if "sha256" in held and str(held["sha256"]) != extractor.sha256:
        raise ValueError(
            f"{path}: statistics from other weights than those of this {extractor.name} "
            f"(sha256 {str(held['sha256'])[:12]}…, here {extractor.sha256[:12]}…)"
        )


def _data_reference(source, dataset, extractor, cache, workers):
    """Statistics of a data set, from the cache or put there, with features of some images."""
    depends = f"{dataset.description}|{extractor.name}|{extractor.sha256}"
    key = hashlib.sha256(depends.encode()).hexdigest()[:16]
    path = Path(cache) / f"{Path(source).name or 'data'}-{extractor.name}-{key}.npz"
    if not dist.broadcast(path.is_file()):
        step = max(1, len(dataset) // MANIFOLD_IMAGES)
        every = summarize(dataset, extractor, f"statistics of {source}", False, workers=workers)
        some = Subset(dataset, range(0, len(dataset), step))
        few = summarize(some, extractor, f"features of {source}", True, workers=workers)
        if dist.is_main():
            arrays = {**every.statistics, "features": few.features.numpy()}
            arrays |= {"sha256": extractor.sha256, "depends": depends}
            if few.accuracy is not None:
                arrays["accuracy"] = few.accuracy
            with replacing(path) as beside, open(beside, "wb") as file:
                np.savez(file, **arrays)
    if not dist.is_main():
        return {}
    with np.load(path) as file:
        return {
            "statistics": {"mu": file["mu"], "sigma": file["sigma"]},
            "features": torch.from_numpy(file["features"]),
            "count": int(file["count"]),
            "accuracy": float(file["accuracy"]) if "accuracy" in file else None,
        }


def summarize(
    dataset, extractor, label, keep_features, batch_size=64, workers=WORKERS, splits=None
):
    """The Summary of a data set of (uint8 image, label), its images shared by the processes.

    label: of the progress shown. keep_features, splits: as in `Accumulator`.
    """
    accumulator = Accumulator(extractor, len(dataset), keep_features, splits)
    mine = range(dist.rank(), len(dataset), dist.world_size())
    loader = plain_loader(Subset(dataset, mine), batch_size, workers)
    progress = Progress(len(mine), label, "img")
    start = 0
    for images, labels in loader:
        indices = mine[start : start + len(images)]
        accumulator.add(indices, images, None if labels[0] < 0 else labels)
        progress.update(len(images))
        start += len(images)
    progress.close()
    return accumulator.summary()


def real_floor(source, dataset, reference, extractor, count, splits, cache):
    """The same figures for `count` real training images: what a perfect model would have.

    dataset: of `real_images`; they are drawn from it at random without repeats, fewer where there
    are fewer. Returns (figures, count), kept in `cache` for the next time.
    """
    count = min(count, len(dataset))
    depends = f"{dataset.description}|{count}|{extractor.name}|{extractor.sha256}|{splits}|"
    key = hashlib.sha256((depends + reference.sha256).encode()).hexdigest()[:16]
    path = Path(cache) / f"{Path(source).name or 'data'}-real-{key}.json"
    if not dist.broadcast(path.is_file()):
        chosen = np.random.default_rng(0).permutation(len(dataset))[:count].tolist()
        summary = summarize(
            Subset(dataset, chosen),
            extractor,
            "real images",
            reference.has_images,
            splits=splits,
        )
        if dist.is_main():
            figures = compare(summary, reference, extractor)
            # a classifier knows the images that it was fitted on; the reference's it does not
            figures.pop("accuracy", None)
            if reference.accuracy is not None:
                figures["accuracy"] = reference.accuracy
            with replacing(path) as beside:
                beside.write_text(json.dumps(figures))
    return dist.broadcast(json.loads(path.read_text()) if dist.is_main() else None), count


# ---- judging --------------------------------------------------------------------------------


@dataclass
class Judge:
    """All that measuring needs, made before any image is generated."""

    extractor: Extractor
    reference: Reference | None
    floor: tuple | None  # (figures, count) of real training images
    splits: str

    @property
    def keep_features(self):
        """Whether precision and recall can be had, for which an Accumulator keeps features."""
        return self.reference is not None and self.reference.has_images

    def stated(self, images):
        """What every report of so many images states."""
        return {
            "images": images,
            "reference": self.reference.name if self.reference else None,
            "reference_images": self.reference.count if self.reference else None,
            "reference_sha256": self.reference.sha256 if self.reference else None,
            "extractor": self.extractor.name,
            "extractor_sha256": self.extractor.sha256,
            "isc_splits": self.splits,
        }

    def report(self, summary, settings, output_dir=None, logger=None, step=0):
        """Report the figures of a Summary (see `report`) and return them, on rank 0 ({} elsewhere).

        settings: what they depend on besides the judge.
        """
        if not dist.is_main():
            return {}
        figures = compare(summary, self.reference, self.extractor)
        notes = caveats(summary, self.reference, self.extractor)
        settings = {**self.stated(summary.count), **settings}
        report(figures, settings, notes, self.floor, output_dir, logger, step)
        return figures


def open_judge(
    source,
    data_path=None,
    *,
    img_size,
    num_images,
    extractor=None,
    weights=None,
    splits="torch-fidelity",
    cache="fid_stats",
    device="cpu",
):
    """A Judge of num_images images. Raises ValueError.

    source: of the reference, "auto" or "none" (see --reference). data_path: the data set whose real
    images are the floor; that of the reference if not given, and none where neither is one.
    extractor: Inception if not given, for the digits their classifier.
    """
    if source not in ("auto", "none"):
        check_reference(source)  # which is quick, before weights are fetched
    extractor = Extractor(pick_extractor(extractor, source, data_path), weights, device, img_size)
    if extractor.classes and splits == "torch-fidelity" and num_images < 10:
        raise ValueError(f"{num_images} images: expected at least 10, for an Inception Score")
    if source == "auto":
        published = Path("fid_stats") / f"adm_in{img_size}_stats.npz"
        source = str(data_path) if is_data_set(data_path) else "none"
        if published.is_file() and data_path != DIGITS:
            source = str(published)
    if source == "none":
        print0("no --reference: only figures that need none")
        return Judge(extractor, None, None, splits)
    data_path = str(data_path or source)
    real = real_images(data_path, img_size, "train") if is_data_set(data_path) else None
    dataset = real if source == data_path != DIGITS else None
    reference = load_reference(source, extractor, img_size, cache, dataset=dataset)
    if reference.has_images and num_images <= NEIGHBOURS:
        raise ValueError(f"{num_images} images: expected more than {NEIGHBOURS}, the neighbours")
    floor = None
    if real:
        floor = real_floor(data_path, real, reference, extractor, num_images, splits, cache)
    return Judge(extractor, reference, floor, splits)


# ---- reports --------------------------------------------------------------------------------


def report(figures, settings, notes=(), floor=None, output_dir=None, logger=None, step=0):
    """Show figures as a table and as a line of JSON, and add that line to results.jsonl.

    figures: name -> number. settings: all that they depend on. floor: (figures, count) of real
    images. Call it on rank 0 only.
    """
    # JSON knows no infinity, which a lossless tokenizer's PSNR is
    record = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    record |= {**settings, "time": time.strftime("%Y-%m-%dT%H:%M:%S")}
    notes = list(notes)
    if notes:
        record["notes"] = notes
    if floor:
        record["real"] = {**floor[0], "images": floor[1]}
    print0(f"\n{table(figures, settings, floor)}")
    for note in notes:
        print0(f"NOTE: {note}")
    print0(json.dumps(record))
    if output_dir:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        path = Path(output_dir) / "results.jsonl"
        cut_off = path.is_file() and not path.read_bytes().endswith(b"\n")
        with path.open("a") as file:
            file.write("\n" * cut_off + json.dumps(record) + "\n")
    if logger:
        group = f"eval_{settings.get('weights', 'images')}"
        logger.scalars({f"{group}/{name}": value for name, value in figures.items()}, step)


IN_ROWS = ("images", "seconds_per_image")


def table(figures, settings, floor=None):
    """Metric, value, the value of real images; below it, images and settings."""
    real, count = floor or ({}, None)
    rows = [("metric", "value", "real images")]
    for name, value in figures.items():
        rows.append((name, f"{value:.4f}", f"{real[name]:.4f}" if name in real else "–"))
    rows.append(("images", str(settings["images"]), str(count or "–")))
    if "seconds_per_image" in settings:
        rows.append(("seconds an image", f"{settings['seconds_per_image']:.4f}", "–"))
    rows = [row if floor else row[:2] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    shown = ", ".join(f"{k} {v}" for k, v in settings.items() if k not in IN_ROWS)
    return "\n".join([*lines, shown])


def main(argv=None):
    parser = Parser(description="Figures of a folder of images or an .npz, without a model.")
    parser.add_argument("images", help="a folder of pictures, or an .npz with arr_0")
    parser.add_argument(
        "--output_dir", metavar="DIR", help="add them to its results.jsonl (default: print only)"
    )
    parser.add_argument(
        "--img_size",
        type=positive_int,
        metavar="N",
        help="side that the images must have (default: that of the first)",
    )
    add_device_flag(parser)
    add_evaluation_flags(parser, standalone=True)
    args = parser.parse_args(argv)
    device = dist.init(args.device)
    if args.output_dir:
        make_folder(args.output_dir, "--output_dir")
    images = open_images(args.images, args.img_size)
    judge = open_judge(
        args.reference or "none",
        img_size=images[0][0].shape[0],
        num_images=len(images),
        extractor=args.extractor,
        weights=args.inception_weights,
        splits=args.isc_splits,
        cache=args.stats_dir,
        device=device,
    )
    summary = summarize(images, judge.extractor, "images", judge.keep_features, splits=judge.splits)
    judge.report(summary, {"source": args.images}, args.output_dir)


if __name__ == "__main__":
    run(main)
