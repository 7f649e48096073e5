"""The scripts as a user calls them. Run: python -m pytest tests/test_cli.py"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from rule import GOLDEN

import engine_mar
import main_cache
import main_mar
import main_tokenizer
import reproduce
import sample
from models import export
from util import dist, presets
from util.checkpoint import LAST, load_checkpoint
from util.flags import run
from util.images import GridWriter

ROOT = Path(__file__).parent.parent
PARSERS = {
    "main_mar": main_mar,
    "main_cache": main_cache,
    "main_tokenizer": main_tokenizer,
    "reproduce": reproduce,
    "sample": sample,
}

# The published training command, but for paths and the launcher.
PUBLISHED_TRAINING = """--img_size 256 --vae_path V --vae_embed_dim 16 --vae_stride 16
--patch_size 1 --model mar_large --diffloss_d 3 --diffloss_w 1024 --epochs 400
--warmup_epochs 100 --batch_size 64
--blr 1.0e-4 --diffusion_batch_mul 4 --output_dir D --resume D --data_path P --use_cached
--cached_path C --online_eval --grad_checkpointing --num_workers 10 --pin_mem --world_size 1
--local_rank -1 --dist_on_itp --dist_url env:// --log_dir L --device cuda --seed 1 --start_epoch 0
--min_lr 0 --lr_schedule constant --ema_rate 0.9999 --mask_ratio_min 0.7 --grad_clip 3.0
--attn_dropout 0.1 --proj_dropout 0.1 --buffer_size 64 --num_sampling_steps 100 --temperature 1.0
--class_num 1000 --label_drop_prob 0.1 --eval_freq 40 --save_last_freq 5 --weight_decay 0.02
--lr 8e-4 --no_pin_mem"""
PUBLISHED_EVALUATION = """--model mar_base --diffloss_d 6 --diffloss_w 1024 --eval_bsz 256
--num_images 50000 --num_iter 256 --num_sampling_steps 100 --cfg 2.9 --cfg_schedule linear
--temperature 1.0 --output_dir O --resume R --data_path P --evaluate"""
PUBLISHED_CACHING = """--img_size 256 --vae_path V --vae_embed_dim 16 --batch_size 128 --data_path P
--cached_path C --device cuda --seed 0 --num_workers 10 --pin_mem --world_size 1 --local_rank -1
--dist_on_itp --dist_url env://"""


@pytest.mark.parametrize(
    ("script", "command"),
    [
        (main_mar, PUBLISHED_TRAINING),
        (main_mar, PUBLISHED_EVALUATION),
        (main_cache, PUBLISHED_CACHING),
    ],
)
def test_published_flags_are_known(script, command):
    """Every flag of the published commands parses."""
    args = script.get_parser().parse_args(shlex.split(command))
    assert args.data_path == "P"


def test_published_defaults():
    """A flag left out means what it meant, except the mismatched head and the device."""
    expected = {
        "batch_size": 16,
        "epochs": 400,
        "model": "mar_large",
        "img_size": 256,
        "vae_path": "pretrained_models/vae/kl16.ckpt",
        "num_iter": 64,
        "num_images": 50000,
        "cfg": 1.0,
        "cfg_schedule": "linear",
        "label_drop_prob": 0.1,
        "eval_freq": 40,
        "save_last_freq": 5,
        "online_eval": False,
        "evaluate": False,
        "eval_bsz": 64,
        "weight_decay": 0.02,
        "grad_checkpointing": False,
        "lr": None,
        "blr": 1e-4,
        "min_lr": 0.0,
        "lr_schedule": "constant",
        "warmup_epochs": 100,
        "ema_rate": 0.9999,
        "mask_ratio_min": 0.7,
        "grad_clip": 3.0,
        "attn_dropout": 0.1,
        "proj_dropout": 0.1,
        "buffer_size": 64,
        "diffloss_d": 3,
        "diffloss_w": 1024,
        "num_sampling_steps": "100",
        "diffusion_batch_mul": 1,
        "temperature": 1.0,
        "data_path": "./data/imagenet",
        "class_num": 1000,
        "output_dir": "./output_dir",
        "seed": 1,
        "resume": "",
        "start_epoch": 0,
        "num_workers": 10,
        "pin_mem": True,
        "dist_url": "env://",
        "use_cached": False,
        "cached_path": "",
        "device": "auto",
    }
    args = vars(main_mar.get_parser().parse_args([]))
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize("name", PARSERS)
def test_every_flag_is_explained_with_its_default(name):
    """--help has groups, and for each flag a sentence and its default."""
    parser = PARSERS[name].get_parser()
    text = " ".join(parser.format_help().split())
    for group in parser._action_groups[2:]:
        assert group.title and f"{group.title}:" in text
    for action in parser._actions[1:]:
        assert action.help, action.dest
        said = parser._get_formatter()._get_help_string(action)
        assert "(default: " in said or action.required, f"{action.dest}: {said}"


def test_preset_lies_between_defaults_and_flags():
    """A preset changes defaults; the command line changes the preset; a data set brings its own."""
    args, given = presets.apply(main_mar.get_parser(), ["--preset", "digits", "--epochs", "3"])
    assert (args.model, args.epochs, args.img_size, args.tokenizer) == ("mar_tiny", 3, 8, "pixels")
    assert given == {"preset", "epochs"}
    args, _ = presets.apply(main_mar.get_parser(), ["--data_path", "digits"])
    assert (args.model, args.class_num, args.epochs) == ("mar_large", 10, 400)


def complain(capsys, main, *argv):
    """The one line that a script prints to standard error before it exits with status 2."""
    with pytest.raises(SystemExit) as stop:
        run(main, [str(a) for a in argv])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


DIGITS = ("--preset", "digits", "--device", "cpu")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--vae_path", "nowhere.ckpt"), "nowhere.ckpt: no such file"),
        ((*DIGITS, "--class_num", "7"), "found 10 classes, --class_num is 7"),
        ((*DIGITS, "--img_size", "9"), "img_size 9: expected a multiple"),
        ((*DIGITS, "--img_size", "16"), "the digits are 8×8"),
        ((*DIGITS, "--num_iter", "17"), "--num_iter 17: expected 1 to 16"),
        ((*DIGITS, "--num_sampling_steps", "2000"), "diffusion steps '2000'"),
        ((*DIGITS, "--max_timestep", "-3"), "--max_timestep: -3: expected an integer"),
        ((*DIGITS, "--ema_rate", "1.5"), "--ema_rate: 1.5: expected a number from 0 to 1"),
        ((*DIGITS, "--batch_size", "5000"), "batch_size 5000"),
        ((*DIGITS, "--accum_iter", "500"), "--accum_iter 500"),
        ((*DIGITS, "--vae_stride", "16"), "--vae_stride 16: the tokenizer pixels has 1"),
        ((*DIGITS, "--evaluate"), "--resume '': expected a checkpoint, found none"),
        ((*DIGITS, "--resume", GOLDEN / "diffusion_tables.npz"), "diffusion_tables.npz"),
        ((*DIGITS, "--model", "ar_tiny", "--num_iter", "4"), "--num_iter 4: ar_tiny generates one"),
        ((*DIGITS, "--model", "ar_tiny", "--buffer_size", "4"), "ar_tiny has no such argument"),
        ((*DIGITS, "--device", "banana"), "--device banana: expected cuda, cpu or auto"),
        ((*DIGITS, "--log_dir", ROOT / "LICENSE"), "LICENSE: not a folder to write to"),
        ((*DIGITS, "--out", "a.png"), "--out a.png: keeps the images of --evaluate"),
        ((*DIGITS, "--max_timestep", "1000"), "--max_timestep: 1000: expected an integer from"),
        ((*DIGITS, "--head", "ce"), "head 'ce': the tokenizer is continuous, expected diffloss"),
        ((*DIGITS, "--epochs", "0"), "--epochs: 0: expected an integer, at least 1"),
        ((*DIGITS, "--device", "meta"), "--device meta: expected cuda, cpu or auto"),
        ((*DIGITS, "--online_eval", "--data_path", "/no"), "--data_path /no: expected a folder"),
    ],
)
def test_wrong_flags_of_training(capsys, tmp_path, flags, message):
    """What does not fit is one line with the value and what was expected, and status 2."""
    line = complain(capsys, main_mar.main, *flags, "--output_dir", tmp_path)
    assert message in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu(capsys):
    """A device that is not there is said, with those that are."""
    line = complain(capsys, main_mar.main, "--preset", "digits", "--device", "cuda")
    assert "--device cuda: no such device here; expected cpu or auto" in line


def test_more_processes_than_gpus(monkeypatch):
    """Said by the process that has none; where each is shown its own, all are the first there."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "2")
    for visible in (1, 4):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)  # noqa: B023 (not kept)
        dist.init("cuda")
    assert [str(device) for device in chosen] == ["cuda:0", "cuda:2"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="process 2 of this machine: expected at most 2, its GPUs"):
        dist.init("cuda")


def test_errors_leave_no_traceback():
    """As a process: one line on standard error, exit status 2."""
    done = subprocess.run(
        [sys.executable, "main_mar.py", *DIGITS, "--num_iter", "99"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: --num_iter 99")
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A checkpoint after one short epoch on the digits."""
    folder = tmp_path_factory.mktemp("digits")
    flags = ["--epochs", "1", "--batch_size", "256", "--num_sampling_steps", "5"]
    main_mar.main([*DIGITS, *flags, "--output_dir", str(folder)])
    return folder / LAST


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--labels", "3-12"), "expected classes from 0 to 9"),
        (("--labels", "x"), "expected numbers, ranges"),
        (("--labels", "0-"), "expected numbers, ranges"),
        (("--labels", ""), "expected numbers, ranges"),
        (("--labels", "5-3"), "expected classes from 0 to 9"),
        (("--per_class", "0"), "--per_class: 0: expected an integer, at least 1"),
        (("--per_class", "500"), "a grid of 5000 images, expected at most 1024"),
        (("--num_iter", "40"), "num_iter 40: expected 1 to 16"),
        (("--num_sampling_steps", "ddim7,8"), "'ddim7,8'"),
        (("--temperature", "-1"), "--temperature: -1: expected a number, at least 0"),
        (("--out", "a.jpg"), "--out a.jpg: expected a name in .png or .npz, or a folder"),
        (("--out", ""), "expected a name in .png or .npz, or a folder"),
        (("--out", ROOT / "LICENSE"), "LICENSE: not a folder to write to"),
        (("--vae_path", "x.ckpt"), "vae_path x.ckpt: the tokenizer pixels has no weights"),
        (("--reference", "none.npz"), "none.npz: no such file"),
        (("--data_path", "/nope"), "--data_path /nope: expected a folder with train/"),
    ],
)
def test_wrong_flags_of_sampling(capsys, tmp_path, ckpt, flags, message):
    """The same for sample.py."""
    flags = ("--ckpt", ckpt, "--device", "cpu", "--out", tmp_path / "a.png", *flags)
    assert message in complain(capsys, sample.main, *flags)


def test_a_model_keeps_its_kind_of_tokenizer(capsys, tmp_path, ckpt):
    """Another is refused before it is made."""
    flags = ("--device", "cpu", "--output_dir", tmp_path, "--resume", ckpt, "--tokenizer", "kl16")
    line = complain(capsys, main_mar.main, *flags)
    assert "--tokenizer kl16: " in line and "was trained with pixels; leave the flag out" in line


def test_processes_that_do_not_meet(monkeypatch):
    """A wrong address is one line."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="--dist_url nonsense: process 0 of 2 cannot join others"):
        dist.init("cpu", dist_url="nonsense")


def test_missing_checkpoint(capsys):
    """A path that is not there is named."""
    assert "none.pth: no such file" in complain(capsys, sample.main, "--ckpt", "none.pth")


def test_sampling_writes_what_was_asked_for(tmp_path, ckpt):
    """Labels by number and range, so many of each; a grid, a folder and an .npz of the same."""
    out = [tmp_path / "grid.png", tmp_path / "folder", tmp_path / "all.npz"]
    flags = ["--ckpt", ckpt, "--device", "cpu", "--labels", "7,0-1", "--per_class", "2"]
    flags += ["--num_iter", "4", "--batch_size", "4", "--out", *out]
    sample.main([str(f) for f in flags])
    images = np.load(out[2])["arr_0"]
    assert (images.shape, images.dtype) == ((6, 8, 8, 3), np.uint8)
    from PIL import Image

    names = sorted(p.name for p in out[1].iterdir())
    assert names == [f"{i:06d}.png" for i in range(6)]
    for name, image in zip(names, images, strict=True):
        assert np.array_equal(np.asarray(Image.open(out[1] / name)), image)
    assert Image.open(out[0]).size[0] < Image.open(out[0]).size[1]  # two columns, three rows
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all.npz", "folder", "grid.png"]


def test_sampling_without_a_class(tmp_path, ckpt):
    """--labels none samples with the embedding of no class."""
    flags = ["--ckpt", ckpt, "--device", "cpu", "--labels", "none", "--out", tmp_path / "a.npz"]
    sample.main([str(f) for f in flags])
    assert np.load(tmp_path / "a.npz")["arr_0"].shape == (8, 8, 8, 3)


def test_resuming_takes_the_head_from_the_weights(capsys, ckpt, tmp_path):
    """--resume needs no flag of the architecture, and refuses one that contradicts the weights."""
    flags = ["--resume", ckpt, "--data_path", "digits", "--device", "cpu", "--num_workers", "0"]
    flags += ["--batch_size", "512", "--epochs", "2", "--num_sampling_steps", "5"]
    flags += ["--output_dir", tmp_path, "--max_timestep", "950"]
    main_mar.main([str(f) for f in flags])
    assert load_checkpoint(tmp_path / LAST)["config"]["model"]["name"] == "mar_tiny"
    capsys.readouterr()
    line = complain(capsys, main_mar.main, *flags, "--diffloss_d", "6")
    assert "--diffloss_d 6:" in line and "holds 3" in line


def test_published_checkpoint_evaluates_and_resumes(tmp_path, vae_path, capsys):
    """The published evaluation command on a published file; then training goes on from it."""
    published = GOLDEN / "checkpoint-published.pth"
    common = f"--vae_path {vae_path} --vae_embed_dim 16 --vae_stride 16 --patch_size 1 --device cpu"
    common += f" --diffloss_d 2 --diffloss_w 64 --num_sampling_steps 3 --resume {published}"
    flags = f"{common} --eval_bsz 4 --num_images 10 --num_iter 4 --cfg 2.9 --cfg_schedule linear"
    flags += f" --temperature 1.0 --output_dir {tmp_path}/out --evaluate"
    flags += f" --extractor tiny --out {tmp_path}/images"
    main_mar.main(shlex.split(flags))
    record = json.loads((tmp_path / "out/results.jsonl").read_text())
    assert (record["images"], record["cfg"], record["num_sampling_steps"]) == (10, 2.9, "3")
    assert len(list((tmp_path / "images").glob("*.png"))) == 10

    images = write_images(tmp_path / "data", classes="abcdefghij", count=1, size=(64, 64))
    flags = f"{common} --data_path {images} --epochs 5 --batch_size 5 --num_workers 0 --lr 1e-4"
    main_mar.main([*shlex.split(flags), "--output_dir", str(tmp_path / "on")])
    assert "4 epochs are done" in capsys.readouterr().out
    after = load_checkpoint(tmp_path / "on" / LAST)
    assert after["epoch"] == 4
    # 20 steps were there, an epoch of 2 came on top
    assert {int(s["step"]) for s in after["optimizer"]["state"].values()} == {22}


@pytest.mark.parametrize("backbone", ["ar_tiny", "ar_tiny --order random", "dit_tiny"])
def test_other_backbones_train_resume_and_sample(tmp_path, backbone):
    """The same scripts serve them all; the checkpoint says which it is."""
    flags = f"--preset digits --device cpu --model {backbone} --batch_size 512"
    flags += f" --num_sampling_steps 3 --save_last_freq 1 --output_dir {tmp_path}"
    main_mar.main(shlex.split(f"{flags} --epochs 1"))
    plain = f"--resume {tmp_path} --data_path digits --output_dir {tmp_path} --device cpu"
    main_mar.main(shlex.split(f"{plain} --epochs 2 --batch_size 512 --num_workers 0"))
    assert load_checkpoint(tmp_path / LAST)["epoch"] == 1
    out = tmp_path / "samples.npz"
    sample.main(["--ckpt", str(tmp_path), "--device", "cpu", "--cfg", "2", "--out", str(out)])
    assert np.load(out)["arr_0"].shape == (80, 8, 8, 3)


def test_images_to_cache_to_training_to_samples(tmp_path, images, vae_path):
    """The whole path: a folder, its cache, a model trained on that, pictures from its file."""
    cache = tmp_path / "cache"
    common = f"--img_size 32 --vae_path {vae_path} --device cpu --num_workers 0"
    for _ in range(2):  # the second run finds everything there
        main_cache.main(
            shlex.split(f"{common} --data_path {images} --cached_path {cache} --batch_size 3")
        )
    assert len(list(cache.rglob("*.npz"))) == 8
    flags = f"{common} --use_cached --cached_path {cache} --class_num 2 --model mar_tiny"
    flags += " --buffer_size 4 --diffloss_d 1 --diffloss_w 32 --batch_size 4 --epochs 2 --lr 1e-3"
    flags += " --warmup_epochs 1 --max_timestep 950 --num_sampling_steps 4 --num_iter 3"
    main_mar.main([*shlex.split(flags), "--output_dir", str(tmp_path / "run")])
    checkpoint = load_checkpoint(tmp_path / "run" / LAST)
    assert checkpoint["config"]["tokenizer"]["vae_path"] == str(vae_path)
    out = tmp_path / "samples.npz"
    sample.main(["--ckpt", str(tmp_path / "run" / LAST), "--labels", "all", "--out", str(out)])
    assert np.load(out)["arr_0"].shape == (16, 32, 32, 3)


def read_lines(path):
    """What is on each line of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_evaluation_says_what_it_measured(ckpt, tmp_path, capsys):
    """--evaluate prints a table and one JSON line, which results.jsonl and TensorBoard keep."""
    flags = [*DIGITS, "--resume", ckpt, "--evaluate", "--num_images", "20", "--num_iter", "2"]
    flags += ["--output_dir", tmp_path / "run", "--stats_dir", tmp_path / "stats"]
    for _ in range(2):
        main_mar.main([str(f) for f in flags])
    output = capsys.readouterr().out
    records = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert records == read_lines(tmp_path / "run/results.jsonl")
    first, second = records
    assert first["frechet_distance"] == second["frechet_distance"]
    assert {"inception_score", "precision", "recall", "accuracy", "seconds_per_image"} <= set(first)
    assert first["weights_sha256"] == second["weights_sha256"] and first["weights"] == "ema"
    assert (first["images"], first["real"]["images"]) == (20, 20)
    assert any("covariance is singular" in note for note in first["notes"])
    assert "real images" in output and "seconds an image" in output
    assert list((tmp_path / "run").glob("events.out.tfevents*"))


def test_online_evaluation_measures_ema_and_raw_weights(tmp_path):
    """--online_eval, of both, with different figures."""
    flags = [*DIGITS, "--epochs", "1", "--batch_size", "256", "--num_sampling_steps", "5"]
    flags += ["--online_eval", "--num_images", "20", "--num_iter", "2", "--eval_bsz", "20"]
    flags += ["--stats_dir", tmp_path / "stats", "--output_dir", tmp_path / "run"]
    main_mar.main([str(f) for f in flags])
    ema, raw = read_lines(tmp_path / "run/results.jsonl")
    assert (ema["weights"], raw["weights"]) == ("ema", "raw")
    assert ema["frechet_distance"] != raw["frechet_distance"]
    logged = {name for line in read_lines(tmp_path / "run/log.jsonl") for name in line}
    assert {"eval_ema/frechet_distance", "eval_raw/frechet_distance"} <= logged


def sweep(ckpt, folder, *axes):
    flags = ["--ckpt", ckpt, "--device", "cpu", "--labels", "all", "--per_class", "2"]
    flags += ["--reference", "digits", "--stats_dir", folder / "stats", "--output_dir", folder]
    sample.main([str(f) for f in (*flags, "--sweep", *axes)])


def test_sweep_is_resumed_and_drawn(ckpt, tmp_path, monkeypatch, capsys):
    """Each point once, though asked for again with another: a table, a CSV and the plots."""
    calls = []
    evaluate = engine_mar.evaluate
    monkeypatch.setattr(
        engine_mar,
        "evaluate",
        lambda *args, **kwargs: (calls.append(kwargs["settings"]), evaluate(*args, **kwargs)),
    )
    steps = ("num_sampling_steps=3,5", "num_iter=2,3")
    sweep(ckpt, tmp_path, "temperature=0.9", *steps)
    assert len(calls) == 4
    sweep(ckpt, tmp_path, "temperature=0.9,1", *steps)
    assert len(calls) == 8
    assert {call["temperature"] for call in calls[4:]} == {1.0}
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 8
    rows = (tmp_path / "sweep.csv").read_text().splitlines()
    assert len(rows) == 9 and rows[0].startswith("temperature,num_sampling_steps,num_iter,frechet")
    assert len((tmp_path / "sweep.md").read_text().splitlines()) == 10
    plots = {path.name for path in tmp_path.glob("*.png")}
    assert plots == {f"sweep_{name}.png" for name in ("diffusion_steps", "temperature", "speed")}


def test_a_sweep_of_other_labels_is_another(ckpt, tmp_path, capsys):
    """As many images of other classes, or from other data, are not taken for those there."""
    flags = ["--ckpt", ckpt, "--device", "cpu", "--reference", "digits", "--output_dir", tmp_path]
    flags += ["--stats_dir", tmp_path / "stats", "--sweep", "num_iter=2", "--batch_size", "10"]
    for labels in (("0-9", "1"), ("3", "10"), ("3", "10")):
        sample.main([str(f) for f in (*flags, "--labels", labels[0], "--per_class", labels[1])])
        # a run that was killed leaves half a line
        with (tmp_path / "results.jsonl").open("a") as file:
            file.write('{"cfg": 1.0, "ima')
    assert capsys.readouterr().out.count("there already") == 1
    whole = [line for line in (tmp_path / "results.jsonl").read_text().splitlines() if "}" in line]
    assert [json.loads(line)["labels"] for line in whole] == ["0-9", "3"]


def test_classes_take_turns_but_for_a_grid(ckpt, tmp_path):
    """ADM's Inception Score splits consecutive images: sorted by class it would be far too low."""
    args, _ = presets.apply(main_mar.get_parser(), [*DIGITS, "--num_images", "25"])
    labels = main_mar.labels_of(args, {"model": {"class_num": 10}})
    assert labels[:12] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    writer = GridWriter(tmp_path / "a.png", [7, 0, 7, 0], columns=2)
    assert writer.order == [0, 2, 1, 3]


def test_a_folder_of_other_pictures_is_refused(capsys, ckpt, tmp_path):
    """Stale pictures would be measured with the new ones; the same ones again are fine."""
    flags = ("--ckpt", ckpt, "--device", "cpu", "--num_iter", "2", "--out", tmp_path / "out")
    for _ in range(2):
        sample.main([*map(str, flags), "--per_class", "2"])
    line = complain(capsys, sample.main, *flags, "--per_class", "1")
    assert "holds 10 other pictures, such as 0000" in line


def test_raw_weights_of_an_export_are_refused(capsys, ckpt, tmp_path):
    """An export holds the averaged weights alone."""
    out = tmp_path / "ema.safetensors"
    export.main([str(ckpt), str(out)])
    line = complain(capsys, sample.main, "--ckpt", out, "--weights", "raw", "--device", "cpu")
    assert "holds one set of weights only" in line


def test_a_folder_to_resume_may_have_a_dot(tmp_path):
    """The same command serves the first run and the next."""
    folder = tmp_path / "blr1.0e-4"
    flags = [*DIGITS, "--epochs", "1", "--batch_size", "512", "--num_sampling_steps", "3"]
    main_mar.main([*map(str, flags), "--output_dir", str(folder), "--resume", str(folder)])
    assert (folder / LAST).is_file()


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("cfg", "--sweep cfg: expected NAME=VALUE"),
        ("cfg=1,x", "--sweep cfg=1,x: x: expected a number"),
        ("width=3", "expected NAME=VALUE,… with cfg, temperature, num_iter, num_sampling_steps"),
        ("num_iter=2,17", "--sweep num_iter=17: expected 1 to 16"),
        ("num_sampling_steps=0", "diffusion steps '0'"),
        ("temperature=-1", "--sweep temperature=-1: -1: expected a number, at least 0"),
        ("cfg=1,1.0", "--sweep cfg=1,1.0: a value is there twice"),
    ],
)
def test_wrong_sweeps(capsys, tmp_path, ckpt, axis, message):
    """Said before anything is measured."""
    flags = ("--ckpt", ckpt, "--device", "cpu", "--reference", "digits", "--sweep", axis)
    assert message in complain(capsys, sample.main, *flags, "--output_dir", tmp_path)
    assert not list(tmp_path.iterdir())


def test_tokenizer_is_measured(images, vae_path, tmp_path):
    """Figures and a picture, which do not depend on the batches."""
    records = []
    for batch_size in (8, 3):
        flags = f"--data_path {images} --img_size 32 --vae_path {vae_path} --extractor tiny"
        flags += f" --device cpu --num_workers 0 --batch_size {batch_size}"
        main_tokenizer.main([*shlex.split(flags), "--output_dir", str(tmp_path / str(batch_size))])
        records.append(json.loads((tmp_path / str(batch_size) / "results.jsonl").read_text()))
    figures = ("rfd", "psnr", "ssim", "latent_mean", "latent_std", "latent_scale")
    for name in figures:
        assert records[0][name] == pytest.approx(records[1][name], rel=1e-4), name
    assert records[0]["latent_scale"] == pytest.approx(1 / records[0]["latent_std"])
    assert 0 < records[0]["psnr"] < 20 and records[0]["rfd"] > 0
    assert (tmp_path / "8/reconstructions.png").is_file()


def test_pixels_lose_nothing(tmp_path, capsys):
    """The tokenizer that is the identity: distance 0, PSNR infinite, null in JSON."""
    flags = "--tokenizer pixels --data_path digits --split test --device cpu --num_workers 0"
    main_tokenizer.main([*shlex.split(flags), "--output_dir", str(tmp_path)])
    record = json.loads((tmp_path / "results.jsonl").read_text())
    assert abs(record["rfd"]) < 1e-6 and record["psnr"] is None and record["images"] == 360
    wrong = (*shlex.split(flags), "--split", "val")
    assert "split 'val': " in complain(capsys, main_tokenizer.main, *wrong)
    line = complain(capsys, main_tokenizer.main, "--tokenizer", "vq", "--output_dir", tmp_path)
    assert "--tokenizer vq: expected --epochs to train one, or a --vae_path" in line


def test_a_terminal_gets_no_other_files(tmp_path):
    """Scripts write where they are told: nothing appears in the folder they are called from."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    flags = [*DIGITS, "--epochs", "1", "--batch_size", "512", "--output_dir", "out"]
    flags += ["--num_sampling_steps", "3", "--num_iter", "2"]
    subprocess.run(
        [sys.executable, ROOT / "main_mar.py", *flags],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
    )
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    json.loads((tmp_path / "out/log.jsonl").read_text().splitlines()[0])
