"""A grid of sampling settings, measured point by point, as a table and as the paper's plots."""

import csv
import itertools
import json
import math
from argparse import ArgumentTypeError
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen is needed

import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from util.files import replacing
from util.flags import finite, nonnegative, positive_int

AXES = {
    "cfg": finite,
    "temperature": nonnegative,
    "num_iter": positive_int,
    "num_sampling_steps": str,
}
METRICS = (
    "fid",
    "frechet_distance",
    "pixel_distance",
    "inception_score",
    "accuracy",
    "precision",
    "recall",
)
LABELS = {
    "cfg": "guidance",
    "temperature": "temperature",
    "num_iter": "autoregressive steps",
    "num_sampling_steps": "diffusion steps",
    "seconds_per_image": "seconds an image",
    "fid": "FID",
    "frechet_distance": "Fréchet distance",
    "pixel_distance": "Fréchet distance, pixels",
    "inception_score": "IS",
}
LOGARITHMIC = ("num_sampling_steps", "seconds_per_image")
COLUMNS = 3  # panels side by side
# file -> (axis that must vary, x of the plot): the shapes of the paper's figures
PLOTS = {
    "diffusion_steps": ("num_sampling_steps", "num_sampling_steps"),  # figure 4
    "temperature": ("temperature", "temperature"),  # figure 5
    "speed": ("num_iter", "seconds_per_image"),  # figure 6
    "guidance": ("cfg", "cfg"),
}


def parse_grid(texts):
    """["cfg=1,2", "temperature=0.9,1"] to a list of points, {name: value}. Raises ValueError."""
    axes = {}
    for text in texts:
        name, _, values = text.partition("=")
        if name in axes:
            raise ValueError(f"--sweep {text}: {name} is there twice, expected {name}=A,B")
        if name not in AXES or not values:
            raise ValueError(f"--sweep {text}: expected NAME=VALUE,… with {', '.join(AXES)}")
        try:
            axes[name] = [AXES[name](value) for value in values.split(",")]
        except ArgumentTypeError as error:
            raise ValueError(f"--sweep {text}: {error}") from None
        if len(set(axes[name])) < len(axes[name]):
            raise ValueError(f"--sweep {text}: a value is there twice")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def find_result(path, identity):
    """The last line of a results.jsonl that agrees with `identity` (name -> value), or None."""
    if not Path(path).is_file():
        return None
    found = None
    for line in Path(path).read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # cut off when a run was killed
            continue
        if all(record.get(name) == value for name, value in identity.items()):
            found = record
    return found


def write_sweep(records, points, folder):
    """sweep.csv, sweep.md and a plot for each axis that varies; returns the files written.

    records: of the report of each point.
    """
    axes = list(points[0])
    metrics = [name for name in METRICS if name in records[0]]
    rows = [
        {name: record[name] for name in (*axes, *metrics, "seconds_per_image", "images")}
        for record in records
    ]
    folder = Path(folder)
    with replacing(folder / "sweep.csv") as beside, beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with replacing(folder / "sweep.md") as beside:
        beside.write_text(markdown(rows))
    files = [folder / "sweep.csv", folder / "sweep.md"]
    rows = [{**row, "real": record.get("real")} for row, record in zip(rows, records, strict=True)]
    for name, (axis, x) in PLOTS.items():
        if axis in axes and len({row[axis] for row in rows}) > 1:
            files.append(folder / f"sweep_{name}.png")
            _plot(rows, axis, x, [a for a in axes if a != axis], metrics, files[-1])
    return files


def markdown(rows):
    """Rows, {name: value} each, as a table in Markdown."""

    def show(value):
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [" | ".join(show(value) for value in row.values()) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def _plot(rows, axis, x, others, metrics, path):
    """A panel for each metric: it against x, a line for each setting of the other axes."""
    others = [name for name in others if len({row[name] for row in rows}) > 1]
    lines = {}
    for row in sorted(rows, key=lambda row: _position(row[x])):
        lines.setdefault(tuple(row[name] for name in others), []).append(row)
    columns = min(len(metrics), COLUMNS)
    down = math.ceil(len(metrics) / columns)
    size = 4.2 * columns, 3.2 * down + 0.12 * len(lines) + 0.3
    figure, panels = plt.subplots(down, columns, figsize=size, squeeze=False, layout="constrained")
    panels = list(panels.flat)
    for panel in panels[len(metrics) :]:
        panel.set_axis_off()
    for panel, metric in zip(panels, metrics, strict=False):
        for setting, line in sorted(lines.items(), key=lambda item: list(map(_position, item[0]))):
            label = ", ".join(f"{LABELS[n]} {v}" for n, v in zip(others, setting, strict=True))
            xs, ys = [_position(row[x]) for row in line], [row[metric] for row in line]
            panel.plot(xs, ys, marker="o", markersize=4, label=label)
            for row, px, py in zip(line, xs, ys, strict=True) if x != axis else ():
                # which of the axis's values each point is
                panel.annotate(
                    str(row[axis]), (px, py), (3, 3), textcoords="offset points", fontsize=7
                )
        if x in LOGARITHMIC:
            panel.set_xscale("log")
        if x == axis:
            panel.xaxis.set_minor_formatter(NullFormatter())
            ticks = {_position(row[x]): str(row[x]) for row in rows}
            panel.set_xticks(list(ticks), ticks.values())
        if metric in (real := rows[0].get("real") or {}):
            panel.axhline(real[metric], color="grey", linestyle="--", linewidth=1, label="real")
        panel.set(xlabel=LABELS[x], ylabel=LABELS.get(metric, metric))
        panel.tick_params(which="both", labelsize=8)
        panel.margins(0.1)  # of the points' names
        panel.grid(alpha=0.3)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=9)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=150, format="png")
    plt.close(figure)


def _position(value):
    """Where a value lies on an axis: itself, or the count in "ddim50"."""
    return float(str(value).removeprefix("ddim"))
