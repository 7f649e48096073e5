"""The speed of sampling and training: python -m benchmarks.speed --model base

Ours and the plain implementation of `benchmarks.plain`, with the same random weights, in turns in
one process: a cold run of each is dropped, then medians and minima of the rounds. First it prints
the largest relative differences of results for the same noise; if one is above 1e-5, it prints no
speed-up and exits with status 1. Exact methods are compared with plain, approximations with ours.
"""

import contextlib
import platform
import sys
from pathlib import Path

from util.flags import Parser, add_device_flag, finite, positive, positive_int, run
from util.table import Table

HEADS = {"tiny": (2, 64), "base": (6, 1024), "large": (8, 1280), "huge": (12, 1536)}  # of table 4
SECTIONS = Table(
    "section",
    {
        name: f"benchmarks.sections:{name}"
        for name in (
            *("head", "sampling", "images", "training", "step", "profile", "optimizer", "loader"),
            "approximate",
        )
    },
)


def get_parser():
    """The parser of all flags."""
    parser = Parser(description=__doc__.splitlines()[0])
    add_model_flags(parser)
    add_timing_flags(parser)
    add_device_flag(parser)
    return parser


def add_model_flags(parser):
    """Flags for the model and its sampling."""
    parser.add_argument("--model", choices=HEADS, default="base", help="size of the model")
    table_4 = "of the head (default: table 4's)"
    parser.add_argument("--diffloss_d", type=positive_int, help=f"blocks {table_4}")
    parser.add_argument("--diffloss_w", type=positive_int, help=f"width {table_4}")
    parser.add_argument("--num_iter", type=positive_int, default=64, help="autoregressive steps")
    parser.add_argument("--num_sampling_steps", default="100", help="diffusion steps")
    parser.add_argument("--cfg", type=finite, default=3.0, help="guidance scale")
    parser.add_argument(
        "--precision", choices=("fp32", "tf32", "bf16"), help="(default: fp32, on a GPU bf16)"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="ours with --compile, in training",
    )
    parser.add_argument(
        "--torch_linear",
        action="store_true",
        help="on a CPU, use torch's linear layers on both sides, to measure gains without oneDNN",
    )


def add_timing_flags(parser):
    """Flags for the measurements."""
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, help="what to measure (default: all)"
    )
    parser.add_argument(
        "--batch_sizes",
        type=positive_int,
        nargs="+",
        help="batch sizes of sampling (default: 1 4, on a GPU 1 16 256)",
    )
    parser.add_argument(
        "--train_batch",
        type=positive_int,
        help="images per training step (default: 2, on a GPU 64)",
    )
    parser.add_argument(
        "--rounds", type=positive_int, default=5, help="rounds counted, after a cold one"
    )
    parser.add_argument(
        "--timed_steps",
        type=positive_int,
        default=4,
        help="how many autoregressive steps are timed, from the middle of equal parts of all",
    )
    parser.add_argument(
        "--tolerance",
        type=positive,
        default=1e-5,
        help="largest relative difference between the two sides with which speed is measured",
    )
    parser.add_argument(
        "--anyway", action="store_true", help="measure even if the sides differ by more"
    )
    parser.add_argument(
        "--peak_tflops",
        type=positive,
        default=790,
        help="peak TFLOP/s of the GPU, for MFU and roofline; the default is an H200's",
    )
    parser.add_argument(
        "--peak_tbs", type=positive, default=4.3, help="TB/s of its memory; also an H200's"
    )


def main(argv=None):
    """Run the script."""
    args = get_parser().parse_args(argv)

    from benchmarks import differences

    sides = open_sides(args)
    args.batch_sizes = args.batch_sizes or ([1, 16, 256] if sides.gpu else [1, 4])
    args.train_batch = args.train_batch or (64 if sides.gpu else 2)
    print(describe(sides, args))
    if not differences.check(sides, args.timed_steps, args.tolerance) and not args.anyway:
        sys.exit(1)
    for name in SECTIONS:
        if name in (args.sections or SECTIONS):
            SECTIONS[name](sides, args)


def open_sides(args):
    """The Sides according to the flags. Raises ValueError."""
    from benchmarks.sides import Sides
    from models.fast import products
    from models.settings import Sampling
    from util import dist
    from util.precision import pick_precision

    device = dist.init(args.device)
    products.mode = "torch" if args.torch_linear else products.mode
    depth, width = HEADS[args.model]
    precision = args.precision or ("fp32" if device.type == "cpu" else "bf16")
    return Sides(
        f"mar_{args.model}",
        args.diffloss_d or depth,
        args.diffloss_w or width,
        args.num_sampling_steps,
        Sampling(num_iter=args.num_iter, cfg=args.cfg),
        device,
        pick_precision(precision, device),
    )


def describe(sides, args):
    """The machine, the model and the settings, in a line."""
    import torch

    millions = sum(p.numel() for p in sides.model.parameters()) / 1e6
    net = sides.model.diffloss.net
    head = f"{len(net.res_blocks)}×{net.input_proj.out_features}"
    return (
        f"{describe_machine(sides)}, torch {torch.__version__}, {sides.precision}; "
        f"MAR {args.model} ({millions:.0f}M, head {head}), {args.num_iter} autoregressive and "
        f"{args.num_sampling_steps} diffusion steps, guidance {args.cfg:g}; {args.rounds} rounds"
        + (", torch's linear layers on both sides" if args.torch_linear else "")
    )


def describe_machine(sides):
    """The name of the GPU, or the threads and the name of the processor."""
    import torch

    if sides.gpu:
        return torch.cuda.get_device_name(sides.device)
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(x for x in lines if x.startswith("model name")).split(": ")[1]
    return f"{torch.get_num_threads()} threads of {processor}"


if __name__ == "__main__":
    run(main)
