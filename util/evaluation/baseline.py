"""The metrics of real images: those of a perfect model."""

import hashlib
import json
from math import isfinite

import numpy as np
from torch.utils.data import Subset

from util import dist
from util.dist import print0
from util.evaluation.accumulator import summarize
from util.evaluation.kept import kept_path
from util.evaluation.metrics import AT, OF_UNSEEN
from util.files import first_line, replacing

SEAL = "sha256"  # entry of a cache file, of the others


def measure_baseline(evaluator, source, dataset, num_images):
    """(metrics, number of images) of num_images real training images, by the Evaluator's rows.

    source: path of the data set. dataset: its RealImages, from which they are drawn at random
    without replacement; all if there are fewer. Results are cached in stats_dir by name; only
    missing ones are computed.
    """
    count = min(num_images, len(dataset))
    paths = {name: _path(evaluator, name, source, dataset, count) for name in evaluator.extractors}
    kept = dist.broadcast({name: _read(path) for name, path in paths.items()})
    found, missing = _kept_and_missing(evaluator, kept)
    if missing:
        found |= _measure(evaluator, dataset, count, missing)
        _keep(evaluator, missing, found, kept, paths)
    return dist.broadcast(found), count


def _kept_and_missing(evaluator, kept):
    """(name -> cached number, name -> Metric still to be computed)."""
    found, missing = {}, {}
    for name, row in evaluator.rows.items():
        extractor = evaluator.extractor_of(row).name
        held, reference = kept[extractor], evaluator.references[extractor]
        if OF_UNSEEN & {*row.needs}:
            # a classifier has seen the images it was trained on, but not those of the reference
            own = {extractor: reference}
            found |= evaluator.metrics(own, {name: row}) if dist.is_main() else {}
        elif {*map(_plain, row.labels(name))} <= held.keys():
            found |= {key: held[_plain(key)] for key in row.labels(name)}
        else:
            missing[name] = row
    return found, missing


def _measure(evaluator, dataset, count, rows):
    """Metrics of `count` images drawn from a data set, by these rows; {} off rank 0."""
    drawn = Subset(dataset, np.random.default_rng(0).permutation(len(dataset))[:count].tolist())
    summaries = summarize(drawn, evaluator.start(count, rows), "real images")
    return evaluator.metrics(summaries, rows) if dist.is_main() else {}


def _keep(evaluator, rows, found, kept, paths):
    """Add the numbers of these rows to the cache files, one per extractor."""
    for name, row in rows.items() if dist.is_main() else ():
        extractor = evaluator.extractor_of(row).name
        kept[extractor] |= {_plain(key): found[key] for key in row.labels(name)}
        sealed = {**kept[extractor], SEAL: _seal(kept[extractor])}
        with replacing(paths[extractor]) as beside:
            beside.write_text(json.dumps(sealed))


def _plain(key):
    """The name of a number in a file, which is of one extractor anyway."""
    return key.partition(AT)[0]


def _path(evaluator, extractor, source, dataset, count):
    """The cache file of metrics in the features of an extractor."""
    sha256 = evaluator.extractors[extractor].sha256
    depends = f"{dataset.description}|{count}|{extractor}|{sha256}|{evaluator.settings.isc_splits}|"
    depends += evaluator.references[extractor].sha256
    return kept_path(evaluator.settings.stats_dir, source, "real", depends, "json")


def _read(path):
    """The content of a cache file, name -> number; {} if it is missing or damaged."""
    if not path.is_file():
        return {}
    try:
        held = json.loads(path.read_text())
        sealed = held.pop(SEAL, None)
        # files of earlier versions have no seal, but nothing except numbers either
        if not all(type(value) in (int, float) and isfinite(value) for value in held.values()):
            raise ValueError("not all of it is numbers")
        if sealed not in (None, _seal(held)):
            raise ValueError("it does not fit its sha256")
        return held
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        print0(f"NOTE: {path}: not readable ({first_line(error)}): computed again")
        return {}


def _seal(held):
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()
