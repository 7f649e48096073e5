"""Reproduce the paper's tables at small scale. `python reproduce.py --help`.

Every row of a table is trained with the same data, steps, batches and learning rate, on models of
equal size, and evaluated in the same way, for several seeds. Existing results are reused. Writes to
--output_dir: TABLE.md, with the paper's numbers beside ours, TABLE.png, and a grid of samples for
each row. Discrete rows need a VQ tokenizer and continuous ones a KL tokenizer; both are trained
first, with the same network, on the same data.
"""

import json
import math
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

import main_mar
import main_tokenizer
import sample
from models.presets import PAPER
from util import jsonl
from util.data import describe_paths, kind_or_folder
from util.evaluation.settings import NETWORK, Evaluation
from util.evaluation.sweep import markdown
from util.files import replacing
from util.flags import (
    Parser,
    add_device_flag,
    add_size_flag,
    nonnegative_int,
    positive_int,
    run,
)
from util.settings import add_flags
from util.sizes import sides

GUIDANCE = (1.0, 1.5, 2.0, 3.0)

# training runs: name -> flags that differ
KL, VQ = {"tokenizer": "kl"}, {"tokenizer": "vq"}
DIFF, CE = {**KL, "head": "diffloss"}, {**VQ, "head": "ce"}
RASTER = {"model": "ar_tiny", "order": "raster"}
RANDOM = {"model": "ar_tiny", "order": "random"}
MAR = {"model": "mar_tiny"}
RUNS = {
    "ar-raster-ce": {**CE, **RASTER},
    "ar-raster-diff": {**DIFF, **RASTER},
    "ar-random-ce": {**CE, **RANDOM},
    "ar-random-diff": {**DIFF, **RANDOM},
    "mar-ce": {**CE, **MAR},
    "mar-diff": {**DIFF, **MAR},
    "mar-l2": {**KL, **MAR, "head": "l2"},
    "mar-diff-vq": {**DIFF, **MAR, "tokenizer": "vq_latent"},
    "mar-diff-pixels": {**DIFF, **MAR, "tokenizer": "pixels"},  # in patches of the same size
    "mar-diff-w16": {**DIFF, **MAR, "diffloss_w": 16},
    "mar-diff-w32": {**DIFF, **MAR, "diffloss_w": 32},
    "mar-diff-w96": {**DIFF, **MAR, "diffloss_w": 96},
    "mar-diff-d1": {**DIFF, **MAR, "diffloss_d": 1},
    "mar-diff-d6": {**DIFF, **MAR, "diffloss_d": 6},
    "dit-diff": {**KL, "model": "dit_tiny"},
}


@dataclass
class Row:
    """A row of a table. run: name in RUNS. steps: sampling steps as a fraction of the tokens."""

    label: str
    run: str
    steps: float = 0.25
    order: str | None = None
    paper: str = "–"  # FID/IS without → with guidance


def _paper(label, run, preset, **kwargs):
    return Row(label, run, paper=PAPER[preset][1], **kwargs)


TABLES = {
    "table1": [
        _paper("AR, raster, CE", "ar-raster-ce", "table1-ar-raster-ce", steps=1),
        _paper("AR, raster, Diff", "ar-raster-diff", "table1-ar-raster-diff", steps=1),
        _paper("AR, random, CE", "ar-random-ce", "table1-ar-random-ce", steps=1),
        _paper("AR, random, Diff", "ar-random-diff", "table1-ar-random-diff", steps=1),
        _paper("MAR, one at a time, CE", "mar-ce", "table1-mar-one-ce", steps=1),
        _paper("MAR, one at a time, Diff", "mar-diff", "table1-mar-one-diff", steps=1),
        _paper("MAR, CE", "mar-ce", "table1-mar-ce"),
        _paper("MAR, Diff", "mar-diff", "table1-mar-diff"),
        _paper("MAR, L2", "mar-l2", "table1-mar-l2"),
    ],
    "table2": [
        _paper("VQ, latents before quantization", "mar-diff-vq", "table2-vq16"),
        _paper("KL", "mar-diff", "table2-kl16"),
        Row("pixels", "mar-diff-pixels"),
    ],
    "table3": [
        _paper("width 16", "mar-diff-w16", "table3-w256"),
        _paper("width 32", "mar-diff-w32", "table3-w512"),
        _paper("width 64", "mar-diff", "table3-w1024"),
        _paper("width 96", "mar-diff-w96", "table3-w1536"),
        Row("depth 1, width 64", "mar-diff-d1"),
        Row("depth 6, width 64", "mar-diff-d6"),
    ],
    "table5": [
        _paper("confidence, CE", "mar-ce", "table5-confidence-ce", order="confidence"),
        _paper("random, CE", "mar-ce", "table5-random-ce"),
        _paper("random, Diff", "mar-diff", "table5-random-diff"),
        Row("raster, Diff", "mar-diff", order="raster"),
    ],
}


def get_parser():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "what",
        choices=(*TABLES, "figures"),
        help="1: AR/MAR and loss; 2: tokenizers; 3: head; 5: order; figures: 4, 5 and 6",
    )
    parser.add_argument(
        "--data_path",
        default="digits",
        metavar="DIR",
        help=describe_paths(),
    )
    add_size_flag(parser, "side of the images in pixels, or their height and width", 8)
    parser.add_argument("--class_num", type=positive_int, default=10, metavar="N", help="classes")
    parser.add_argument(
        "--ch_mult", default="1,2", help="levels of the tokenizers: their stride is 2^(levels − 1)"
    )
    parser.add_argument(
        "--num_codes", type=positive_int, default=256, metavar="N", help="codes of the VQ tokenizer"
    )
    parser.add_argument(
        "--tokenizer_epochs", type=positive_int, default=40, help="epochs per tokenizer"
    )
    parser.add_argument(
        "--epochs", type=positive_int, default=100, help="training epochs per model"
    )
    parser.add_argument(
        "--seeds",
        type=nonnegative_int,
        nargs="+",
        default=[1, 2, 3],
        metavar="S",
        help="seeds, one run each",
    )
    parser.add_argument(
        "--num_images", type=positive_int, default=1000, metavar="N", help="samples per evaluation"
    )
    parser.add_argument(
        "--output_dir", default="./output_dir/reproduce", help="folder of all outputs"
    )
    add_device_flag(parser)
    add_flags(parser, Evaluation, only=NETWORK)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    if args.num_images % args.class_num:
        raise ValueError(f"--num_images {args.num_images}: expected the same number per class")
    train_tokenizers(args)
    if args.what == "figures":
        figures(args)
    else:
        table(args)


def train_tokenizers(args):
    """Train a KL and a VQ tokenizer with the same network, once for all seeds."""
    for name in ("kl", "vq"):
        folder = Path(args.output_dir) / f"tokenizer-{name}"
        if (folder / "results.jsonl").is_file():
            continue
        flags = {
            **data_flags(args),
            "tokenizer": name,
            "epochs": args.tokenizer_epochs,
            "batch_size": 32,
            "lr": 2e-3,
            "ch_mult": args.ch_mult,
            "vae_embed_dim": 4,
            "num_workers": workers(args),
            "extractor": args.extractor,
            "extractor_weights": args.extractor_weights,
            "inception_weights": args.inception_weights,
            "output_dir": folder,
        }
        if name == "vq":
            flags["num_codes"] = args.num_codes
        call(main_tokenizer.main, flags)


def train(args, name, seed):
    """The checkpoint of a run, trained unless it is complete already."""
    from util.checkpoint import LAST

    folder = Path(args.output_dir) / name / f"seed{seed}"
    done = folder / "done.json"
    flags = {"preset": "digits", **data_flags(args), **RUNS[name], "epochs": args.epochs}
    if flags["tokenizer"] != "pixels":
        kind = flags["tokenizer"].removesuffix("_latent")
        flags["vae_path"] = Path(args.output_dir) / f"tokenizer-{kind}" / "tokenizer.ckpt"
    else:
        flags["patch_size"] = math.isqrt(math.prod(sides(args.img_size)) // tokens(args))
    flags |= {"class_num": args.class_num, "num_workers": workers(args), "seed": seed}
    flags |= {"eval_freq": args.epochs, "output_dir": folder}
    used = {key: str(value) for key, value in flags.items()}
    if done.is_file():
        if json.loads(done.read_text()) != used:
            raise ValueError(f"{folder}: made with other flags; pass another --output_dir")
    else:
        call(main_mar.main, {**flags, "resume": folder})
        with replacing(done) as beside:
            beside.write_text(json.dumps(used))
    return folder / LAST


def evaluate(args, row, seed, sweep):
    """The records (results.jsonl) of the points of a sweep over a row's model."""
    ckpt = train(args, row.run, seed)
    steps = max(1, round(row.steps * tokens(args)))
    folder = ckpt.parent / f"steps{steps}-{row.order or 'own'}-{args.num_images}"
    flags = {
        "ckpt": ckpt,
        "labels": "all",
        "per_class": args.num_images // args.class_num,
        "num_iter": steps,
        "order": row.order,
        "batch_size": 250,
        "reference": args.data_path,
        "extractor": args.extractor,
        "extractor_weights": args.extractor_weights,
        "inception_weights": args.inception_weights,
        "stats_dir": Path(args.output_dir) / "fid_stats",
        "device": args.device,
        "output_dir": folder,
    }
    call(sample.main, flags, "--sweep", *sweep)
    return jsonl.read(folder / "results.jsonl"), flags


def tokens(args):
    """The number of tokens per image, in every run."""
    levels = len(args.ch_mult.split(","))
    return math.prod(sides(args.img_size, 2 ** (levels - 1)))


def table(args):
    """Train and evaluate every row, and write the table."""
    rows, folder = TABLES[args.what], Path(args.output_dir)
    found = {row.label: [] for row in rows}
    for seed in args.seeds:  # seed by seed, so that an interrupted run gives a smaller table
        for row in rows:
            lines, flags = evaluate(args, row, seed, [f"cfg={','.join(map(str, GUIDANCE))}"])
            points = {line["cfg"]: line for line in lines}
            best = min(points.values(), key=lambda point: point[distance_name(point)])
            found[row.label].append((points[1.0], best))
            grid = folder / args.what / f"{row.label.replace(', ', '-').replace(' ', '_')}.png"
            if not grid.is_file():
                kept = {k: v for k, v in flags.items() if k not in ("reference", "output_dir")}
                kept |= {"per_class": 8, "cfg": best["cfg"], "out": grid}
                call(sample.main, kept)
            write_table(args, [row for row in rows if found[row.label]], found)
    print((folder / f"{args.what}.md").read_text())
    print(f"in {folder}: {args.what}.md, {args.what}.png, {args.what}/*.png")


def distance_name(record):
    return "fid" if "fid" in record else "frechet_distance"


def write_table(args, rows, found):
    """Write the table so far. found: label -> (record without, with best guidance) per seed."""
    one = found[rows[0].label][0][0]
    distance, real = distance_name(one), one["real"]
    lines = []
    for row in rows:
        plain, best = zip(*found[row.label], strict=True)
        cell = {"row": row.label, "paper: FID/IS": row.paper}
        for words, records in (("no guidance", plain), ("best guidance", best)):
            for name, short in ((distance, "distance"), ("inception_score", "IS")):
                if name not in records[0]:  # if the extractor has no classes
                    continue
                cell[f"{short}, {words}"] = spread([record[name] for record in records])
            if "accuracy" in records[0]:
                cell[f"accuracy, {words}"] = spread([100 * r["accuracy"] for r in records], 1)
        cell["guidance"] = "/".join(f"{record['cfg']:g}" for record in best)
        cell["seeds"] = len(best)
        lines.append(cell)
    text = f"# {args.what} at small scale\n\n{markdown(lines)}\n"
    text += (
        f"{args.data_path}, {args.epochs} epochs, {one['images']} samples, features of "
        f"{one['extractor']}. Mean ± standard deviation over the seeds. The same number of real "
        f"training images has a distance of {real[distance]:.2f}"
    )
    text += f", IS {real['inception_score']:.2f}" if "inception_score" in real else ""
    text += f", accuracy {100 * real['accuracy']:.1f}" if "accuracy" in real else ""
    text += f". The best guidance is that of {', '.join(f'{g:g}' for g in GUIDANCE)} with the "
    text += "smallest distance, for each seed.\n"
    folder = Path(args.output_dir)
    with replacing(folder / f"{args.what}.md") as beside:
        beside.write_text(text)
    plot(folder / f"{args.what}.png", rows, found, distance, real[distance])


def spread(values, digits=2):
    """Mean ± standard deviation over seeds, as text."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def plot(path, rows, found, distance, baseline):
    """Plot each seed of each row as a dot, without and with guidance, and real images."""
    from matplotlib.figure import Figure

    figure = Figure((11, 0.8 + 0.45 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, sharex=True)
    for panel, which, title in zip(panels, (0, 1), ("no guidance", "best guidance"), strict=True):
        for y, row in enumerate(rows):
            values = [pair[which][distance] for pair in found[row.label]]
            panel.plot(values, [y] * len(values), "o", alpha=0.7)
        panel.axvline(baseline, color="gray", linestyle="--", linewidth=1, label="real images")
        panel.set(title=title, xlabel="Fréchet distance", xscale="log")
        panel.grid(alpha=0.3)
        panel.legend()
    panels[0].set_yticks(range(len(rows)), [row.label for row in rows])
    panels[0].invert_yaxis()
    with replacing(path) as beside:
        figure.savefig(beside, dpi=150, format="png")


def figures(args):
    """Plot diffusion steps, temperature, and speed against accuracy, for the first seed."""
    length = tokens(args)

    def measure(run, steps, sweep):
        found, flags = evaluate(args, Row(run, run, steps / length), args.seeds[0], sweep)
        return found, flags["output_dir"]

    draw_figures(measure, length, Path(args.output_dir))


def draw_figures(measure, length, folder):
    """Write the paper's figures 4, 5 and 6 to a folder.

    measure: function (run, steps, points of --sweep) -> (records of results.jsonl, their folder),
    of "mar-diff", "ar-raster-diff", "ar-random-diff" and "dit-diff". length: tokens of an image.
    """
    for name, sweep in {
        "diffusion_steps": ["cfg=1,2", "num_sampling_steps=5,10,25,50,100,250"],
        "temperature": ["cfg=1,1.5,2,3", "temperature=0.9,0.95,1,1.05"],
    }.items():
        _, own = measure("mar-diff", max(1, length // 4), sweep)
        shutil.copy(own / f"sweep_{name}.png", folder / f"figure_{name}.png")
    draw_speed(measure, length, folder)
    print(f"in {folder}: figure_diffusion_steps.png, figure_temperature.png, figure_speed.png")


def draw_speed(measure, length, folder):
    """Plot Fréchet distance against seconds per image, over steps of MAR and of DiT, and for AR."""
    from matplotlib import ticker
    from matplotlib.figure import Figure

    lines, rows = {}, []
    for name in ("ar-raster-diff", "ar-random-diff"):
        lines[name] = [(length, measure(name, length, ["cfg=2"]))]
    for steps in sorted({1, 2, 4, 8, length // 4, length // 2, length}):
        lines.setdefault("MAR", []).append((steps, measure("mar-diff", steps, ["cfg=2"])))
    for steps in (5, 10, 25, 50, 100, 250):
        sweep = ["cfg=2", f"num_sampling_steps={steps}"]
        lines.setdefault("DiT", []).append((steps, measure("dit-diff", 1, sweep)))
    ((_, (only, _)),) = lines["ar-raster-diff"]  # MAR's folder has the points of other figures, too
    own = {key: only[-1][key] for key in ("cfg", "temperature", "num_sampling_steps")}
    figure = Figure((6, 4), layout="constrained")
    panel = figure.subplots()
    for name, points in lines.items():
        records = []
        for steps, (found, _) in points:
            like = {**own, "num_sampling_steps": str(steps)} if name == "DiT" else own
            records.append([r for r in found if like.items() <= r.items()][-1])
            rows.append({"model": name, "steps": steps, **metrics_of(records[-1])})
        xs = [record["seconds_per_image"] for record in records]
        ys = [record[distance_name(record)] for record in records]
        panel.plot(xs, ys, marker="o", label=name)
        for (steps, _), x, y in zip(points, xs, ys, strict=True):
            panel.annotate(str(steps), (x, y), (3, 3), textcoords="offset points", fontsize=7)
    panel.set(xlabel="seconds per image", ylabel="Fréchet distance", xscale="log", yscale="log")
    panel.xaxis.set_major_formatter(ticker.ScalarFormatter())
    panel.yaxis.set_major_formatter(ticker.ScalarFormatter())
    panel.yaxis.set_minor_formatter(ticker.ScalarFormatter())
    panel.grid(alpha=0.3, which="both")
    panel.legend()
    with replacing(folder / "figure_speed.png") as beside:
        figure.savefig(beside, dpi=150, format="png")
    with replacing(folder / "figure_speed.md") as beside:
        beside.write_text(markdown(rows))


def metrics_of(record):
    names = distance_name(record), "accuracy", "seconds_per_image"
    return {name: record[name] for name in names if name in record}


def data_flags(args):
    return {"data_path": args.data_path, "img_size": args.img_size, "device": args.device}


def workers(args):
    most = kind_or_folder(args.data_path).workers
    return 4 if most is None else min(4, most)


def call(main, flags, *more):
    """Call a script with flags, a dict; flags that are None are omitted."""
    lists = {k: v if isinstance(v, list) else [v] for k, v in flags.items() if v is not None}
    argv = [str(part) for name, values in lists.items() for part in (f"--{name}", *values)]
    from util.dist import print0

    print0(f"\n$ {main.__module__}.py {' '.join([*argv, *more])}")
    main([*argv, *more])


if __name__ == "__main__":
    run(main)
