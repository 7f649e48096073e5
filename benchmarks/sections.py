"""The sections of `benchmarks.speed`: each is a function of the Sides and the flags."""

import math
import resource
import statistics
import tempfile
from collections import defaultdict, deque
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from benchmarks import work
from benchmarks.approximate import measure
from benchmarks.sides import Updates
from benchmarks.steps import pick_steps
from benchmarks.timing import TITLES, Counter, compare, count_launches, table, timed
from models.fast import graphs
from util.data import convert
from util.data.cached import open_cache, write_moments
from util.data.loader import Loader
from util.rng import image_generators

CACHED = 2048  # images of the loader's caches
RANDOM_START = 980  # from 999, samples of random weights are unbounded


def head(sides, args):
    """Time all diffusion steps of some tokens."""
    print("\n## The head: all diffusion steps of some tokens, ms\n")
    with sides.autocast():
        rows = [
            compare(f"{n} tokens", *sides.head(n), args.rounds, sides.device)
            for n in ((4, 8, 64, 1024) if sides.gpu else (4, 8, 64))
        ]
        table(TITLES, rows)
        print("\nFor each diffusion step:\n")
        names = ["operations", "tensors made on the host", "launches", "host copies"]
        pair = zip(("ours", "plain"), sides.head(4), strict=True)
        table(["", *names], [[name, *operations(sides, side)] for name, side in pair])
    print("\nWith guidance a token is two rows of the network.")


def operations(sides, side):
    """Operations, host-made tensors, launches and copies of a call, per diffusion step, as text."""
    with Counter() as counter:
        side()
    counts = [counter.operations, counter.made]
    if sides.gpu:
        counts += count_launches(side, sides.device)
    counts = [f"{count / sides.diffusion_steps:.1f}" for count in counts]
    return counts + ["–"] * (4 - len(counts))


def sampling(sides, args):
    """Time an autoregressive step."""
    print("\n## Sampling: an autoregressive step, ms\n")
    rows, parts = [], []
    for bsz in args.batch_sizes:
        if sides.gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            with sides.autocast():
                steps = list(pick_steps(sides, args.timed_steps, bsz))
                rows.append(compare_steps(sides, steps, bsz, args.rounds))
                parts.append([f"batch {bsz}", *part_columns(sides, steps, args)])
        except torch.OutOfMemoryError:
            rows.append([f"batch {bsz}", *["out of memory"] * 5])
    table(TITLES, rows)
    numbers = ", ".join(str(step.number) for step in pick_steps(sides, args.timed_steps, 1))
    print(
        f"\nThe mean of steps {numbers} of {args.num_iter}; an image takes all of them. "
        "Ours by parts, ms, each waited for:\n"
    )
    bound = ["lower bound", "bound / ours"] if sides.gpu else ["TFLOP"]
    table(["", "encoder", "decoder", "head", "host and noise", *bound], parts)
    with sides.autocast():
        once, _ = timed(partial(sides.model.head.sampler, sides.sampling), sides.device)
    print(f"\nbesides, {1e3 * once:.3g} ms once per batch: the head's weights arranged")
    print_peak_memory(sides)


def images(sides, args):
    """Time ours on whole batches of images: the first call, a later one, and without graphs."""
    print(f"\n## Sampling whole images, {args.num_iter} steps, ours, s\n")
    if not sides.gpu and args.model != "tiny" and not args.sections:
        print("left out: minutes on a CPU; `--sections images` runs it there too")
        return
    rows = [[f"batch {bsz}", *time_images(sides, bsz, args.rounds)] for bsz in args.batch_sizes]
    table(["", "first call", "later", "images/s", "without graphs", "peak GiB"], rows)


def time_images(sides, bsz, rounds):
    """Seconds of a batch of images, images per second, and peak memory, as text."""
    model, sampling = sides.model, sides.sampling.but(max_timestep=RANDOM_START)
    labels = torch.arange(bsz, device=sides.device) % model.class_num
    model.diffloss.fast = type(model.diffloss.fast)()  # without what was recorded before

    def sample():
        generators = image_generators(0, range(bsz))
        with sides.autocast():
            model.sample_tokens(bsz, labels=labels, generator=generators, **sampling.asdict())

    if sides.gpu:
        torch.cuda.reset_peak_memory_stats()
    first = timed(sample, sides.device)[0]
    later = statistics.median(timed(sample, sides.device)[0] for _ in range(rounds))
    peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if sides.gpu else "–"
    with mock.patch.object(graphs, "enabled", False):
        without = min(timed(sample, sides.device)[0] for _ in range(1 + rounds))
    return [*(f"{x:.4g}" for x in (first, later, bsz / later, without)), peak]


def compare_steps(sides, steps, bsz, rounds):
    """A row of `compare`: the mean of some steps."""

    def ours():
        for step in steps:
            step.ours()

    def plain():
        for step in steps:
            step.plain()

    return compare(f"batch {bsz}", ours, plain, rounds, sides.device, 1e3 / len(steps))


def part_columns(sides, steps, args):
    """Milliseconds of each part of our step, and its lower bound, as text."""
    parts = time_parts(sides, steps, args.rounds)
    whole = parts.pop("whole")
    columns = [f"{1e3 * x:.4g}" for x in (*parts.values(), whole - sum(parts.values()))]
    flops = statistics.mean(work.step_flops(sides.model, step) for step in steps)
    if not sides.gpu:
        return [*columns, f"{flops / 1e12:.3f}"]
    read = work.bytes_read(sides.model, 2 if sides.precision == "bf16" else 4)
    read /= args.peak_tbs * 1e12
    rate = args.peak_tflops * 1e12
    bound = statistics.mean(max(work.step_flops(sides.model, s) / rate, read) for s in steps)
    return [*columns, f"{1e3 * bound:.4g}", f"{bound / whole:.0%}"]


def time_parts(sides, steps, rounds):
    """Mean seconds of our step (`whole`) and of its parts: name -> float."""
    seconds = defaultdict(float)

    def watched(name, function):
        def call(*args, **kwargs):
            taken, result = timed(partial(function, *args, **kwargs), sides.device)
            seconds[name] += taken / rounds / len(steps)
            return result

        return call

    model = sides.model
    owners = {"encode": model, "decode": model, "_replay": model.head.fast}
    for name, owner in owners.items():
        setattr(owner, name, watched(name, getattr(owner, name)))
    try:
        for _ in range(rounds):
            for step in steps:
                watched("whole", step.ours)()
    finally:
        for name, owner in owners.items():
            delattr(owner, name)
    return {name: seconds[name] for name in (*owners, "whole")}


def print_peak_memory(sides):
    """Peak memory of the GPU, or of the process."""
    if sides.gpu:
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"\npeak memory, both sides: {peak:.1f} GiB")
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"\npeak memory of the process, both models: {peak:.1f} GiB")


def training(sides, args):
    """Time forward and backward passes of a batch."""
    print(f"\n## Training: forward and backward of {args.train_batch} images, ms\n")
    model = sides.model
    prepare_training(sides, args)
    pair = sides.training(args.train_batch)
    row = compare("with dropout", *pair, args.rounds, sides.device)
    sides.eval()
    table(TITLES, [row])
    # the draws of the calls that were timed: the first one, of seed 1, was cold
    seeds = [torch.Generator().manual_seed(2 + i) for i in range(args.rounds)]
    masked = [math.ceil(model.sample_mask_ratio(seed) * model.seq_len) for seed in seeds]
    flops = args.train_batch * work.training_flops(model, statistics.mean(masked))
    rate = flops / (float(row[1]) / 1e3) / 1e12
    mfu = f", {rate / args.peak_tflops:.0%} of the peak (MFU)" if sides.gpu else ""
    print(f"\nours: {rate:.3g} TFLOP/s by the shapes{mfu}")


def prepare_training(sides, args):
    """Training mode; ours compiled if that is asked for."""
    sides.train()
    if args.compile and not sides.model.compiled:
        for module, dynamic in sides.model.to_compile():
            module.compile(dynamic=dynamic)


def step(sides, args):
    """Time whole optimizer steps: forward, backward, clipping, AdamW, EMA."""
    print(f"\n## A training step of {args.train_batch} images: all of it, ms\n")
    updates = Updates(sides)
    prepare_training(sides, args)
    pair = sides.training(args.train_batch)

    def side(model, passes, update):
        def run():
            passes()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
            update()

        return run

    ours = side(sides.model, pair[0], updates.ours)
    plain = side(sides.plain, pair[1], updates.plain)
    if args.compile:
        print(f"the first step, with what is compiled for it: {timed(ours, sides.device)[0]:.1f} s")
    rows = [compare("whole step", ours, plain, args.rounds, sides.device)]
    sides.eval()
    table(TITLES, rows)
    print(f"\n{args.train_batch / float(rows[0][1]) * 1e3:.4g} images/s")
    print_peak_memory(sides)


def optimizer(sides, args):
    """An update of the weights and their averages."""
    print("\n## Optimizer and EMA, ms\n")
    updates = Updates(sides)
    row = compare("AdamW, EMA", updates.ours, updates.plain, args.rounds, sides.device)
    table(TITLES, [row])
    for model in (sides.model, sides.plain):
        model.zero_grad(set_to_none=True)


def loader(sides, args):
    """A pass over cached latents: shards against a file per image."""
    print(f"\n## Loader: {CACHED} cached latents in batches of 64, warm, ms\n")
    with tempfile.TemporaryDirectory() as folder:
        plain, ours = Path(folder) / "images", Path(folder) / "shards"
        write_cache(plain)
        convert.convert(plain, ours, "shards")
        plain, ours = passes_over(plain), passes_over(ours)
        for _ in range(3):  # each pass draws other flips: until every page has been touched
            ours()
        row = compare("a pass over the data", ours, plain, args.rounds, sides.device)
    table(TITLES, [row])
    print("\nPlain is one file per image, as published; ours is `main_cache.py --layout shards`.")


def write_cache(folder, count=CACHED):
    """Write random moments in eight classes, one file per image."""
    generator = np.random.default_rng(0)
    for i in range(count):
        moments = generator.standard_normal((2, 32, 16, 16), np.float32)
        write_moments(folder / f"{i % 8}" / f"{i}.JPEG.npz", *moments)


def passes_over(cache):
    """A function that reads and discards all batches of a cache."""
    loader = Loader(open_cache(cache, (32, 16, 16), 8), 64, 0, seed=0)
    return partial(deque, loader.epoch(0), 0)


def approximate(sides, args):
    """Compare exact with approximate sampling, both ours."""
    bsz, model = args.batch_sizes[0], sides.model
    print(f"\n## Approximations, batch {bsz}: ours exact against ours approximate\n")
    if not sides.gpu and args.model != "tiny" and not args.sections:
        print("left out: most of an hour on a CPU; `--sections approximate` runs it there too")
        return
    labels = torch.arange(bsz, device=sides.device) % model.class_num

    def sample(seed, sampling):
        generators = image_generators(seed, range(bsz))
        with sides.autocast():
            latents = model.sample_tokens(
                bsz, labels=labels, generator=generators, **sampling.asdict()
            )
        return latents.cpu().numpy()

    rows = measure(model, sample, sides.sampling.but(max_timestep=RANDOM_START), args.rounds)
    rows = [[name, f"{1e3 * s:.4g}", f"{ratio:.2f}", far] for name, s, ratio, far in rows]
    table(["mode", "ms", "exact / mode", "distance of latents"], rows)
    print(
        "\nThe weights are random: a distance says that samples differ, not its cost. For a "
        "trained model: python -m benchmarks.approximate"
    )
