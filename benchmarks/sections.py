"""The sections of `benchmarks.speed`: each is a function of the Sides and the flags."""

import math
import resource
import statistics
import tempfile
from collections import defaultdict, deque
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from itertools import cycle, islice
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from benchmarks import machine, profiling, work
from benchmarks.approximate import measure
from benchmarks.cases import CASES
from benchmarks.sides import Updates, draw_seeds, whole_steps
from benchmarks.steps import pick_steps
from benchmarks.timing import (
    TITLES,
    Counter,
    compare,
    count_launches,
    cudnn_attention,
    table,
    timed,
)
from models.fast import graphs
from util.data import convert
from util.data.cached import open_cache, write_moments
from util.data.loader import Loader
from util.rng import image_generators

CACHED = 2048  # images of the loader's caches
RANDOM_START = 980  # from 999, samples of random weights are unbounded


def products(sides, args):
    """The rates of torch's products and oneDNN's."""
    print("\n## Products\n")
    if sides.gpu:
        print("torch's: oneDNN is for CPUs")
        return
    sizes = args.train_batch, args.batch_sizes, args.num_iter
    for line in machine.product_lines(sides.model, *sizes):
        print(line, flush=True)


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
    parts = []
    table(TITLES, (sampling_row(sides, args, bsz, parts) for bsz in args.batch_sizes))
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


def sampling_row(sides, args, bsz, parts):
    """The row of a batch size; that of its parts is appended to `parts`."""
    if sides.gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        with sides.autocast():
            steps = list(pick_steps(sides, args.timed_steps, bsz))
            row = compare_steps(sides, steps, bsz, args.rounds)
            parts.append([f"batch {bsz}", *part_columns(sides, steps, args)])
    except torch.OutOfMemoryError:
        return [f"batch {bsz}", *["out of memory"] * (len(TITLES) - 1)]
    return row


def images(sides, args):
    """Time ours on whole batches of images: the first call and later ones, then without graphs."""
    print(f"\n## Sampling whole images, {args.num_iter} steps, ours, s\n")
    if not sides.gpu and CASES[args.model].large and not args.sections:
        print("left out: minutes on a CPU; `--sections images` runs it there too")
        return
    kinds = {", without cuDNN's attention": False, "": True} if sides.gpu else {"": True}
    rows = (
        [f"batch {bsz}{what}", *time_images(sides, bsz, args.rounds, enabled)]
        for bsz in args.batch_sizes
        for what, enabled in kinds.items()
    )
    table(["", "first call", "later", "images/s", "peak GiB"], rows)
    bsz = args.batch_sizes[0]
    with mock.patch.object(graphs, "enabled", False):
        without = timed(partial(sample_images, sides, bsz), sides.device)[0]
    print(f"\nbatch {bsz} without CUDA graphs: {without:.4g} s")


def sample_images(sides, bsz):
    """Sample a batch."""
    with sides.starting_at(random_start(sides)):
        sides.images(bsz)[0]()


def random_start(sides):
    """The timestep from which samples of random weights are bounded."""
    return min(RANDOM_START, sides.sampling.max_timestep or RANDOM_START)


def time_images(sides, bsz, rounds, enabled):
    """Seconds of a batch of images, images per second, and peak memory, as text.

    enabled: whether torch may take cuDNN's attention.
    """
    head = sides.model.diffloss
    head.fast = type(head.fast)()  # without what was recorded before
    if sides.gpu:
        torch.cuda.reset_peak_memory_stats()
    sample = partial(sample_images, sides, bsz)
    with cudnn_attention(enabled):
        first = timed(sample, sides.device)[0]
        later = statistics.median(timed(sample, sides.device)[0] for _ in range(rounds))
    peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if sides.gpu else "–"
    return [*(f"{x:.4g}" for x in (first, later, bsz / later)), peak]


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
    prepare_training(sides, args)
    rows, notes, draws = [], [], count_draws(args)
    kinds = {"forward and backward": True}
    if sides.gpu and not args.compile:  # the other one last: only what it alone prepares is new
        kinds = {"forward and backward, without cuDNN's attention": False, **kinds}
    for what, enabled in kinds.items():
        with cudnn_attention(enabled):
            notes.append(f"{what}: {warm_up(sides, sides.training(args.train_batch, draws), args)}")
            pair, before = sides.training(args.train_batch, draws), allocations()
            rows.append(compare(what, *pair, args.rounds, sides.device))
            notes[-1] += f", then {allocations() - before}"
    sides.eval()
    table(TITLES, rows)
    print("\nFirst calls, each with another number of masked tokens (medians; what CUDA allocated)")
    print("\n".join(["", *(f"- {note}" for note in notes)]))
    print_rate(sides, args, float(rows[-1][1]) / 1e3)


def count_draws(args):
    """How many training steps differ; with --compile few, as each is compiled."""
    return min(2 if args.compile else 8, args.rounds)


def allocations():
    """How often memory was asked of CUDA so far."""
    return torch.cuda.memory_stats().get("num_device_alloc", 0) if torch.cuda.is_available() else 0


def warm_up(sides, pair, args):
    """Each call of a pair for the first time, in turns; what that took, as text.

    A process pays it once for each shape: plans of cuDNN's attention, kernels, memory.
    """
    before = allocations()
    seconds = {"ours": [], "plain": []}
    for _ in range(count_draws(args)):
        for name, function in zip(seconds, pair, strict=True):
            seconds[name].append(timed(function, sides.device)[0])
    texts = [f"{name} {1e3 * statistics.median(x):.4g} ms" for name, x in seconds.items()]
    return f"{', '.join(texts)}; {allocations() - before} allocations"


def print_rate(sides, args, seconds):
    """Print what ours computed per second in the calls that were timed."""
    model, draws = sides.model, draw_seeds(count_draws(args))
    timed_ones = islice(cycle(draws), 1, 1 + args.rounds)  # the first was cold
    seeds = [torch.Generator().manual_seed(seed) for seed in timed_ones]
    masked = [math.ceil(model.sample_mask_ratio(seed) * model.seq_len) for seed in seeds]
    flops = args.train_batch * work.training_flops(model, statistics.mean(masked))
    rate = flops / seconds / 1e12
    mfu = f", {rate / args.peak_tflops:.0%} of the peak (MFU)" if sides.gpu else ""
    print(f"\nours: {rate:.3g} TFLOP/s by the shapes{mfu}")


def prepare_training(sides, args):
    """Training mode; ours compiled if that is asked for."""
    sides.train()
    if args.compile and not sides.model.compiled:
        for module, dynamic in sides.model.to_compile():
            module.compile(dynamic=dynamic)


def step(sides, args):
    """Time whole optimizer steps."""
    print(f"\n## A training step of {args.train_batch} images: all of it, ms\n")
    prepare_training(sides, args)
    pair = whole_steps(sides, Updates(sides), args.train_batch, count_draws(args))
    if args.compile:
        print(f"with what is compiled for {count_draws(args)} mask ratios: ", end="")
    print(f"first calls: {warm_up(sides, pair, args)}\n")
    rows = [compare("whole step", *pair, args.rounds, sides.device)]
    sides.eval()
    table(TITLES, rows)
    print(f"\n{args.train_batch / float(rows[0][1]) * 1e3:.4g} images/s")
    print_peak_memory(sides)


def profile(sides, args):
    """Follow whole steps of ours."""
    print(f"\n## Where a training step of {args.train_batch} images goes\n")
    prepare_training(sides, args)
    draws = min(profiling.STEPS, count_draws(args))
    ours, _ = whole_steps(sides, Updates(sides), args.train_batch, draws)
    first = [timed(ours, sides.device)[0] for _ in range(profiling.STEPS)]
    print(f"first calls, s: {', '.join(f'{x:.2f}' for x in first)}")
    profiling.profile(ours, sides.device)
    sides.eval()


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
        with redirect_stdout(StringIO()):  # its progress is no Markdown
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
    if not sides.gpu and CASES[args.model].large and not args.sections:
        print("left out: more than an hour on a CPU; `--sections approximate` runs it there too")
        return
    labels = sides.labels(bsz)

    def sample(seed, sampling):
        generators = image_generators(seed, range(bsz))
        with sides.autocast():
            latents = model.sample_tokens(
                bsz, labels=labels, generator=generators, **sampling.asdict()
            )
        return latents.cpu().numpy()

    rows = measure(model, sample, sides.sampling.but(max_timestep=random_start(sides)), args.rounds)
    rows = [[name, f"{1e3 * s:.4g}", f"{ratio:.2f}", far] for name, s, ratio, far in rows]
    table(["mode", "ms", "exact / mode", "distance of latents"], rows)
    print(
        "\nThe weights are random: a distance says that samples differ, not its cost. For a "
        "trained model: python -m benchmarks.approximate"
    )
