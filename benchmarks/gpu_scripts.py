"""Checks of `benchmarks.gpu` on the scripts: each (device, quick) → what was found.

An AssertionError says what is wrong.
"""

import contextlib
import io
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from util import jsonl
from util.checkpoint import LAST

ROOT = Path(__file__).parent.parent
DIGITS = "--preset digits --num_sampling_steps 10 --num_workers 0"
TESTS = """test_graphs test_denoiser test_speed test_precision test_device test_diffusion test_mar
test_heads test_train test_resume test_sample test_accumulation test_fsdp"""


def call(main, flags):
    """What a script prints, called in this process."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        main([str(flag) for flag in (flags.split() if isinstance(flags, str) else flags)])
    print(said.getvalue())
    return said.getvalue()


@contextlib.contextmanager
def folder():
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


# ---- training ------------------------------------------------------------------------------------


def train_bf16(device, quick):
    """Training of the digits."""
    return train_digits(device, quick, "bf16")


def train_fp16(device, quick):
    """The same with a scaler."""
    return train_digits(device, quick, "fp16")


def train_tf32(device, quick):
    """The same in tf32."""
    return train_digits(device, quick, "tf32")


def train_digits(device, quick, precision):
    """Loss goes down, is finite, and a run that ends and is resumed gives what one run does."""
    import main_mar

    epochs = 2 if quick else 12
    common = f"{DIGITS} --device {device} --precision {precision} --epochs {epochs}"
    with folder() as path:
        start = time.monotonic()
        call(main_mar.main, f"{common} --output_dir {path}/whole")
        seconds = time.monotonic() - start
        flags = f"{common} --save_steps 11 --keep 99 --output_dir {path}/parts"
        call(main_mar.main, flags)
        kept = sorted((path / "parts").glob("checkpoint-step*.pth"))
        assert kept, sorted(os.listdir(path / "parts"))
        shutil.move(kept[len(kept) // 2], path / "parts" / LAST)
        said = call(main_mar.main, f"{flags} --resume {path}/parts")
        losses = {n: read_losses(path / n) for n in ("whole", "parts")}
    whole, parts = losses["whole"], losses["parts"]
    assert all(map(math.isfinite, whole + parts)), losses
    assert "resumed" in said and "nothing to train" not in said, said[-500:]
    assert whole[-1] < whole[0] * (1 if quick else 0.7), f"losses {whole}"
    far = abs(parts[-1] / whole[-1] - 1)
    assert far < 0.05, f"resumed ends at {parts[-1]}, whole at {whole[-1]}"
    return (
        f"loss {whole[0]:.3f} → {whole[-1]:.3f} in {epochs} epochs, {seconds:.1f} s; resumed ends "
        f"within {far:.0e}"
    )


def read_losses(path):
    """The training losses of a run's folder."""
    return [x["loss"] for x in jsonl.read(path / "log.jsonl") if "loss" in x]


def train_compiled(device, quick):
    """An epoch with --compile."""
    import main_mar

    if quick:
        return "left out: takes minutes"
    losses, times = [], []
    for more in ("", "--compile"):
        with folder() as path:
            start = time.monotonic()
            flags = f"{DIGITS} --device {device} --epochs 2 {more} --output_dir {path}"
            call(main_mar.main, flags)
            times.append(time.monotonic() - start)
            losses.append(read_losses(path)[-1])
    assert abs(losses[1] / losses[0] - 1) < 0.05, losses
    return f"loss {losses[0]:.4f}, compiled {losses[1]:.4f}; {times[0]:.0f} s, {times[1]:.0f} s"


def torchrun(device, quick):
    """The launcher with one process, --fsdp, which then has no effect, and an evaluation."""
    with folder() as path:
        flags = f"{DIGITS} --device {device} --epochs 1 --fsdp --online_eval --num_images 20"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1"]
        command += ["main_mar.py", *flags.split(), "--output_dir", path]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        print(done.stdout, done.stderr)
        assert done.returncode == 0, (done.stderr or done.stdout).strip()[-300:]
        assert "--fsdp has no effect" in done.stdout, done.stdout[-300:]
        return f"loss {read_losses(path)[-1]:.3f}; metrics are written"


def dry_run(device, quick):
    """What --dry_run says of memory and time, against a run."""
    import torch

    import main_mar

    model = "" if quick else "--model mar_small --batch_size 256"
    flags = f"{DIGITS} {model} --device {device} --epochs 2 --eval_freq 99"
    with folder() as path:
        said = call(main_mar.main, f"{flags} --output_dir {path}/dry --dry_run")
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        start = time.monotonic()
        call(main_mar.main, f"{flags} --output_dir {path}/run")
        seconds = time.monotonic() - start
    found = {n: re.search(rf"^  {n} +(.*)$", said, re.M) for n in ("memory", "a step", "one image")}
    assert all(found.values()), said
    told = "; ".join(f"{n} {m.group(1)}" for n, m in found.items())
    if device.type != "cuda":
        return told
    used = torch.cuda.max_memory_allocated(device)
    return f"{told}; the run used {used / 2**30:.3f} GiB and {seconds:.1f} s"


# ---- sampling and caching ------------------------------------------------------------------------


def sampled(device, quick):
    """sample.py here and on the CPU, from the same seeds in float32: how far images are apart."""
    import main_mar
    import sample

    epochs, found = 1 if quick else 20, {}
    with folder() as path:
        flags = f"{DIGITS} --device {device} --epochs {epochs} --eval_freq 99"
        call(main_mar.main, f"{flags} --output_dir {path}")
        flags = f"--ckpt {path} --per_class 2 --seed 3"
        for name, more in {
            "here": f"--device {device} --precision fp32",
            "cpu": "--device cpu",
            "tf32": f"--device {device} --precision tf32",
            "bf16": f"--device {device} --precision bf16",
            "other": f"--device {device} --precision fp32 --batch_size 7",
        }.items():
            call(sample.main, f"{flags} {more} --out {path}/{name}.npz")
            found[name] = np.load(path / f"{name}.npz")["arr_0"].astype(int)
        call(sample.main, f"{flags} --device {device} --out {path}/grid.png {path}/pictures")
        count = len(list((path / "pictures").rglob("*.png")))
    images = found["here"]
    assert images.std() > 0 and count == len(images) == 20, (count, images.shape)
    near = {n: (np.abs(x - images) <= 1).mean() for n, x in found.items() if n != "here"}
    assert near["cpu"] > 0.97 and near["other"] > 0.97, near
    return "pixels within one grey level of fp32's here: " + ", ".join(
        f"{n} {x:.1%} (at most {abs(found[n] - images).max()})" for n, x in near.items()
    )


def caches(device, quick):
    """main_cache.py with a narrow KL-16, in both layouts; then training from the cache."""
    import torch

    import main_cache
    import main_mar
    from models.vae import AutoencoderKL
    from util.data.cached import open_cache

    with folder() as path:
        torch.manual_seed(0)
        torch.save({"model": AutoencoderKL(ch=32).state_dict()}, path / "kl.ckpt")
        write_pictures(path / "pictures", 4 if quick else 64)
        own = f"--img_size 64 --vae_path {path}/kl.ckpt --data_path {path}/pictures --num_workers 2"
        moments = {}
        for where in (device, "cpu"):
            for layout in ("images", "shards"):
                cache = path / f"{layout}-{where}"
                flags = f"{own} --device {where} --cached_path {cache} --layout {layout}"
                call(main_cache.main, f"{flags} --batch_size 8")
                rows = read_rows(open_cache(cache, (32, 4, 4), 2, flip=False))
                moments[layout, str(where)] = torch.as_tensor(rows).float()
        call(main_cache.main, f"--cached_path {path}/shards-{device} --verify")
        model = "--model mar_tiny --buffer_size 4 --batch_size 8 --epochs 1 --warmup_epochs 0"
        model += f" --num_sampling_steps 5 --num_iter 4 --device {device} --max_timestep 950"
        model += f" --use_cached --cached_path {path}/shards-{device} {own}"
        call(main_mar.main, f"{model} --output_dir {path}/run")
        losses = read_losses(path / "run")
    assert losses and all(map(math.isfinite, losses)), losses
    found = {}
    for layout in ("images", "shards"):
        ours, theirs = (moments[layout, str(where)] for where in (device, "cpu"))
        found[layout] = ((ours - theirs).norm() / theirs.norm()).item()
    assert max(found.values()) < 5e-3, found
    far = ", ".join(f"{n} {x:.0e}" for n, x in found.items())
    return f"from the CPU's (float16 in shards): {far}; trained from it, loss {losses[-1]:.3f}"


def write_pictures(path, count):
    """JPEGs of two classes."""
    from PIL import Image

    draw = np.random.default_rng(0)
    for i in range(2 * count):
        small = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        file = path / "train" / "ab"[i % 2] / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((80, 72)).save(file)


def read_rows(cache):
    """The moments of all images of a cache."""
    if hasattr(cache, "__getitems__"):
        return np.asarray(cache.__getitems__(list(range(len(cache))))[0])
    return np.stack([cache[i][0] for i in range(len(cache))])


# ---- tests ---------------------------------------------------------------------------------------


def tests(device, quick):
    """The test files that concern a GPU, as they stand."""
    files = [f"tests/{name}.py" for name in TESTS.split()]
    if quick:
        files = files[:1]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    command += ["-n", "6"] if not quick and has_xdist() else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *files], cwd=ROOT, env=environment, text=True, stdout=-1)
    print(done.stdout)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    assert done.returncode == 0, f"{lines[-1]} {' '.join(failed)[:400]}"
    return lines[-1].strip("= ")


def has_xdist():
    """Whether pytest can run files in several processes."""
    from importlib.util import find_spec

    return find_spec("xdist") is not None
