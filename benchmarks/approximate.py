"""The cost of approximate sampling: python -m benchmarks.approximate --ckpt CHECKPOINT

Each approximation, and some combined, against exact sampling of the same model from the same seeds,
in turns in one process; a cold round is dropped. Reports images per second and the distance from
the exact images (root mean square, as a fraction of the pixel range), with that of another seed for
comparison: other diffusion steps draw other noise, which gives that distance. Then the metrics of
`sample.py --reference`, which show whether the images are worse.
"""

import statistics
from collections import Counter, defaultdict
from functools import partial

from diffusion.solvers import BELOW_SINGULARITY
from models.settings import Sampling
from util.evaluation.settings import NETWORK, Evaluation
from util.flags import Parser, add_device_flag, positive_int, run
from util.settings import add_flags, from_flags

# name -> fields of Sampling; num_iter is a fraction of the exact one's
MODES = {
    "exact": {},
    "--max_timestep 980": {"max_timestep": 980},
    f"--max_timestep {BELOW_SINGULARITY}": {"max_timestep": BELOW_SINGULARITY},
    "ancestral, 25 diffusion steps": {"num_sampling_steps": "25"},
    "--solver ddim, 25": {"solver": "ddim", "num_sampling_steps": "25"},
    "--solver ddim, 10": {"solver": "ddim", "num_sampling_steps": "10"},
    "--solver dpm++, 25": {"solver": "dpm++", "num_sampling_steps": "25"},
    "--solver dpm++, 10": {"solver": "dpm++", "num_sampling_steps": "10"},
    "--anneal linear": {"anneal": "linear"},
    "--anneal cosine": {"anneal": "cosine"},
    "--anneal two-stage": {"anneal": "two-stage"},
    "--cfg_interval 0.25 0.75": {"cfg_interval": (0.25, 0.75)},
    "--refresh_every 2": {"refresh_every": 2},
    "--refresh_every 4": {"refresh_every": 4},
    "half the autoregressive steps": {"num_iter": 0.5},
    "half the steps, uniform": {"num_iter": 0.5, "token_schedule": "uniform"},
    "half the steps, spread": {"num_iter": 0.5, "order": "spread"},
    "a quarter of the steps": {"num_iter": 0.25},
    "a quarter of the steps, uniform": {"num_iter": 0.25, "token_schedule": "uniform"},
    "a quarter of the steps, square": {"num_iter": 0.25, "token_schedule": "square"},
    "a quarter of the steps, exponential": {"num_iter": 0.25, "token_schedule": "exponential"},
    "a quarter of the steps, root": {"num_iter": 0.25, "token_schedule": "root"},
    "a quarter of the steps, spread": {"num_iter": 0.25, "order": "spread"},
    "a quarter of the steps, spread, anneal linear:50:20": {
        "num_iter": 0.25,
        "order": "spread",
        "anneal": "linear:50:20",
    },
    "an eighth of the steps": {"num_iter": 0.125},
    "an eighth of the steps, uniform": {"num_iter": 0.125, "token_schedule": "uniform"},
    "an eighth of the steps, spread": {"num_iter": 0.125, "order": "spread"},
    "anneal linear, interval, refresh 2": {
        "anneal": "linear",
        "cfg_interval": (0.25, 0.75),
        "refresh_every": 2,
    },
    "dpm++ 10, refresh 2": {"solver": "dpm++", "num_sampling_steps": "10", "refresh_every": 2},
    "dpm++ 10, refresh 2, half the steps": {
        "solver": "dpm++",
        "num_sampling_steps": "10",
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
    parser.add_argument(
        "--modes",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="only modes whose name contains one of these, and exact",
    )
    add_flags(parser, Evaluation, only=NETWORK)
    add_device_flag(parser)
    return parser


def main(argv=None):
    """Run the script."""
    args = get_parser().parse_args(argv)
    modes = pick_modes(args.modes)

    import torch

    from models import load_model
    from util import dist
    from util.precision import pick_precision

    device = dist.init(args.device)
    model, config = load_model(args.ckpt)
    labels = [i % config["model"]["class_num"] for i in range(args.num_images)]
    precision = pick_precision("auto", device)
    sample = open_sample(args, model, config, labels, device, precision)
    measurements = Measurements(open_evaluation(args, config, device), args.rounds, labels)
    sampling = Sampling.of(**config["sampling"])
    exact = sampling.asdict()
    exact["num_sampling_steps"] = sampling.num_sampling_steps or model.head.spacing
    print(
        f"{args.ckpt} on {device}, {torch.get_num_threads()} threads, {precision}; "
        f"{args.rounds} rounds of {args.num_images} images, {args.batch_size} at once; exact is "
        f"{exact}\n"
    )
    rows = measure(model, sample, sampling, args.rounds, measurements.keep, modes)
    print_table(rows, measurements, args.num_images)


def pick_modes(texts):
    """The MODES whose name contains one of the texts, and "exact". Raises ValueError."""
    for text in texts:
        if not any(text in name for name in MODES):
            raise ValueError(f"modes {text!r}: expected part of a mode's name, such as spread")
    picked = {name for name in MODES if any(text in name for text in texts)} | {"exact"}
    return {name: changes for name, changes in MODES.items() if name in picked}


def open_sample(args, model, config, labels, device, precision):
    """A function (seed, sampling) that gives an image of each label, uint8 (n, H, W, 3)."""
    import numpy as np

    import engine_mar as engine
    from models import build_tokenizer

    tokenizer = build_tokenizer(**config["tokenizer"]).to(device)
    drawn = model.to(device), tokenizer, labels
    how = {"batch_size": args.batch_size, "device": device, "precision": precision}

    def sample(seed, sampling):
        batches = engine.generate_images(*drawn, sampling, seed=seed, **how)
        return np.concatenate([images for _, images in batches])

    return sample


def open_evaluation(args, config, device):
    """The Evaluator of the images. Raises ValueError."""
    from util.evaluation.evaluator import open_evaluator

    return open_evaluator(
        from_flags(Evaluation, args),
        img_size=config["model"]["img_size"],
        num_images=args.num_images,
        device=device,
    )


class Measurements:
    """A Measurement of the images of each mode, of all rounds. labels: those of a round."""

    def __init__(self, evaluator, rounds, labels):
        self.evaluator, self.labels = evaluator, labels
        self.by_mode = defaultdict(partial(evaluator.start, rounds * len(labels)))
        self.done = Counter()

    def keep(self, name, images):
        """Add a round of a mode's images."""
        indices = range(self.done[name], self.done[name] + len(images))
        self.by_mode[name].add(indices, images, self.labels)
        self.done[name] += len(images)

    def metrics(self):
        """Mode -> name of a metric -> number."""
        return {name: self.evaluator.metrics(each.summary()) for name, each in self.by_mode.items()}


def print_table(rows, measurements, num_images):
    """Print the rows of `measure`, each with its metrics."""
    from benchmarks.timing import table
    from util.evaluation import metrics

    found = measurements.metrics()
    shown = {key: label for key, label in metrics.labels().items() if key in found["exact"]}
    table(
        ["mode", "images/s", "ratio", "distance", *shown.values()],
        [
            [name, f"{num_images / seconds:.0f}", f"{ratio:.2f}", distance]
            + [f"{found[name][key]:.4g}" for key in shown]
            for name, seconds, ratio, distance in rows
        ],
    )


def measure(model, sample, sampling, rounds, keep=lambda name, images: None, modes=MODES):
    """Times and distances of the modes that the model supports, in turns.

    sample(seed, sampling) gives images, whose distances are fractions of the range of a pixel, or
    latents, whose distances are in their standard deviations. sampling: the exact Sampling.
    keep(name, result): called with the result of each counted round. Returns rows (name, median
    seconds, how many times faster than exact, distance from exact as text).
    """
    from benchmarks.timing import timed

    modes = fitting_modes(model, sampling, modes)
    seconds, distances, others, before = defaultdict(list), defaultdict(list), [], None
    for turn in range(rounds + 1):
        exact = None
        for name, settings in modes.items():
            taken, result = timed(partial(sample, turn, settings))
            if not turn:  # cold
                continue
            keep(name, result)
            exact = result if exact is None else exact  # the first mode
            seconds[name].append(taken)
            distances[name].append(distance(result, exact))
        if before is not None:
            others.append(distance(before, exact))
        before = exact
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    said = {name: f"{statistics.mean(values):.3f}" for name, values in distances.items()}
    if others:
        said["exact"] = f"0 (another seed: {statistics.mean(others):.3f})"
    return [(name, medians[name], medians["exact"] / medians[name], said[name]) for name in modes]


def fitting_modes(model, exact, wanted):
    """Name -> Sampling of the modes that the model supports; the others are reported."""
    modes = {}
    for name, changes in wanted.items():
        if "num_iter" in changes:
            num_iter = max(1, round(changes["num_iter"] * exact.num_iter))
            changes = {**changes, "num_iter": num_iter}
        try:
            model.check(exact.but(**changes))
            modes[name] = exact.but(**changes)
        except ValueError as error:
            print(f"{name}: left out, {error}")
    return modes


def distance(result, exact):
    """The root mean square difference of arrays, over 255 for bytes, else over the exact std."""
    unit = 255.0 if exact.dtype == "uint8" else exact.std()
    difference = result.astype("float32") - exact.astype("float32")
    return float((difference**2).mean() ** 0.5 / unit)


if __name__ == "__main__":
    run(main)
