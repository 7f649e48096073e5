"""Sweeps over a grid of sampling settings, as a table and as plots like the paper's."""

import csv
import itertools
import math
from argparse import ArgumentTypeError
from pathlib import Path

from util import jsonl
from util.evaluation import metrics
from util.files import replacing

LABELS = {  # of axes and settings in plots; others are shown by their names
    "cfg": "guidance",
    "temperature": "temperature",
    "num_iter": "autoregressive steps",
    "num_sampling_steps": "diffusion steps",
    "seconds_per_image": "seconds per image",
}
LOGARITHMIC = ("num_sampling_steps", "seconds_per_image")
COSTS = ("seconds_per_image", "images")  # of every record, beside its metrics
COLUMNS = 3  # panels side by side
# file -> (axis that must vary, x of the plot): the shapes of the paper's figures
PLOTS = {
    "diffusion_steps": ("num_sampling_steps", "num_sampling_steps"),  # figure 4
    "temperature": ("temperature", "temperature"),  # figure 5
    "speed": ("num_iter", "seconds_per_image"),  # figure 6
    "guidance": ("cfg", "cfg"),
}


def parse_grid(texts, settings):
    """["cfg=1,2", "temperature=0.9,1"] to a list of points, {name: value}. Raises ValueError.

    settings: the Settings class whose fields the names are.
    """
    fields = {f.name: f.metadata for f in settings.fields() if "nargs" not in f.metadata}
    axes = {}
    for text in texts:
        name, _, values = text.partition("=")
        if name in axes:
            raise ValueError(f"--sweep {text}: {name} is there twice, expected {name}=A,B")
        if name not in fields or not values:
            raise ValueError(f"--sweep {text}: expected NAME=VALUE,… with {', '.join(fields)}")
        axes[name] = [_value(text, value, fields[name]) for value in values.split(",")]
        if len(set(axes[name])) < len(axes[name]):
            raise ValueError(f"--sweep {text}: a value is there twice")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _value(text, value, details):
    """A value, parsed like the field's flag. Raises ValueError."""
    try:
        value = details.get("type", str)(value)
    except ArgumentTypeError as error:
        raise ValueError(f"--sweep {text}: {error}") from None
    choices = details.get("choices", [value])
    if value not in choices:
        raise ValueError(f"--sweep {text}: {value}: expected one of {', '.join(choices)}")
    return value


def find_result(path, identity, names=()):
    """The last record of a results.jsonl that matches `identity`, or None.

    identity: name -> value. names: metrics that the record must have.
    """
    found = None
    for record in filter(_is_whole, jsonl.read(path)):
        same = all(_equal(record.get(name), value) for name, value in identity.items())
        if same and all(name in record for name in names):
            found = record
    return found


def _is_whole(record):
    """Whether the numbers of a record are numbers, or null for infinity."""
    real = record.get("real") or {}
    if not isinstance(real, dict):
        return False
    numbers = [record[name] for name in metrics.labels(record)]
    costs = [record[name] for name in COSTS if name in record]
    whole = all(type(n) in (int, float, type(None)) for n in (*numbers, *real.values()))
    return whole and all(type(n) in (int, float) for n in costs)


def _equal(one, other):
    """Whether two values of a record are the same; Python takes True for 1."""
    return one == other and (type(one) is bool) == (type(other) is bool)


def write_sweep(records, points, folder):
    """Write sweep.csv, sweep.md and a plot for each axis that varies; returns their paths.

    records: the record in results.jsonl of each point.
    """
    axes, folder = list(points[0]), Path(folder)
    shown = metrics.labels(records[0])
    names = [name for name in shown if all(name in record for record in records)]
    rows = [{name: record.get(name) for name in (*axes, *names, *COSTS)} for record in records]
    files = [folder / "sweep.csv", folder / "sweep.md"]
    with replacing(files[0]) as beside, beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with replacing(files[1]) as beside:
        beside.write_text(markdown(rows))
    real = records[0].get("real") or {}
    for name, (axis, x) in PLOTS.items():
        if axis in axes and len({row[axis] for row in rows}) > 1:
            files.append(folder / f"sweep_{name}.png")
            _plot(rows, axis, x, [a for a in axes if a != axis], names, real, files[-1])
    return files


def markdown(rows):
    """Rows, {name: value} each, as a table in Markdown."""

    def show(value):
        if value is None:  # infinite, or not measured
            return "–"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [" | ".join(show(value) for value in row.values()) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def _plot(rows, axis, x, others, names, real, path):
    """A panel per metric, plotted against x, with a line per setting of the other axes."""
    from matplotlib.figure import Figure

    lines = _lines(rows, x, [name for name in others if len({row[name] for row in rows}) > 1])
    columns = min(len(names), COLUMNS)
    down = math.ceil(len(names) / columns)
    size = 4.2 * columns, 3.2 * down + 0.12 * len(lines) + 0.3
    figure = Figure(size, layout="constrained")
    panels = list(figure.subplots(down, columns, squeeze=False).flat)
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    for panel, name in zip(panels, names, strict=False):
        for label, line in lines.items():
            _draw(panel, line, axis, x, name, label)
        if name in real:
            panel.axhline(real[name], color="gray", linestyle="--", linewidth=1, label="real")
        _dress(panel, rows, axis, x, metrics.labels([name])[name])
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=9)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=150, format="png")


def _lines(rows, x, others):
    """Label of a setting of the other axes -> its rows along x, in the order of the settings."""
    lines = {}
    for row in sorted(rows, key=lambda row: _position(row[x])):
        lines.setdefault(tuple(row[name] for name in others), []).append(row)
    settings = sorted(lines, key=lambda setting: list(map(_position, setting)))
    return {
        ", ".join(f"{LABELS.get(n, n)} {v}" for n, v in zip(others, setting, strict=True)): lines[
            setting
        ]
        for setting in settings
    }


def _draw(panel, line, axis, x, name, label):
    """Plot one metric along a line; if x is not the axis, annotate points with its value."""
    xs, ys = [_position(row[x]) for row in line], [row[name] for row in line]
    panel.plot(xs, ys, marker="o", markersize=4, label=label)
    for row, px, py in zip(line, xs, ys, strict=True) if x != axis else ():
        panel.annotate(str(row[axis]), (px, py), (3, 3), textcoords="offset points", fontsize=7)


def _dress(panel, rows, axis, x, label):
    """Set scales, ticks and labels of a panel."""
    from matplotlib.ticker import NullFormatter

    if x in LOGARITHMIC:
        panel.set_xscale("log")
    if x == axis:
        panel.xaxis.set_minor_formatter(NullFormatter())
        ticks = {_position(row[x]): str(row[x]) for row in rows}
        panel.set_xticks(list(ticks), ticks.values())
    panel.set(xlabel=LABELS[x], ylabel=label)
    panel.tick_params(which="both", labelsize=8)
    panel.margins(0.1)  # for the values beside the points
    panel.grid(alpha=0.3)


def _position(value):
    """The position of a value on an axis: a number, the count in "ddim50", or the name."""
    try:
        return float(str(value).removeprefix("ddim"))
    except ValueError:
        return str(value)
