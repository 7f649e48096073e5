"""What a user got wrong is one line. Run: python -m pytest tests/test_wrong_flags.py"""

import subprocess
import sys

import pytest
import torch
from cli import DIGITS, ROOT, complain
from rule import GOLDEN
from safetensors.torch import save_file

import main_mar
import sample
from models import export
from util import dist


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            (*DIGITS, "--tokenizer", "kl16", "--vae_path", "nowhere.ckpt"),
            "nowhere.ckpt: no such file",
        ),
        (("--data_path", "/no"), "/no: expected a folder of images for each class"),
        ((*DIGITS, "--model_kwargs", "norm_layer=x"), "--model_kwargs norm_layer=x: 'str' object"),
        ((*DIGITS, "--model_kwargs", "mlp_ratio=-1"), "--model_kwargs mlp_ratio=-1: "),
        ((*DIGITS, "--model_kwargs", "mlp_ratio=x"), "--model_kwargs mlp_ratio=x: "),
        ((*DIGITS, "--model_kwargs", "buffer_size=2"), "buffer_size=2: has a flag of its own"),
        (
            (*DIGITS, "--model", "dit_tiny", "--no_vlb", "--head", "l2"),
            "--head l2: dit_tiny has no",
        ),
        ((*DIGITS, "--class_num", "7"), "found 10 classes, --class_num is 7"),
        ((*DIGITS, "--patch_size", "3"), "img_size 8: expected a multiple"),
        ((*DIGITS, "--img_size", "16"), "the digits are 8×8"),
        ((*DIGITS, "--num_iter", "17"), "--num_iter 17: expected 1 to 16"),
        ((*DIGITS, "--num_sampling_steps", "2000"), "diffusion steps '2000'"),
        ((*DIGITS, "--max_timestep", "-3"), "--max_timestep: -3: expected an integer"),
        ((*DIGITS, "--ema_rate", "1.5"), "--ema_rate: 1.5: expected a number from 0 to 1"),
        ((*DIGITS, "--batch_size", "5000"), "batch_size 5000"),
        ((*DIGITS, "--accum_iter", "500"), "--accum_iter 500"),
        ((*DIGITS, "--vae_stride", "16"), "--vae_stride 16: the tokenizer has 1"),
        ((*DIGITS, "--evaluate"), "--resume '': expected a checkpoint, found none"),
        ((*DIGITS, "--resume", GOLDEN / "diffusion_tables.npz"), "diffusion_tables.npz"),
        ((*DIGITS, "--model", "ar_tiny", "--num_iter", "4"), "--num_iter 4: ar_tiny generates one"),
        ((*DIGITS, "--model", "ar_tiny", "--buffer_size", "4"), "ar_tiny has no such argument"),
        ((*DIGITS, "--device", "banana"), "--device banana: expected cuda, mps, cpu or auto"),
        ((*DIGITS, "--log_dir", ROOT / "LICENSE"), "LICENSE: not a folder to write to"),
        ((*DIGITS, "--out", "a.png"), "--out a.png: saves the images of --evaluate"),
        ((*DIGITS, "--max_timestep", "1000"), "--max_timestep: 1000: expected an integer from"),
        ((*DIGITS, "--head", "ce"), "head 'ce': the tokenizer is continuous, expected diffloss"),
        ((*DIGITS, "--epochs", "0"), "--epochs: 0: expected an integer, at least 1"),
        ((*DIGITS, "--device", "meta"), "--device meta: expected cuda, mps, cpu or auto"),
        ((*DIGITS, "--online_eval", "--data_path", "/no"), "--data_path /no: expected a folder"),
    ],
)
def test_wrong_flags_of_training(capsys, tmp_path, flags, message):
    """What does not fit is one line with the value and what was expected, and status 2."""
    line = complain(capsys, main_mar.main, *flags, "--output_dir", tmp_path)
    assert message in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu(capsys):
    """A device that does not exist is named, with those that do."""
    line = complain(capsys, main_mar.main, "--preset", "digits", "--device", "cuda")
    assert "--device cuda: no such device here; expected cpu or auto" in line


def test_more_processes_than_gpus(monkeypatch):
    """The process without one reports it; where each sees only its own, all take the first."""
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
        (("--out", "a.npy"), "--out a.npy: expected a name in .png or .npz, or a folder"),
        (("--out", ""), "expected a name in .png or .npz, or a folder"),
        (("--out", ROOT / "LICENSE"), "LICENSE: not a folder to write to"),
        (("--vae_path", "x.ckpt"), "vae_path x.ckpt: the tokenizer pixels has no weights"),
        (("--reference", "none.npz"), "none.npz: no such file"),
        (("--metrics", "accuracy"), "--metrics accuracy: expected a --reference, perhaps none"),
        (("--data_path", "/nope"), "--data_path /nope: expected a folder with train/"),
    ],
)
def test_wrong_flags_of_sampling(capsys, tmp_path, ckpt, flags, message):
    """The same for sample.py."""
    flags = ("--ckpt", ckpt, "--device", "cpu", "--out", tmp_path / "a.png", *flags)
    assert message in complain(capsys, sample.main, *flags)


def test_a_model_keeps_its_kind_of_tokenizer(capsys, tmp_path, ckpt):
    """Another is refused before it is made."""
    flags = (*DIGITS, "--output_dir", tmp_path, "--resume", ckpt, "--tokenizer", "kl16")
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


FIXTURES = ROOT / "tests" / "fixtures"


@pytest.mark.parametrize("name", ["kl.ckpt", "vq.ckpt", "flat.safetensors", "flat.ckpt"])
def test_a_tokenizer_is_no_model(capsys, tmp_path, name):
    """Its file is named as what it is, with the flag that takes it."""
    path = FIXTURES / name
    if name.startswith("flat"):
        path, state = tmp_path / name, {"module.encoder.conv_in.weight": torch.zeros(1)}
        (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    said = f"{path}: the network of a tokenizer, expected a checkpoint of a model; --vae_path takes"
    assert said in complain(capsys, sample.main, "--ckpt", path, "--device", "cpu")
    flags = (*DIGITS, "--output_dir", tmp_path / "run", "--resume", path)
    assert said in complain(capsys, main_mar.main, *flags)


def test_a_model_is_no_tokenizer(capsys, tmp_path, ckpt):
    """Nor is its export; and the other way round."""
    out = tmp_path / "ema.safetensors"
    export.main([str(ckpt), str(out)])
    for path in (ckpt, out, GOLDEN / "checkpoint-published.pth"):
        flags = (*DIGITS, "--output_dir", tmp_path / "run", "--tokenizer", "kl", "--vae_path", path)
        line = complain(capsys, main_mar.main, *flags)
        assert f"{path}: a checkpoint of a model, expected the network of a tokenizer" in line


def test_a_folder_of_other_images_is_refused(capsys, ckpt, tmp_path):
    """Stale images would be measured with the new ones; the same ones again are fine."""
    flags = ("--ckpt", ckpt, "--device", "cpu", "--num_iter", "2", "--out", tmp_path / "out")
    for _ in range(2):
        sample.main([*map(str, flags), "--per_class", "2"])
    line = complain(capsys, sample.main, *flags, "--per_class", "1")
    assert "holds 20 images of other settings: images 10 (was 20)" in line


def test_raw_weights_of_an_export_are_refused(capsys, ckpt, tmp_path):
    """An export holds the averaged weights alone."""
    out = tmp_path / "ema.safetensors"
    export.main([str(ckpt), str(out)])
    line = complain(capsys, sample.main, "--ckpt", out, "--weights", "raw", "--device", "cpu")
    assert "holds one set of weights only" in line


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("cfg", "--sweep cfg: expected NAME=VALUE"),
        ("cfg=1,x", "--sweep cfg=1,x: x: expected a number"),
        ("width=3", "expected NAME=VALUE,… with num_iter, num_sampling_steps, cfg, cfg_schedule"),
        ("num_iter=2,17", "--sweep num_iter=17: expected 1 to 16"),
        ("num_sampling_steps=0", "diffusion steps '0'"),
        ("temperature=-1", "--sweep temperature=-1: -1: expected a number, at least 0"),
        ("cfg=1,1.0", "--sweep cfg=1,1.0: a value is there twice"),
    ],
)
def test_wrong_sweeps(capsys, tmp_path, ckpt, axis, message):
    """Refused before anything is measured."""
    flags = ("--ckpt", ckpt, "--device", "cpu", "--reference", "digits", "--sweep", axis)
    assert message in complain(capsys, sample.main, *flags, "--output_dir", tmp_path)
    assert not list(tmp_path.iterdir())
