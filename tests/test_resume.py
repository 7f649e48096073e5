"""What a run was, and what resumes it. Run: python -m pytest tests/test_resume.py

Most tests compare without training: flags, configuration and record of a run, all as main_mar.py
makes them, with those of the same run when something has changed.
"""

import argparse
import functools
import os
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from cli import ROOT

import main_mar
import models
from models import build_model, presets
from models.config import compare_with
from models.vae import AutoencoderKL
from util.recipe import Recipe
from util.run import record
from util.run.record import NO_SETTINGS, PLACES, check_resumed, describe
from util.settings import from_flags

KL, VQ = (str(ROOT / "tests" / "fixtures" / f"{name}.ckpt") for name in ("kl", "vq"))
FLAGS = [
    *("--model", "mar_tiny", "--tokenizer", "kl", "--vae_path", KL, "--img_size", "16"),
    *("--class_num", "2", "--buffer_size", "4", "--diffloss_d", "1", "--diffloss_w", "32"),
    *("--epochs", "30", "--device", "cpu"),
]
SAME = (*FLAGS, "diffloss", "fp32", "ddpm", "uniform")  # values that the run has without a flag
NAMES = ["cat/a.png", "cat/b.png", "dog/c.png", "dog/d.png"]


def configured(args, given, checkpoint):
    """(configuration, tokenizer) of a run that resumes a checkpoint, or of a new one."""
    stored = models.checkpoint_config(checkpoint, "before.pth") if checkpoint else {}
    config, _, tokenizer = main_mar.configure(args, given, stored, "before.pth", None)
    return config, tokenizer


def a_run(*flags, stored=None, **world):
    """(flags, configuration, record) of a run; `stored`: the checkpoint that it resumes."""
    args, given = presets.apply(main_mar.get_parser(), [*FLAGS, *flags])
    config, tokenizer = configured(args, given, stored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "world_size", lambda: world.get("processes", 1))
        held = describe(
            tokenizer,
            a_loader(**world),
            from_flags(Recipe, args).resolved(world.get("processes", 1)),
            world.get("optimizer", torch.optim.AdamW)([torch.zeros(1)]),
            precision=world.get("resolved", "fp32") if args.precision == "auto" else args.precision,
            cached=args.use_cached,
            listing=world.get("listing", "nowhere"),
        )
    return args, config, {**held, **world.get("versions", {})}


def a_loader(names=NAMES, classes=("cat", "dog"), labels=(0, 0, 1, 1), **_):
    """A loader of a folder of images."""
    samples = [(os.path.join("root", name), 0) for name in names]
    data = SimpleNamespace(root="root", samples=samples, targets=[*labels], classes=[*classes])
    return SimpleNamespace(dataset=data, images=len(names))


def a_checkpoint(*flags, **world):
    """What a run saves that it can be compared with, as read from a file."""
    args, config, held = a_run(*flags, **world)
    return {"args": vars(args), "config": config, "record": held, "model_ema": weights(config)}


def weights(config):
    return build_model(**config["model"]).state_dict()


def resume(checkpoint, *flags, **world):
    """The notes of a run that resumes a checkpoint. Raises ValueError if it is refused."""
    args, config, held = a_run(*flags, stored=checkpoint, **world)
    return compare_with(checkpoint, "before.pth", vars(args), config, held)


# what is changed -> what is refused
REFUSED = {
    ("--vae_path", "other.ckpt"): "another tokenizer: the sha256 of its weights is ",
    ("--vae_scale", "0.5"): "--vae_scale 0.5 (was ",
    ("--vae_shift", "0.5"): "--vae_shift 0.5 (was ",
    ("--tokenizer", "vq_latent", "--vae_path", VQ): "another tokenizer: ",
    ("--tokenizer", "pixels"): "--tokenizer pixels: before.pth was trained with kl",
    ("--model", "mar_small"): "--model mar_small: before.pth holds mar_tiny",
    ("--class_num", "3"): "--class_num 3: before.pth holds 2",
    ("--img_size", "32"): "--img_size 32: before.pth holds 16",
    ("--patch_size", "2"): "--patch_size 2: before.pth holds 1",
    ("--vae_stride", "8"): "--vae_stride 8: the tokenizer has 4",
    ("--vae_embed_dim", "8"): "--vae_embed_dim 8: the tokenizer has 4",
    ("--buffer_size", "8"): "--buffer_size 8: before.pth holds 4",
    ("--diffloss_d", "2"): "--diffloss_d 2: before.pth holds 1",
    ("--diffloss_w", "64"): "--diffloss_w 64: before.pth holds 32",
    ("--head", "l2"): "--head l2: before.pth holds diffloss",
    ("--model_kwargs", "mlp_ratio=2"): "--mlp_ratio 2: before.pth holds None",
}
# what is changed beside the flags -> what is refused
REFUSED_WORLD = [
    ({"classes": ("dog", "cat")}, "the classes are in another order: class 0 is dog (was cat)"),
    ({"classes": ("cat", "wolf")}, "other classes: class 1 is wolf (was dog)"),
    ({"labels": (0, 1, 0, 1)}, "the same images have other labels"),
    ({"optimizer": torch.optim.SGD}, "optimizer SGD (was AdamW)"),
]
# what is changed -> what is said
SAID = {
    ("--batch_size", "32"): "--batch_size 32 (was 16), --lr 1.25e-05 (was 6.25e-06), images per "
    "step 32 (was 16)",
    ("--accum_iter", "2"): "--accum_iter 2 (was 1), --lr 1.25e-05 (was 6.25e-06), images per step "
    "32 (was 16)",
    ("--blr", "2e-4"): "--blr 0.0002 (was 0.0001), --lr 1.25e-05 (was 6.25e-06)",
    ("--lr", "1"): "--lr 1.0 (was 6.25e-06)",
    ("--min_lr", "1e-6"): "--min_lr 1e-06 (was 0.0)",
    ("--lr_schedule", "cosine"): "--lr_schedule cosine (was constant)",
    ("--warmup_epochs", "2"): "--warmup_epochs 2.0 (was 100)",
    ("--weight_decay", "0"): "--weight_decay 0.0 (was 0.02)",
    ("--grad_clip", "1"): "--grad_clip 1.0 (was 3.0)",
    ("--ema_rate", "0.9"): "--ema_rate 0.9 (was 0.9999)",
    ("--epochs", "31"): "--epochs 31 (was 30)",
    ("--seed", "2"): "--seed 2 (was 1)",
    ("--precision", "bf16"): "--precision bf16 (was fp32)",
    ("--no_vlb",): "vlb off (was on)",
    ("--compile",): "compile on (was off)",
    ("--mask_ratio_per_rank",): "mask_ratio_per_rank on (was off)",
    ("--grad_checkpointing",): "grad_checkpointing on (was off)",
    ("--attn_dropout", "0"): "--attn_dropout 0.0 (was 0.1)",
    ("--proj_dropout", "0"): "--proj_dropout 0.0 (was 0.1)",
    ("--mask_ratio_min", "0.1"): "--mask_ratio_min 0.1 (was 0.7)",
    ("--label_drop_prob", "0"): "--label_drop_prob 0.0 (was 0.1)",
    ("--diffusion_batch_mul", "4"): "--diffusion_batch_mul 4 (was 1)",
    ("--num_sampling_steps", "50"): "--num_sampling_steps 50 (was 100)",
    ("--cfg", "2"): "--cfg 2.0 (was 1.0)",
    ("--cfg_interval", "0", "0.5"): "--cfg_interval 0.0 0.5 (was 0.0 1.0)",
    ("--num_iter", "8"): "--num_iter 8 (was 16)",
    ("--order", "raster"): "--order raster (was not given)",
    ("--data_path", "/elsewhere"): "--data_path /elsewhere (was ./data/imagenet)",
    ("--use_cached",): "use_cached on (was off), data as latents (was images)",
    ("--save_minutes", "5"): "--save_minutes 5.0 (was not given)",
}
# what is changed beside the flags -> what is said
SAID_WORLD = [
    (
        {"processes": 2},
        "--lr 1.25e-05 (was 6.25e-06), processes 2 (was 1), images per step 32 (was",
    ),
    ({"resolved": "bf16"}, "--precision bf16 (was fp32)"),
    ({"names": NAMES[:3], "labels": (0, 0, 1)}, "images in the data 3 (was 4)"),
    ({"names": [*NAMES[:3], "dog/e.png"]}, "other images, by their names"),
    ({"listing": __file__}, "other files of the data, by their sizes or times"),
    ({"versions": {"torch": "2.6"}}, f"torch 2.6 (was {torch.__version__})"),
    ({"versions": {"library": "9"}}, "version of this library 9 (was 0."),
]


@pytest.fixture(scope="module", autouse=True)
def tokenizers_are_read_once():
    """By the hundred runs of these tests, which change nothing in them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoencoderKL, "from_file", functools.cache(AutoencoderKL.from_file))
        yield


@pytest.fixture(scope="module")
def other_vae(tmp_path_factory):
    """The tokenizer's file with one weight changed."""
    content = torch.load(KL, weights_only=True)
    weights = content.get("model", content)
    next(iter(weights.values())).view(-1)[0] += 1
    path = tmp_path_factory.mktemp("vae") / "other.ckpt"
    torch.save(content, path)
    return str(path)


@pytest.fixture(scope="module")
def before():
    return a_checkpoint(listing=ROOT / "LICENSE")


def changed(before, flags, world):
    """`resume`, with nothing else changed."""
    return resume(before, *flags, **{"listing": ROOT / "LICENSE", **world})


@pytest.mark.parametrize("flags", REFUSED, ids=" ".join)
def test_flags_that_spoil_a_run_are_refused(before, other_vae, flags):
    """In one line with what it is and was."""
    flags_here = [other_vae if flag == "other.ckpt" else flag for flag in flags]
    with pytest.raises(ValueError) as refused:
        changed(before, flags_here, {})
    assert REFUSED[flags] in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(("world", "expected"), REFUSED_WORLD)
def test_what_spoils_a_run_is_refused(before, world, expected):
    """Unless the user wants it: then it is said."""
    with pytest.raises(ValueError) as refused:
        changed(before, (), world)
    assert str(refused.value).startswith("before.pth: ") and "\n" not in str(refused.value)
    assert f": {expected}; " in str(refused.value) and "--resume_anyway" in str(refused.value)
    note, *others = changed(before, ("--resume_anyway",), world)
    assert note.startswith("resumed although") and note.endswith(f": {expected}") and not others


@pytest.mark.parametrize("flags", SAID, ids=" ".join)
def test_other_flags_are_said(before, flags):
    """With the old and the new value, and nothing else."""
    assert changed(before, flags, {}) == [f"not as before: {SAID[flags]}"]


@pytest.mark.parametrize(("world", "expected"), SAID_WORLD)
def test_what_else_a_run_depends_on_is_said(before, world, expected):
    """Processes, precision, data, versions."""
    (note,) = changed(before, (), world)
    assert note.startswith(f"not as before: {expected}")


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--lr_schedule", "constant", "--warmup_epochs", "100.0", "--blr", "1e-04"),
        ("--precision", "fp32", "--lr", "6.25e-06"),
        ("--num_iter", "16"),
        ("--cfg_interval", "0", "1"),
        ("--head", "diffloss", "--patch_size", "1", "--vae_embed_dim", "4"),
    ],
)
def test_the_same_run_says_nothing(before, flags):
    """Called again, or with the values spelled out that it had."""
    assert changed(before, flags, {}) == []


def test_flags_that_come_from_the_checkpoint_need_not_be_repeated(before):
    """The shortest command that resumes says no more than what it does change."""
    args, given = presets.apply(main_mar.get_parser(), ["--epochs", "30", "--device", "cpu"])
    config, _ = configured(args, given, before)
    assert compare_with(before, "before.pth", vars(args), config, before["record"]) == []


def test_a_preset_says_what_its_flags_say(capsys):
    """The same flags without it are the same run; those of another are compared, each."""
    of_preset = presets.PRESETS["digits"]
    spelled = [f"--{name}={value}" for name, value in of_preset.items()]

    def run(*flags, stored=None):
        args, given = presets.apply(main_mar.get_parser(), flags)
        return args, configured(args, given, stored)[0]

    args, config = run("--preset", "digits", "--diffloss_w", "32")
    stored = {"args": vars(args), "config": config, "model_ema": weights(config)}
    args, config = run(*spelled, "--diffloss_w=32", stored=stored)
    assert compare_with(stored, "before.pth", vars(args), config, {}) == []
    assert "preset" not in capsys.readouterr().out
    run("--preset", "digits", stored=stored)
    said = "NOTE: the checkpoint, not --preset digits, sets --diffloss_w 32 (not 64)"
    assert said in capsys.readouterr().out


def another(action):
    """Words on the command line that give an action of the parser another value."""
    flag, value = action.option_strings[0], action.default
    if action.nargs == 0:
        return [flag]
    if action.choices:
        return [flag, str(next(c for c in action.choices if c not in (value, *SAME)))]
    if action.nargs == 2:
        return [flag, "0.1", "0.9"]
    if action.dest == "img_size":
        return [flag, "7"]
    for word in ("7", "0.3", "mlp_ratio=7", "a.b", "linear", "black"):
        with suppress(argparse.ArgumentTypeError, ValueError):
            return [flag, word] if not action.type or action.type(word) else []
    raise AssertionError(f"no other value of {flag}")


def test_no_flag_is_silent(before, capsys, monkeypatch):
    """Every flag of the parser is refused or said when changed, but for a short list."""
    monkeypatch.setattr("util.run.tracker._check_installed", lambda name: None)
    silent = set()
    for action in main_mar.get_parser()._actions:
        if action.dest in ("help", "preset"):
            continue
        try:
            notes = changed(before, another(action), {})
        except ValueError:
            continue
        words = f"{notes} {capsys.readouterr().out}"
        if not any(word in words for word in (f"--{action.dest} ", f"{action.dest} o")):
            silent.add(action.dest)
    assert silent <= {*PLACES, *NO_SETTINGS}
    # what is on the list is there for a reason: nothing that could be said, nor a flag of old, but
    # for one of main_tokenizer.py
    known = {"preset", "model_kwargs", "dist_timeout", "perceptual_weights"}
    assert {*PLACES, *NO_SETTINGS} - silent <= known


def test_checkpoints_without_a_record(before):
    """Of earlier versions: flags and configuration are compared, nothing is said of the rest."""
    old = {name: value for name, value in before.items() if name != "record"}
    assert changed(old, (), {"classes": ("a", "b"), "processes": 2}) == []
    assert changed(old, ("--seed", "2"), {}) == ["not as before: --seed 2 (was 1)"]
    with pytest.raises(ValueError, match=r"--vae_scale 0.5 \(was "):
        changed(old, ("--vae_scale", "0.5"), {})
    # as the published code stores them: the learning rate that was used, and some of the flags
    published = {"lr": 6.25e-06, "blr": 1e-4, "world_size": 1, "gpu": 0, "epochs": 400}
    old["args"] = published
    assert changed(old, ("--epochs", "400"), {}) == []
    assert changed(old, ("--epochs", "400", "--lr", "1"), {}) == [
        "not as before: --lr 1.0 (was 6.25e-06)"
    ]
    assert changed(old, ("--epochs", "400", "--no_vlb"), {}) == ["not as before: vlb off (was on)"]


@pytest.mark.parametrize(
    "broken", [5, [], {"classes": 5}, {"classes": [5]}, {"lr": [torch.zeros(2)]}, {"images": ""}]
)
def test_a_record_that_makes_no_sense(before, broken):
    """It is compared like any other: no traceback."""
    with suppress(ValueError):
        changed({**before, "record": broken}, (), {})


def test_lists_and_tuples_are_the_same():
    """Files hold lists where the parser gives tuples."""
    now, before = {"out": (1, (2.0, "a"))}, {"out": [1, [2, "a"]]}
    assert list(check_resumed("x.pth", (now, {}), (before, None))) == []
    notes = check_resumed("x.pth", ({"other": (1, 2)}, {}), ({"other": [1, 3]}, None))
    assert list(notes) == ["not as before: --other 1 2 (was 1 3)"]
