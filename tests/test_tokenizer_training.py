"""The training of tokenizers as a run: stopped, resumed, logged, refused.

Run: python -m pytest tests/test_tokenizer_training.py
"""

import json
import re
import shlex
import subprocess
import sys
from operator import eq
from pathlib import Path

import pytest
import torch
from cli import complain
from test_stop import signalled

import main_mar
import main_tokenizer
from models import build_tokenizer, presets
from util.checkpoint import LAST, load_checkpoint
from util.flags import run
from util.run import stop
from util.run.saver import Saver

ROOT = Path(__file__).parents[1]
SHORT = "--data_path digits --split test --num_images 40 --device cpu --num_workers 0 --ch 8"
SHORT += " --extractor grey-pixels --batch_size 128 --epochs 2 --lr 3e-3"
ADVERSARIAL = "--disc_weight 0.5 --disc_layers 1 --disc_ch 8 --disc_start 8"
WAYS = {
    "kl": f"--tokenizer kl {ADVERSARIAL} --ema_rate 0.9 --latent_noise 1 --latent_mask 0.5",
    "vq, moving averages": f"--tokenizer vq --num_codes 32 --codebook ema {ADVERSARIAL}"
    " --accum_iter 2 --entropy_weight 0.1",
    "vq, gradient": "--tokenizer vq --num_codes 32 --warmup_epochs 1 --grad_clip 1",
}


def train(flags, folder):
    """The checkpoint of a training."""
    run(main_tokenizer.main, [*shlex.split(f"{SHORT} {flags}"), "--output_dir", str(folder)])
    return load_checkpoint(folder / LAST, of_tokenizer=True)


def tensors(content, name=""):
    """Name -> tensor or number, of all in nested dicts and lists."""
    if isinstance(content, list | tuple):
        content = dict(enumerate(content))
    if not isinstance(content, dict):
        return {name: content}
    return {k: v for key in content for k, v in tensors(content[key], f"{name} {key}").items()}


def assert_same(one, other):
    """All that a training goes on with, bit by bit."""
    for part in ("model", "model_ema", "optimizer", "parts"):
        one_part, other_part = (tensors(each.get(part, {})) for each in (one, other))
        assert one_part.keys() == other_part.keys()
        for name, value in one_part.items():
            equal = torch.equal if torch.is_tensor(value) else eq
            assert equal(value, other_part[name]), f"{part}{name}"


def log_of(folder):
    """The records of training in log.jsonl, without times."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    timed = ("images_per_s", "data_wait")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


FIRST, *OTHERS = sorted(WAYS, key=lambda way: "averages" not in way)  # the one with most state


@pytest.mark.parametrize("way", [FIRST, *(pytest.param(w, marks=pytest.mark.slow) for w in OTHERS)])
def test_a_stopped_training_resumes_within_the_epoch(way, tmp_path, monkeypatch, capsys):
    """With networks, averages, optimizers, discriminator and codes of the one that nobody stopped,
    and the same file in the end."""
    whole = train(WAYS[way], tmp_path / "whole")
    steps = {int(state["step"]) for state in whole["optimizer"]["state"].values()}.pop()
    folder = tmp_path / "stopped"
    monkeypatch.setattr(Saver, "after_step", signalled(steps // 2 + 2))  # in the second epoch
    with pytest.raises(SystemExit) as ended:
        train(WAYS[way], folder)
    assert ended.value.code == stop.STATUS
    assert f"call again with --resume {folder}" in capsys.readouterr().err
    monkeypatch.undo()
    stopped = load_checkpoint(folder / LAST, of_tokenizer=True)
    assert stopped["epoch"] == 0 and stopped["place"]["batch"] > 0
    assert_same(train(f"{WAYS[way]} --resume {folder}", folder), whole)
    files = [
        torch.load(tmp_path / each / "tokenizer.ckpt", weights_only=True)
        for each in ("whole", "stopped")
    ]
    assert files[0]["scale"] == files[1]["scale"]
    assert files[0]["config"]["sha256"] == files[1]["config"]["sha256"]
    last, whole = (log_of(tmp_path / each)[-1] for each in ("stopped", "whole"))
    assert last["grad_norm"] == whole["grad_norm"]  # the loss is a mean over other steps


def test_what_a_run_leaves(tmp_path, capsys):
    """Curves of every loss, pictures of reconstructions and latents by epoch, the file at each
    evaluation with its metrics in the end, and a page that says how to resume."""
    flags = f"{WAYS['vq, moving averages']} --disc_start 5 --eval_freq 1 --online_eval"
    train(flags, tmp_path)
    last = log_of(tmp_path)[-1]
    losses = {"l1", "commitment", "entropy", "adversarial", "adaptive_weight", "discriminator"}
    assert losses | {"codes_used", "code_perplexity", "codes_revived"} <= last.keys()
    assert "codebook" not in last  # moving averages have none
    total = sum(last[name] for name in ("l1", "commitment", "entropy", "adversarial"))
    assert last["loss"] == pytest.approx(total, rel=1e-4)
    first = log_of(tmp_path)[0]
    assert first["step"] == 5 and "adversarial" not in first and "discriminator" not in first
    names = {path.name for path in (tmp_path / "samples").iterdir()}
    assert names == {
        f"epoch000{n}_{what}.png" for n in (1, 2) for what in ("reconstructions", "latents")
    }
    page = (tmp_path / "index.html").read_text()
    assert "main_tokenizer.py" in page and "adaptive weight" in page and "psnr" in page
    held = torch.load(tmp_path / "tokenizer.ckpt", weights_only=True)
    assert held["config"]["metrics"]["psnr"] > 5
    assert held["config"]["metrics"]["extractor"] == "grey-pixels"
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


def test_a_training_without_options_has_no_parts(tmp_path):
    """No part beside the network, and the weights of the file are those that were trained."""
    held = train("--tokenizer kl", tmp_path)
    assert "parts" not in held
    file = torch.load(tmp_path / "tokenizer.ckpt", weights_only=True)
    assert all(torch.equal(held["model"][name], value) for name, value in file["model"].items())
    tokenizer = build_tokenizer("kl", tmp_path / "tokenizer.ckpt")
    assert tokenizer.stride == 2 and tokenizer.image_channels == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--ch 16", "--ch 16: the training in .* has 8, which its weights fix"),
        ("--tokenizer vq", "--tokenizer vq: the training in .* has kl, which its weights fix"),
        ("--img_size 16", "--img_size 16: the training in .* has 8"),
        ("--codebook ema", "--codebook ema: the training in .* has gradient"),
    ],
)
def test_what_a_resumed_training_refuses(flags, message, tmp_path, capsys):
    """Flags that its weights contradict, before anything is trained."""
    train("--tokenizer kl --epochs 1", tmp_path)
    wrong = f"{SHORT} --tokenizer kl {flags} --resume {tmp_path} --output_dir {tmp_path}"
    assert re.search(message, complain(capsys, main_tokenizer.main, *shlex.split(wrong)))


def test_checkpoints_of_models_and_tokenizers_are_told_apart(tmp_path, capsys):
    """Each script refuses the other's, in a line that says what it is."""
    train("--tokenizer kl --epochs 1", tmp_path / "kl")
    flags = f"--preset digits --device cpu --output_dir {tmp_path / 'mar'}"
    said = complain(capsys, main_mar.main, *shlex.split(f"{flags} --resume {tmp_path / 'kl'}"))
    assert "the network of a tokenizer, expected a checkpoint of a model" in said
    path = f"{tmp_path / 'kl' / LAST}"
    content = torch.load(path, weights_only=True)
    del content["config"]["network"]
    torch.save(content, path)
    wrong = f"{SHORT} --tokenizer kl --resume {path} --output_dir {tmp_path / 'other'}"
    said = complain(capsys, main_tokenizer.main, *shlex.split(wrong))
    assert "expected a checkpoint of the training of a tokenizer" in said


def test_parts_that_a_checkpoint_does_not_have_begin_anew(tmp_path, capsys):
    """A discriminator can be added to a run that had none, which is said."""
    train("--tokenizer kl --epochs 1", tmp_path)
    held = train(f"--tokenizer kl {ADVERSARIAL} --resume {tmp_path}", tmp_path)
    assert "has no discriminator: it begins anew" in capsys.readouterr().out
    assert held["parts"].keys() == {"discriminator", "discriminator_optimizer"}


def test_the_discriminator_stays_on_with_other_batches(tmp_path):
    """Its start is counted in steps that were taken, not in those that epochs have now."""
    flags = f"--tokenizer kl {ADVERSARIAL}".replace("--disc_start 8", "--disc_start 9")
    train(f"{flags} --epochs 1", tmp_path)  # 11 steps
    held = train(f"{flags} --batch_size 256 --resume {tmp_path}", tmp_path)  # 5 more
    steps = {
        name: next(iter(state["state"].values()))["step"].item()
        for name, state in {**held["parts"], "network": held["optimizer"]}.items()
        if "state" in state
    }
    assert steps == {"network": 16, "discriminator_optimizer": 16 - 9}


def test_a_finished_training_keeps_its_description(tmp_path):
    """Called again with other flags, it trains nothing and says of the file what was."""
    train("--tokenizer kl --latent_noise 2 --epochs 1", tmp_path)
    before = torch.load(tmp_path / "tokenizer.ckpt", weights_only=True)["config"]
    train(f"--tokenizer kl --epochs 1 --resume {tmp_path}", tmp_path)
    after = torch.load(tmp_path / "tokenizer.ckpt", weights_only=True)["config"]
    assert before["training"] == after["training"]
    assert after["training"]["flags"] == "--latent_noise 2.0"


def test_what_a_network_does_not_use(tmp_path, capsys):
    """It is said, and not written into its file; a fitted one takes no losses at all."""
    flags = "--epochs 1 --batch_size 1024 --kl_weight 3 --codebook ema --latent_noise 1"
    train(f"--tokenizer vq --num_codes 8 {flags}", tmp_path / "vq")
    assert "NOTE: not used by vq: --kl_weight\n" in capsys.readouterr().out
    file = torch.load(tmp_path / "vq" / "tokenizer.ckpt", weights_only=True)
    assert file["config"]["training"]["flags"] == "--codebook ema --latent_noise 1.0"
    assert file["config"]["network"]["num_codes"] == 8
    flags = f"{SHORT} --tokenizer pca --stride 4 --vae_embed_dim 2 --latent_noise 1"
    main_tokenizer.main([*shlex.split(flags), "--output_dir", str(tmp_path / "pca")])
    assert "not used by pca: --ch, --latent_noise, --lr\n" in capsys.readouterr().out
    assert torch.load(tmp_path / "pca" / "tokenizer.ckpt")["config"]["network"]["stride"] == 4


def test_a_preset_can_be_overridden(tmp_path):
    """Also what it switches on."""
    flags = ["--preset", "ldm-kl16", "--no-encoder_attention", "--blr", "1e-4"]
    args, _ = presets.apply_to_network(main_tokenizer.get_parser(), flags)
    assert not args.encoder_attention and args.decoder_attention
    assert args.blr == 1e-4 and args.lr is None


def test_a_dry_run_leaves_nothing(tmp_path, capsys):
    """It says what a run costs, and trains nothing."""
    flags = f"{SHORT} --tokenizer kl --dry_run --output_dir {tmp_path}"
    run(main_tokenizer.main, shlex.split(flags))
    assert "dry run, nothing is left of it" in capsys.readouterr().out
    assert not {path.name for path in tmp_path.iterdir()} - {"run.lock"}


@pytest.mark.slow
def test_two_processes_resume_within_the_epoch(tmp_path):
    """Discriminator, averages and codes of both go on as if they had not been stopped."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    flags = f"{SHORT} {WAYS['vq, moving averages']} --batch_size 64 --epochs 1 --save_steps 3"
    flags += " --keep 9 --disc_start 2"

    def train_both(folder, more=""):
        own = shlex.split(f"{flags} {more} --output_dir {folder}")
        subprocess.run([*command, "main_tokenizer.py", *own], check=True, cwd=ROOT)
        return load_checkpoint(folder / LAST, of_tokenizer=True)

    whole = train_both(tmp_path / "whole")
    place = tmp_path / "whole" / "checkpoint-step00000003.pth"
    assert load_checkpoint(place, of_tokenizer=True)["place"]["batch"] == 6
    assert_same(train_both(tmp_path / "resumed", f"--resume {place}"), whole)
