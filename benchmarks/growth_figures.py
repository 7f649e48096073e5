"""The figures of `benchmarks.growth`: each is a function of the flags that returns its panels.

A panel is a dict: title, x and y (labels), scale of the y axis ("log" or "linear") and curves. A
curve is a dict: name, x, and `measured` or `law` or both, lists of numbers as long as x.
"""

import json
import math
import os
import statistics
import subprocess
import sys

import torch

from benchmarks import kv_cache, laws, machine
from benchmarks.growth_paper import bytes_sent, on_paper, panel
from benchmarks.processes import measure, precision_of, training_step
from benchmarks.timing import in_turns, table
from models import build_model
from models.settings import Sampling
from util import dist
from util.files import replacing
from util.precision import autocast
from util.rng import image_generators

CAUSAL = 256, 6  # width and blocks of the causal model
PER_IMAGE = "ms per image"


class Here:
    """The device and the precision, models on it, and functions that do what is timed."""

    def __init__(self, args):
        self.args, self.device = args, dist.init(args.device)
        self.precision = precision_of(self.device)

    def model(self, side, **options):
        """A model of side × side tokens."""
        steps = str(self.args.num_sampling_steps)
        options |= {"img_size": side, "vae_stride": 1, "num_sampling_steps": steps}
        return build_model(self.args.model, **options).to(self.device)

    def training(self, model, bsz):
        """A function that takes a training step."""
        return training_step(model, bsz, self.device, self.precision)

    def sampling(self, model, bsz, **settings):
        """A function that samples a batch with guidance."""
        sampling = Sampling(num_iter=self.args.num_iter, cfg=2.0).but(**settings)
        labels = torch.arange(bsz, device=self.device) % model.class_num

        def sample():
            generators = image_generators(0, range(bsz))
            model.eval()
            with autocast(self.device, self.precision):
                model.sample_tokens(bsz, labels=labels, generator=generators, **sampling.asdict())

        return sample

    def curves(self, ways):
        """A curve for each way, all timed in turns, its law fitted; the constants are printed.

        ways: name -> list of points (x, images of a call, function, terms), see `laws.fit`.
        """
        calls = [(name, x, call) for name, points in ways.items() for x, _, call, _ in points]
        calls.sort(key=lambda each: each[1])  # none comes after a much larger one
        functions = {(name, x): call for name, x, call in calls}
        seconds = in_turns(functions, self.args.rounds, self.device)
        medians = {key: statistics.median(values) for key, values in seconds.items()}
        print("The laws:\n")
        return [
            curve(name, points, [medians[name, point[0]] for point in points])
            for name, points in ways.items()
        ]


def describe(args):
    """The machine, the model and the settings, in a line."""
    here = Here(args)
    return (
        f"{machine.describe(here.device)}, {here.precision}; {args.model}, {args.num_iter} "
        f"autoregressive and {args.num_sampling_steps} diffusion steps, guidance; medians of "
        f"{args.rounds} rounds"
    )


def curve(name, points, seconds):
    """A curve of milliseconds per image. points: see `Here.curves`. seconds: those of a call."""
    xs, images, _, terms = zip(*points, strict=True)
    constants, law = laws.fit([list(each.values()) for each in terms], seconds)
    said = (
        f"{1e-9 / c if c else math.inf:.4g} GFLOP/s"
        if term == "FLOPs"
        else f"{1e3 * c:.4g} ms {term}"
        for term, c in zip(terms[0], constants, strict=True)
    )
    print(f"- {name}: {', '.join(said)}")
    both = ([1e3 * s / n for s, n in zip(x, images, strict=True)] for x in (seconds, law))
    return {"name": name, "x": list(xs), **dict(zip(("measured", "law"), both, strict=True))}


def show(curves, x):
    """Print curves with the same x as a table."""
    rows = [[str(value)] for value in curves[0]["x"]]
    for each in curves:
        for row, measured, law in zip(rows, each["measured"], each["law"], strict=True):
            row += [f"{measured:.4g}", f"{law:.4g}", f"{measured / law:.2f}"]
    print()
    table([x, *(t for each in curves for t in (each["name"], "law", "measured / law"))], rows)


# ---- the figures ---------------------------------------------------------------------------------


def tokens(args):
    """By the number of tokens: FLOPs by the shapes, a·L + b·L², at a constant rate."""
    here, bsz = Here(args), args.batch_size
    print(f"\n## Tokens: {PER_IMAGE}, {bsz} images at once\n")
    points = {"training": [], "without attention dropout": []}
    points |= {f"{args.num_iter} steps": [], "causal, a step per token": []}
    for side in args.sides:
        model, bare = here.model(side), here.model(side, attn_dropout=0.0)
        causal = kv_cache.build(side, *CAUSAL).to(here.device)
        sampling = sum(laws.sampling_flops(model, args.num_iter, args.num_sampling_steps))
        each = (
            (here.training(model, bsz), {"FLOPs": training(model)}),
            (here.training(bare, bsz), {"FLOPs": training(model)}),
            (here.sampling(model, bsz), {"FLOPs": sampling}),
            (here.sampling(causal, bsz, num_iter=side**2), {"FLOPs": laws.cached_flops(causal)}),
        )
        for name, (function, terms) in zip(points, each, strict=True):
            terms = {term: bsz * value for term, value in terms.items()}
            points[name].append((side**2, bsz, function, terms))
    curves = here.curves(points)
    show(curves[:2], "tokens")
    show(curves[2:], "tokens")
    return [
        panel("training step", "tokens", PER_IMAGE, curves[:2]),
        panel("sampling", "tokens", PER_IMAGE, curves[2:]),
    ]


def training(model):
    """FLOPs of a training step of one image with the mask ratio that `training_step` draws."""
    ratio = model.sample_mask_ratio(torch.Generator().manual_seed(0))
    return laws.training_flops(model, math.ceil(ratio * model.seq_len))


def batch(args):
    """By images per batch: a constant, and FLOPs at a constant rate."""
    here, side = Here(args), args.sides[0]
    print(f"\n## Batch: {PER_IMAGE}, {side**2} tokens\n")
    model = here.model(side)
    sampling = sum(laws.sampling_flops(model, args.num_iter, args.num_sampling_steps))
    ways = {
        "training step": (here.training, training(model)),
        "sampling": (here.sampling, sampling),
    }
    curves = here.curves(
        {
            name: [
                (n, n, function(model, n), {"per call": 1, "FLOPs": n * flops})
                for n in args.batch_sizes
            ]
            for name, (function, flops) in ways.items()
        }
    )
    show(curves, "images")
    return [panel(f"{side**2} tokens", "images per batch", PER_IMAGE, curves)]


def steps(args):
    """By diffusion steps: a constant, and each step's FLOPs at a constant rate."""
    here, side, bsz = Here(args), args.sides[0], args.batch_size
    print(f"\n## Diffusion steps: {PER_IMAGE}, {side**2} tokens, {bsz} images at once\n")
    model = here.model(side)
    points = []
    for count in args.steps:
        transformer, head = laws.sampling_flops(model, args.num_iter, count)
        function = here.sampling(model, bsz, num_sampling_steps=str(count))
        points.append((count, bsz, function, {"per call": 1, "FLOPs": bsz * head}))
    curves = here.curves({"sampling": points})
    print(f"- the Transformer by the shapes: {1e-9 * bsz * transformer:.4g} GFLOP per call")
    show(curves, "steps")
    title = f"{side**2} tokens in {args.num_iter} autoregressive steps"
    return [panel(title, "diffusion steps", PER_IMAGE, curves)]


def processes(args):
    """By processes: measured here, and calculated for MAR-L on H100s."""
    return [together(args), on_paper()]


def together(args):
    """Images per second of training, each process with its own batch.

    The law: a step alone, then an all-reduce alone.
    """
    bsz, side = args.batch_size, args.sides[0]
    print(f"\n## Processes: images per second, {bsz} images each, {side**2} tokens\n")
    jobs = {n: launch(args, n) for n in sorted(args.processes) if n > 1}
    first = next(iter(jobs.values()), None) or measure(args)
    alone = dict.fromkeys(("without", "together"), first["alone"])
    found = {1: {**first, **alone, "all_reduce": 0.0}, **jobs}
    print(f"{first['threads']} threads in each process\n")

    def rates(seconds):
        return [n * bsz / seconds(x) for n, x in found.items()]

    curves = [
        {"name": "with all-reduce", "measured": rates(lambda x: x["together"])}
        | {"law": rates(lambda x: first["alone"] + x["all_reduce"])},
        {"name": "without", "measured": rates(lambda x: x["without"])}
        | {"law": rates(lambda x: first["alone"])},
    ]
    curves = [{**each, "x": list(found)} for each in curves]
    show(curves, "processes")
    for n, x in jobs.items():
        sent = bytes_sent(x["parameters"], n) / 1e6
        print(f"\n{n} processes: each sends {sent:.4g} MB, alone in {1e3 * x['all_reduce']:.4g} ms")
    return panel("measured here", "processes", "images per second", curves, "linear")


def launch(args, count):
    """What `benchmarks.processes` measures with so many processes. Raises ValueError."""
    threads = str(max(1, torch.get_num_threads() // count))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={count}", "-m", "benchmarks.processes", json.dumps(vars(args))]
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "rror" in line]
        raise ValueError(f"--processes {count}: {said[0] if said else 'failed'}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- drawing -------------------------------------------------------------------------------------


def draw(panels, path):
    """Draw panels side by side: measured points, and laws as lines."""
    from matplotlib.figure import Figure

    figure = Figure((4.7 * len(panels) if len(panels) > 1 else 6, 3.7), layout="constrained")
    for axes, each in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, values in enumerate(each["curves"]):
            _draw(axes, values, f"C{number}")
        _dress(axes, each)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=110, format="png")


def _draw(axes, values, color):
    """Draw a curve."""
    if "measured" in values:
        axes.plot(values["x"], values["measured"], "o", color=color, label=values["name"])
        axes.plot(values["x"], values["law"], "--", color=color, label="expected")
    else:
        axes.plot(values["x"], values["law"], "--", color=color, label=values["name"])


def _dress(axes, each):
    """Set scales, ticks and labels of a panel."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    axes.set(title=each["title"], xlabel=each["x"], ylabel=each["y"])
    axes.set(xscale="log", yscale=each["scale"])
    axes.xaxis.minorticks_off()
    xs = each["curves"][0]["x"]
    axes.set_xticks(xs, [f"{x:,}" for x in xs])
    if each["scale"] == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.minorticks_off()
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    else:
        axes.set_ylim(0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
