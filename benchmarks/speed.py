"""How fast sampling and training are: python -m benchmarks.speed --model base

Ours and the plain implementation of `benchmarks.plain`, with the same random weights, in turns in
one process: a cold run of each is dropped, then medians and minima of the rounds. First it prints
the largest relative differences of results for the same noise; where one is above 1e-5 it prints no
speed-up and ends with status 1. All that is exact is one block; what approximates is another, where
ours is compared with ours.
"""

import contextlib
import math
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections import deque
from functools import partial
from pathlib import Path

import numpy as np
import torch

import models.linear
from benchmarks import approximate, plain
from engine_mar import parameter_groups
from models import build_model
from models.autoregressive import CFG_SCHEDULES, take
from models.order import token_counts
from util import caches, dist
from util.data import cached_set, training_loader, write_moments
from util.ema import EMA
from util.flags import Parser, add_device_flag, finite, positive, positive_int, run
from util.precision import autocast
from util.rng import image_generators

TOLERANCE = 1e-5
BOUNDED = 950  # 1/sqrt(ᾱ) is 13 there
SECTIONS = ("head", "sampling", "training", "optimizer", "loader", "approximate")
HEADS = {"tiny": (2, 64), "base": (6, 1024), "large": (8, 1280), "huge": (12, 1536)}  # of table 4
LOADED = 2048  # images of the loader's caches


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=HEADS, default="base", help="its size")
    parser.add_argument(
        "--diffloss_d", type=positive_int, help="blocks of the head (default: table 4's)"
    )
    parser.add_argument(
        "--diffloss_w", type=positive_int, help="width of the head (default: table 4's)"
    )
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="what to measure"
    )
    parser.add_argument(
        "--batch_sizes",
        type=positive_int,
        nargs="+",
        help="of sampling (default: 1 4, on a GPU 1 16 256)",
    )
    parser.add_argument(
        "--train_batch", type=positive_int, help="images a training step (default: 2, on a GPU 64)"
    )
    parser.add_argument("--rounds", type=positive_int, default=5, help="counted, after a cold one")
    parser.add_argument("--num_iter", type=positive_int, default=64, help="autoregressive steps")
    parser.add_argument(
        "--timed_steps",
        type=positive_int,
        default=4,
        help="so many of these are timed, from the middle of equal parts of the whole",
    )
    parser.add_argument("--num_sampling_steps", default="100", help="diffusion steps")
    parser.add_argument("--cfg", type=finite, default=3.0, help="guidance scale")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="(default: fp32, on a GPU bf16)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="ours with --compile, in the section training"
    )
    parser.add_argument(
        "--torch_linear",
        action="store_true",
        help="on a CPU, leave linear layers to torch on both sides: what is gained without oneDNN",
    )
    parser.add_argument(
        "--peak_tflops",
        type=positive,
        default=790,
        help="of the GPU, for MFU and roofline; the default is an H200's",
    )
    parser.add_argument(
        "--peak_tbs", type=positive, default=4.3, help="TB/s of its memory; also an H200's"
    )
    add_device_flag(parser)
    args = parser.parse_args(argv)

    bench = Bench(args)
    bench.describe()
    differences = bench.differences()
    print("\n## Largest relative differences for the same noise, float32\n")
    table(["what", "difference"], [[name, f"{value:.1e}"] for name, value in differences.items()])
    if not all(value <= TOLERANCE for value in differences.values()):  # nor where one is nan
        print(f"\nabove {TOLERANCE:.0e}: these are not the same computation; no speed is measured")
        sys.exit(1)
    if bench.precision != "fp32":
        found = bench.reduced()
        print(f"\nThe head in {bench.precision}, from plain in float32:\n")
        table(["side", "difference"], [[name, f"{value:.1e}"] for name, value in found.items()])
        if not found["ours"] <= 2 * found["plain"]:
            print("\nours is further off than twice plain; no speed is measured")
            sys.exit(1)
    for section in SECTIONS:
        if section in args.sections:
            getattr(bench, section)()


class Bench:
    """Both sides and what they are measured on."""

    def __init__(self, args):
        self.args = args
        self.device = dist.init(args.device)
        self.gpu = self.device.type != "cpu"
        self.precision = args.precision or ("bf16" if self.gpu else "fp32")
        self.batch_sizes = args.batch_sizes or ([1, 16, 256] if self.gpu else [1, 4])
        self.train_batch = args.train_batch or (64 if self.gpu else 2)
        models.linear.enabled = not args.torch_linear
        depth, width = HEADS[args.model]
        with torch.device(self.device):
            self.model = build_model(
                f"mar_{args.model}",
                diffloss_d=args.diffloss_d or depth,
                diffloss_w=args.diffloss_w or width,
                num_sampling_steps=args.num_sampling_steps,
            )
            generator = torch.Generator(self.device).manual_seed(0)
            for name, p in self.model.named_parameters():  # layers that start at 0 hide differences
                scale = p[0].numel() ** -0.5 if p.ndim > 1 and name.endswith("weight") else 0.02
                torch.nn.init.normal_(p, 1.0 * (p.ndim == 1 and "weight" in name), scale, generator)
            self.plain = plain.PlainMAR(self.model)
        self.model.eval(), self.plain.eval()
        self.length = self.model.seq_len
        if args.num_iter > self.length:
            raise ValueError(
                f"--num_iter {args.num_iter}: expected at most {self.length}, the tokens"
            )
        self.channels = self.model.token_embed_dim

    # ---- what is measured, and how -----------------------------------------------------------

    def describe(self):
        processor = platform.processor() or platform.machine()
        with contextlib.suppress(OSError):
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            processor = next(x for x in lines if x.startswith("model name")).split(": ")[1]
        where = f"{torch.get_num_threads()} threads of {processor}"
        if self.gpu:
            where = torch.cuda.get_device_name(self.device)
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        net = self.model.diffloss.net
        head = f"{len(net.res_blocks)}×{net.input_proj.out_features}"
        print(
            f"{where}, torch {torch.__version__}, {self.precision}; MAR {self.args.model} "
            f"({millions:.0f}M, head {head}), {self.args.num_iter} autoregressive and "
            f"{self.args.num_sampling_steps} diffusion steps, guidance {self.args.cfg:g}; "
            f"{self.args.rounds} rounds"
            + (", torch's linear layers on both sides" if self.args.torch_linear else "")
        )

    def in_turns(self, sides, before=None):
        """Seconds of each call, one list for each of some functions: name -> list."""
        seconds = {name: [] for name in sides}
        for _ in range(1 + self.args.rounds):
            for name, side in sides.items():
                if before:
                    before(name)
                self.wait()
                begin = time.perf_counter()
                side()
                self.wait()
                seconds[name].append(time.perf_counter() - begin)
        return {name: values[1:] for name, values in seconds.items()}

    def wait(self):
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def compare(self, what, sides, unit=1e3, before=None):
        """A row: medians and minima of both sides in milliseconds, and the ratio of medians."""
        seconds = self.in_turns(sides, before)
        ours, theirs = (seconds[name] for name in ("ours", "plain"))
        ratio = statistics.median(theirs) / statistics.median(ours)
        figures = [f(x) * unit for x in (ours, theirs) for f in (statistics.median, min)]
        return [what, *(f"{x:.4g}" for x in figures), f"{ratio:.2f}"]

    def autocast(self):
        return autocast(self.device, self.precision)

    def draw(self, *shape, seed=0):
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device)

    # ---- the same numbers --------------------------------------------------------------------

    def start_at(self, timestep):
        """Begin the reverse process of both there; None: at its very end."""
        head = self.model.diffloss
        head.max_timestep = timestep
        self.plain.diffloss.first = head.gen_diffusion.first_step(timestep)

    def reduced(self):
        """In a lower precision: how far each side is from plain in float32, name -> difference.

        Ours twice, of other rows first: a graph that replays what it recorded would show.
        """
        self.start_at(BOUNDED)
        noise = self.draw(self.steps + 1, 8, self.channels)
        _, theirs = self.head_sides(8, noise=noise)
        exact = theirs()[:8]
        with self.autocast():
            self.head_sides(8, noise=noise.flip(1))[0]()
            ours, theirs = self.head_sides(8, noise=noise)
            found = {"ours": relative(ours(), exact), "plain": relative(theirs()[:8], exact)}
        self.start_at(None)
        return found

    def differences(self):
        """What of ours differs how much from plain: name -> largest |a − b| / largest |b|."""
        matmul = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        found = {}
        noise = self.draw(self.steps + 1, 8, self.channels)
        # from 999 random weights send samples so far out that half of the computation hardly
        # shows; from 950 all of it does
        for start in (None, BOUNDED):
            self.start_at(start)
            ours, theirs = self.head_sides(8, noise=noise)
            name = f"head, 8 tokens, from {start or 999}"
            found[name] = relative(ours(), theirs()[:8])
        for state in self.states(2, noise=True):
            ours, theirs = (side() for side in state.sides())
            found[f"autoregressive step {state.number}, batch 2, from 950"] = relative(ours, theirs)
        self.start_at(None)
        ours, theirs = self.training_sides(2, same=True)
        found["training loss"] = relative(ours(), theirs())
        ours, theirs = (
            torch.cat([p.grad.flatten() for p in side.parameters() if p.grad is not None])
            for side in (self.model, self.plain)
        )  # as one vector: the gradient of a key's bias is nothing but rounding
        found["gradients, their norm"] = ((ours - theirs).norm() / theirs.norm()).item()
        self.optimizer_sides(steps=3, found=found)
        torch.set_float32_matmul_precision(matmul)
        return found

    # ---- exact -------------------------------------------------------------------------------

    @property
    def steps(self):
        return self.model.diffloss.gen_diffusion.num_steps

    def head_sides(self, rows, noise=None):
        """Both heads on `rows` tokens with guidance."""
        width = self.model.fake_latent.shape[1]
        z, z_uncond = self.draw(rows, width, seed=1), self.draw(rows, width, seed=2)
        draw = self.model.diffloss.start_sampling()
        both = torch.cat([z, z_uncond])
        return (
            lambda: draw(z, self.args.cfg, z_uncond, noise=noise),
            torch.no_grad()(
                lambda: self.plain.diffloss.sample(both, self.args.cfg, guided=True, noise=noise)
            ),
        )

    def head(self):
        print("\n## The head: all diffusion steps of some tokens, ms\n")
        rows = []
        with self.autocast():
            for n in (4, 8, 64) if not self.gpu else (4, 8, 64, 1024):
                ours, theirs = self.head_sides(n)
                rows.append(self.compare(f"{n} tokens", {"ours": ours, "plain": theirs}))
            table(["", "ours", "least", "plain", "least", "plain / ours"], rows)
            self.count_operations(*self.head_sides(4))
        print("\nWith guidance a token is two rows of the network.")

    def count_operations(self, ours, theirs):
        """Operations and host-made tensors for each diffusion step."""
        rows = []
        for name, side in (("ours", ours), ("plain", theirs)):
            with Counter() as counter:
                side()
            kernels, copies = self.launches(side) if self.gpu else ("–", "–")
            figures = [counter.operations / self.steps, counter.made / self.steps]
            rows.append([name, *(f"{x:.1f}" for x in figures), kernels, copies])
        print("\nFor each diffusion step:\n")
        table(["", "operations", "tensors made on the host", "launches", "host copies"], rows)

    def launches(self, side):
        """Kernels or graphs launched and host-to-device copies of a call, a diffusion step."""
        from torch.profiler import ProfilerActivity, profile

        side()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            side()
            self.wait()
        names = [event.name for event in profiler.events()]
        launches = sum("LaunchKernel" in name or "GraphLaunch" in name for name in names)
        copies = sum("Memcpy HtoD" in name for name in names)
        return [f"{x / self.steps:.1f}" for x in (launches, copies)]

    def states(self, bsz, noise=False):
        """Autoregressive steps to time: from the middle of equal parts of all."""
        counts = [self.length, *token_counts(self.length, self.args.num_iter)]
        timed = min(self.args.timed_steps, self.args.num_iter)
        for part in range(timed):
            step = (2 * part + 1) * self.args.num_iter // (2 * timed)
            yield Step(self, step, counts[step], counts[step + 1], bsz, noise)

    def sampling(self):
        print("\n## Sampling: an autoregressive step, ms\n")
        rows, parts = [], []
        for bsz in self.batch_sizes:
            states = list(self.states(bsz))
            if self.gpu:
                torch.cuda.reset_peak_memory_stats()
            try:
                with self.autocast():
                    for state in states:
                        state.arrange()
                    both = {
                        "ours": partial(all_of, [state.ours for state in states]),
                        "plain": partial(all_of, [state.theirs for state in states]),
                    }
                    rows.append(self.compare(f"batch {bsz}", both, 1e3 / len(states)))
                    parts.append([f"batch {bsz}", *self.parts(states, bsz)])
            except torch.OutOfMemoryError:
                rows.append([f"batch {bsz}", *["out of memory"] * 5])
        asked = ", ".join(str(s.number) for s in self.states(1))
        table(["", "ours", "least", "plain", "least", "plain / ours"], rows)
        print(
            f"\nThe mean of steps {asked} of {self.args.num_iter}; an image takes all of them. "
            "Ours by parts, ms, each waited for:\n"
        )
        with self.autocast():
            begin = time.perf_counter()
            self.model.head.start_sampling()
            self.wait()
            once = 1e3 * (time.perf_counter() - begin)
        limit = ["least possible", "share of it"] if self.gpu else ["TFLOP"]
        table(["", "encoder", "decoder", "head", "host and noise", *limit], parts)
        print(
            f"\nbesides, {once:.3g} ms once for all steps of a batch: the head's weights arranged"
        )
        if self.gpu:
            peak = torch.cuda.max_memory_allocated() / 2**30
            print(f"\npeak memory, both sides: {peak:.1f} GiB")
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"\npeak memory of the process, both models: {peak:.1f} GiB")

    def parts(self, states, bsz):
        """Milliseconds of each part of our step, and what the hardware would need for it."""
        seconds = {"encode": 0.0, "decode": 0.0, "_denoise": 0.0, "all": 0.0}

        def timed(name, function):
            def call(*args, **kwargs):
                self.wait()
                begin = time.perf_counter()
                result = function(*args, **kwargs)
                self.wait()
                seconds[name] += time.perf_counter() - begin
                return result

            return call

        head = self.model.diffloss
        owners = {"encode": self.model, "decode": self.model, "_denoise": head}
        for name, owner in owners.items():
            setattr(owner, name, timed(name, getattr(owner, name)))
        for _ in range(self.args.rounds):
            for state in states:
                timed("all", state.ours)()
        for name, owner in owners.items():
            delattr(owner, name)
        scale = 1e3 / len(states) / self.args.rounds
        named = [seconds[name] for name in owners]
        figures = [f"{x * scale:.4g}" for x in (*named, seconds["all"] - sum(named))]
        flops = sum(self.step_flops(state, bsz) for state in states) / len(states)
        if not self.gpu:
            return [*figures, f"{flops / 1e12:.3f}"]
        least = sum(self.least(state, bsz) for state in states) / len(states)
        return [*figures, f"{least * 1e3:.4g}", f"{least * 1e3 / (seconds['all'] * scale):.0%}"]

    # ---- FLOPs and bytes from shapes ---------------------------------------------------------

    def transformer_flops(self, known):
        """Of one image and one stream: encoder and decoder."""
        model = self.model
        buffer, width = model.buffer_size, model.fake_latent.shape[1]

        def stack(blocks, tokens):
            return len(blocks) * (24 * tokens * width**2 + 4 * tokens**2 * width)

        return stack(model.encoder_blocks, buffer + known) + stack(
            model.decoder_blocks, buffer + self.length
        )

    def head_flops(self):
        """Of one row and one evaluation of the denoising MLP, its embeddings of t and z aside."""
        return 2 * sum(
            p.numel()
            for name, p in self.model.diffloss.net.named_parameters()
            if p.ndim > 1 and not name.startswith(("time_embed", "cond_embed"))
        )

    def step_flops(self, state, bsz):
        """Of an autoregressive step with guidance: what the mathematics asks for."""
        rows = 2 * bsz * (state.unknown - state.remaining)
        transformer = 2 * bsz * self.transformer_flops(self.length - state.unknown)
        return transformer + rows * self.steps * self.head_flops()

    def least(self, state, bsz):
        """Seconds that this device needs at least: for the FLOPs, or for reading weights."""
        flops = self.step_flops(state, bsz) / (self.args.peak_tflops * 1e12)
        head = self.model.diffloss.net
        mlp = sum(p.numel() for block in head.res_blocks for p in block.mlp.parameters())
        joined = sum(p.numel() for p in head.parameters()) - mlp
        transformer = sum(p.numel() for p in self.model.parameters()) - mlp - joined
        width = 2 if self.precision == "bf16" else 4
        read = width * (transformer + joined + self.steps * mlp) / (self.args.peak_tbs * 1e12)
        return max(flops, read)

    # ---- training ----------------------------------------------------------------------------

    def training_sides(self, bsz, same=False):
        """Forward and backward of both on a batch. same: of the same draws, by order in ours."""
        model, theirs = self.model, self.plain
        latents = self.draw(bsz, model.vae_embed_dim, model.seq_h, model.seq_w, seed=3)
        labels = torch.arange(bsz, device=self.device) % model.class_num
        mul = model.diffloss.diffusion_batch_mul

        def draws(generator, step_generator):
            """The draws of our forward again, in its order; for all tokens."""
            orders = model.sample_orders(bsz, generator)
            if model.training:
                torch.rand(bsz, 1, generator=generator, device=self.device)  # dropped labels
            unknown = math.ceil(model.sample_mask_ratio(step_generator) * self.length)
            asked = orders[:, :unknown]
            t = model.diffloss.draw_timesteps((mul, bsz, unknown), generator, self.device)
            shape = (mul, bsz, unknown, self.channels)
            noise = torch.randn(shape, generator=generator, device=self.device)
            mask = torch.zeros(bsz, self.length, device=self.device).scatter(1, asked, 1.0)
            index = asked.expand(mul, -1, -1)
            t = torch.zeros(mul, bsz, self.length, dtype=t.dtype, device=self.device).scatter(
                2, index, t
            )
            noise = torch.zeros(mul, bsz, self.length, self.channels, device=self.device).scatter(
                2, index.unsqueeze(-1).expand(shape), noise
            )
            return mask, t.flatten(), noise.flatten(0, 2)

        turns = {"ours": 0, "plain": 0}

        def generators(side):
            """Of the side's next turn: both mask as many tokens at the same turn."""
            turns[side] += not same
            made = torch.Generator(self.device), torch.Generator()
            return [g.manual_seed(turns[side]) for g in made]

        def ours():
            model.zero_grad(set_to_none=True)
            with self.autocast() if not same else contextlib.nullcontext():
                loss = model(latents, labels, *generators("ours"))
            loss.backward()
            return loss.detach()

        def other():
            theirs.zero_grad(set_to_none=True)
            with self.autocast() if not same else contextlib.nullcontext():
                mask, t, noise = draws(*generators("plain"))
                loss = theirs(model.patchify(latents), theirs.class_emb(labels), mask, t, noise)
            loss.backward()
            return loss.detach()

        return ours, other

    def training(self):
        print(f"\n## Training: forward and backward of {self.train_batch} images, ms\n")
        self.model.train(), self.plain.train()
        if self.args.compile:
            self.model.compile_training()
        ours, theirs = self.training_sides(self.train_batch)
        row = self.compare("with dropout", {"ours": ours, "plain": theirs})
        self.model.eval(), self.plain.eval()
        table(["", "ours", "least", "plain", "least", "plain / ours"], [row])
        turns = [torch.Generator().manual_seed(1 + turn) for turn in range(1, 1 + self.args.rounds)]
        masked = [math.ceil(self.model.sample_mask_ratio(turn) * self.length) for turn in turns]
        masked = statistics.mean(masked)
        mul = self.model.diffloss.diffusion_batch_mul
        flops = self.transformer_flops(self.length - masked) + mul * masked * self.head_flops()
        flops *= 3 * self.train_batch
        rate = flops / (float(row[1]) / 1e3) / 1e12
        share = f", {rate / self.args.peak_tflops:.0%} of the peak (MFU)" if self.gpu else ""
        print(f"\nours: {rate:.3g} TFLOP/s by the shapes{share}")

    def optimizer_sides(self, steps=0, found=None):
        """AdamW and EMA of both; with `found`, the differences after `steps` of them."""
        ours = torch.optim.AdamW(
            parameter_groups(self.model, 0.02), lr=8e-4, betas=(0.9, 0.95), fused=True
        )
        theirs = plain.optimizer(self.plain)
        ema = EMA(self.model, 0.9999)
        averages = [p.detach().clone() for p in self.plain.parameters()]
        generator = torch.Generator(self.device).manual_seed(5)
        before = [p.detach().clone() for p in self.model.parameters()] if found is not None else []
        for mine, other in zip(self.model.parameters(), self.plain.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator, device=self.device)
            other.grad = mine.grad.clone()

        def fast():
            ours.step()
            ema.update(self.model)

        def slow():
            theirs.step()
            plain.update_ema(averages, self.plain.parameters(), 0.9999)

        if found is not None:
            for _ in range(steps):
                fast(), slow()
            pairs = list(zip(self.model.parameters(), self.plain.parameters(), strict=True))
            found["weights after 3 updates"] = max(
                relative(a.detach(), b.detach()) for a, b in pairs
            )
            pairs = zip(ema.module.parameters(), averages, strict=True)
            found["averaged weights"] = max(relative(a, b) for a, b in pairs)
            with torch.no_grad():
                for parameters in (self.model.parameters(), self.plain.parameters()):
                    torch._foreach_copy_(list(parameters), before)
        return fast, slow

    def optimizer(self):
        print("\n## Optimiser and EMA, ms\n")
        fast, slow = self.optimizer_sides()
        row = self.compare("AdamW, EMA", {"ours": fast, "plain": slow})
        table(["", "ours", "least", "plain", "least", "plain / ours"], [row])
        for model in (self.model, self.plain):
            model.zero_grad(set_to_none=True)

    def loader(self):
        print(f"\n## Loader: {LOADED} cached latents in batches of 64, warm, ms\n")
        with tempfile.TemporaryDirectory() as folder:
            paths = {"plain": Path(folder) / "images", "ours": Path(folder) / "shards"}
            generator = np.random.default_rng(0)
            for i in range(LOADED):
                moments = generator.standard_normal((2, 32, 16, 16), np.float32)
                write_moments(paths["plain"] / f"{i % 8}" / f"{i}.JPEG.npz", *moments)
            caches.convert(paths["plain"], paths["ours"], "shards")
            sides = {}
            for name, path in paths.items():
                dataset = cached_set(path, (32, 16, 16), 8)
                loader = training_loader(dataset, 64, 0, seed=0, pin_memory=False)
                sides[name] = partial(deque, loader, 0)  # each batch is dropped at once
            for _ in range(3):  # each pass draws other flips: until every page has been touched
                sides["ours"]()
            row = self.compare("a pass over the data", sides)
        table(["", "ours", "least", "plain", "least", "plain / ours"], [row])
        print("\nPlain is a file an image, as published; ours is `main_cache.py --layout shards`.")

    def approximate(self):
        bsz = self.batch_sizes[0]
        print(f"\n## Approximations, batch {bsz}: ours exact against ours approximate\n")
        if not self.gpu and self.args.model != "tiny" and self.args.sections is SECTIONS:
            print("left out: most of an hour on a CPU; `--sections approximate` runs it there too")
            return
        labels = torch.arange(bsz, device=self.device) % self.model.class_num

        def sample(seed, **settings):
            with self.autocast():
                latents = self.model.sample_tokens(
                    bsz, labels=labels, generator=image_generators(seed, range(bsz)), **settings
                )
            self.wait()
            return latents.cpu().numpy()

        sampling = {"num_iter": self.args.num_iter, "cfg": self.args.cfg}
        self.model.head.max_timestep = 980  # from 999 the samples of random weights are beyond all
        rows = approximate.measure(self.model, sample, sampling, self.args.rounds)
        rows = [[name, f"{1e3 * s:.4g}", f"{ratio:.2f}", far] for name, s, ratio, far in rows]
        table(["mode", "ms", "exact / mode", "distance of latents"], rows)
        self.model.head.max_timestep = None
        print(
            "\nThe weights are random: a distance says that samples differ, not its cost. For a "
            "trained model: python -m benchmarks.approximate"
        )


class Step:
    """One autoregressive step of both sides: where it begins, and what is known there."""

    def __init__(self, bench, number, unknown, remaining, bsz, noise):
        self.bench, self.number, self.bsz = bench, number, bsz
        self.unknown, self.remaining = unknown, remaining
        model, device = bench.model, bench.device
        self.labels = torch.arange(bsz, device=device) % model.class_num
        self.orders = model.sample_orders(bsz, torch.Generator(device).manual_seed(number))
        self.tokens = bench.draw(bsz, bench.length, bench.channels, seed=number)
        self.tokens[:, :unknown] = 0.0
        self.noise = None
        if noise:
            self.noise = bench.draw(bench.steps + 1, bsz, bench.length, bench.channels, seed=9)
        self.arrange()

    def arrange(self):
        """What our loop does once an image. The precision is that of autocast now."""
        model = self.bench.model
        self.draw = model.head.start_sampling()
        classes = model.embed_labels(self.labels, self.bsz)
        self.classes = torch.cat([classes, model.embed_labels(None, self.bsz)])
        self.generators = image_generators(0, range(self.bsz))
        self.positions = take_back(self.tokens, self.orders)
        self.mask = torch.ones(self.tokens.shape[:2], device=self.tokens.device)
        self.mask = self.mask.scatter(1, self.orders[:, self.unknown :], 0.0)

    @torch.no_grad()
    def ours(self):
        bench, model = self.bench, self.bench.model
        asked = slice(self.remaining, self.unknown)
        scale = CFG_SCHEDULES["linear"](bench.args.cfg, self.remaining, bench.length)
        noise = None
        if self.noise is not None:
            noise = torch.stack([take(part, self.orders[:, asked]) for part in self.noise])
        z, z_uncond = model.predict(self.tokens, self.orders, asked, self.classes).chunk(2)
        sampled = self.draw(z, scale, z_uncond, self.generators, noise=noise)
        tokens = self.tokens.clone()
        tokens[:, asked] = sampled
        return take_back(tokens, self.orders)

    def theirs(self):
        bench = self.bench
        return bench.plain.step(
            self.positions,
            self.mask,
            self.orders,
            self.labels,
            self.number,
            bench.args.num_iter,
            bench.args.cfg,
            self.noise,
        )[0]

    def sides(self):
        return self.ours, self.theirs


class Counter(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts operations that compute (not views), and tensors made from Python or numpy."""

    def __init__(self):
        super().__init__()
        self.operations = self.made = 0

    def __enter__(self):
        self.makers = torch.tensor, torch.from_numpy

        def counted(function):
            def call(*args, **kwargs):
                self.made += 1
                return function(*args, **kwargs)

            return call

        torch.tensor, torch.from_numpy = map(counted, self.makers)
        return super().__enter__()

    def __exit__(self, *args):
        torch.tensor, torch.from_numpy = self.makers
        return super().__exit__(*args)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        views = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
        self.operations += not views
        return function(*args, **(kwargs or {}))


def all_of(functions):
    for function in functions:
        function()


def take_back(tokens, orders):
    """Tokens (N, L, C) from the order of generation to their positions."""
    return torch.zeros_like(tokens).scatter(1, orders.unsqueeze(-1).expand_as(tokens), tokens)


def relative(ours, plain):
    """The largest difference over the largest value."""
    return ((ours - plain).abs().max() / plain.abs().max()).item()


def table(titles, rows):
    print("| " + " | ".join(titles) + " |")
    print("|" + " --- |" * len(titles))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    run(main)
