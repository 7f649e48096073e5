"""Sample images from a checkpoint, ours or published. `python sample.py --help`."""

from pathlib import Path

import engine_mar as engine
from models import build_tokenizer, load_model
from util import dist
from util.dist import print0
from util.flags import Parser, add_machine_flags, add_sampling_flags, amount, count, run
from util.images import MAX_GRID, FolderWriter, GridWriter, NpzWriter


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
        default="0-9",
        help="class numbers and ranges such as 207,360,980-989; all; or none: of no class",
    )
    group.add_argument(
        "--per_class", type=count, default=8, metavar="N", help="images of each of the labels"
    )
    group.add_argument(
        "--out",
        nargs="+",
        default=["samples.png"],
        metavar="PATH",
        help=".png: all in a grid; .npz: one file of uint8 NHWC, for ADM's evaluator; any other "
        "name: a folder of PNGs",
    )
    group.add_argument("--batch_size", type=count, default=64, help="images at once, a process")
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--vae_path", metavar="FILE", help="its weights (default: as in training)")
    group.add_argument(
        "--vae_scale", type=amount, metavar="X", help="its scale (default: as in training)"
    )
    add_sampling_flags(parser)
    add_machine_flags(parser, num_workers=None)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    device = dist.init(args.device, args.dist_on_itp, args.dist_url)
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
    for name in sampling:
        if getattr(args, name) is not None:
            sampling[name] = getattr(args, name)
    if args.num_iter is None:
        sampling["num_iter"] = min(sampling["num_iter"], model.seq_len)
    labels = parse_labels(args.labels, config["model"]["class_num"])
    labels = [label for label in labels for _ in range(args.per_class)]
    folders, files = get_writers(args.out, len(labels), args.per_class)
    settings = ", ".join(f"{name} {value}" for name, value in sampling.items())
    print0(f"{args.ckpt} ({args.weights}): {len(labels)} images, {settings}, seed {args.seed}")

    batches = engine.generate_images(
        model.to(device),
        tokenizer.to(device),
        labels,
        seed=args.seed,
        batch_size=args.batch_size,
        device=device,
        precision=dist.pick_precision(args.precision, device),
        latent_range=config.get("latent_range"),
        label="sampling",
        **sampling,
    )
    batches = written(batches, folders)
    for indices, images in engine.gathered(batches) if files else batches:
        for writer in files:
            writer.add(indices, images)
    if dist.is_main():
        for writer in files:
            writer.close()
    dist.barrier()
    print0(f"wrote {', '.join(args.out)}")


def parse_labels(text, class_num):
    """Class numbers that "207,360,980-989", "all" or "none" stands for. Raises ValueError."""
    if text == "none":
        return [None]
    if text == "all":
        return list(range(class_num))
    labels = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            raise ValueError(f"--labels {text!r}: expected numbers, ranges as 0-9, all or none")
        labels += range(int(first), int(last or first) + 1)
    wrong = [label for label in labels if label >= class_num]
    if wrong or not labels:
        raise ValueError(f"--labels {text!r}: expected classes from 0 to {class_num - 1}")
    return labels


def get_writers(paths, count, columns):
    """(writers of folders, to which each process adds its own, writers of single files)."""
    folders, files = [], []
    for path in map(Path, paths):
        if path.suffix == ".png" and count > MAX_GRID:
            raise ValueError(
                f"--out {path}: a grid of {count} images, expected at most {MAX_GRID}; "
                "name a folder or an .npz"
            )
        if path.suffix == ".png":
            files.append(GridWriter(path, columns if 1 < columns < count else None))
        elif path.suffix == ".npz":
            files.append(NpzWriter(path, count))
        else:
            folders.append(FolderWriter(path))
    return folders, files


def written(batches, folders):
    """The same batches, added to the folders on the way."""
    for indices, images in batches:
        for writer in folders:
            writer.add(indices, images)
        yield indices, images


if __name__ == "__main__":
    run(main)
