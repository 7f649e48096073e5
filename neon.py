"""Lead a trained model away from its own samples (Neon). `python neon.py --help`.

It samples images, trains the model on them for a while, and writes θ_base + w·(θ_base − θ_tuned)
(Alemohammad et al. 2025). The same command resumes where it was stopped.
"""

from itertools import chain
from pathlib import Path

import main_mar
import sample
from models.settings import Model, Sampling
from util.data.classes import known_names
from util.files import make_folder
from util.flags import Parser, add_machine_flags, finite, machine, positive, positive_int, run
from util.labels import balanced_labels
from util.run import last_words
from util.settings import add_flags, to_flags

SAMPLES, TUNED = "samples", "tuned"  # folders in --output_dir
MACHINE = ("device", "precision", "seed", "num_workers", "dist_url", "dist_timeout")


def get_parser():
    """The parser of all flags; those for sampling are fields of settings."""
    parser = Parser(description=__doc__)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--ckpt",
        required=True,
        metavar="PATH",
        help="the base, whose EMA weights are taken: a checkpoint, its export as safetensors, a "
        "folder with one, or the name of a model on the Hugging Face hub",
    )
    group.add_argument(
        "--output_dir",
        required=True,
        metavar="DIR",
        help="folder of the samples, of the training on them, and of neon-W.safetensors for each W "
        "of --weight",
    )
    group.add_argument(
        "--weight",
        type=finite,
        nargs="+",
        default=[1.0],
        metavar="W",
        help="how far to go from the base, away from the tuned weights; 0 is the base, -1 the "
        "tuned weights",
    )
    group = parser.add_argument_group("training on samples")
    group.add_argument(
        "--num_images",
        type=positive_int,
        default=1000,
        metavar="N",
        help="images to sample, equally many of each class",
    )
    group.add_argument("--epochs", type=positive_int, default=1, help="passes over them")
    group.add_argument("--batch_size", type=positive_int, default=64, help="images per batch")
    group.add_argument(
        "--lr",
        type=positive,
        help="learning rate (default: a tenth of that in the base's training)",
    )
    group = parser.add_argument_group("sampling")
    group.add_argument("--vae_path", metavar="PATH", help="tokenizer (default: as in training)")
    add_flags(group, Sampling, unset="the checkpoint's")
    add_machine_flags(parser, num_workers=0)
    parser.set_defaults(weights="ema", vae_scale=None, vae_shift=None)  # of sample.open_checkpoint
    return parser


def main(argv=None):
    """Run the script."""
    args = get_parser().parse_args(argv)
    if args.num_images < args.batch_size:
        raise ValueError(
            f"--num_images {args.num_images}: expected {args.batch_size} or more, a --batch_size"
        )
    make_folder(args.output_dir, "--output_dir")

    from util import dist
    from util.dist import print0
    from util.precision import pick_precision
    from util.run import lock

    device = dist.init(**machine(args))
    folder = Path(args.output_dir)
    last_words.set_folder(folder, "neon")
    model, tokenizer, config = sample.open_checkpoint(args)
    sampling = sample.pick_sampling(args, config, model, [{}])
    lr = args.lr or base_rate(config) / 10
    with lock.folder(folder, "--output_dir"):
        precision = pick_precision(args.precision, device)
        drawn = model.to(device), tokenizer.to(device)
        named = {**config, "data": {**config.get("data", {}), "classes": class_names(config)}}
        write_samples(args, *drawn, named, sampling, device, precision)
        main_mar.main(training_flags(args, config, sampling, lr))
        if dist.is_main():
            for path in merge(args, model.cpu(), config, sampling, lr):
                print0(f"wrote {path}; to measure it: python sample.py --ckpt {path} --reference …")


def class_names(config):
    """The names of the classes, or their indices as texts, whose alphabetical order is theirs."""
    count = config["model"]["class_num"]
    return known_names(config) or [f"{i:0{len(str(count))}d}" for i in range(count)]


def base_rate(config):
    """The learning rate of the base's training. Raises ValueError if it is not known."""
    rate = config.get("training", {}).get("rate")
    if not rate:
        raise ValueError("--lr: expected a number, as the base does not say how it was trained")
    return rate


def write_samples(args, model, tokenizer, config, sampling, device, precision):
    """Sample the images to train on, as latents, where they are not there."""
    import engine_mar as engine
    from models.neon import cache_samples
    from util.rng import image_generators

    labels, _ = balanced_labels(args.num_images, config, args.seed)
    how = {"seed": args.seed, "batch_size": args.batch_size, "precision": precision, "fit": False}
    sampled = engine.origin(model, tokenizer, labels, sampling, **how)

    def draw(indices):
        chosen, generators = [labels[i] for i in indices], image_generators(args.seed, indices)
        return engine.sample_latents(model, chosen, sampling, generators, device, precision)

    folder = Path(args.output_dir) / SAMPLES
    make_folder(folder, "--output_dir")
    cache_samples(folder, draw, labels, config, tokenizer, sampled, args.batch_size)


def training_flags(args, config, sampling, lr):
    """The flags of main_mar.py that train the base on its samples, as it was trained before."""
    samples, tuned = (str(Path(args.output_dir) / name) for name in (SAMPLES, TUNED))
    said = {"init_from": args.ckpt, "cached_path": samples, "data_path": samples}
    said |= {"output_dir": tuned, "resume": tuned, "vae_path": args.vae_path}
    said |= {"epochs": args.epochs, "eval_freq": args.epochs, "batch_size": args.batch_size}
    said |= {"lr": lr, "warmup_epochs": 0, "ema_rate": 0, "keep": 1}
    said |= {name: getattr(args, name) for name in MACHINE}
    flags = [(f"--{name}", str(value)) for name, value in said.items() if value is not None]
    own = [field.name for field in Model.fields() if not field.metadata.get("fixed")]
    own = {name: config["model"].get(name) for name in own}
    flags += [to_flags(Model, own), to_flags(Sampling, sampling.asdict())]
    return [*chain(*flags), "--use_cached", "--no_flip"]


def merge(args, model, config, sampling, lr):
    """Write the extrapolated weights for each --weight; yields their paths. Raises ValueError."""
    from models.neon import write_merged
    from util.checkpoint import LAST, load_checkpoint

    folder = Path(args.output_dir)
    tuned = load_checkpoint(folder / TUNED / LAST)
    about = {"lr": lr, "epochs": args.epochs, "batch_size": args.batch_size}
    for name, value in about.items():
        if tuned["args"].get(name) != value:
            raise ValueError(
                f"--{name} {value}: the training in {folder / TUNED} is done with "
                f"{tuned['args'].get(name)}; expected that, or another --output_dir"
            )
    about |= {"base": Path(args.ckpt).name, "images": args.num_images}
    config = {**config, "neon": {**about, "sampling": sampling.asdict()}}
    for weight in args.weight:
        path = folder / f"neon-{weight:g}.safetensors"
        write_merged(path, model.state_dict(), tuned["model"], weight, config)
        yield path


if __name__ == "__main__":
    run(main, resumes=True)
