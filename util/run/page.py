"""`index.html` of a run's folder: curves, sample grids, settings; opens without a server.

It shows what is in the files of the run, so that a resumed one has its whole history. It needs
neither a network nor a library.
"""

import re
import shlex
import sys
import time
from contextlib import contextmanager
from html import escape
from pathlib import Path
from urllib.parse import quote

from util import jsonl
from util.dist import is_main, local_world_size, print0, world_size
from util.evaluation.metrics import METRICS
from util.files import first_line, replacing
from util.plain import is_number
from util.run.charts import chart, short
from util.run.stop import Stopped

FILE = "index.html"
LOG, RESULTS = "log.jsonl", "results.jsonl"
MOST_LINES = 500  # of the log that are read; evaluations are read all
GRID = re.compile(r"epoch(\d+)_(\w+)\.png")
AGAIN = 60  # seconds after which a browser reads the page of a running training again
TRAINING = {  # names in the log -> caption
    "loss": "loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "images_per_s": "images per second",
    "data_wait": "fraction of time spent waiting for data",
}
QUARTERS = re.compile(r"loss_t(\d+-\d+)")
WHEN = ("step", "epoch")
EVALUATION = re.compile(r"eval_(\w+)/(.+)")


class Page:
    """The page of a run, written anew by `write`.

    args: parsed flags, among them output_dir and log_dir. parser: the parser of them, which knows
    the defaults. argv: the flags as they were given; None for those of the process. epochs: of the
    run. script: by which it is resumed.
    """

    def __init__(self, args, parser, argv, epochs, script="main_mar.py"):
        self.folder, self.logs = Path(args.output_dir), Path(args.log_dir or args.output_dir)
        self.path, self.epochs, self.failed = self.folder / FILE, epochs, False
        self.script = script
        self.argv = [*map(str, sys.argv[1:] if argv is None else argv)]
        self.flags, self.defaults = vars(args), vars(parser.parse_args([]))

    @contextmanager
    def following(self):
        """Write the page when the run in this block is done, is stopped, or fails."""
        state = "failed"
        try:
            yield
            state = "done"
        except Stopped:
            state = "stopped"
            raise
        finally:
            self.write(state)

    def write(self, state="running"):
        """Write the page on rank 0. state: running, stopped, failed or done.

        What prevents it is said once.
        """
        if not is_main():
            return
        try:
            text = self._text(state)
            with replacing(self.path) as beside:
                beside.write_text(text, "utf-8")
        except Exception as error:  # a page is not worth a training
            if not self.failed:
                print0(f"NOTE: {self.path}: not written ({first_line(error)})")
            self.failed = True

    def _text(self, state):
        records, results = read_log(self.logs / LOG), jsonl.read(self.folder / RESULTS)
        name = self.folder.resolve().name
        again = f'<meta http-equiv="refresh" content="{AGAIN}">' if state == "running" else ""
        parts = [
            f"<h1>{escape(name)}</h1><p>{self._progress(records, state)}</p>",
            _section("Samples", sample_grids(self.folder)),
            _section("Evaluations, by step", evaluations(records, results)),
            _section("Training, by step", training(records)),
            _section("Settings", settings(self.flags, self.defaults)),
            _section("Commands", self._commands()),
        ]
        head = f"<title>{escape(name)}</title>{again}<style>{STYLE}</style>"
        return (
            '<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"{head}\n<body>{''.join(parts)}</body></html>\n"
        )

    def _progress(self, records, state):
        last = next((each for each in reversed(records) if "epoch" in each), None)
        place = "nothing logged yet"
        if last:
            epoch = self.epochs if state == "done" else f"{last['epoch']:.1f}"
            place = f"epoch {epoch} of {self.epochs}, step {last['step']}"
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        model = escape(str(self.flags.get("model", self.flags["tokenizer"])))
        return f'{model} · <b class="{state}">{state}</b> · {place} · written {now}'

    def _commands(self):
        launcher = "python"
        if world_size() > 1:
            launcher = f"torchrun --nproc_per_node={local_world_size()}"
        argv = [*without(self.argv, "--resume"), "--resume", str(self.folder)]
        resume = f"{launcher} {self.script} {shlex.join(argv)}"
        board = f"tensorboard --logdir {shlex.quote(str(self.logs))}"
        more = " on each machine, as before," if world_size() > local_world_size() else ""
        return (
            f"<p>Resume{more} from the last checkpoint:</p><pre>{escape(resume)}</pre>"
            f"<p>The same curves, and more, in TensorBoard:</p><pre>{escape(board)}</pre>"
        )


def _section(title, content):
    return f"<section><h2>{title}</h2>{content}</section>\n" if content else ""


def without(argv, flag):
    """The words of a command line without a flag that has one value."""
    pairs = zip(["", *argv], argv, strict=False)
    return [word for before, word in pairs if flag not in (before, word.split("=")[0])]


# ---- curves --------------------------------------------------------------------------------------


def read_log(path):
    """The records of log.jsonl: all evaluations, and at most MOST_LINES others, evenly spread."""
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
    step = -(-len(lines) // MOST_LINES) or 1
    last = (len(lines) - 1) % step
    kept = [line for i, line in enumerate(lines) if i % step == last or '"eval_' in line]
    records = map(jsonl.parse, kept)
    return [each for each in records if isinstance(each, dict) and is_number(each.get("step"))]


def points(records, name):
    """(step, value, where) of each record that has a number of this name."""
    return [
        (each["step"], each[name], _where(each)) for each in records if is_number(each.get(name))
    ]


def _where(record):
    epoch = record.get("epoch")
    return f" (epoch {epoch:.4g})" if is_number(epoch) else ""


def training(records):
    """The curves of training."""
    names = dict.fromkeys(name for each in records for name in each)
    series = {text: {name: points(records, name)} for name, text in TRAINING.items()}
    quarters = filter(None, map(QUARTERS.fullmatch, names))
    series["loss by timestep"] = {found[1]: points(records, found[0]) for found in quarters}
    own = [n for n in names if n not in (*TRAINING, *WHEN) and "/" not in n]  # of a tokenizer
    own = [name for name in own if not QUARTERS.fullmatch(name)]
    series |= {name.replace("_", " "): {name: points(records, name)} for name in own}
    return _row([chart(text, each) for text, each in series.items() if any(each.values())])


def evaluations(records, results):
    """A chart for each metric: a curve for each kind of weights, and that of real images."""
    series = {}
    for name in dict.fromkeys(name for each in records for name in each):
        if found := EVALUATION.fullmatch(name):
            series.setdefault(found[2], {})[found[1]] = points(records, name)
    real = {}
    for each in results:
        real |= each["real"] if isinstance(each.get("real"), dict) else {}
    charts = []
    for metric, curves in series.items():
        line = ("real images", real[metric]) if is_number(real.get(metric)) else None
        if any(curves.values()):
            title = metric.replace("_", " ") + _lowest(metric, curves)
            charts.append(chart(title, curves, line=line))
    return _row(charts)


def _lowest(metric, curves):
    """Words on the lowest point of the curves, name -> points, of a distance; "" for others."""
    row = METRICS.get(metric)
    if not row or not row.distance:
        return ""
    value, name, step = min((y, name, x) for name, each in curves.items() for x, y, _ in each)
    return f" (lowest: {name}, step {step}, {short(value)})"


def _row(charts):
    return f'<div class="row charts">{"".join(charts)}</div>' if charts else ""


# ---- grids and settings --------------------------------------------------------------------------


def sample_grids(folder):
    """The grids of the newest epoch large, and those of others small."""
    epochs = {}
    for path in sorted((folder / "samples").glob("epoch*.png")):
        if found := GRID.fullmatch(path.name):
            epochs.setdefault(int(found[1]), []).append((found[2], path.name))
    if not epochs:
        return ""
    newest, *others = sorted(epochs, reverse=True)
    large = "".join(_grid(newest, *each) for each in epochs[newest])
    small = "".join(_grid(epoch, *each) for epoch in others for each in epochs[epoch])
    rest = f'<div class="row small">{small}</div>' if small else ""
    return f'<div class="row large">{large}</div>{rest}'


def _grid(epoch, weights, name):
    link = f"samples/{quote(name)}"
    text = f"epoch {epoch}, {escape(weights)}"
    return (
        f'<figure><a href="{link}"><img src="{link}" alt="samples, {text}" loading="lazy"></a>'
        f"<figcaption>{text}</figcaption></figure>"
    )


def settings(flags, defaults):
    """Tables of flags: those that differ from the defaults, and the rest, folded."""
    names = [name for name in {**defaults, **flags} if name in flags]  # in the order of --help
    flags = {name: flags[name] for name in names}
    other = {name: value for name, value in flags.items() if value != defaults.get(name)}
    rest = {name: value for name, value in flags.items() if name not in other}
    return (
        f"{_table(other)}<details><summary>{len(rest)} flags at their defaults</summary>"
        f"{_table(rest)}</details>"
    )


def _table(flags):
    rows = [
        f"<tr><td>--{escape(name)}</td><td>{escape(_value(value))}</td></tr>"
        for name, value in flags.items()
    ]
    return f"<table>{''.join(rows)}</table>"


def _value(value):
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "–" if value in (None, "") else str(value)


STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c2128; --soft: #667; --rule: #e4e7ec;
  --box: #f6f7f9; --c0: #1f6fd1; --c1: #e07b00; --c2: #2a9d5c; --c3: #a04fc4;
  --c4: #c8323c; --c5: #0f8b96; --c6: #8a6a2f; --c7: #cf4b93; }
@media (prefers-color-scheme: dark) { :root { --back: #14171c; --text: #e3e6ea; --soft: #99a1ad;
  --rule: #2b3038; --box: #1d2128; --c0: #6cb0ff; --c1: #ffab4a; --c2: #6ad49a; --c3: #d59af0;
  --c4: #ff8a8f; --c5: #5fd0da; --c6: #d0b070; --c7: #ff93c7; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1.2em;
  background: var(--back); color: var(--text); }
h1 { margin: 0; } h1 + p { margin: 0; color: var(--soft); }
h2 { font-size: 1.15em; margin: 1.8em 0 .6em; }
b.running { color: var(--c0); } b.done { color: var(--c2); }
b.stopped, b.failed { color: var(--c1); }
.row { display: flex; flex-wrap: wrap; gap: 1em; align-items: end; }
.row + .row { margin-top: 1em; }
figure { margin: 0; } .charts figure { width: 378px; }
figcaption { font-size: .9em; color: var(--soft); }
svg { display: block; width: 100%; background: var(--box); border-radius: 6px; }
text { font-size: 11px; fill: var(--soft); } .end { text-anchor: end; }
.middle { text-anchor: middle; } .rule { stroke: var(--rule); } .axis { stroke: var(--soft); }
polyline { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round; }
circle { fill: transparent; } circle:hover, .few circle { fill: var(--c); }
.few circle { r: 2.5px; } .few circle:hover { r: 4px; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
line.real { stroke: var(--soft); stroke-width: 1.4; stroke-dasharray: 5 4; }
.key { margin-left: .5em; white-space: nowrap; font-size: .85em; color: var(--c); }
.key::before { content: "–\\2009"; }
.key.real { color: var(--soft); } .key.real::before { content: "- - "; }
img { display: block; image-rendering: pixelated; border-radius: 4px; max-width: 100%; }
.large img { width: 574px; } .small img { width: 181px; } .small figcaption { font-size: .8em; }
table { border-collapse: collapse; font-size: .9em; display: block; columns: 3 340px; }
tr { break-inside: avoid; display: flex; border-bottom: 1px solid var(--rule); }
td { padding: .15em 1em .15em 0; overflow-wrap: anywhere; }
td:first-child { flex: none; min-width: 13em; margin-right: .5em; }
td:first-child, pre { font-family: ui-monospace, monospace; }
summary { cursor: pointer; color: var(--soft); margin: .8em 0; }
pre { background: var(--box); padding: .7em 1em; border-radius: 6px; white-space: pre-wrap; }
"""
