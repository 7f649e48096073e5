"""Export the EMA weights of a checkpoint: python -m models.export CHECKPOINT OUT.safetensors"""

from pathlib import Path

from models import checkpoint_config
from util.checkpoint import export_ema, find_checkpoint, load_checkpoint
from util.files import make_folder
from util.flags import Parser, run


def main(argv=None):
    parser = Parser(description="Write a checkpoint's EMA weights as safetensors, for sample.py.")
    parser.add_argument(
        "checkpoint", help="our checkpoint or a published one, or a folder with checkpoint-last.pth"
    )
    parser.add_argument("out", help="output file, ending in .safetensors")
    args = parser.parse_args(argv)
    if Path(args.out).suffix != ".safetensors":
        raise ValueError(f"{args.out}: expected a name ending in .safetensors")
    make_folder(Path(args.out).parent, "out")
    path = find_checkpoint(args.checkpoint) or args.checkpoint
    checkpoint = load_checkpoint(path)
    export_ema(checkpoint, args.out, checkpoint_config(checkpoint, path))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
