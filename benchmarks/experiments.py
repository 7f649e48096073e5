"""Trainings compared in equal time or equal steps: python -m benchmarks.experiments SET ...

Trains the rows of a set (benchmarks/experiment_rows.py) on the same images, for each seed and each
length, and compares their samples with held-out images. Equal time is made of equal conditions:
what a step costs is measured first, all rows in turns in one process, and a row whose steps are
cheaper takes more of them. So a busy machine changes no result. What is done is reused and what was
stopped is resumed: a command may be repeated with more seeds or lengths, and several processes may
share the work by --rows. Writes to --output_dir: costs.json, SET.md, SET.png and grids of samples,
and for `figures` figure_*.png.
"""

import itertools
import json
import shutil
import statistics
import tempfile
import time
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import torch

import main_cache
import main_mar
import main_tokenizer
import sample
from benchmarks import experiment_tables as tables
from benchmarks.experiment_rows import NETWORKS, RECIPE, SETS
from benchmarks.tokenizers import hold_out
from reproduce import call, draw_figures
from util import jsonl
from util.checkpoint import LAST
from util.data.loader import FirstBatches
from util.evaluation.settings import NETWORK, Evaluation
from util.files import replacing
from util.flags import (
    Parser,
    add_device_flag,
    add_precision_flag,
    nonnegative_int,
    positive,
    positive_int,
    run,
)
from util.settings import add_flags

TIMED = 8  # steps of a row that are timed at once
ROUNDS = 12
SIZES = ("tiny", "mini", "small", "base", "large", "huge")
STRIDE = 4  # pixels of a token, along each side
COSTS = "costs.json"  # seconds per image of each row
DONE = "done"  # a file that says that a folder is complete
NETWORK_OF = {"vq_latent": "vq"}  # tokenizer -> folder of its network, unless it has its own


def get_parser():
    """The parser of all flags."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=SETS, metavar="SET", help=f"rows to run: {', '.join(SETS)}")
    parser.add_argument(
        "--rows", nargs="+", metavar="NAME", help="only these rows of the set (default: all)"
    )
    parser.add_argument(
        "--data_path", required=True, metavar="DIR", help="folder with train/class/image files"
    )
    parser.add_argument(
        "--split", default="test", help="folder of held-out images beside train (default: test)"
    )
    parser.add_argument("--img_size", type=positive_int, default=16, help="side of the images")
    parser.add_argument(
        "--tokenizers",
        metavar="DIR",
        help="folder with kl/tokenizer.ckpt and vq/tokenizer.ckpt, which are trained if they are "
        "missing (default: tokenizers in --output_dir)",
    )
    parser.add_argument(
        "--tokenizer_epochs", type=positive_int, default=10, help="epochs per tokenizer"
    )
    parser.add_argument(
        "--num_codes", type=positive_int, default=256, metavar="K", help="codes of the VQ tokenizer"
    )
    parser.add_argument(
        "--size", choices=SIZES, default="mini", help="size of the models (default: mini)"
    )
    parser.add_argument(
        "--epochs", type=positive_int, nargs="+", default=[1, 3, 9], help="lengths to compare"
    )
    parser.add_argument(
        "--minutes", type=positive, nargs="+", help="lengths in minutes instead, on this machine"
    )
    parser.add_argument(
        "--seeds", type=nonnegative_int, nargs="+", default=[1, 2, 3], help="seeds of the models"
    )
    parser.add_argument(
        "--cfg", type=positive, nargs="+", default=[1.0], help="guidance scales of the samples"
    )
    parser.add_argument(
        "--per_class", type=positive_int, default=200, metavar="N", help="samples of each class"
    )
    parser.add_argument(
        "--train_only", action="store_true", help="leave the evaluation to a later call"
    )
    parser.add_argument(
        "--tables_only", action="store_true", help="write the tables of what is there, no more"
    )
    parser.add_argument(
        "--output_dir", default="./output_dir/experiments", help="folder of all outputs"
    )
    add_device_flag(parser)
    add_precision_flag(parser)
    add_flags(parser, Evaluation, only=NETWORK)
    return parser


def main(argv=None):
    """Run the script."""
    args = get_parser().parse_args(argv)
    for name in args.rows or ():
        if name not in SETS[args.what].rows:
            raise ValueError(f"--rows {name!r}: expected some of {', '.join(SETS[args.what].rows)}")
    if args.rows and args.what == "figures":
        raise ValueError(f"--rows {args.rows[0]!r}: figures need all of their rows")
    args.tokenizers = args.tokenizers or str(Path(args.output_dir) / "tokenizers")
    of = SETS[args.what]
    args.rows = [] if args.tables_only else args.rows or list(of.rows)
    if args.tables_only and not (Path(args.output_dir) / COSTS).is_file():
        raise ValueError(f"--tables_only: no {COSTS} in {args.output_dir}")
    for name in sorted({of.rows[row].tokenizer for row in {*args.rows, of.like}}):
        train_tokenizer(args, NETWORK_OF.get(name, name))
        cache_latents(args, name)
    costs = seconds_per_image(args)
    if args.minutes:
        epoch = costs[of.like] * images(args) / 60
        args.epochs = sorted({max(1, round(minutes / epoch)) for minutes in args.minutes})
    for length in args.epochs:
        for seed in args.seeds:
            for name in args.rows:
                for epochs in sorted({*lengths(args, costs, name, length).values()}):
                    train(args, name, seed, epochs)
                    if not args.train_only and args.what != "figures":
                        evaluate(args, name, seed, epochs)
        write(args, costs)
    if args.what == "figures" and args.rows and not args.train_only:
        figures(args)


def lengths(args, costs, name, length):
    """Epochs of a row that equal `length` epochs of the row `like`: "steps", "time" -> epochs."""
    of = SETS[args.what]
    ratio = {"steps": 1.0, "time": costs[of.like] / costs[name]}
    return {kind: max(1, round(length * ratio[kind])) for kind in of.equal}


# ---- training -------------------------------------------------------------------------------


def train_tokenizer(args, name):
    """Train and measure a network, unless it is there. name: in NETWORKS."""
    folder = Path(args.tokenizers) / name
    if not (folder / "results.jsonl").is_file():
        own = {**data_flags(args), **NETWORKS[name], "split": args.split, "output_dir": folder}
        own |= {"epochs": args.tokenizer_epochs, "resume": folder}
        own |= {"num_codes": args.num_codes} if name == "vq" else {}
        own |= {flag: getattr(args, flag) for flag in NETWORK}
        call(main_tokenizer.main, own)


def cache_latents(args, name):
    """Cache the latents of a tokenizer, unless that is done."""
    folder = latents(args, name)
    if not (folder / DONE).is_file():
        flags = {**data_flags(args), **tokenizer_flags(args, name), "cached_path": folder}
        call(main_cache.main, {**flags, "layout": "shards"})
        (folder / DONE).touch()


def train(args, name, seed, epochs):
    """Train a row for so many epochs, unless that is done; resumes a shorter run."""
    folder = run_folder(args, name, seed)
    if not checkpoint(folder, epochs).is_file():
        flags = {**flags_of(args, name, seed, epochs), "output_dir": folder, "resume": folder}
        call(main_mar.main, *split(flags), "--use_cached")
        with replacing(checkpoint(folder, epochs)) as beside:
            shutil.copy(folder / LAST, beside)


def flags_of(args, name, seed, epochs):
    """The flags of main_mar.py for a row."""
    of = SETS[args.what]
    row = of.rows[name]
    own = dict(row.flags)
    if "preset" not in own:  # which chooses for itself
        own = {**RECIPE, **own}
        own = {**of.recipe(epochs, images(args) // own["batch_size"]), **own}
    own["model"] = f"{own['model']}_{args.size}"
    own |= {**data_flags(args), **tokenizer_flags(args, row.tokenizer)}
    own |= {"cached_path": latents(args, row.tokenizer), "precision": args.precision}
    own |= {"val_path": Path(args.data_path) / args.split}
    own |= {"seed": seed, "epochs": epochs, "eval_freq": epochs, "save_last_freq": 1, "keep": 1}
    guided = [how for how in row.samples.values() if how.guide]
    return {**own, "keep_every": guide_epoch(guided[0], epochs)} if guided else own


def guide_epoch(how, epochs):
    """The epoch whose checkpoint guides. how: a Sample."""
    return max(1, round(how.guide * epochs))


def split(flags):
    """Flags with values, a dict, and then the names of those that are True."""
    switches = [f"--{name}" for name, value in flags.items() if value is True]
    return {name: value for name, value in flags.items() if value is not True}, *switches


def data_flags(args):
    """The flags of scripts for the images."""
    own = {"data_path": args.data_path, "img_size": args.img_size, "device": args.device}
    return {**own, "num_workers": 0}


def tokenizer_flags(args, name):
    """The flags of scripts for a tokenizer."""
    network = Path(args.tokenizers) / NETWORK_OF.get(name, name)
    return {"tokenizer": name, "vae_path": network / "tokenizer.ckpt"}


def images(args):
    """The number of training images."""
    return files_in(Path(args.data_path, "train"))


@cache
def files_in(folder):
    return sum(path.is_file() for path in folder.rglob("*.*"))


def tokens(args):
    """The number of tokens of an image."""
    return (args.img_size // STRIDE) ** 2


def latents(args, tokenizer):
    return Path(args.output_dir) / "latents" / tokenizer


def run_folder(args, name, seed):
    return Path(args.output_dir) / "runs" / f"{tables.slug(name)}-seed{seed}"


def checkpoint(folder, epochs):
    return folder / f"after{epochs:04d}.pth"


# ---- what a step costs ----------------------------------------------------------------------


def seconds_per_image(args):
    """Seconds of training per image of each row asked for, and of those known: name -> number.

    Measured once: medians of ROUNDS, all rows in turns; on the CPU in seconds of its time.
    """
    of, path = SETS[args.what], Path(args.output_dir) / COSTS
    known = json.loads(path.read_text()) if path.is_file() else {}
    asked = dict.fromkeys([of.like, *args.rows])
    rows = [name for name in asked if of.rows[name].timed and name not in known]
    if rows:
        known = timed(args, dict.fromkeys([of.like, *rows]), known)
        with replacing(path) as beside:
            beside.write_text(json.dumps(known, indent=1))
    own = {name: name if row.timed else of.like for name, row in of.rows.items()}
    return {name: known[like] for name, like in own.items() if like in known}


def timed(args, rows, known):
    """Seconds per image of these rows, added to those that are known."""
    like = SETS[args.what].like
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: some_steps(args, name, Path(folder) / tables.slug(name)) for name in rows}
        found = {name: [] for name in rows}
        for _ in range(1 + ROUNDS):
            for name, take in steps.items():
                found[name].append(seconds_of(take, args.device) / images_of(args, name))
    medians = {name: statistics.median(times[1:]) for name, times in found.items()}
    scale = known.get(like, medians[like]) / medians[like]  # to rows that were timed before
    return {**{name: scale * value for name, value in medians.items()}, **known}


def some_steps(args, name, folder):
    """A function that takes the next TIMED steps of a row's training."""
    caught = []
    flags = {**flags_of(args, name, seed=0, epochs=10), "output_dir": folder}
    with patch.object(main_mar, "try_out", lambda *objects: caught.append(objects)):
        call(main_mar.main, *split(flags), "--use_cached", "--dry_run")
    _, _, run_epoch, loader, _ = caught[0]
    return partial(run_epoch, loader=FirstBatches(loader, TIMED), epoch=0)


def images_of(args, name):
    """Images in TIMED steps of a row."""
    return TIMED * {**RECIPE, **SETS[args.what].rows[name].flags}["batch_size"]


def seconds_of(function, device):
    """Seconds of a call: of the processor's time on the CPU, else of the clock."""
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    clock = time.process_time if on_cpu else time.perf_counter
    begin = clock()
    function()
    return clock() - begin


# ---- evaluation -----------------------------------------------------------------------------


def evaluate(args, name, seed, epochs):
    """Sample a row's model after so many epochs, and measure the samples."""
    for label, cfg in samplings(args, name):
        folder = sample_folder(args, name, seed, epochs, label, cfg)
        if not jsonl.read(folder / "results.jsonl"):
            measure(args, name, seed, epochs, label, cfg)


def samplings(args, name):
    """What a row's samples differ by, pairs of a label and a guidance scale."""
    for label, how in SETS[args.what].rows[name].samples.items():
        for cfg in [how.flags["cfg"]] if "cfg" in how.flags else args.cfg:
            yield label, cfg


def measure(args, name, seed, epochs, label, cfg):
    """Sample a checkpoint, keep the samples, and compare them with the held-out images."""
    how = SETS[args.what].rows[name].samples[label]
    folder = sample_folder(args, name, seed, epochs, label, cfg)
    own = {"num_iter": max(1, round(how.steps * tokens(args))), "cfg": cfg, **how.flags}
    own["out"] = folder / "samples.npz"
    if how.guide:
        past = f"checkpoint-epoch{guide_epoch(how, epochs):04d}.pth"
        own["guide"] = run_folder(args, name, seed) / past
    folder.mkdir(parents=True, exist_ok=True)
    call(sample.main, {**sample_flags(args, name, seed, epochs, folder), **own})


def sample_flags(args, name, seed, epochs, folder):
    """The flags of sample.py that evaluate a row's model; results go to a folder."""
    return {
        "ckpt": checkpoint(run_folder(args, name, seed), epochs),
        "labels": "all",
        "per_class": args.per_class,
        "batch_size": 250,
        "reference": hold_out(args),
        "stats_dir": Path(args.output_dir) / "stats",
        "output_dir": folder,
        "device": args.device,
        "precision": args.precision,
        **{flag: getattr(args, flag) for flag in NETWORK},
    }


def sample_folder(args, name, seed, epochs, label, cfg):
    folder = f"after{epochs:04d}-{tables.slug('samples' + label)}-cfg{cfg:g}"
    return run_folder(args, name, seed) / folder


def figures(args):
    """Draw the paper's figures 4 to 6, by the first seed's longest runs."""
    rows = {tables.slug(name): name for name in SETS[args.what].rows}
    rows["dit-diff"] = "DiT"

    def measure(run, steps, sweep):
        given = args, rows[run], args.seeds[0], max(args.epochs)
        folder = run_folder(*given[:3]) / f"after{given[3]:04d}-figures-steps{steps}"
        flags = {**sample_flags(*given, folder), "num_iter": steps}
        call(sample.main, flags, "--sweep", *sweep)
        return jsonl.read(folder / "results.jsonl"), folder

    draw_figures(measure, tokens(args), Path(args.output_dir))


# ---- what was found -------------------------------------------------------------------------


def write(args, costs):
    """Write the table and the pictures of all that is there, if anything is."""
    found = [point for point in points(args, costs) if point.records]
    if found:
        tables.write(Path(args.output_dir), args.what, found, SETS[args.what].claims)


def points(args, costs):
    """Everything that could be there, as `experiment_tables.Point`."""
    of = SETS[args.what]
    for length, name in itertools.product(args.epochs, [row for row in of.rows if row in costs]):
        for kind, epochs in lengths(args, costs, name, length).items():
            minutes = epochs * images(args) * costs[name] / 60
            for label, cfg in samplings(args, name):
                folders = {s: sample_folder(args, name, s, epochs, label, cfg) for s in args.seeds}
                lines = {s: jsonl.read(f / "results.jsonl")[-1:] for s, f in folders.items()}
                records = {seed: line[0] for seed, line in lines.items() if line}
                weights = of.rows[name].samples[label].flags.get("weights", "ema")
                losses = [held_out(args, name, seed, epochs, weights) for seed in args.seeds]
                losses = [each for each in losses if each]
                how = name + label, kind, length, epochs, minutes, cfg
                yield tables.Point(*how, folders, records, losses)


def held_out(args, name, seed, epochs, weights):
    """The held-out losses of a row's model after so many epochs: name -> number, or None."""
    flags = flags_of(args, name, seed, epochs)
    step = epochs * (images(args) // flags["batch_size"])
    records = jsonl.read(run_folder(args, name, seed) / "results.jsonl")
    found = [r for r in records if (r.get("weights"), r.get("step")) == (weights, step)]
    return found[-1] if found else None


if __name__ == "__main__":
    run(main)
