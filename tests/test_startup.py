"""A wrong flag is answered before torch is loaded. Run: python -m pytest tests/test_startup.py"""

import json
import subprocess
import sys

import pytest
from cli import ROOT

HEAVY = ("torch", "numpy", "torchvision", "timm", "torch_fidelity", "matplotlib", "PIL")
# runs each command of a script in turn; writes its status, what it printed, and what is loaded
DRIVER = f"""
import contextlib, importlib, io, json, sys

from util.flags import run

name, commands = sys.argv[1], json.loads(sys.argv[2])
found, script = [], importlib.import_module(name)
for argv in commands:
    out, err, status = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run(script.main, argv)
        except SystemExit as stop:
            status = stop.code
    loaded = sorted(set({HEAVY}) & set(sys.modules))
    found.append((status, out.getvalue(), err.getvalue(), loaded))
print(json.dumps(found))
"""
# script -> wrong flags and what is said of them
WRONG = {
    "main_mar": {
        "--no_such_flag": "unrecognized arguments: --no_such_flag",
        "--epoch 3": "unrecognized arguments: --epoch 3",
        "--anneal slowly": "--anneal: anneal 'slowly': expected linear, cosine, two-stage",
        "--num_sampling_steps 2000": "--num_sampling_steps: diffusion steps '2000'",
        "--model nope": "--model: invalid choice: 'nope'",
        "--head nope": "--head: invalid choice: 'nope'",
        "--preset nope": "--preset: invalid choice: 'nope'",
        "--tokenizer nope": "--tokenizer: invalid choice: 'nope'",
        "--metrics nope": "--metrics: invalid choice: 'nope'",
        "--cfg x": "--cfg: x: expected a number",
        "--cfg nan": "--cfg: nan: expected a number",
        "--epochs 1.5": "--epochs: 1.5: expected an integer, at least 1",
        "--max_timestep 1000": "--max_timestep: 1000: expected an integer from 0 to 999",
        "--cfg_interval 0.5": "--cfg_interval: expected 2 arguments",
        "--vae_scale 1,0": "--vae_scale: 1,0: expected a number above 0",
        "--model_kwargs 3": "3: expected NAME=VALUE",
        "--out a.png": "--out a.png: saves the images of --evaluate",
        "--log_dir LICENSE": "LICENSE: not a folder to write to",
    },
    "main_cache": {
        "": "the following arguments are required: --cached_path",
        "--cached_path c --layout nope": "--layout: invalid choice: 'nope'",
        "--cached_path c --batch_size 0": "--batch_size: 0: expected an integer, at least 1",
        "--cached_path c --verify --convert_from d": "--convert_from d: not together with --verify",
        "--cached_path c --convert_from c": "expected another than --cached_path",
    },
    "main_tokenizer": {
        "--tokenizer nope": "--tokenizer: invalid choice: 'nope'",
        "--cfg 2": "unrecognized arguments: --cfg 2",
        "--tokenizer pixels --epochs 3": "--epochs 3: expected 0 for the tokenizer pixels",
        "--tokenizer kl": "--tokenizer kl: expected --epochs to train one, or a --vae_path",
        "--tokenizer kl --vae_path v --lr 1": "--lr 1.0: is for training, pass --epochs",
        "--tokenizer kl --vae_path v --epochs 3": "--vae_path v: with --epochs the network is",
    },
    "reproduce": {
        "": "the following arguments are required: what",
        "table9": "invalid choice: 'table9'",
        "table1 --num_images 15": "--num_images 15: expected the same number per class",
        "table1 --seeds -1": "--seeds: -1: expected an integer, at least 0",
    },
    "demo.app": {
        "": "--ckpt output_dir/digits/checkpoint-last.pth: no such file; `make demo` makes it",
        "--ckpt nope.pth": "--ckpt nope.pth: no such file",
        "--port 0": "--port: 0: expected an integer from 1 to 65535",
    },
    "sample": {
        "": "expected --ckpt FILE, or --like FILE.png",
        "--like nowhere.png": "nowhere.png: no such file, expected a PNG",
        "--ckpt c --cfg x": "--cfg: x: expected a number",
        "--ckpt c --anneal slowly": "--anneal: anneal 'slowly': expected",
        "--ckpt c --num_sampling_steps 2000": "--num_sampling_steps: diffusion steps '2000'",
        "--ckpt c --solver nope": "--solver: invalid choice: 'nope'",
        "--ckpt c --sweep cfg=1,2": "--sweep: expected a --reference",
        "--ckpt c --metrics accuracy": "--metrics accuracy: expected a --reference",
        "--ckpt c --data_path /nope": "--data_path /nope: expected a folder with train/",
    },
    "edit": {
        "": "the following arguments are required: --ckpt",
        "--ckpt c --image a": "--strength: expected how much of the picture to draw anew",
        "--ckpt c --strength 1": "--image: expected a picture, or --outpaint for new ones",
        "--ckpt c --image a --strength 2": "--strength: 2: expected a number from 0 to 1",
        "--ckpt c --image a --fill nope": "--fill: invalid choice: 'nope'",
        "--ckpt c --image a --box 1,2,3": "1,2,3: expected left, top, width and height",
        "--ckpt c --image a --outpaint up=8": "up=8: expected SIDE=N, with left, right",
        "--ckpt c --image a --outpaint left=x": "x: expected an integer, at least 0",
        "--ckpt c --image a --outpaint left=8 --box 0,0,1,1": "expected no --box beside it",
        "--ckpt c --image a b --mask c d e": "--mask: 3 for 2 pictures, expected one",
        "--ckpt c --image a --strength 1 --compare c.jpg": "--compare c.jpg: expected a .png",
    },
}
HELP = {"main_mar": ["--help", "--list_presets"]}


@pytest.mark.parametrize("script", WRONG)
def test_flags_are_answered_before_torch_is_loaded(script, tmp_path):
    """--help, and each wrong flag in one line with status 2."""
    help = HELP.get(script, ["--help"])
    commands = [flags.split() for flags in (*help, *WRONG[script])]
    commands = [[str(ROOT / "LICENSE") if part == "LICENSE" else part for part in argv]
                for argv in commands]  # fmt: skip
    run = [sys.executable, "-c", DRIVER, script, json.dumps(commands)]
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    for argv, (status, out, err, loaded) in zip(commands, results, strict=True):
        assert not loaded, f"{argv} loads {loaded}"
        if argv in [[flag] for flag in help]:
            assert status in (None, 0) and len(out) > 1000 and not err, argv
    for (flags, message), (status, _, err, _) in zip(
        WRONG[script].items(), results[len(help) :], strict=True
    ):
        assert status == 2, flags
        (line,) = err.splitlines()
        assert line.startswith("error: ") and message in line, f"{flags}: {line}"
