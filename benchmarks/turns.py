"""What `benchmarks.cpu` measures, and the section of Markdown that it writes."""

import statistics
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from benchmarks import differences, machine
from benchmarks.sides import Sides, Updates, whole_steps
from benchmarks.steps import pick_steps
from benchmarks.timing import in_turns, table_lines
from models.fast import products
from models.settings import Sampling
from util.files import replacing
from util.precision import has_instructions, pick_precision

TOLERANCE = 1e-5  # what differs by more is not timed
DRAWS = 8  # training steps that differ


# ---- pairs of functions (ours, plain) that are built anew for each way that ours computes --------


def training(sides, row):
    """Whole training steps, one after the other."""
    sides.train()
    updates = Updates(sides)

    def build():
        pair = whole_steps(sides, updates, row.bsz, DRAWS)
        return [partial(repeat, row.steps, function) for function in pair]

    return build


def images(sides, row):
    """Sampling of whole images."""
    return partial(sides.images, row.bsz)


def steps(sides, row):
    """Autoregressive steps from the middle of equal parts of sampling."""

    def build():
        with sides.autocast():
            chosen = list(pick_steps(sides, row.steps, row.bsz))
        pair = [[s.ours for s in chosen], [s.plain for s in chosen]]
        return [sides.autocast_in(partial(call_all, functions)) for functions in pair]

    return build


def repeat(times, function):
    """Call a function so many times."""
    call_all([function] * times)


def call_all(functions):
    """Call functions one after the other."""
    for function in functions:
        function()


# ---- the ways that ours computes -----------------------------------------------------------------


def ways():
    """Name -> (products.mode, precision) of each way that ours is timed."""
    found = {"ours": (products.mode, "fp32"), "torch": ("torch", "fp32")}
    if has_instructions("bf16"):
        found["bf16"] = products.mode, "bf16"
    return found


@contextmanager
def products_by(mode):
    """Products by this library, or "auto"."""
    before, products.mode = products.mode, mode
    try:
        yield
    finally:
        products.mode = before


def with_products(mode, function):
    """The function, called with this products.mode."""

    def run():
        with products_by(mode):
            return function()

    return run


def time_row(sides, row):
    """Median seconds of a row: name -> float, of plain and each of `ways`."""
    build = KINDS[row.kind](sides, row)
    functions = {"plain": build()[1]}
    for name, (mode, precision) in ways().items():
        with products_by(mode), sides.computing_in(precision):
            functions[name] = with_products(mode, build()[0])
    seconds = in_turns(functions, row.rounds)
    parts = row.steps if row.mean else 1
    return {name: statistics.median(values) / parts for name, values in seconds.items()}


KINDS = {"training": training, "images": images, "steps": steps}


# ---- the section ---------------------------------------------------------------------------------


class Report:
    """The section, complete at any time. args: the flags of `benchmarks.cpu`."""

    def __init__(self, args):
        self.args, self.started, self.different = args, time.monotonic(), False
        self.device = torch.device("cpu")
        pick_precision("fp32", self.device)
        self.described = f"{machine.describe(self.device)}; {time.strftime('%Y-%m-%d %H:%M')}"
        self.differences, self.products, self.times, self.bf16 = {}, {}, [], {}
        self.say(self.described)

    def say(self, text):
        """Print a line of progress."""
        print(f"{text} [at {time.monotonic() - self.started:.0f} s]", file=sys.stderr, flush=True)

    def add(self, title, case, rows):
        """Compare and time a model. title: what the tables call it."""
        settings = Sampling.of(**case.sampling)
        sides = Sides(case.model, settings, self.device, "fp32")
        found = self.differences[title] = differences.summary(sides)
        self.say(f"{title}: largest relative difference {max(found.values()):.1e}")
        if not all(value <= TOLERANCE for value in found.values()):  # nor where one is nan
            self.different = True
            self.write()
            return
        sizes = case.train_batch, sorted({row.bsz for row in rows}), settings.num_iter
        self.products[title] = list(machine.product_lines(sides.model, *sizes))
        if "bf16" in ways():
            self.bf16[title] = differences.of_bf16(sides)
        for row in rows:
            self.time(sides, title, row, settings.but(**row.sampling))
        self.write()

    def time(self, sides, title, row, settings):
        """Time a row."""
        sides.sampling = settings
        what = row.what.format(
            **{**vars(row), **settings.asdict(), "diffusion_steps": sides.diffusion_steps}
        )
        seconds = time_row(sides, row)
        sides.eval()
        self.times.append((f"{title}, {what}", row.rounds, seconds))
        self.say(f"{title}, {what}: {', '.join(f'{n} {s:.3g} s' for n, s in seconds.items())}")
        self.write()

    def write(self):
        """Write what there is so far to --out."""
        if self.args.out:
            with replacing(self.args.out) as path:
                Path(path).write_text(self.text())

    def text(self):
        """The section."""
        return "\n".join(self.lines()) + "\n"

    def lines(self):
        """The lines of the section."""
        flags = " ".join("FILE" if x == self.args.out else x for x in self.args.argv)
        yield f"## On a CPU\n\n```\npython -m benchmarks.cpu {flags}".rstrip() + "\n```\n"
        yield f"{self.described}.\n"
        if self.args.quick:
            yield "Tiny models and few steps: a trial of the command, no measurement.\n"
        yield from self.differences_lines()
        yield from self.times_lines()
        yield from self.bf16_lines()
        for title, lines in self.products.items():
            yield f"\n### Products of {title}\n"
            yield from lines

    def differences_lines(self):
        """How far the results of both sides differ."""
        yield "### Largest relative differences for the same noise, float32\n"
        titles = list(self.differences)
        names = next(iter(self.differences.values()), {})
        rows = [[name, *(f"{self.differences[t][name]:.1e}" for t in titles)] for name in names]
        yield from table_lines(["", *titles], rows)
        if self.different:
            yield f"\nAbove {TOLERANCE:.0e} this is not the same computation, and is not timed."

    def times_lines(self):
        """Medians of plain and ours."""
        yield "\n### Plain and ours in turns, medians, s\n"
        titles = ["", "plain", "ours", "plain / ours", "ours, torch's products", "plain / it"]
        rows = []
        for what, rounds, s in self.times:
            pair = [[f"{s[x]:.3g}", f"{s['plain'] / s[x]:.2f}"] for x in ("ours", "torch")]
            rows.append([what, f"{s['plain']:.3g}", *pair[0], *pair[1], str(rounds)])
        yield from table_lines([*titles, "rounds"], rows)

    def bf16_lines(self):
        """Ours in bf16 against ours in float32."""
        yield "\n### Ours in bf16, s\n"
        if not self.bf16:
            yield "Not measured: no instructions of this processor for products in bf16 are known."
            return
        rows = [
            [what, f"{s['ours']:.3g}", f"{s['bf16']:.3g}", f"{s['ours'] / s['bf16']:.2f}"]
            for what, _, s in self.times
        ]
        yield from table_lines(["", "fp32", "bf16", "fp32 / bf16"], rows)
        yield "\nRelative differences from float32 for the same noise:\n"
        names = next(iter(self.bf16.values()))
        rows = [[name, *(f"{x[name]:.1e}" for x in self.bf16.values())] for name in names]
        yield from table_lines(["", *self.bf16], rows)
