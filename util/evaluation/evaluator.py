"""The Evaluator: all that evaluation needs, opened before any image is generated."""

from dataclasses import dataclass, field, replace
from functools import cache, partial

import torch

from util import dist
from util.data import has_images, is_reference_set, kind_of
from util.data.settings import PLAIN
from util.dist import print0
from util.evaluation.accumulator import Accumulator, Measurement
from util.evaluation.baseline import measure_baseline
from util.evaluation.features import NONE, described, open_extractors, pick_extractors
from util.evaluation.fitted import Labelled
from util.evaluation.image_sets import RealImages
from util.evaluation.metrics import NEEDS, pick_metrics
from util.evaluation.references import (
    add_training,
    check_reference,
    find_reference,
    load_reference,
)
from util.evaluation.reports import caveats, report
from util.evaluation.settings import Evaluation
from util.precision import full_precision


@dataclass
class Evaluator:
    """Evaluates sets of images by rows of METRICS, and reports the results.

    start → add, add, … → summary → report.
    """

    settings: Evaluation
    extractors: dict  # name -> Extractor; the first is the main one
    chosen: dict  # name -> Metric, according to the settings
    references: dict = field(default_factory=dict)  # name of an extractor -> Reference, or empty
    baseline: tuple | None = None  # (metrics, number of images) of real training images
    classes: list | None = None  # names of those that labels of images denote, if known

    @property
    def extractor(self):
        """The main Extractor."""
        return next(iter(self.extractors.values()))

    @property
    def reference(self):
        """The Reference in the features of the main Extractor, or None."""
        return self.references.get(self.extractor.name)

    @property
    def rows(self):
        """The chosen metrics whose needs are met: name -> Metric."""
        return {name: row for name, row in self.chosen.items() if not self.lacking(row)}

    @property
    def promised(self):
        """Names of the numbers in every report, whether labels are known or not."""
        named = self.settings.metrics
        rows = [each for each in self.rows.items() if "labels" not in each[1].needs]
        return [key for name, row in rows if named or not row.new for key in row.labels(name)]

    def extractor_of(self, row):
        """The Extractor in whose features a Metric is computed."""
        return self.extractors[row.extractor or self.extractor.name]

    def lacking(self, row):
        """The unmet needs of a Metric (names in NEEDS)."""
        extractor = self.extractor_of(row)
        reference = self.references.get(extractor.name)
        there = {
            "reference": reference,
            "features": True,
            "reference features": reference and reference.has_images,
            "training features": reference and reference.has_training,
            "logits": extractor.classes,
            "labels": extractor.classes and self._knows_labels(extractor),
        }
        return [need for need in row.needs if not there[need]]

    def _knows_labels(self, extractor):
        return None in (extractor.names, self.classes) or extractor.names == list(self.classes)

    def start(self, num_images, rows=None):
        """A Measurement of num_images images by `rows` (default: all).

        Call its `add` for each batch, then `summary`.

        Raises ValueError for too few images.
        """
        rows = self.rows if rows is None else rows
        accumulators = {}
        for name, extractor in self.extractors.items():
            mine = [row for row in rows.values() if self.extractor_of(row) is extractor]
            needs = {need for row in mine for need in row.needs}
            if mine or extractor is self.extractor:
                splits = self.settings.isc_splits if "logits" in needs else None
                accumulators[name] = Accumulator(extractor, num_images, "features" in needs, splits)
        for name, row in rows.items():
            if num_images < row.least:
                raise ValueError(f"{num_images} images: expected at least {row.least}, for {name}")
        return Measurement(accumulators)

    def metrics(self, summaries, rows=None):
        """Metrics of the summaries of a Measurement, by `rows` (default: all). On rank 0."""
        found = {}
        for name, row in (self.rows if rows is None else rows).items():
            extractor = self.extractor_of(row)
            device = torch.device(extractor.device)
            held = summaries[extractor.name], self.references.get(extractor.name)
            if {need for need in row.needs if need.endswith("features")}:
                held = [_features_on(device, each) for each in held]
            with full_precision(device.type):  # distances are differences of products
                found |= row.numbers(name, *held)
        return found

    def stated(self, num_images):
        """Entries of every report on num_images images."""
        reference = self.reference
        return {
            "images": num_images,
            "reference": reference.name if reference else None,
            "reference_images": reference.num_images if reference else None,
            "reference_sha256": reference.sha256 if reference else None,
            "isc_splits": self.settings.isc_splits,
            **described(self.extractors),
        }

    def notes(self, num_images):
        """Caveats about metrics of num_images images."""
        for name, reference in self.references.items():
            where = "" if reference is self.reference else f"{name}: "
            for note in caveats(num_images, reference, self.extractors[name]):
                yield where + note
        for name, row in self.chosen.items() if self.references else ():
            if "reference features" in self.lacking(row):
                numbers = " and ".join(row.labels(name))
                yield f"no {numbers}: the reference has statistics only, no images"

    def report(self, summaries, settings, output_dir=None, logger=None, step=0):
        """Report the summaries of a Measurement; returns the metrics, {} off rank 0.

        settings: all that they depend on besides the evaluation, name -> value. For the other
        arguments see `reports.report`.
        """
        if not dist.is_main():
            return {}
        num_images = summaries[self.extractor.name].num_images
        found, settings = self.metrics(summaries), {**self.stated(num_images), **settings}
        notes = self.notes(num_images)
        report(found, settings, notes, self.baseline, output_dir, logger, step)
        return found


def _features_on(device, held):
    """A Summary or a Reference with its features on a device; None stays None."""
    names = ("features", "training") if held else ()
    found = {name: getattr(held, name, None) for name in names}
    return held and replace(held, **{k: v.to(device) for k, v in found.items() if v is not None})


def open_evaluator(
    settings,
    data_path=None,
    *,
    img_size,
    num_images,
    device="cpu",
    classes=None,
    reading=PLAIN,
):
    """The Evaluator of num_images images for an Evaluation. Raises ValueError.

    data_path: the data set whose real images are the baseline; if not given, that of the reference,
    if it is a data set. classes: names of the classes that the model was trained on, or None.
    reading: how real pictures are read, a util.data.settings.Reading, as in training.
    """
    open_set = cache(partial(RealImages, split="train", img_size=img_size, reading=reading))
    source, why = find_reference(settings, data_path, img_size, open_set, classes)
    print0(_say_reference(settings.reference, source, why))
    if source:
        check_reference(source)  # quick, before weights are downloaded
    names = pick_extractors(settings, source, data_path)
    if not names:
        raise ValueError(
            f"--extractor {NONE}: nothing can be measured; it is for the training of a tokenizer"
        )
    chosen = pick_metrics(settings.metrics, *names)
    labelled = Labelled.of(source, data_path, open_set, settings.stats_dir)
    more = [row.extractor for row in chosen.values() if row.extractor]
    extractors = open_extractors(names, settings, device, img_size, labelled, more)
    evaluator = Evaluator(settings, extractors, chosen, classes=classes)
    evaluator.start(num_images)  # raises for too few images before the reference is read
    data_path = data_path or (source if is_reference_set(source) else None)
    real, data_path = None, data_path and str(data_path)
    if source:
        real = open_set(data_path) if has_images(data_path) else None
        _add_references(evaluator, source, real, data_path, img_size, reading)
    if real:
        _add_training(evaluator, real, data_path)
    _check_chosen(evaluator, num_images)
    if real:
        evaluator.baseline = measure_baseline(evaluator, data_path, real, num_images)
    return evaluator


def _add_references(evaluator, source, real, data_path, img_size, reading):
    """Add the references of an Evaluator. real: the training images at data_path, or None."""
    same = real and source == data_path and kind_of(source).held_out == "train"
    how = {"dataset": real if same else None, "reading": reading}
    for name, extractor in evaluator.extractors.items():
        own = extractor is evaluator.extractor
        evaluator.references[name] = load_reference(
            source, extractor, img_size, evaluator.settings.stats_dir, own=own, **how
        )


def _add_training(evaluator, real, data_path):
    """Add features of the training images to the references in whose features they are needed."""
    for name, reference in evaluator.references.items():
        rows = [row for row in evaluator.chosen.values() if "training features" in row.needs]
        extractor = evaluator.extractors[name]
        if reference.has_images and extractor in map(evaluator.extractor_of, rows):
            how = data_path, real, extractor, evaluator.settings.stats_dir
            evaluator.references[name] = add_training(reference, *how)


def _say_reference(asked, source, why):
    """A line on what images are compared with, and why that was chosen."""
    if source is None:
        advice = f" (--reference auto: {why}; pass a path)" if why else ""
        return f"no reference: only metrics that need none{advice}"
    images = f", {kind_of(source).held_out} images" if is_reference_set(source) else ""
    return f"reference: {source}{images}" + (f" (--reference auto: {why})" if why else "")


def _check_chosen(evaluator, num_images):
    """Raises ValueError for too few images, and for requested metrics that are unavailable."""
    evaluator.start(num_images)
    for name in evaluator.settings.metrics or ():
        row = evaluator.chosen[name]
        if lacking := evaluator.lacking(row):
            raise ValueError(
                f"--metrics {name}: needs {NEEDS[lacking[0]]}; here are the extractor "
                f"{evaluator.extractor_of(row).name} and --reference {evaluator.settings.reference}"
            )
