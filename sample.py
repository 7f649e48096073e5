"""Sample images from one of our checkpoints or a published one. `python sample.py --help`."""

from pathlib import Path

from models import sampling_of
from models.like import (
    check_labels,
    compare_digests,
    find_ckpt,
    find_tokenizer,
    is_again,
    read_like,
)
from models.settings import Sampling
from util import hub
from util.averages import expect_weights
from util.data import check_data_set
from util.data.classes import find_labels, known_names
from util.data.settings import Reading, plain_reading
from util.evaluation.settings import Evaluation
from util.files import make_folder
from util.flags import (
    Parser,
    add_latent_flags,
    add_machine_flags,
    checked,
    machine,
    positive_int,
    run,
)
from util.labels import LABELS, cycle_labels
from util.run import last_words, stop
from util.settings import add_flags, from_flags, said_flags


def get_parser():
    """The parser of all flags; those for sampling and evaluation are fields of settings."""
    parser = Parser(description=__doc__)
    add_image_flags(parser.add_argument_group("images"))
    add_model_flags(parser)
    add_flags(parser.add_argument_group("metrics"), Evaluation, reference=None)
    add_sweep_flags(parser.add_argument_group("sweep"))
    add_machine_flags(parser, num_workers=None)
    return parser


def add_checkpoint_flags(group, otherwise=None):
    """Flags for the model. otherwise: the checkpoint if none is given; if None, one is required."""
    default = f" (default: {otherwise})" if otherwise else ""
    group.add_argument(
        "--ckpt",
        required=not otherwise,
        metavar="PATH",
        help="a checkpoint, its export as safetensors, a folder with one, or the name of a model "
        f"on the Hugging Face hub, user/name{default}",
    )
    group.add_argument(
        "--weights",
        type=checked(expect_weights),
        default="ema",
        metavar="NAME",
        help="ema, raw, or ema_N: a further average of a run with --ema_images",
    )


def add_model_flags(parser):
    """Flags for the tokenizer and for sampling, whose defaults are the checkpoint's."""
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--vae_path", metavar="PATH", help="weights (default: as in training)")
    add_latent_flags(group, "as in training")
    stored = {"unset": "the checkpoint's"}
    group = parser.add_argument_group("sampling")
    add_flags(group, Sampling, Sampling.names(approximates=None), **stored)
    group = parser.add_argument_group("faster sampling that approximates")
    add_flags(group, Sampling, Sampling.names(approximates=True), **stored)


def add_image_flags(group):
    """Flags for the images to sample and the files to write."""
    add_checkpoint_flags(group, "the one that --like names")
    group.add_argument(
        "--guide",
        metavar="PATH",
        help="the scale --cfg leads away from this checkpoint (its EMA weights), a weaker one of "
        "the same tokens such as an earlier one of the run, in place of the model without the "
        "class: autoguidance (default: none)",
    )
    group.add_argument(
        "--like",
        metavar="FILE.png",
        help="make this picture again, one image or a grid, by what it says it was made by; other "
        "flags change that, and --num_images asks for more like it (default: none)",
    )
    group.add_argument(
        "--labels",
        help="classes by name, as in goldfish,school_bus, or by index, as in 207,360,980-989; all; "
        "none: no class; or random: drawn, each as often as in the training data (default: the "
        "first ten)",
    )
    group.add_argument(
        "--per_class", type=positive_int, metavar="N", help="images per label (default: 8)"
    )
    group.add_argument(
        "--num_images",
        type=positive_int,
        metavar="N",
        help="images in all, cycling through the labels (default: --per_class of each)",
    )
    group.add_argument(
        "--out",
        nargs="+",
        metavar="PATH",
        help=".png: a grid of all; .npz: one file of uint8 NHWC, for ADM's evaluator; any other "
        "name: a folder of PNGs (default: samples.png; FILE_like.png with --like FILE.png; none "
        "with --reference)",
    )
    group.add_argument(
        "--batch_size",
        type=positive_int,
        default=64,
        help="images per batch and process; that of --like, if given",
    )


def add_sweep_flags(group):
    """Flags for a sweep over sampling settings."""
    group.add_argument(
        "--sweep",
        nargs="+",
        default=[],
        metavar="NAME=VALUES",
        help="evaluate each point of a grid of sampling settings, as in cfg=1,2 temperature=0.95,1 "
        "num_iter=8,16; points in results.jsonl are not evaluated again (default: none)",
    )
    group.add_argument(
        "--output_dir",
        metavar="DIR",
        help="folder of results.jsonl and the sweep's table and plots (default: the "
        "checkpoint's; the current one for a model that is passed on)",
    )
    group.add_argument(
        "--data_path",
        metavar="PATH",
        help="a data set whose real images are evaluated for comparison (default: none)",
    )
    add_flags(group, Reading, Reading.names(pixels=True), unset="as in training")
    add_flags(group, Reading, ["label_file"])


def main(argv=None):
    """Run the script."""
    args, given = get_parser().parse_given(argv)
    check(args)
    like = read_like(args, given) if args.like else None

    import engine_mar as engine
    from models.guide import facts_of, open_guide
    from util import dist
    from util.dist import print0
    from util.evaluation.sweep import parse_grid
    from util.precision import pick_precision

    points = parse_grid(args.sweep, Sampling)
    device = dist.init(**machine(args))
    asked = args.ckpt
    guide = open_guide(args.guide) if args.guide else None
    model, tokenizer, config = open_checkpoint(args, like, guide)
    args.output_dir = folder_of_results(args, asked)
    last_words.set_folder(args.output_dir, "sample")
    sampling = pick_sampling(args, config, model, points, like, guide)
    labels, balance = pick_labels(args, config, like)
    precision = pick_precision(args.precision, device)  # also used for the features
    generation = {
        "seed": args.seed,
        "batch_size": args.batch_size,
        "device": device,
        "precision": precision,
        "latent_range": config.get("latent_range"),
        "progress": "sampling",
    }
    drawn = model.to(device), tokenizer.to(device), labels
    how = {"weights": args.weights, "columns": args.per_class if args.per_class != 1 else None}
    made_by = asked if hub.is_name(asked) else args.ckpt  # not the place of the hub's files
    how["source"] = engine.source_of(made_by, config["tokenizer"], tokenizer)
    if guide:
        generation["guide"] = guide.to(device)
        how["source"]["guide"] = facts_of(guide, args.guide)
    if is_again(args):
        generation |= {"first": like["first"], "fit": False}
        how |= {"columns": like["columns"], "only": like["index"]}
    with engine.open_images(args.out, *drawn, sampling, **how, **generation) as outputs:
        evaluator = open_evaluation(args, config, len(labels), device)
        shown = ", ".join(f"{name} {value}" for name, value in sampling.asdict().items())
        number = len(labels) if how.get("only") is None else f"1 of {len(labels)}"
        print0(f"{args.ckpt} ({args.weights}): {number} images, {shown}, seed {args.seed}")
        with stop.deferred():
            if evaluator:
                measure(args, points, drawn, sampling, evaluator, outputs, generation, balance)
            else:
                batches = engine.generate_images(*drawn, sampling, known=outputs.read, **generation)
                for batch in batches:
                    outputs.keep(*batch)
    if args.out:
        print0(f"wrote {', '.join(args.out)}")


def check(args):
    """Raises ValueError for flags that contradict each other."""
    if not args.ckpt and not args.like:
        raise ValueError("expected --ckpt FILE, or --like FILE.png")
    if args.sweep and not args.reference:
        raise ValueError("--sweep: expected a --reference to measure against")
    if args.metrics and not args.reference:
        raise ValueError(f"--metrics {args.metrics[0]}: expected a --reference, perhaps none")
    if args.data_path:
        check_data_set(args.data_path)
    if args.output_dir:
        make_folder(args.output_dir, "--output_dir")
    if args.per_class and args.num_images:
        raise ValueError(f"--num_images {args.num_images}: expected no --per_class beside it")
    if args.labels in LABELS and not args.num_images:
        raise ValueError(
            f"--labels {args.labels}: expected --num_images, how many there are of all"
        )
    if not args.num_images and not args.like:
        args.per_class = args.per_class or 8
    if is_again(args) and args.reference:
        raise ValueError(
            f"--reference {args.reference}: with --like, expected --num_images, how many to measure"
        )
    if args.sweep and args.out:
        raise ValueError("--sweep keeps no images: expected no --out")
    if args.out is None:
        args.out = [] if args.reference else ["samples.png"]
        if args.like:
            args.out = [f"{Path(args.like).stem}_like.png"]
    for path in args.out if args.like else ():
        if Path(path).exists() and Path(path).samefile(args.like):
            raise ValueError(f"--out {path}: the picture of --like, expected another name")


def open_checkpoint(args, like=None, guide=None):
    """(model, tokenizer, configuration) of --ckpt; a folder is replaced by its checkpoint file.

    like: see `read_like`, or None. guide: the model of --guide, whose latents must be the same. The
    configuration has the tokenizer's arguments as used.
    """
    import models
    from models.guide import check_latents
    from util.checkpoint import find_weights

    own = {"vae_path": args.vae_path, "scale": args.vae_scale, "shift": args.vae_shift}
    own = {name: value for name, value in own.items() if value is not None}
    args.ckpt = str(find_ckpt(args, like) if like else find_weights(args.ckpt))
    if like:
        own = {**find_tokenizer(args, like), **own}
    model, tokenizer, config = models.load(args.ckpt, args.weights, **own)
    if guide:
        check_latents(guide, config, args.guide)
    if like:
        compare_digests(args, like, model, tokenizer, guide)
    return model, tokenizer, {**config, "tokenizer": {**config["tokenizer"], **own}}


def folder_of_results(args, asked):
    """--output_dir, else the folder of the checkpoint, unless that is passed on: the current one.

    asked: --ckpt as it was given.
    """
    folder = Path(args.ckpt).parent
    passed_on = hub.is_name(asked) or hub.digest_in(folder)
    return args.output_dir or ("." if passed_on else folder)


def pick_sampling(args, config, model, points, like=None, guide=None):
    """The checkpoint's Sampling, or that of --like, overridden by flags; checked at all points of a
    sweep. guide: the model of --guide."""
    given = {k: v for k, v in said_flags(Sampling, args).items() if v is not None}
    own = {k: v for k, v in (like["sampling"] if like else {}).items() if v is not None}
    sampling = sampling_of(model, config, **{**own, **given})
    for point in points:
        model.check(sampling.but(**point), guide)
        num_iter = point.get("num_iter", 1)
        if not 1 <= num_iter <= model.seq_len:
            raise ValueError(
                f"--sweep num_iter={num_iter}: expected 1 to {model.seq_len}, the number of tokens"
            )
    if guide and all(sampling.but(**point).cfg == 1.0 for point in points):
        raise ValueError(f"--guide {args.guide}: expected --cfg, the scale; at 1 nothing is guided")
    return sampling


def pick_labels(args, config, like=None):
    """(a label per image, entries of reports on them). Raises ValueError.

    Images cycle through the labels, because splits of the Inception Score consist of consecutive
    ones.
    """
    class_num = config["model"]["class_num"]
    if args.labels in LABELS:
        return LABELS[args.labels](args.num_images, config, args.seed)
    chosen = like["labels"] if like else range(min(10, class_num))
    if args.labels is not None:
        chosen = find_labels(args.labels, class_num, known_names(config))
    if like:
        check_labels(args, like, chosen, class_num)
    else:
        args.labels = args.labels or f"0-{len(chosen) - 1}"
    count = args.num_images or len(chosen) * (args.per_class or 0) or len(like["labels"])
    text = None if args.labels == "all" else args.labels
    return cycle_labels(chosen, count, config, text)


def open_evaluation(args, config, num_images, device):
    """The Evaluator, opened before any image is generated; None without --reference."""
    if not args.reference:
        return None
    from util.evaluation.evaluator import open_evaluator

    return open_evaluator(
        from_flags(Evaluation, args),
        args.data_path,
        img_size=config["model"]["img_size"],
        num_images=num_images,
        device=device,
        classes=known_names(config),
        reading=plain_reading(config.get("data"), said_flags(Reading, args)),
    )


def measure(args, points, drawn, sampling, evaluator, outputs, generation, balance):
    """Evaluate the model at each of the points; {} means the settings unchanged.

    drawn: model, tokenizer and labels. balance: entries of reports on the labels.
    """
    import engine_mar as engine
    from util import dist
    from util.dist import print0
    from util.evaluation.sweep import find_result, write_sweep

    folder = Path(args.output_dir)
    identity = evaluator.stated(len(drawn[2]))
    identity |= {"guide_sha256": None}  # absent without a guide, and from older results
    identity |= engine.identify(*drawn, args.batch_size, generation.get("guide"))
    identity |= {"seed": args.seed, "dtype": generation["precision"]}
    del identity["reference"]  # the content of a file matters, not its path

    def found(point):
        wanted = {**identity, **sampling.but(**point).asdict()}
        names = [*evaluator.promised, "seconds_per_image"]  # unless all images were there
        return find_result(folder / "results.jsonl", wanted, names)

    settings = {"checkpoint": args.ckpt, "weights": args.weights, **balance}
    settings |= {"per_class": args.per_class} if args.per_class else {}
    settings |= {"guide": args.guide} if args.guide else {}
    settings |= {"seed": args.seed, "dtype": generation["precision"]}

    def evaluate(point):
        if point and any(dist.all_gather(bool(found(point)))):
            print0(f"{point}: there already")
            return
        how = {"settings": settings, "outputs": outputs, "output_dir": folder, **generation}
        engine.evaluate(*drawn, sampling.but(**point), evaluator, **how)

    for done, point in enumerate(points):
        try:
            stop.check()
            evaluate(point)
        except stop.Stopped as request:
            told = f", {done} of {len(points)} points are evaluated" if point else ""
            raise stop.Stopped(f"{request}{told}") from None
    if len(points) > 1 and dist.is_main():
        files = write_sweep([found(point) for point in points], points, folder)
        print0((folder / "sweep.md").read_text())
        print0(f"in {folder}: {', '.join(file.name for file in files)}")


if __name__ == "__main__":
    run(main, resumes=True)
