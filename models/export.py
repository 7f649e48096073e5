"""Pass a model on: python -m util.export CHECKPOINT OUT

OUT is a folder with weights, configuration and model card or, if it ends in .safetensors, a file of
the averaged weights alone, for sample.py.
"""

from pathlib import Path

from models import checkpoint_config, load_model
from models.stored import digests_of
from util import hub
from util.checkpoint import export_ema, find_weights, load_checkpoint
from util.files import make_folder
from util.flags import Parser, run


def get_parser():
    parser = Parser(description="Write a checkpoint's EMA weights, to pass the model on.")
    parser.add_argument(
        "checkpoint",
        help="our checkpoint or a published one, a folder that holds one, or the name of a model "
        "on the Hugging Face hub",
    )
    parser.add_argument(
        "out", help="a folder; or a file ending in .safetensors, for the weights alone"
    )
    group = parser.add_argument_group("of a folder")
    group.add_argument("--license", metavar="ID", help="licence of the weights, such as mit")
    group.add_argument("--title", metavar="TEXT", help="title of the card (default: the name)")
    group.add_argument("--data", metavar="TEXT", help="what the training data are, for the card")
    group.add_argument(
        "--name",
        metavar="NAME",
        help="what the card's commands load, such as user/name (default: the folder's name)",
    )
    group.add_argument(
        "--samples",
        metavar="PNG",
        help="picture for the card, or draw: sample one (default: the run's newest grid, if any)",
    )
    group.add_argument(
        "--vae_path", metavar="PATH", help="file of the tokenizer (default: as in training)"
    )
    group.add_argument(
        "--with_tokenizer", action="store_true", help="copy a tokenizer that is published, too"
    )
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    if Path(args.out).suffix == ".safetensors":
        write_file(args)
    else:
        write_folder(args)
    print(f"wrote {args.out}")


def write_file(args):
    """Write the EMA weights as one file. Raises ValueError."""
    make_folder(Path(args.out).parent, "out")
    path = find_weights(args.checkpoint)
    checkpoint = load_checkpoint(path)
    config = checkpoint_config(checkpoint, path) | digests_of(checkpoint)
    export_ema(checkpoint, args.out, config)


def write_folder(args):
    """Write a folder of `save_pretrained`. Raises ValueError."""
    if Path(args.out).suffix in hub.WEIGHT_FILES:
        raise ValueError(f"{args.out}: expected a folder, or a name ending in .safetensors")
    path = find_weights(args.checkpoint)
    model, config = load_model(path)
    if args.vae_path:
        config["tokenizer"] = {**config["tokenizer"], "vae_path": args.vae_path}
    model.save_pretrained(
        args.out,
        config=config,
        with_tokenizer=args.with_tokenizer,
        run=path.parent,
        samples=True if args.samples == "draw" else args.samples,
        name=args.name,
        title=args.title,
        license=args.license,
        data=args.data,
    )


if __name__ == "__main__":
    run(main)
