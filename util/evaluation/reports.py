"""Reports of an evaluation: a table, a line of JSON, TensorBoard; and caveats."""

import time
from pathlib import Path

from util import jsonl
from util.dist import print0

IN_ROWS = ("images", "seconds_per_image")  # settings that are rows of the table


def report(metrics, settings, notes=(), baseline=None, output_dir=None, logger=None, step=0):
    """Print metrics as a table and as a line of JSON, and append that line to results.jsonl.

    metrics: name -> number. settings: all that they depend on. baseline: (metrics, number of
    images) of real images. Call it on rank 0 only.
    """
    record = {**metrics, **settings, "time": time.strftime("%Y-%m-%dT%H:%M:%S")}
    notes = list(notes)
    if notes:
        record["notes"] = notes
    if baseline:
        record["real"] = {**baseline[0], "images": baseline[1]}
    print0(f"\n{table(metrics, settings, baseline)}")
    for note in notes:
        print0(f"NOTE: {note}")
    print0(jsonl.dumps(record))
    if output_dir:
        jsonl.append(Path(output_dir) / "results.jsonl", record)
    if logger:
        group = f"eval_{settings.get('weights', 'images')}"
        logger.scalars({f"{group}/{name}": value for name, value in metrics.items()}, step)


def table(metrics, settings, baseline=None):
    """A table of metrics, their values and those of real images, followed by the settings."""
    real, count = baseline or ({}, None)
    rows = [("metric", "value", "real images")]
    for name, value in metrics.items():
        rows.append((name, _decimals(value), _decimals(real[name]) if name in real else "–"))
    rows.append(("images", str(settings["images"]), str(count or "–")))
    if "seconds_per_image" in settings:
        rows.append(("seconds per image", f"{settings['seconds_per_image']:.4f}", "–"))
    rows = [row if baseline else row[:2] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    shown = ", ".join(f"{k} {v}" for k, v in settings.items() if k not in IN_ROWS)
    return "\n".join([*lines, shown])


def _decimals(value):
    """A number to four decimals, or six of a small one, such as a KID."""
    return f"{value:.{4 if abs(value) >= 0.01 else 6}f}"


def caveats(num_images, reference, extractor):
    """Caveats about a distance to a Reference."""
    yield from few_images(num_images, extractor)
    if reference.num_images is not None and reference.num_images <= extractor.width:
        yield f"the reference has only {reference.num_images} images for {extractor.width} features"


def few_images(num_images, extractor):
    """A caveat if there are too few images for a reliable distance."""
    if num_images <= extractor.width:
        yield (
            f"{num_images} images for {extractor.width} features: the covariance is singular and "
            "the distance too large; compare it only with distances of the same number of images"
        )
