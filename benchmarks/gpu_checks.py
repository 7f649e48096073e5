"""Checks of `benchmarks.gpu` on the library's functions: each (device, quick) → what was found.

An AssertionError says what is wrong. quick: tiny sizes.
"""

import contextlib
import io
import math
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch

from benchmarks.differences import relative
from benchmarks.sides import randomize
from benchmarks.timing import wait
from diffusion.solvers import BELOW_SINGULARITY
from models import build_model
from models.fast import graphs as graphs_module
from models.fast import linear as linear_module
from models.fast.graphs import Graphs
from models.settings import Sampling
from util.precision import autocast, full_precision, pick_precision
from util.rng import image_generators

GRAPHS = 1e-5  # largest relative difference of the head's tokens, float32
GRAPHS_LOW = 5e-2  # the same in bf16
SAMPLES = 1e-3  # of latents after all autoregressive steps, float32


def open_model(device, quick, name="base", **more):
    """A MAR with random weights; tiny ones if quick."""
    sizes = {"diffloss_d": 6, "diffloss_w": 1024, "num_sampling_steps": "100"}
    if quick:
        name, sizes = "tiny", {"num_sampling_steps": "5", "diffloss_d": 2, "diffloss_w": 64}
        sizes |= {"img_size": 64, "buffer_size": 4, "class_num": 10}
    with torch.device(device):
        model = build_model(f"mar_{name}", **sizes, **more)
    randomize(model, device)
    return model.eval()


@contextlib.contextmanager
def no_graphs():
    """The plain loop instead of graphs."""
    with mock.patch.object(graphs_module, "enabled", False):
        yield


def peak(device, function):
    """The most GiB allocated during a call; 0 on a CPU."""
    if device.type != "cuda":
        function()
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**30


# ---- CUDA graphs ---------------------------------------------------------------------------------


def graphs_head(device, quick):
    """Tokens of the head by replay equal those of the plain loop, whatever was replayed before."""
    head = open_model(device, quick).diffloss
    found = {}
    for precision, most in (("fp32", GRAPHS), ("bf16", GRAPHS_LOW)):
        far = []
        for repeat in range(2):  # the second time all are replays
            for rows in (1, 3, 4, 8, 61, 256, 1024)[: 4 if quick else None]:
                for cfg in (1.0, 2.9):
                    far.append(replayed_head(head, device, precision, rows, cfg, repeat))
        found[precision] = max(far)
        assert found[precision] <= most, f"{precision}: {far}, expected at most {most:g}"
    held = head.fast.graphs
    if device.type == "cuda":
        assert held.possible and held.recorded, "nothing was recorded"
    count = f"{len(held.recorded)} recordings held"
    return ", ".join(f"{p} within {x:.1e}" for p, x in found.items()) + f", {count}"


def replayed_head(head, device, precision, rows, cfg, seed):
    """Relative difference between the head's tokens with and without graphs."""
    generator = torch.Generator(device).manual_seed(seed)
    width = head.net.cond_embed.in_features

    def randn(*shape):
        return torch.randn(shape, generator=generator, device=device)

    z, z_uncond = randn(rows, width), randn(rows, width)
    noise = randn(head.gen_diffusion.num_steps + 1, rows, head.in_channels)

    def draw():
        with autocast(device, precision):
            sampler = head.sampler(Sampling(max_timestep=BELOW_SINGULARITY))
            return sampler(z, cfg, z_uncond if cfg != 1.0 else None, noise=noise)

    ours = draw()
    with no_graphs():
        theirs = draw()
    assert ours.isfinite().all(), "tokens that are not finite"
    return relative(ours, theirs)


def graphs_sampling(device, quick):
    """Latents after all steps, with and without graphs, from the same seeds; other weights too."""
    model = open_model(device, quick)
    settings = {"num_iter": 4 if quick else 16, "max_timestep": BELOW_SINGULARITY}
    ways = {
        "guided": Sampling(cfg=2.9, **settings),
        "unguided": Sampling(cfg=1.0, **settings),
        "dpm++": Sampling(cfg=2.9, solver="dpm++", num_sampling_steps="5", **settings),
        "annealed": Sampling(cfg=2.9, anneal="linear", **settings),
        "refreshed": Sampling(cfg=2.9, refresh_every=2, **settings),
    }
    found = {}
    for name, sampling in ways.items():
        for batch in (1, 5) if quick else (1, 16):
            far = relative(*(sample_both(model, device, batch, sampling)))
            found[f"{name} {batch}"] = far
    with torch.no_grad():
        for parameter in model.diffloss.parameters():
            parameter.mul_(0.9)
    found["other weights"] = relative(*sample_both(model, device, 2, ways["guided"]))
    worst = max(found, key=found.get)
    assert found[worst] <= SAMPLES, f"{found}, expected at most {SAMPLES:g}"
    return f"within {found[worst]:.1e} ({worst}) of {len(found)} ways"


def sample_both(model, device, batch, sampling):
    """Latents with and without graphs."""

    def sample():
        labels = torch.arange(batch, device=device) % model.class_num
        generators = image_generators(0, range(batch))
        return model.sample_tokens(batch, labels=labels, generator=generators, **sampling.asdict())

    ours = sample()
    with no_graphs():
        return ours, sample()


def graphs_fall_back(device, quick):
    """What cannot be recorded is computed without, with a line; after that, the process goes on."""
    held, x = Graphs(), torch.arange(4.0, device=device)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for _ in range(2):
            result = held("waits", lambda x: x * x.max().item(), x)
            assert result.tolist() == [0, 3, 6, 9], result
    lines = said.getvalue().splitlines()
    if device.type != "cuda":
        assert not lines, lines
        return "no recording on this device"
    assert len(lines) == 1 and lines[0].startswith("NOTE"), lines
    wait(device)
    after = []
    try:
        torch.cuda.empty_cache()
    except RuntimeError as error:
        after.append(f"empty_cache: {error}")
    fresh = Graphs()
    for n in (1.0, 2.0):
        assert fresh("double", lambda x: 2 * x, x * n).tolist() == [0, 2 * n, 4 * n, 6 * n]
    assert fresh.possible and len(fresh.recorded) == 1, "nothing is recorded after a failure"
    large = torch.randn(1 << 24, device=device)
    assert (large @ large).isfinite()
    return f"{lines[0]}; {'; '.join(after) or 'then recorded others'}"


# ---- precision -----------------------------------------------------------------------------------


def precision(device, quick):
    """Products in each precision have its error; the loss is nearly the same in all."""
    a, b = (torch.randn(512, 512, device=device, dtype=torch.float64) for _ in range(2))
    exact, errors = a @ b, {}
    for name in ("fp32", "tf32", "bf16", "fp16"):
        assert pick_precision(name, device) == name
        with autocast(device, name):
            errors[name] = relative((a.float() @ b.float()).double(), exact)
            with full_precision(device.type):
                again = relative((a.float() @ b.float()).double(), exact)
        assert again < 1e-5, f"full_precision inside {name}: {again:.1e}"
    assert errors["fp32"] < 1e-5, errors
    if device.type == "cuda":
        assert 1e-5 < errors["tf32"] < 3e-3, f"tf32 {errors['tf32']:.1e}: is it in use?"
    losses = {name: loss_in(device, quick, name) for name in errors}
    far = {n: abs(x / losses["fp32"] - 1) for n, x in losses.items()}
    assert max(far.values()) < 2e-2, far
    auto = pick_precision("auto", device)
    return (
        "products: " + ", ".join(f"{n} {x:.0e}" for n, x in errors.items()) + "; loss from fp32's: "
        "" + ", ".join(f"{n} {x:.0e}" for n, x in far.items()) + f"; auto is {auto}"
    )


def loss_in(device, quick, precision):
    """The training loss of a batch in a precision."""
    model = open_model(device, quick)
    pick_precision(precision, device)
    with torch.no_grad(), autocast(device, precision):
        return one_loss(model, device, 4).item()


def one_loss(model, device, batch, seed=0, step_seed=0):
    """The loss of random latents, all draws from seeds."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = batch, model.vae_embed_dim, model.seq_h, model.seq_w
    latents = torch.randn(shape, generator=generator, device=device)
    labels = torch.arange(batch, device=device) % model.class_num
    return model(latents, labels, generator, torch.Generator().manual_seed(step_seed))


def linear(device, quick):
    """models.fast.linear is plain torch on a GPU."""
    x, weight = torch.randn(8, 256, device=device), torch.randn(512, 256, device=device)
    packed = linear_module.pack(weight)
    same = torch.nn.functional.linear(x, weight)
    for result in (linear_module.linear(x, weight), linear_module.packed_linear(x, packed)):
        assert relative(result, same) <= (0 if device.type == "cuda" else 1e-5)
    assert not (hasattr(packed, "packed") and device.type == "cuda")
    return "bit for bit torch's" if device.type == "cuda" else "oneDNN's within 1e-5"


# ---- training ------------------------------------------------------------------------------------


def compiled(device, quick):
    """--compile changes neither loss nor gradient; how long it takes."""
    if quick:
        return "left out: takes minutes"
    more = {"attn_dropout": 0.0, "proj_dropout": 0.0}
    plain, ours = (open_model(device, quick, **more).train() for _ in range(2))
    for module, dynamic in ours.to_compile():
        module.compile(dynamic=dynamic)
    far, times = [], []
    for seed in range(4):
        losses, norms = [], []
        for model in (plain, ours):
            model.zero_grad()
            wait(device)
            start = time.monotonic()
            with autocast(device, "bf16"):
                loss = one_loss(model, device, 8, seed, seed)
            loss.backward()
            wait(device)
            losses.append(loss.item())
            norms.append(gradient_norm(model))
        times.append(time.monotonic() - start)
        far += [abs(a / b - 1) for a, b in (losses, norms)]
    assert max(far) < 2e-2, f"loss and gradient's norm differ by {far}"
    seconds = ", ".join(f"{x:.1f}" for x in times)
    return f"bf16, loss and gradient's norm within {max(far):.0e}; steps took {seconds} s"


def gradient_norm(model):
    """Norm of all gradients."""
    gradients = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return torch.stack(gradients).norm().item()


def memory(device, quick):
    """Peaks of training with and without --grad_checkpointing, of sampling with and without
    graphs; checkpointing changes no loss."""
    found, losses, batch = {}, [], 2 if quick else 32
    for checkpointing in (False, True):
        model = open_model(device, quick, grad_checkpointing=checkpointing).train()

        def step(model=model):
            torch.manual_seed(0)
            with autocast(device, "bf16"):
                loss = one_loss(model, device, batch)
            loss.backward()
            losses.append(loss.item())

        name = f"training {batch}" + ", checkpointing" * checkpointing
        found[name] = peak(device, step)
        del model, step
    assert math.isclose(*losses, rel_tol=1e-3), f"the losses are {losses}"
    model = open_model(device, quick)
    sampling = Sampling(num_iter=4, cfg=2.9, max_timestep=BELOW_SINGULARITY)
    batch = 2 if quick else 64
    labels = torch.arange(batch, device=device) % model.class_num

    def sample():
        generators = image_generators(0, range(batch))
        with torch.no_grad(), autocast(device, "bf16"):
            model.sample_tokens(batch, labels=labels, generator=generators, **sampling.asdict())

    with no_graphs():
        found[f"sampling {batch}"] = peak(device, sample)
    found[f"sampling {batch}, graphs"] = peak(device, sample)
    if device.type == "cuda":
        values = list(found.values())
        assert values[1] < values[0], f"checkpointing saves nothing: {found}"
    return ", ".join(f"{n} {x:.2f} GiB" for n, x in found.items())


def fused_fp16(device, quick):
    """Fused AdamW with a scaler: a step that overflows is skipped, later ones change all weights,
    as without fusion."""
    from engine_mar import optimizer_step, parameter_groups

    results = []
    for fused in (True, False):
        model = open_model(device, quick).train()
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.02), lr=1e-3, fused=fused)
        scaler, skipped, steps = torch.amp.GradScaler(device.type, init_scale=2.0**28), 0, 0
        while steps < 3:
            before = scaler.get_scale()
            torch.manual_seed(steps)
            with autocast(device, "fp16"):
                loss = one_loss(model, device, 2, steps, steps)
            scaler.scale(loss).backward()
            optimizer_step(model, optimizer, scaler, 3.0)
            lower = scaler.get_scale() < before
            skipped, steps = skipped + lower, steps + (not lower)
            assert skipped < 60, "every step is skipped"
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert all(x.isfinite().all() for x in results) and skipped, f"{skipped} steps skipped"
    far = ((results[0] - results[1]).norm() / results[1].norm()).item()
    assert far < 1e-2, f"fused and not differ by {far:.1e}"
    return f"{skipped} steps skipped, then as without fusion within {far:.0e}"


def nccl(device, quick):
    """One rank: collectives, DDP and FSDP, with the losses of a model that is not wrapped."""
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    from util import dist
    from util.run import fsdp
    from util.run.launch import Launch

    more = {"attn_dropout": 0.0, "proj_dropout": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        dist._join(Launch(), f"file://{folder}/store", device, 60.0)
        backend = distributed.get_backend()
        dist.barrier()
        sums = torch.ones(3, device=device)
        distributed.all_reduce(sums)
        assert sums.tolist() == [1, 1, 1] and dist.all_gather(7) == [7]
        losses = {"alone": train_little(open_model(device, quick, **more), device)}
        ids = [torch.cuda.current_device()] if device.type == "cuda" else None
        wrapped = DistributedDataParallel(open_model(device, quick, **more), device_ids=ids)
        losses["DDP"] = train_little(wrapped, device)
        if device.type == "cuda" or fsdp._works_on_cpus():
            model = open_model(device, quick, **more)
            fsdp.shard_over_all(model)
            losses["FSDP"] = train_little(model, device)
            whole = [dist.whole(p.detach()) for p in model.parameters()]
            assert dist.is_sharded(model) and all(p.isfinite().all() for p in whole)
        dist.cleanup()
    alone = losses["alone"]
    far = {n: max(abs(a / b - 1) for a, b in zip(x, alone, strict=True)) for n, x in losses.items()}
    assert max(far.values()) < 1e-4, losses
    return f"{backend}: " + ", ".join(f"{n} within {x:.0e}" for n, x in far.items())


def train_little(model, device):
    """Losses of three steps of float32, by engine_mar's functions."""
    from engine_mar import optimizer_step, parameter_groups
    from util.dist import unwrap

    model.train()
    groups = parameter_groups(unwrap(model), 0.02)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    scaler, losses, own = torch.amp.GradScaler(device.type, enabled=False), [], unwrap(model)
    for seed in range(3):
        generator = torch.Generator(device).manual_seed(seed)
        shape = 2, own.vae_embed_dim, own.seq_h, own.seq_w
        latents = torch.randn(shape, generator=generator, device=device)
        labels = torch.arange(2, device=device)
        loss = model(latents, labels, generator, torch.Generator().manual_seed(seed))
        loss.backward()
        optimizer_step(model, optimizer, scaler, 3.0)
        losses.append(loss.item())
    assert all(map(math.isfinite, losses)) and all(a != b for a, b in pairwise(losses)), losses
    return losses


# ---- data and evaluation -------------------------------------------------------------------------


def page_locked(device, quick):
    """Batches of a loader and per-image draws by page-locked memory are what they are without."""
    from benchmarks.sections import write_cache
    from util.data import convert
    from util.data.cached import open_cache
    from util.data.loader import Loader
    from util.rng import randn

    pin, times = device.type == "cuda", {}
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder) / "images", 256)
        convert.convert(Path(folder) / "images", Path(folder) / "shards", "shards")
        sums = {}
        for locked in (False, pin):
            for workers in (0, 2):
                cache = open_cache(Path(folder) / "shards", (32, 16, 16), 8)
                loader = Loader(cache, 64, workers, seed=0, pin_memory=locked)
                batches = []
                start = time.monotonic()
                for x, labels in loader.epoch(0):
                    assert x.is_pinned() == locked, f"pinned: {x.is_pinned()}"
                    moved = x.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                    batches.append(moved[0].double().sum() + moved[1].sum())
                wait(device)
                times[locked, workers] = time.monotonic() - start
                sums[locked, workers] = torch.stack(batches).tolist()
                loader.close()
    assert len({str(x) for x in sums.values()}) == 1, sums
    shape = (8, 101, 16)
    here = randn(shape, image_generators(0, range(8)), device)
    there = randn(shape, image_generators(0, range(8)), torch.device("cpu"))
    assert torch.equal(here.cpu(), there), "per-image draws differ from the CPU's"
    return "the same batches; seconds of 256 images: " + ", ".join(
        f"{'locked' if p else 'ordinary'}, {w} workers {x:.2f}" for (p, w), x in times.items()
    )


def features(device, quick):
    """Features of the digits' classifier, grey pixels and Inception as on the CPU."""
    import numpy as np

    from util.evaluation.features import Extractor

    draw, found = np.random.default_rng(0), {}
    with tempfile.TemporaryDirectory() as folder:
        names = {"digits-classifier": None, "grey-pixels": None}
        if not quick:
            names["inception-v3-compat"] = random_inception(Path(folder) / "weights.pth")
        for name, weights in names.items():
            images = draw.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
            pick_precision("fp32", device)
            ours, theirs = (
                Extractor(name, weights, d)(images)[0].float().cpu()
                for d in (device, torch.device("cpu"))
            )
            found[name] = relative(ours, theirs)
    assert max(found.values()) < 1e-3, found
    return ", ".join(f"{n} within {x:.0e}" for n, x in found.items())


def random_inception(path):
    """A file of random Inception weights."""
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    network = inception.FeatureExtractorInceptionV3
    with (
        mock.patch.object(inception, "load_state_dict_from_url", return_value={}),
        mock.patch.object(network, "load_state_dict", lambda self, state: None),
    ):
        model = network("inception-v3-compat", ["2048", "logits_unbiased"])
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(model.state_dict(), path)
    return str(path)
