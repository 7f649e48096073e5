"""The published way and ours on this CPU, in one call: python -m benchmarks.cpu --out cpu.md

Three models, each: plain (`benchmarks.plain`, the network written the published way), ours, ours
with torch's products and, where the processor multiplies bf16 by itself, ours in bf16, in turns in
one process. First come the largest relative differences of results for the same noise: if one is
above 1e-5, the model is not timed, and the exit status is 1. Prints a section of Markdown, as it
stands in benchmarks/RESULTS.md.
"""

import sys
from dataclasses import dataclass, field, replace

from benchmarks.cases import CASES
from util.files import check_writable
from util.flags import Parser, positive_int, run

TITLES = {"digits": "digits", "small": "small, 10M", "base": "MAR-B"}  # of the rows of CASES


@dataclass(frozen=True)
class Row:
    """What is timed of a model.

    kind: name of a function of `benchmarks.turns`. what: text, with fields and settings in braces.
    bsz: images. steps: training steps, or autoregressive steps of which the mean is given. rounds:
    how many at most. mean: whether the time is that of one step. sampling: what differs from the
    settings of the model.
    """

    kind: str
    what: str
    bsz: int
    steps: int = 1
    rounds: int = 5
    mean: bool = False
    sampling: dict = field(default_factory=dict)


SAMPLES = "sampling, batch {bsz}, {num_iter} steps of {diffusion_steps}, guidance {cfg:g}"
ONE_OF = "autoregressive step of {num_iter}×{diffusion_steps}, batch {bsz}, guidance {cfg:g}"
PAPER = {"cfg": 2.9}
ROWS = {
    "digits": [
        Row("training", "{steps} training steps of {bsz} images", 64, steps=8),
        Row(
            "images", "{bsz} samples, {num_iter} steps of {diffusion_steps}, guidance {cfg:g}", 250
        ),
    ],
    "small": [Row("training", "training step of {bsz} images", 32)],
    "base": [
        Row("training", "training step of {bsz} images", 2),
        Row("images", SAMPLES, 1, rounds=3, sampling={**PAPER, "num_iter": 6}),
        Row("steps", ONE_OF, 1, steps=3, rounds=3, mean=True, sampling=PAPER),
        Row("steps", ONE_OF, 4, steps=2, rounds=2, mean=True, sampling=PAPER),
    ],
}
TINY = {"name": "mar_tiny", "diffloss_d": 1, "diffloss_w": 64, "num_sampling_steps": "4"}


def get_parser():
    """The parser of all flags."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="FILE", help="write the section here too, as it grows")
    parser.add_argument("--models", nargs="+", choices=ROWS, help="which models (default: all)")
    parser.add_argument(
        "--rounds",
        type=positive_int,
        default=5,
        help="rounds counted, after a cold one; the longest rows take 2 or 3 at most",
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny models, few steps and images: only a trial"
    )
    return parser


def main(argv=None):
    """Run the script."""
    args = get_parser().parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    if args.out:
        check_writable(args.out, f"--out {args.out}")

    from benchmarks.turns import Report

    report = Report(args)
    for name in args.models or ROWS:
        report.add(
            TITLES[name], case_of(name, args.quick), [sized(row, args) for row in ROWS[name]]
        )
    print(report.text())
    if report.different:
        sys.exit(1)


def case_of(name, quick):
    """The Case of a model; quick: with the same tokens, but tiny."""
    case = CASES[name]
    return replace(
        case, model={"num_sampling_steps": "100", **case.model, **(TINY if quick else {})}
    )


def sized(row, args):
    """A row with the rounds and sizes that the flags ask for."""
    row = replace(row, rounds=min(row.rounds, args.rounds))
    if not args.quick:
        return row
    sampling = {**row.sampling, "num_iter": 4}
    return replace(row, bsz=min(2, row.bsz), steps=min(2, row.steps), sampling=sampling)


if __name__ == "__main__":
    run(main)
