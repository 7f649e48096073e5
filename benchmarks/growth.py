"""How cost grows, measured beside the expected law: python -m benchmarks.growth --out FOLDER

Of tokens, images per batch, diffusion steps and processes: a figure and a table each. A law has its
form from the shapes; its few constants are fitted to what is measured, or stated as assumptions.
"""

import json
from pathlib import Path

from diffusion.schedule import TRAIN_STEPS
from util.files import make_folder, replacing
from util.flags import Parser, add_device_flag, integer, positive_int, run
from util.table import Table

STEPS = integer(1, TRAIN_STEPS)
SIZES = "mar_tiny", "mar_mini", "mar_small", "mar_base", "mar_large", "mar_huge"
FIGURES = Table(
    "figure",
    {
        name: f"benchmarks.growth_figures:{name}"
        for name in ("tokens", "batch", "steps", "processes")
    },
)


def get_parser():
    """The parser of all flags."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of the figures")
    parser.add_argument(
        "--figures", nargs="+", choices=FIGURES, help="what to measure (default: all)"
    )
    parser.add_argument("--model", choices=SIZES, default="mar_small", help="model")
    for flag, kind, default, help in (
        ("--sides", positive_int, (8, 12, 16, 24, 32), "sides of token grids; elsewhere the first"),
        ("--batch_sizes", positive_int, (1, 2, 4, 8, 16, 32, 64), "images per batch"),
        ("--batch_size", positive_int, 2, "images per batch elsewhere"),
        ("--steps", STEPS, (10, 20, 50, 100, 200, 500, 1000), "diffusion steps"),
        ("--num_sampling_steps", STEPS, 10, "diffusion steps elsewhere"),
        ("--processes", positive_int, (2,), "processes that train together, beside one alone"),
        ("--num_iter", positive_int, 4, "autoregressive steps"),
        ("--rounds", positive_int, 3, "rounds counted, after a cold one"),
    ):
        several = {"nargs": "+"} if isinstance(default, tuple) else {}
        parser.add_argument(flag, type=kind, default=default, metavar="N", help=help, **several)
    add_device_flag(parser)
    return parser


def main(argv=None):
    """Run the script."""
    args = get_parser().parse_args(argv)
    tokens = min(args.sides) ** 2
    if args.num_iter > tokens:
        raise ValueError(f"--num_iter {args.num_iter}: expected at most {tokens}, the tokens")
    make_folder(args.out, "--out")

    from benchmarks import growth_figures

    print(growth_figures.describe(args))
    for name in args.figures or FIGURES:
        panels, path = FIGURES[name](args), Path(args.out, f"growth_{name}.png")
        with replacing(path.with_suffix(".json")) as beside:
            beside.write_text(json.dumps(panels, indent=1))
        growth_figures.draw(panels, path)


if __name__ == "__main__":
    run(main)
