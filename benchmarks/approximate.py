"""The cost of approximate sampling: python -m benchmarks.approximate --ckpt CHECKPOINT

Each approximation, and some combined, against exact sampling of the same model from the same seeds,
in turns in one process; a cold round is dropped. Reports images per second and the distance from
the exact images (root mean square, as a fraction of the pixel range), with that of another seed for
comparison: other diffusion steps draw other noise, which gives that distance. Then the metrics of
`sample.py --reference`, which show whether the images are worse.
"""

import statistics
import time
from collections import Counter

import numpy as np
import torch

import engine_mar as engine
from diffusion.solvers import BELOW_SINGULARITY
from models import build_tokenizer, load_model
from models.settings import Sampling
from util import dist
from util.evaluation import metrics
from util.evaluation.evaluator import open_evaluator
from util.evaluation.settings import NETWORK, Evaluation
from util.flags import Parser, add_device_flag, positive_int, run
from util.precision import pick_precision
from util.settings import add_flags, from_flags

# name -> fields of Sampling that differ from exact sampling; num_iter is a fraction of its steps
MODES = {
    "exact": {},
    "--max_timestep 980": {"max_timestep": 980},
    f"--max_timestep {BELOW_SINGULARITY}": {"max_timestep": BELOW_SINGULARITY},
    "ancestral, 25 diffusion steps": {"num_sampling_steps": "25"},
    "--solver ddim, 25": {"num_sampling_steps": "25", "solver": "ddim"},
    "--solver ddim, 10": {"num_sampling_steps": "10", "solver": "ddim"},
    "--solver dpm++, 25": {"num_sampling_steps": "25", "solver": "dpm++"},
    "--solver dpm++, 10": {"num_sampling_steps": "10", "solver": "dpm++"},
    "--anneal linear": {"anneal": "linear"},
    "--anneal cosine": {"anneal": "cosine"},
    "--anneal two-stage": {"anneal": "two-stage"},
    "--cfg_interval 0.25 0.75": {"cfg_interval": (0.25, 0.75)},
    "--refresh_every 2": {"refresh_every": 2},
    "--refresh_every 4": {"refresh_every": 4},
    "half the autoregressive steps": {"num_iter": 0.5},
    "anneal linear, interval, refresh 2": {
        "anneal": "linear",
        "cfg_interval": (0.25, 0.75),
        "refresh_every": 2,
    },
    "dpm++ 10, refresh 2": {"num_sampling_steps": "10", "solver": "dpm++", "refresh_every": 2},
    "dpm++ 10, refresh 2, half the steps": {
        "num_sampling_steps": "10",
        "solver": "dpm++",
        "refresh_every": 2,
        "num_iter": 0.5,
    },
}


def get_parser():
    """The parser of all flags."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="a trained model")
    parser.add_argument(
        "--reference", default="digits", metavar="PATH", help="as for sample.py --reference"
    )
    parser.add_argument(
        "--num_images", type=positive_int, default=1000, help="images per round and mode"
    )
    parser.add_argument("--batch_size", type=positive_int, default=250, help="images per batch")
    parser.add_argument(
        "--rounds", type=positive_int, default=5, help="rounds counted, each with another seed"
    )
    add_flags(parser, Evaluation, only=NETWORK)
    add_device_flag(parser)
    return parser


def main(argv=None):
    """Run the script."""
    args = get_parser().parse_args(argv)
    device = dist.init(args.device)
    model, config = load_model(args.ckpt)
    tokenizer = build_tokenizer(**config["tokenizer"]).to(device)
    model.to(device)
    evaluator = open_evaluator(
        from_flags(Evaluation, args),
        img_size=config["model"]["img_size"],
        num_images=args.num_images,
        device=device,
    )
    labels = [i % config["model"]["class_num"] for i in range(args.num_images)]
    precision = pick_precision("auto", device)
    common = {"batch_size": args.batch_size, "device": device, "precision": precision}

    def sample(seed, sampling):
        drawn = model, tokenizer, labels, sampling
        batches = engine.generate_images(*drawn, seed=seed, **common)
        return np.concatenate([images for _, images in batches])

    exact = Sampling.of(**config["sampling"])
    print(
        f"{args.ckpt} on {device}, {torch.get_num_threads()} threads, {precision}; "
        f"{args.rounds} rounds of {args.num_images} images, {args.batch_size} at once; exact is "
        f"{exact.asdict()}\n"
    )
    measured, done = {}, Counter()

    def keep(name, images):
        if name not in measured:
            measured[name] = evaluator.start(args.rounds * args.num_images)
        measured[name].add(range(done[name], done[name] + len(images)), images, labels)
        done[name] += len(images)

    rows = measure(model, sample, exact, args.rounds, keep)
    found = {name: evaluator.metrics(each.summary()) for name, each in measured.items()}
    show(rows, found, args.num_images)


def show(rows, found, num_images):
    """Print the rows of `measure`, each with its metrics. found: mode -> metrics."""
    shown = {key: label for key, label in metrics.labels().items() if key in found["exact"]}
    columns = ["mode", "images/s", "ratio", "distance", *shown.values()]
    print(f"| {' | '.join(columns)} |\n| {' | '.join('---' for _ in columns)} |")
    for name, seconds, ratio, distance in rows:
        cells = [name, f"{num_images / seconds:.0f}", f"{ratio:.2f}", distance]
        cells += [f"{found[name][key]:.4g}" for key in shown]
        print(f"| {' | '.join(cells)} |")


def measure(model, sample, exact, rounds, keep=lambda name, images: None):
    """Times and distances of all modes that the model supports, in turns.

    sample(seed, sampling) gives images, whose distances are fractions of the range of a pixel, or
    latents, whose distances are in their standard deviations. exact: the Sampling to compare with.
    keep(name, result): called with the result of each counted round. Returns rows (name, median
    seconds, how many times faster than exact, distance from exact as text).
    """
    modes = open_modes(model, exact)
    seconds, distances = {name: [] for name in modes}, {name: [] for name in modes}
    others, before = [], None
    for turn in range(rounds + 1):
        for name, sampling in modes.items():
            begin = time.perf_counter()
            result = sample(turn, sampling)
            seconds[name].append(time.perf_counter() - begin)
            if not turn:
                continue
            keep(name, result)
            whole = result.dtype == np.uint8
            result = result.astype(np.float32)
            if name == "exact":
                reference, unit = result, 255.0 if whole else result.std()
                others += [] if before is None else [rms(reference, before) / unit]
                before = reference
            distances[name].append(rms(result, reference) / unit)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    rows = []
    for name in modes:
        distance = f"{statistics.mean(distances[name]):.3f}"
        if name == "exact" and others:
            distance = f"0 (another seed: {statistics.mean(others):.3f})"
        rows.append((name, medians[name], medians["exact"] / medians[name], distance))
    return rows


def open_modes(model, exact):
    """Name -> Sampling of the MODES that the model supports; the others are reported."""
    modes = {}
    for name, changes in MODES.items():
        if "num_iter" in changes:
            steps = max(1, round(changes["num_iter"] * exact.num_iter))
            changes = {**changes, "num_iter": steps}
        try:
            model.check(exact.but(**changes))
            modes[name] = exact.but(**changes)
        except ValueError as error:
            print(f"{name}: left out, {error}")
    return modes


def rms(a, b):
    """The root mean square difference between two arrays."""
    return float(np.sqrt(np.mean((np.asarray(a) - np.asarray(b)) ** 2)))


if __name__ == "__main__":
    run(main)
