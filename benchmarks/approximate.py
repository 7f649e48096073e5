"""What faster sampling costs: python -m benchmarks.approximate --ckpt CHECKPOINT

Each approximation, and some together, against exact sampling of the same model from the same seeds,
in turns in one process; a cold round is dropped. Beside the images a second stands how far the
images are from the exact ones (root mean square, of the range of a pixel), with those of another
seed as a measure: where other diffusion steps are taken other noise is drawn, and it is that far.
Then the figures of `sample.py --reference`, which say whether the images are worse.
"""

import statistics
import time

import numpy as np
import torch

import engine_mar as engine
from models import build_tokenizer, load_model
from util import dist
from util.evaluation import Accumulator, open_judge
from util.flags import Parser, add_device_flag, add_extractor_flags, positive_int, run
from util.metrics import frechet_distance
from util.precision import pick_precision

# name -> (diffusion steps, or None for the model's own; arguments of sample_tokens); the number of
# autoregressive steps is a share of the exact ones
MODES = {
    "exact": (None, {}),
    "--max_timestep 980": (None, {"max_timestep": 980}),
    "--max_timestep 950": (None, {"max_timestep": 950}),
    "ancestral, 25 diffusion steps": ("25", {}),
    "--solver ddim, 25": ("25", {"solver": "ddim"}),
    "--solver ddim, 10": ("10", {"solver": "ddim"}),
    "--solver dpm++, 25": ("25", {"solver": "dpm++"}),
    "--solver dpm++, 10": ("10", {"solver": "dpm++"}),
    "--anneal linear": (None, {"anneal": "linear"}),
    "--anneal cosine": (None, {"anneal": "cosine"}),
    "--anneal two-stage": (None, {"anneal": "two-stage"}),
    "--cfg_interval 0.25 0.75": (None, {"cfg_interval": (0.25, 0.75)}),
    "--refresh_every 2": (None, {"refresh_every": 2}),
    "--refresh_every 4": (None, {"refresh_every": 4}),
    "half the autoregressive steps": (None, {"num_iter": 0.5}),
    "anneal linear, interval, refresh 2": (
        None,
        {"anneal": "linear", "cfg_interval": (0.25, 0.75), "refresh_every": 2},
    ),
    "dpm++ 10, refresh 2": ("10", {"solver": "dpm++", "refresh_every": 2}),
    "dpm++ 10, refresh 2, half the steps": (
        "10",
        {"solver": "dpm++", "refresh_every": 2, "num_iter": 0.5},
    ),
}


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="a trained model")
    parser.add_argument(
        "--reference", default="digits", metavar="PATH", help="as for sample.py --reference"
    )
    parser.add_argument("--num_images", type=positive_int, default=1000, help="a round and mode")
    parser.add_argument("--batch_size", type=positive_int, default=250, help="images at once")
    parser.add_argument(
        "--rounds", type=positive_int, default=5, help="counted, each of another seed"
    )
    add_extractor_flags(parser)
    add_device_flag(parser)
    args = parser.parse_args(argv)
    device = dist.init(args.device)
    model, config = load_model(args.ckpt)
    tokenizer = build_tokenizer(**config["tokenizer"]).to(device)
    model.to(device)
    judge = open_judge(
        args.reference,
        None,
        img_size=config["model"]["img_size"],
        num_images=args.num_images,
        extractor=args.extractor,
        weights=args.inception_weights,
        device=device,
    )
    classes = config["model"]["class_num"]
    labels = [i % classes for i in range(args.num_images)]
    precision = pick_precision("auto", device)

    def sample(seed, **settings):
        batches = engine.generate_images(
            model,
            tokenizer,
            labels,
            seed=seed,
            batch_size=args.batch_size,
            device=device,
            precision=precision,
            **settings,
        )
        return np.concatenate([images for _, images in batches])

    print(
        f"{args.ckpt} on {device}, {torch.get_num_threads()} threads, {precision}; "
        f"{args.rounds} rounds of {args.num_images} images, {args.batch_size} at once; exact is "
        f"{ {**config['sampling'], 'num_sampling_steps': config['model']['num_sampling_steps']} }\n"
    )
    accumulators = {}

    def figures(name, images):
        if name not in accumulators:
            accumulators[name] = Accumulator(judge.extractor, args.rounds * args.num_images)
        done = int(accumulators[name].statistics.count)
        accumulators[name].add(range(done, done + len(images)), images, labels)

    rows = measure(model, sample, config["sampling"], args.rounds, figures)
    print("| mode | images/s | ratio | distance | Fréchet distance | accuracy |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, seconds, ratio, distance in rows:
        speed = f"{args.num_images / seconds:.0f}"
        summary = accumulators[name].summary()
        far = frechet_distance(summary.statistics, judge.reference.statistics)
        share = "–" if summary.accuracy is None else f"{summary.accuracy:.1%}"
        print(f"| {name} | {speed} | {ratio:.2f} | {distance} | {far:.2f} | {share} |")


def measure(model, sample, sampling, rounds, keep=lambda name, images: None):
    """Times and distances of all modes that the model knows, in turns.

    sample(seed, **settings) gives images, whose distances are in shares of the range of a pixel, or
    latents, in their deviations. Returns rows (name, median
    seconds, how many times faster than exact, distance from exact as text).
    """
    spacing, modes = model.head.spacing, {}
    for name, (steps, settings) in MODES.items():
        settings = {**sampling, **settings}
        if settings["num_iter"] < 1:
            settings["num_iter"] = max(1, round(settings["num_iter"] * sampling["num_iter"]))
        try:
            model.check_sampling(**settings)
            modes[name] = steps or spacing, settings
        except ValueError as error:
            print(f"{name}: left out, {error}")
    seconds, distances, before = {name: [] for name in modes}, {name: [] for name in modes}, None
    others = []
    for turn in range(rounds + 1):
        for name, (steps, settings) in modes.items():
            model.head.respace(steps)
            begin = time.perf_counter()
            result = sample(turn, **settings)
            seconds[name].append(time.perf_counter() - begin)
            if not turn:
                continue
            keep(name, result)
            whole = result.dtype == np.uint8
            result = result.astype(np.float32)
            if name == "exact":
                exact, unit = result, 255.0 if whole else result.std()
                others += [] if before is None else [rms(exact, before) / unit]
                before = exact
            distances[name].append(rms(result, exact) / unit)
    model.head.respace(spacing)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    rows = []
    for name in modes:
        distance = f"{statistics.mean(distances[name]):.3f}"
        if name == "exact" and others:
            distance = f"0 (another seed: {statistics.mean(others):.3f})"
        rows.append((name, medians[name], medians["exact"] / medians[name], distance))
    return rows


def rms(a, b):
    return float(np.sqrt(np.mean((np.asarray(a) - np.asarray(b)) ** 2)))


if __name__ == "__main__":
    run(main)
