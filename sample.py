"""Sample images from a checkpoint, ours or published. `python sample.py --help`."""

from pathlib import Path

import engine_mar as engine
from diffusion import create_diffusion
from models import build_tokenizer, load_model
from util import dist
from util.checkpoint import find_checkpoint
from util.dist import print0
from util.evaluation import open_judge
from util.files import make_folder
from util.flags import (
    APPROXIMATIONS,
    Parser,
    add_evaluation_flags,
    add_machine_flags,
    add_sampling_flags,
    approximations,
    positive,
    positive_int,
    run,
)
from util.image_sets import check_data_set
from util.images import open_writers
from util.precision import pick_precision
from util.sweep import find_result, parse_grid, write_sweep

SAMPLING = ("num_iter", "cfg", "cfg_schedule", "temperature", "order")
STATED = ("checkpoint", "weights", "num_sampling_steps", "max_timestep", *SAMPLING, *APPROXIMATIONS)


def get_parser():
    parser = Parser(description=__doc__)
    group = parser.add_argument_group("what")
    group.add_argument(
        "--ckpt", required=True, metavar="FILE", help="a checkpoint, or its export as safetensors"
    )
    group.add_argument(
        "--weights", choices=("ema", "raw"), default="ema", help="which of its two sets of weights"
    )
    group.add_argument(
        "--labels",
        help="class numbers and ranges such as 207,360,980-989; all; or none: of no class "
        "(default: the first ten)",
    )
    group.add_argument(
        "--per_class",
        type=positive_int,
        default=8,
        metavar="N",
        help="images of each of the labels",
    )
    group.add_argument(
        "--out",
        nargs="+",
        metavar="PATH",
        help=".png: all in a grid; .npz: one file of uint8 NHWC, for ADM's evaluator; any other "
        "name: a folder of PNGs (default: samples.png, or with --reference nothing)",
    )
    group.add_argument(
        "--batch_size", type=positive_int, default=64, help="images at once, a process"
    )
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--vae_path", metavar="FILE", help="its weights (default: as in training)")
    group.add_argument(
        "--vae_scale", type=positive, metavar="X", help="its scale (default: as in training)"
    )
    add_sampling_flags(parser)
    add_evaluation_flags(parser, standalone=True)
    group = parser.add_argument_group("sweep")
    group.add_argument(
        "--sweep",
        nargs="+",
        default=[],
        metavar="NAME=VALUES",
        help="measure each point of a grid, as in cfg=1,2 temperature=0.95,1 num_iter=8,16 "
        "num_sampling_steps=25,100; points in results.jsonl are not done again (default: none)",
    )
    group.add_argument(
        "--output_dir",
        metavar="DIR",
        help="of results.jsonl and the sweep's table and plots (default: the checkpoint's folder)",
    )
    group.add_argument(
        "--data_path",
        metavar="DIR",
        help="a data set whose real images are measured beside the samples (default: none)",
    )
    add_machine_flags(parser, num_workers=None)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    device = dist.init(args.device, args.dist_on_itp, args.dist_url)
    args.ckpt = str(find_checkpoint(args.ckpt) or args.ckpt)
    model, config = load_model(
        args.ckpt,
        args.weights,
        num_sampling_steps=args.num_sampling_steps,
        max_timestep=args.max_timestep,
    )
    own = {"vae_path": args.vae_path, "scale": args.vae_scale}
    own = {k: v for k, v in own.items() if v is not None}
    tokenizer = build_tokenizer(**{**config["tokenizer"], **own})

    sampling = dict(config["sampling"])
    for name in SAMPLING:
        if getattr(args, name) is not None:
            sampling[name] = getattr(args, name)
    inexact = approximations(args, sampling)
    sampling = {k: v for k, v in sampling.items() if k not in APPROXIMATIONS} | inexact
    model.check_sampling(**sampling)
    if args.num_iter is None:
        sampling["num_iter"] = min(sampling["num_iter"], model.seq_len)
    if args.labels is None:
        args.labels = f"0-{min(10, config['model']['class_num']) - 1}"
    labels = parse_labels(args.labels, config["model"]["class_num"])
    # the classes in turn: splits of the Inception Score take consecutive images
    labels = labels * args.per_class
    points = parse_grid(args.sweep)
    writers = check(args, points, labels, model)
    precision = pick_precision(args.precision, device)  # also that of the features
    judge = get_judge(args, config, len(labels), device) if args.reference else None
    settings = ", ".join(f"{name} {value}" for name, value in sampling.items())
    print0(f"{args.ckpt} ({args.weights}): {len(labels)} images, {settings}, seed {args.seed}")

    generation = {
        "seed": args.seed,
        "batch_size": args.batch_size,
        "device": device,
        "precision": precision,
        "latent_range": config.get("latent_range"),
        "progress": "sampling",
    }
    model, tokenizer = model.to(device), tokenizer.to(device)
    if judge:
        folder = Path(args.output_dir or Path(args.ckpt).parent)
        settings = {"checkpoint": args.ckpt, "weights": args.weights, **config["model"], **sampling}
        settings = {name: settings.get(name) for name in STATED}
        settings |= {"labels": args.labels, "per_class": args.per_class}
        settings |= {"seed": args.seed, "dtype": generation["precision"]}
        measure(points, model, tokenizer, labels, judge, writers, folder, settings, generation)
    else:
        batches = engine.generate_images(model, tokenizer, labels, **generation, **sampling)
        engine.deliver(batches, writers)
    if args.out:
        print0(f"wrote {', '.join(args.out)}")


def check(args, points, labels, model):
    """Refuse what cannot be done before any of it is; returns writers. Raises ValueError."""
    if args.sweep and not args.reference:
        raise ValueError("--sweep: expected a --reference to measure against")
    if args.data_path:
        check_data_set(args.data_path)
    if args.output_dir:
        make_folder(args.output_dir, "--output_dir")
    if args.sweep and args.out:
        raise ValueError("--sweep keeps no images: expected no --out")
    for point in points:
        create_diffusion(point.get("num_sampling_steps", ""))
        num_iter = point.get("num_iter", 1)
        if not 1 <= num_iter <= model.seq_len:
            raise ValueError(
                f"--sweep num_iter={num_iter}: expected 1 to {model.seq_len}, the tokens"
            )
    if args.out is None:
        args.out = [] if args.reference else ["samples.png"]
    return open_writers(args.out, labels, args.per_class if args.per_class > 1 else None)


def get_judge(args, config, num_images, device):
    """What measures the samples, made before any of them."""
    return open_judge(
        args.reference,
        args.data_path,
        img_size=config["model"]["img_size"],
        num_images=num_images,
        extractor=args.extractor,
        weights=args.inception_weights,
        splits=args.isc_splits,
        cache=args.stats_dir,
        device=device,
    )


def measure(points, model, tokenizer, labels, judge, writers, folder, settings, generation):
    """Measure the model at each of the points, {} being the settings as they are."""
    identity = judge.stated(len(labels))
    identity |= engine.identify(model, tokenizer, labels, generation["batch_size"])
    # what is in a file matters, not where it lies; and the labels' hash says what they are
    named = ("checkpoint", "weights", "labels", "per_class")
    identity |= {k: v for k, v in settings.items() if k not in named}
    del identity["reference"]
    results = folder / "results.jsonl"
    sampled = {*SAMPLING, *(name for name in APPROXIMATIONS if settings[name] is not None)}
    for point in points:
        here = {**settings, **point}
        if point and any(dist.all_gather(bool(find_result(results, {**identity, **point})))):
            print0(f"{point}: there already")
            continue
        model.head.respace(here["num_sampling_steps"])
        engine.evaluate(
            model,
            tokenizer,
            labels,
            judge,
            settings=here,
            writers=writers,
            output_dir=folder,
            **generation,
            **{name: value for name, value in here.items() if name in sampled},
        )
    if len(points) > 1 and dist.is_main():
        found = [find_result(results, {**identity, **point}) for point in points]
        files = write_sweep(found, points, folder)
        print0((folder / "sweep.md").read_text())
        print0(f"in {folder}: {', '.join(file.name for file in files)}")


def parse_labels(text, class_num):
    """Class numbers that "207,360,980-989", "all" or "none" stands for. Raises ValueError."""
    if text == "none":
        return [None]
    if text == "all":
        return list(range(class_num))
    labels = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdigit() and last.isdigit()):
            raise ValueError(f"--labels {text!r}: expected numbers, ranges as 0-9, all or none")
        labels += range(int(first), int(last) + 1)
    wrong = [label for label in labels if label >= class_num]
    if wrong or not labels:
        raise ValueError(f"--labels {text!r}: expected classes from 0 to {class_num - 1}")
    return labels


if __name__ == "__main__":
    run(main)
