"""The recipes of CONTRIBUTING.md, followed. Run: python -m pytest tests/test_extend.py

tests/recipes.py adds a head, an option of the blocks, a tokenizer, metrics, a solver, an order, a
schedule, an optimizer and data sets to a copy of the source, and counts what each costs. Then the
real scripts train, sample, evaluate and resume with them, all in one process.
"""

import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import write_images
from recipes import COST, Source, places

from models.config import resolve_model
from models.settings import Model
from models.tokenizer import PixelTokenizer

# runs each of a list of commands; writes their exit statuses and what they said
DRIVER = """
import contextlib, importlib, io, json, sys
from pathlib import Path

from util.flags import run

assert Path(sys.modules["util"].__file__).is_relative_to(Path.cwd())
said = []
for script, *argv in json.loads(Path("commands.json").read_text()):
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run(importlib.import_module(script).main, argv)
        except SystemExit as end:
            status = end.code
    said.append((status, out.getvalue(), err.getvalue()))
    Path("said.json").write_text(json.dumps(said))
"""
TINY = "main_mar --preset digits --device cpu --diffloss_d 1 --diffloss_w 32 --batch_size 256"
TINY += " --warmup_epochs 0 --num_sampling_steps 3 --save_last_freq 1 --eval_freq 99 --seed 3"
MEASURED = "--extractor grey-pixels --stats_dir stats --metrics frechet_distance brightness nearest"
STRIPED_FLAGS = "--data_path stripes --num_iter 2"
STREAMED = "--data_path striped-stream --num_iter 2"
# name -> flags that ask for it; those that a resumed run names again, as they are not the model's
ASKED = {
    "head": ("--head gauss --gauss_std 0.25 --num_iter 2", "--num_iter 2"),
    "block": ("--head_scale --num_iter 2", "--num_iter 2"),
    "tokenizer": ("--tokenizer haar --num_iter 2", "--num_iter 2"),
    "solver": ("--solver mean --num_iter 2", "--num_iter 2"),
    "order": ("--model ar_tiny --order columns", ""),
    "token_schedule": ("--token_schedule quadratic --num_iter 3", "--num_iter 3"),
    "optimizer": ("--optimizer descent --num_iter 2", "--optimizer descent --num_iter 2"),
    "data_set": (STRIPED_FLAGS, STRIPED_FLAGS),
    "stream": (STREAMED, STREAMED),
}
SCRIPTS = ("main_mar", "sample", "main_tokenizer", "main_cache")
HAAR = "--tokenizer haar --data_path images --img_size 8"


def commands():
    """Name -> command line, in the order in which they are run."""
    found = {f"help {script}": f"{script} --help" for script in SCRIPTS}
    for name, (asked, again) in ASKED.items():
        drawn = f"sample --ckpt {name} --device cpu --per_class 2 --seed 3"
        reference = "stripes" if name in ("data_set", "stream") else "digits"
        found |= {
            f"train {name}": f"{TINY} {asked} --epochs 1 --output_dir {name}",
            f"sample {name}": f"{drawn} --out {name}.npz --reference {reference} {MEASURED}",
            f"resume {name}": f"{TINY} {again} --epochs 2 --resume {name} --output_dir {name}",
        }
    # `sample` has taken the solver from the checkpoint
    ancestral = "--solver ddpm --temperature 0 --out ancestral.npz"
    found["sample ddpm"] = f"sample --ckpt solver --device cpu --per_class 2 --seed 3 {ancestral}"
    for name in ("head", "data_set", "stream"):  # metrics left to the defaults
        flags = f"{TINY} {ASKED[name][0]} --evaluate --resume {name} --num_images 12"
        flags += " --extractor grey-pixels" if name == "head" else ""
        found[f"evaluate {name}"] = f"{flags} --stats_dir stats --output_dir {name}-evaluated"
    measured = "main_tokenizer --tokenizer haar --data_path stripes --split test --device cpu"
    found["measure haar"] = f"{measured} --num_workers 0 --output_dir haar"
    found["cache haar"] = f"main_cache {HAAR} --cached_path cached --num_workers 0 --device cpu"
    cached = f"{HAAR} --use_cached --cached_path cached --class_num 2 --batch_size 8 --num_iter 2"
    found["train cached"] = f"{TINY} {cached} --epochs 1 --output_dir from-cache"
    return found | {f"wrong {i}": command for i, (command, _) in enumerate(WRONG)}


STATISTICS = "--reference statistics.npz --extractor grey-pixels"
# what each recipe's dummy is asked in vain, and the one line that says so
WRONG = [
    (f"{TINY} --head gauss --gauss_std 0", "gauss_std 0.0: expected a number above 0"),
    (f"{TINY} --gauss_std -1", "argument --gauss_std: -1: expected a number, at least 0"),
    (f"{TINY} --head gauss --resume head --gauss_std 0.5", "--gauss_std 0.5: .* holds 0.25"),
    (f"{TINY} --head gauss --solver mean", "solver 'mean': Gauss has no diffusion"),
    (
        "main_mar --preset digits --device cpu --model dit_tiny --head_scale",
        "--head_scale True: dit_tiny has no such argument",
    ),
    (
        f"{TINY} --resume order --head_scale",
        "--head_scale True: .* holds False; leave the flag out",
    ),
    (f"{TINY} --resume tokenizer --tokenizer pixels", "--tokenizer pixels: .* trained with haar"),
    ("sample --ckpt tokenizer --device cpu --vae_path x", "tokenizer haar has no weights"),
    (f"{TINY} --tokenizer haar --vae_stride 1", "--vae_stride 1: the tokenizer has 2"),
    (f"{TINY} --online_eval --metrics bright", "argument --metrics: .*'bright'"),
    (
        f"{TINY} --online_eval --num_images 9 --metrics nearest {STATISTICS}",
        "metrics nearest: need",
    ),
    (f"{TINY} --solver means", "argument --solver: .*'means'"),
    (f"{TINY} --resume optimizer", r"optimizer AdamW \(was SGD\)"),
    ("sample --ckpt order --device cpu --order raster", "learned the columns order only"),
    (f"{TINY} --model ar_tiny --order confidence", "expected .* or columns for a causal model"),
    (f"{TINY} --data_path stripes --img_size 16", "the stripes are 8×8, expected 8"),
    (f"{TINY} --data_path stripes --class_num 4", "stripes: found 3 classes"),
    (f"{TINY} --online_eval --reference striped-stream", "--reference striped-stream: expected a"),
    (
        "main_tokenizer --tokenizer pixels --data_path striped-stream --device cpu",
        "a stream, expec",
    ),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(folder, recipe -> what it changed, name of a command -> (status, output, errors))."""
    folder = tmp_path_factory.mktemp("extended")
    source, changed = Source(folder), {}
    for recipe in COST:
        before = source.read()
        recipe(source)
        changed[recipe] = places(before, source.read())
    write_images(folder / "images", size=(8, 8))
    np.savez(folder / "statistics.npz", mu=np.zeros(64), sigma=np.eye(64))
    lines = commands()
    (folder / "commands.json").write_text(json.dumps([shlex.split(c) for c in lines.values()]))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], cwd=folder, env=environment, capture_output=True, text=True
    )
    said = json.loads((folder / "said.json").read_text())
    assert done.returncode == 0, f"{[*lines.values()][len(said)]}\n{done.stderr[-3000:]}"
    return folder, changed, dict(zip(lines, said, strict=True))


@pytest.mark.parametrize("recipe", COST, ids=lambda recipe: recipe.__name__)
def test_what_it_costs(found, recipe):
    """Beside its own code a change is one row, and one field per option."""
    assert found[1][recipe] == COST[recipe]


@pytest.mark.parametrize("name", ASKED)
def test_it_is_trained_sampled_and_resumed(found, name):
    """By its flag once; the checkpoint knows the rest."""
    for verb in ("train", "sample", "resume"):
        status, out, err = found[2][f"{verb} {name}"]
        assert status == 0, (verb, out[-2000:], err)
    assert f"resumed {name}/checkpoint-last.pth: 1 epochs are done" in out
    assert checkpoint(found, name)["epoch"] == 1
    count = 6 if name in ("data_set", "stream") else 20
    assert np.load(found[0] / f"{name}.npz")["arr_0"].shape == (count, 8, 8, 3)


def checkpoint(found, name):
    """The last checkpoint of a run."""
    return torch.load(found[0] / name / "checkpoint-last.pth", weights_only=True)


def records(found, name):
    """The lines of the results.jsonl of a run."""
    return [json.loads(line) for line in (found[0] / name / "results.jsonl").open()]


def test_flags_know_them(found):
    """Each is a choice, and each option a flag, wherever its kind is chosen from."""
    helps = {s: " ".join(found[2][f"help {s}"][1].split()) for s in SCRIPTS}
    heads = "gauss,", "--gauss_std X", "--head_scale"
    for text in (*heads, "haar,", "mean,", "columns,", "descent,"):
        assert text in helps["main_mar"], text
    for text in ("mean,", "columns,", "quadratic,", "nearest, brightness,"):
        assert text in helps["sample"], text
    assert "haar," in helps["main_tokenizer"] and "haar," in helps["main_cache"]
    for script in ("main_mar", "sample", "main_tokenizer"):
        assert "the built-in 8×8 digits, or stripes, or striped-stream" in helps[script]


def test_the_model_has_them(found):
    """What the weights fix is in the checkpoint after a run that did not name it, and in effect."""
    configs = {name: checkpoint(found, name)["config"] for name in ASKED}
    model = {name: config["model"] for name, config in configs.items()}
    assert (model["head"]["head"], model["head"]["gauss_std"]) == ("gauss", 0.25)
    assert "gauss_std" not in model["block"] and "diffloss_w" not in model["head"]
    assert model["block"]["head_scale"] is True and model["data_set"]["head_scale"] is False
    assert "encoder_blocks.0.attn.head_scale" in checkpoint(found, "block")["model"]
    assert configs["tokenizer"]["tokenizer"]["name"] == "haar"
    assert (model["tokenizer"]["vae_embed_dim"], model["tokenizer"]["patch_size"]) == (4, 1)
    assert (model["order"]["name"], model["order"]["order"]) == ("ar_tiny", "columns")
    assert "target_pos_embed_learned" not in checkpoint(found, "order")["model"]
    for name in ("data_set", "stream"):
        assert (model[name]["class_num"], model[name]["vae_embed_dim"]) == (3, 3)


def test_results_name_them(found):
    """results.jsonl says what was sampled, by the checkpoint's own settings, and both metrics."""
    results = {name: records(found, name)[0] for name in ASKED}
    for record in results.values():
        assert record["brightness"] >= 0 and record["nearest"] > 0
        assert {"brightness", "nearest"} <= record["real"].keys()
    (evaluated,) = records(found, "head-evaluated")
    assert evaluated["head"] == "gauss" and evaluated["frechet_distance"] > 0
    assert results["tokenizer"]["tokenizer"] == "Haar"
    assert results["solver"]["solver"] == "mean"
    assert results["token_schedule"]["token_schedule"] == "quadratic"
    assert results["data_set"]["reference"] == "stripes"
    assert checkpoint(found, "solver")["config"]["sampling"]["solver"] == "ddpm"  # each run's own


def test_the_solver_is_ancestral_sampling_without_noise(found):
    """A known answer: --solver mean gives what ddpm gives at temperature 0, from the same start."""
    assert found[2]["sample ddpm"][0] == 0
    one, other = (np.load(found[0] / f"{name}.npz")["arr_0"] for name in ("solver", "ancestral"))
    assert len(np.unique(one)) > 1 and np.abs(one.astype(int) - other).max() <= 1


def test_the_tokenizer_is_measured_and_cached(found):
    """Every script that takes a tokenizer takes this one: lossless, of three channels as well."""
    for name in ("measure haar", "cache haar", "train cached"):
        assert found[2][name][0] == 0, found[2][name]
    (record,) = records(found, "haar")
    assert record["psnr"] is None and record["tokenizer"] == "haar"  # infinite: lossless
    moments = np.load(next((found[0] / "cached").rglob("*.npz")))["moments"]
    assert moments.shape == (12, 4, 4)
    assert checkpoint(found, "from-cache")["config"]["model"]["vae_embed_dim"] == 12


def test_data_say_what_they_are_compared_with(found):
    """The held-out images of the set, in its usual extractor; a stream has no images to compare."""
    for name in ("data_set", "stream"):
        assert found[2][f"evaluate {name}"][0] == 0, found[2][f"evaluate {name}"]
    (held,), (none,) = records(found, "data_set-evaluated"), records(found, "stream-evaluated")
    assert (held["extractor"], held["reference_images"]) == ("grey-pixels", 300)
    assert held["frechet_distance"] > 0 and held["nearest"] > 0  # asked for by nobody
    assert none["reference"] is None and "frechet_distance" not in none


def test_an_option_newer_than_a_checkpoint_has_its_default():
    """What a checkpoint does not know was not there when its weights were trained."""
    stored = resolve_model(Model("mar_tiny"), set(), {}, PixelTokenizer())
    del stored["diffloss_d"]
    asked = Model("mar_tiny", diffloss_d=5)
    assert resolve_model(asked, set(), {}, PixelTokenizer(), stored, "it")["diffloss_d"] == 3
    with pytest.raises(ValueError, match="--diffloss_d 5: it holds 3; leave the flag out"):
        resolve_model(asked, {"diffloss_d"}, {}, PixelTokenizer(), stored, "it")


@pytest.mark.parametrize("index", range(len(WRONG)), ids=lambda i: WRONG[i][0][-40:])
def test_wrong_uses_are_one_line(found, index):
    """Exit status 2, one line, no traceback."""
    status, _, err = found[2][f"wrong {index}"]
    assert status == 2 and err.count("\n") == 1 and err.startswith("error: "), err
    assert re.search(WRONG[index][1], err), err
