"""The speed of sampling and training: python -m benchmarks.speed --model base

Ours and the plain implementation of `benchmarks.plain`, with the same random weights, in turns in
one process: a cold run of each is dropped, then medians and minima of the rounds. First it prints
the largest relative differences of results for the same noise; if one is above 1e-5, it prints no
speed-up and exits with status 1. Exact methods are compared with plain, approximations with ours.
"""

import sys

from benchmarks.cases import CASES
from util.flags import Parser, add_device_flag, finite, positive, positive_int, run
from util.table import Table

SECTIONS = Table(
    "section",
    {
        name: f"benchmarks.sections:{name}"
        for name in (
            *("products", "head", "sampling", "images", "training", "step", "profile"),
            *("optimizer", "loader", "approximate"),
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
    of_model = "(default: the model's)"
    parser.add_argument("--model", choices=CASES, default="base", help="the model")
    parser.add_argument("--diffloss_d", type=positive_int, help=f"blocks of the head {of_model}")
    parser.add_argument("--diffloss_w", type=positive_int, help=f"width of the head {of_model}")
    parser.add_argument("--num_iter", type=positive_int, help=f"autoregressive steps {of_model}")
    parser.add_argument("--num_sampling_steps", default="100", help="diffusion steps")
    parser.add_argument("--cfg", type=finite, help=f"guidance scale {of_model}")
    parser.add_argument(
        "--precision", choices=("fp32", "tf32", "bf16"), help="(default: fp32, on a GPU bf16)"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="ours with --compile, in training",
    )
    parser.add_argument(
        "--products",
        choices=("auto", "torch", "onednn"),
        help="on a CPU, the library of our products: the faster one of each class of shapes, or "
        "this one; with torch, both sides use the same (default: MAR_PRODUCTS, else auto)",
    )
    torch_linear = {"action": "store_const", "const": "torch", "help": "--products torch"}
    parser.add_argument("--torch_linear", dest="products", **torch_linear)


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
        help="images per training step (default: the model's, on a GPU 64)",
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

    case = CASES[args.model]
    args.num_iter = args.num_iter or case.sampling["num_iter"]
    args.cfg = case.sampling["cfg"] if args.cfg is None else args.cfg
    sides = open_sides(args)
    args.batch_sizes = args.batch_sizes or ([1, 16, 256] if sides.gpu else [1, 4])
    args.train_batch = args.train_batch or (64 if sides.gpu else case.train_batch)
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
    products.mode = args.products or products.mode
    case, precision = CASES[args.model], args.precision
    precision = precision or ("fp32" if device.type == "cpu" else "bf16")
    own = {"diffloss_d": args.diffloss_d, "diffloss_w": args.diffloss_w}
    arguments = {**case.model, **{name: value for name, value in own.items() if value}}
    return Sides(
        {**arguments, "num_sampling_steps": args.num_sampling_steps},
        Sampling.of(**{**case.sampling, "num_iter": args.num_iter, "cfg": args.cfg}),
        device,
        pick_precision(precision, device),
    )


def describe(sides, args):
    """The machine, the model and the settings, in two lines."""
    from benchmarks import machine
    from models.fast import products

    millions = sum(p.numel() for p in sides.model.parameters()) / 1e6
    net = sides.model.diffloss.net
    head = f"{len(net.res_blocks)}×{net.input_proj.out_features}"
    start = sides.sampling.max_timestep
    return (
        f"{machine.describe(sides.device)}\n\n"
        f"MAR {args.model} ({millions:.3g}M, head {head}), {sides.precision}, {args.num_iter} "
        f"autoregressive and {args.num_sampling_steps} diffusion steps"
        + (f" from {start}, " if start else ", ")
        + f"guidance {args.cfg:g}; {args.rounds} rounds; products: {products.mode}"
    )


if __name__ == "__main__":
    run(main)
