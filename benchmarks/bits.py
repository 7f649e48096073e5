"""Check that results do not change: python -m benchmarks.bits --out bits.json --compare old.json

On the digits, every backbone × head × order × tokenizer kind is trained for 22 steps by the real
scripts, and sampled in every way. It records the loss of each step, a digest of the trained weights
and of the decoded samples in float32, the metrics of an evaluation and the bytes of caches. Run it
before and after a change on the same machine: floating-point results differ between processors, and
with the number of threads, which is one here.
"""

import contextlib
import hashlib
import io
import json
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import main_cache
import main_mar
import main_tokenizer
import models.tokenizer
import sample
from util.checkpoint import load_checkpoint
from util.flags import Parser, run
from util.weights import digest

# 11 steps per epoch
TRAIN = "--preset digits --device cpu --batch_size 128 --epochs 2 --warmup_epochs 1 --eval_freq 99"
TRAIN += " --num_sampling_steps 5 --num_workers 0"
SMALL = "--diffloss_d 2 --diffloss_w 32"
MAR, RASTER = f"--model mar_tiny {SMALL}", f"--model ar_tiny {SMALL}"
RANDOM, DIT = f"{RASTER} --order random", "--model dit_tiny"
TOKENIZERS = {
    "pixels": "--tokenizer pixels",
    "kl": "--tokenizer kl --vae_path {kl}",
    "vq": "--tokenizer vq --vae_path {vq}",
    "vq_latent": "--tokenizer vq_latent --vae_path {vq}",
}
BACKBONES = {"mar": MAR, "ar-raster": RASTER, "ar-random": RANDOM}
MORE = {
    "mar pixels diffloss checkpointing": f"{MAR} --grad_checkpointing",
    "mar pixels diffloss accumulation": f"{MAR} --accum_iter 3",
    "mar pixels diffloss bf16": f"{MAR} --precision bf16",
    "mar pixels diffloss no vlb": f"{MAR} --no_vlb --mask_ratio_per_rank",
    "mar pixels diffloss dropout": f"{MAR} --attn_dropout 0.1 --proj_dropout 0.2 --seed 7",
    "ar-random pixels diffloss checkpointing": f"{RANDOM} --grad_checkpointing",
}
PLAIN = {"plain": "", "guided": "--cfg 2", "guided, constant": "--cfg 2 --cfg_schedule constant"}
ORDERS = {"raster": "--order raster --num_iter 4 --cfg 2", "few steps": "--num_iter 3"}
WAYS = {
    "temperature": "--temperature 0.9 --cfg 3",
    "spacing": "--num_sampling_steps 10,10,20 --cfg 2",
    "start": "--max_timestep 980 --num_sampling_steps 25",
    "ddim": "--solver ddim --num_sampling_steps 10 --cfg 2 --temperature 0.8",
    "dpm++": "--solver dpm++ --num_sampling_steps 10 --cfg 2",
    "anneal": "--anneal linear:20:5 --cfg 2",
    "anneal dpm++": "--anneal two-stage:20:5 --solver dpm++ --cfg 2",
    "interval": "--cfg 2 --cfg_interval 0.25 0.75",
    "bf16": "--precision bf16 --cfg 2",
    "no class": "--labels none",
}


def cases():
    """(name, flags of training, name -> flags of sampling)."""
    for backbone, flags in BACKBONES.items():
        for tokenizer, more in TOKENIZERS.items():
            for head in ("ce",) if tokenizer == "vq" else ("diffloss", "l2"):
                ways = dict(PLAIN)
                if backbone == "mar":
                    ways |= ORDERS
                if head == "ce" and backbone == "mar":
                    ways["confidence"] = "--order confidence --num_iter 4 --cfg 2"
                if head == "ce":
                    ways["cold"] = "--temperature 0 --cfg 2"
                if (tokenizer, head) == ("pixels", "diffloss"):
                    ways |= WAYS
                    if backbone == "mar":
                        ways["lazy"] = "--refresh_every 3 --cfg 2"
                        ways["lazy, interval"] = "--refresh_every 2 --cfg 2 --cfg_interval 0.3 0.6"
                yield f"{backbone} {tokenizer} {head}", f"{flags} {more} --head {head}", ways
    for tokenizer in ("pixels", "kl", "vq_latent"):
        yield f"dit {tokenizer}", f"{DIT} {TOKENIZERS[tokenizer]}", PLAIN
    for name, flags in MORE.items():
        yield name, flags, {"plain": ""}


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, metavar="FILE", help="output file")
    parser.add_argument("--compare", metavar="FILE", help="output file of an earlier run")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only cases whose name contains it"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = record(Path(folder), args.only)
    Path(args.out).write_text(json.dumps(found, indent=1))
    if args.compare:
        sys.exit(compare(json.loads(Path(args.compare).read_text()), found))


def record(folder, only=""):
    """Name -> values that must not change."""
    found, losses, decoded = {}, [], []

    def note_loss(module, inputs, output):
        if type(module).__name__ in ("MAR", "AR", "DiT") and module.training:
            losses.append(output.item())

    to_bytes = models.tokenizer.to_uint8

    def note_images(images):
        decoded.append(images.detach().float().cpu().contiguous().numpy().tobytes())
        return to_bytes(images)

    models.tokenizer.to_uint8 = note_images
    hook = torch.nn.modules.module.register_module_forward_hook(note_loss)
    try:
        paths = {}
        for kind in ("kl", "vq"):
            flags = f"--tokenizer {kind} --data_path digits --epochs 2 --batch_size 64 --ch 8"
            flags += " --num_codes 32 --num_workers 0 --device cpu --extractor grey-pixels"
            call(main_tokenizer.main, f"{flags} --output_dir {folder / kind}")
            paths[kind] = folder / kind / "tokenizer.ckpt"
            content = torch.load(paths[kind], weights_only=True)
            results = json.loads((folder / kind / "results.jsonl").read_text())
            found[f"tokenizer {kind}"] = {
                "weights": digest(content["model"]),
                "scale": content["scale"],
                "metrics": {k: v for k, v in results.items() if k in METRICS},
            }
        for name, flags, ways in cases():
            if only not in name:
                continue
            print(name, flush=True)
            out = folder / name.replace(" ", "-")
            losses.clear()
            call(main_mar.main, f"{TRAIN} {flags.format(**paths)} --output_dir {out}")
            checkpoint = load_checkpoint(out / "checkpoint-last.pth")
            one = {
                "losses": list(losses),
                "weights": digest(checkpoint["model"]),
                "ema": digest(checkpoint["model_ema"]),
            }
            for way, more in ways.items():
                decoded.clear()
                command = f"--ckpt {out} --device cpu --per_class 2 --seed 3"
                call(sample.main, f"{command} {more} --out {folder / 'a.npz'}")
                one[f"samples, {way}"] = hashlib.sha256(b"".join(decoded)).hexdigest()
            found[name] = one
        if not only:
            found |= evaluation(folder, folder / "mar-pixels-diffloss")
            found |= caches(folder, paths)
    finally:
        models.tokenizer.to_uint8 = to_bytes
        hook.remove()
    return found


METRICS = (
    *("frechet_distance", "inception_score", "inception_score_std", "precision", "recall"),
    *("accuracy", "rfd", "psnr", "latent_mean", "latent_std", "codes_used", "code_perplexity"),
)


def evaluation(folder, ckpt):
    """Metrics of samples and of real images."""
    flags = f"--preset digits --resume {ckpt} --output_dir {folder / 'evaluated'} --device cpu"
    flags += f" --evaluate --num_images 40 --num_iter 4 --stats_dir {folder / 'stats'}"
    call(main_mar.main, flags)
    line = json.loads((folder / "evaluated" / "results.jsonl").read_text())
    held = {name: line[name] for name in METRICS if name in line}
    held |= {f"real {name}": line["real"][name] for name in METRICS if name in line["real"]}
    return {"evaluation": held}


def caches(folder, paths):
    """The bytes of both layouts of a cache of twelve images."""
    draw = np.random.default_rng(0)
    for i in range(12):
        path = folder / "pictures" / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    flags = "--tokenizer kl --epochs 1 --batch_size 4 --ch 8 --img_size 32 --num_workers 0"
    flags += f" --device cpu --extractor grey-pixels --data_path {folder / 'pictures'}"
    call(main_tokenizer.main, f"{flags} --output_dir {folder / 'kl32'}")
    held = {}
    for layout in ("images", "shards"):
        out = folder / f"cache-{layout}"
        flags = f"--tokenizer kl --vae_path {folder / 'kl32' / 'tokenizer.ckpt'} --img_size 32"
        flags += f" --data_path {folder / 'pictures'} --cached_path {out} --layout {layout}"
        call(main_cache.main, f"{flags} --num_workers 0 --device cpu --batch_size 5")
        for path in sorted({*out.rglob("*.np[yz]")} - {*out.glob("*.sources.npy")}):  # with times
            held[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"caches": held}


def call(main, flags):
    """Run a script with flags, showing its output only if it fails."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            main(shlex.split(flags))
    except BaseException:
        print(output.getvalue()[-2000:], file=sys.stderr)
        raise


def compare(before, after):
    """Print the differences; returns 1 if there are any."""
    differing = 0
    for name in sorted({*before, *after}):
        one, other = before.get(name), after.get(name)
        if one is None or other is None:
            print(f"{name}: only in {'the new' if one is None else 'the old'} one")
            differing += 1
            continue
        for key in sorted({*one, *other}):
            if one.get(key) != other.get(key):
                differing += 1
                print(f"{name}, {key}: {how(one.get(key), other.get(key))}")
    print(f"{len(after)} cases, {differing} differences")
    return int(differing > 0)


def how(one, other):
    """A difference in words; for losses, the largest one."""
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return f"by {max(abs(a - b) for a, b in zip(one, other, strict=True)):.3g} at most"
    return f"{one} before, {other} after"


if __name__ == "__main__":
    run(main)
