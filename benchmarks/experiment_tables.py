"""What benchmarks.experiments found, as tables, curves over time, and grids of samples."""

from dataclasses import dataclass

import numpy as np

from reproduce import distance_name, spread
from util.evaluation.sweep import markdown
from util.files import replacing
from util.images import grid, save_image

SHOWN = 4  # samples of a class in a grid
METRICS = {"kernel_distance": "kernel distance", "precision": "precision", "recall": "recall"}
LOSSES = {"val_mse": "held-out loss", "val_bits_per_token": "bits per token"}
TITLES = {"steps": "equal steps", "time": "equal time"}


@dataclass(frozen=True)
class Point:
    """What was found for a row at a length, for all seeds.

    kind: what it has in common with the other rows of this length, in TITLES. minutes: of training,
    alone on the machine. folders, records: of the samples and their lines of results.jsonl, by
    seed. losses: held-out losses of each seed, name -> number.
    """

    row: str
    kind: str
    length: int
    epochs: int
    minutes: float
    cfg: float
    folders: dict
    records: dict
    losses: list

    @property
    def distances(self):
        """The Fréchet distance of each seed."""
        return [record[distance_name(record)] for record in self.records.values()]


@dataclass(frozen=True)
class Claim:
    """That the first of two rows has the smaller distance. paper: its numbers."""

    better: str
    worse: str
    paper: str


def write(folder, name, points, claims=()):
    """Write NAME.md, NAME.png and samples/ROW.png to a folder. points: a list of Point."""
    with replacing(folder / f"{name}.md") as beside:
        beside.write_text(text_of(name, points, claims))
    lengths = {(point.row, point.minutes) for point in points}
    draw = draw_rows if len(lengths) == len({row for row, _ in lengths}) else draw_curves
    with replacing(folder / f"{name}.png") as beside:
        draw(points).savefig(beside, dpi=150, format="png")
    for row in {point.row for point in points}:
        best = max((p for p in points if p.row == row), key=lambda p: (p.minutes, p.cfg))
        seed = next(iter(best.records))
        save_grid(folder / "samples", row, best.folders[seed], best.records[seed])


def text_of(name, points, claims):
    """The text of all tables."""
    text = f"# {name}\n"
    for length in sorted({point.length for point in points}):
        for kind, title in TITLES.items():
            cells = [cell(p) for p in points if (p.length, p.kind) == (length, kind)]
            if cells:
                text += f"\n## {epochs_of(length)}, {title}\n\n{markdown(cells)}\n"
    for cfg in sorted({point.cfg for point in points}) if claims else ():
        cells = [judged(claim, [p for p in points if p.cfg == cfg]) for claim in claims]
        text += f"\n## Which orderings hold, guidance {cfg:g}\n\n{markdown(cells)}\n\n{JUDGED}\n"
    record = next(iter(points[0].records.values()))
    text += f"\n{record['images']} samples, features of {record['extractor']}; mean ± standard "
    return text + "deviation over the seeds.\n"


def epochs_of(length):
    return f"{length} epoch" + "s" * (length != 1)


def cell(point):
    """A row of a table."""
    own = {"row": point.row, "epochs": point.epochs, "minutes": f"{point.minutes:.2g}"}
    own |= {"guidance": point.cfg, "Fréchet distance": spread(point.distances, 1)}
    found = [*point.records.values(), *point.losses]
    for key, title in {**METRICS, **LOSSES}.items():
        values = [each[key] for each in found if key in each]
        own[title] = spread(values, 4) if values else None
    return own | {"seeds": len(point.records)}


JUDGED = (
    "Mean distances of both rows, > or < where all seeds agree, and how many of them confirm the "
    "paper's order."
)


def judged(claim, points):
    """A row of the table of claims: the distances of both of its rows, for each length."""
    found = {"better": claim.better, "worse": claim.worse, "the paper's": claim.paper}
    for length in sorted({point.length for point in points}):
        for kind, title in TITLES.items():
            own = {p.row: p for p in points if (p.length, p.kind) == (length, kind)}
            found[f"{epochs_of(length)}, {title}"] = compared(
                own.get(claim.better), own.get(claim.worse)
            )
    return found


def compared(better, worse):
    """The distances of two points as text, with how many of their common seeds have the first
    smaller; None if there is nothing to compare."""
    seeds = [seed for seed in better.records if seed in worse.records] if better and worse else []
    if not seeds:
        return None
    pairs = [[p.records[s][distance_name(p.records[s])] for p in (better, worse)] for s in seeds]
    first, second = np.mean(pairs, axis=0)
    confirm = sum(one < other for one, other in pairs)
    sign = "<" if confirm == len(pairs) else ">" if not confirm else "≈"
    return f"{first:.1f} {sign} {second:.1f} ({confirm} of {len(pairs)})"


def draw_curves(points):
    """A figure of the distance over the minutes of training, a curve for each row."""
    from matplotlib import colormaps, ticker
    from matplotlib.figure import Figure

    scales = sorted({point.cfg for point in points})
    rows = list(dict.fromkeys(point.row for point in points))
    figure = Figure((6 * len(scales) + 3, 4.5), layout="constrained")
    panels = figure.subplots(1, len(scales), squeeze=False, sharey=True)[0]
    for panel, cfg in zip(panels, scales, strict=True):
        panel.set_prop_cycle(color=colormaps["tab20"].colors)
        for row in rows:
            own = {p.minutes: p.distances for p in points if (p.row, p.cfg) == (row, cfg)}
            xs = sorted(own)
            means, errors = [[f(own[x]) for x in xs] for f in (np.mean, np.std)]
            panel.errorbar(xs, means, errors, marker="o", ms=3, label=row)
        panel.set(title=f"guidance {cfg:g}", xlabel="minutes", xscale="log", yscale="log")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(ticker.ScalarFormatter())
            axis.set_minor_formatter(ticker.ScalarFormatter())
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("Fréchet distance")
    panels[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
    return figure


def draw_rows(points):
    """A figure of the distance of each row, smallest first, with the first row's as a line."""
    from matplotlib.figure import Figure

    first, points = points[0], sorted(points, key=lambda point: -np.mean(point.distances))
    several = len({point.cfg for point in points}) > 1
    names = [p.row + f", guidance {p.cfg:g}" * several for p in points]
    means, errors = [[f(point.distances) for point in points] for f in (np.mean, np.std)]
    figure = Figure((9, 1 + 0.22 * len(points)), layout="constrained")
    panel = figure.subplots()
    panel.errorbar(means, names, xerr=errors, fmt="o", ms=4)
    panel.axvline(np.mean(first.distances), color="grey", lw=1)
    panel.set(xlabel="Fréchet distance", ylim=(-1, len(points)))
    panel.grid(alpha=0.3)
    return figure


def save_grid(folder, row, samples, record):
    """Save some samples, a column for each class. samples: folder with samples.npz."""
    folder.mkdir(exist_ok=True)
    columns = record["images"] // record["per_class"]  # labels cycle through the classes
    images = np.load(samples / "samples.npz")["arr_0"][: SHOWN * columns]
    save_image(folder / f"{slug(row)}.png", grid(images, columns, min_side=64))


def slug(name):
    """The name of a row as that of a file or folder."""
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return "-".join(words)
