"""Presets that fit themselves to the data. Run: python -m pytest tests/test_fitting.py"""

import re
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import main_cache
import main_mar
import main_tokenizer
from models import found, presets
from models.config import fit_preset
from models.fitting import (
    Facts,
    components_for,
    fast,
    patch_for,
    side_for,
    small,
    small_tokenizer,
)
from models.settings import MODELS
from util.checkpoint import load_checkpoint

# images, tokens, numbers of a token
DATA = {
    "digits of 8 pixels": (1437, 16, 12),
    "1,000 pictures": (1000, 16, 192),
    "10,000 pictures": (10_000, 16, 192),
    "50,000 pictures": (50_000, 16, 192),
    "latents, 256 tokens": (10_000, 256, 16),
    "64 tokens": (10_000, 64, 192),
    "a dozen": (12, 16, 192),
    "one": (1, 16, 192),
}


@pytest.mark.parametrize("name", DATA)
def test_choices_fit_the_data(name):
    """Warm-up and EMA fit the steps of the run, the head passes on all numbers of a token, and the
    class tokens are fewer than the tokens."""
    facts = Facts(*DATA[name])
    found = small(facts)
    steps = found["epochs"] * max(1, facts.images // found["batch_size"])
    assert 200 < steps < 60_000
    assert 0 < found["warmup_epochs"] <= found["epochs"] / 10
    assert 0.9 < found["ema_rate"] < 1 - 3 / steps
    assert found["diffloss_w"] >= min(facts.channels, 64)
    assert 1 <= found["buffer_size"] <= max(1, facts.length // 4)
    assert found["model"] in MODELS and 1e-4 < found["lr"] < 5e-3
    assert 0.1 <= found["mask_ratio_min"] <= 0.7
    assert 1 <= found["batch_size"] <= 32 and found["eval_freq"] <= found["epochs"]


def test_more_data_take_more():
    """More pictures: more steps, fewer epochs, no smaller a model."""
    few, some, many = (small(Facts(n, 16, 192)) for n in (1000, 10_000, 50_000))
    assert few["epochs"] > some["epochs"] > many["epochs"]
    assert few["epochs"] * 1000 < some["epochs"] * 10_000 < many["epochs"] * 50_000
    assert few["model"] == some["model"] == "mar_mini" and many["model"] == "mar_small"
    assert few["attn_dropout"] > many["attn_dropout"] == 0


def test_what_is_known_is_followed():
    """Epochs, batch and model that the user chose decide the rest."""
    short = small(Facts(10_000, 16, 192, epochs=2, batch_size=50, model="mar_base", processes=2))
    assert short["epochs"] == 2 and short["batch_size"] == 50 and short["diffloss_w"] is None
    assert short["warmup_epochs"] <= 0.2 and short["ema_rate"] < 0.91  # of 200 steps
    assert short["lr"] < small(Facts(10_000, 16, 192))["lr"]


def test_the_fast_preset_has_half_the_steps():
    """Batches and rates are twice those of `small`, epochs as many; given ones are kept."""
    facts = Facts(10_000, 16, 192)
    own, other = fast(facts), small(facts)
    assert own["batch_size"] == 2 * other["batch_size"] and own["lr"] == 2 * other["lr"]
    assert own["epochs"] == other["epochs"] and own["keep_every"] == 20  # of 80
    assert own["warmup_epochs"] >= other["warmup_epochs"] and own["ema_rate"] < other["ema_rate"]
    given = fast(Facts(10_000, 16, 192, epochs=2, batch_size=50, model="mar_base"))
    assert (given["batch_size"], given["epochs"], given["lr"]) == (50, 2, 8e-4)


@pytest.mark.parametrize("side", [8, 12, 16, 20, 28, 32, 64, 128])
def test_patches_of_pixels(side):
    """16 tokens or more, of at most 192 numbers; a wide picture is divided alike."""
    patch = patch_for((side, 2 * side), 3)
    assert side % patch == 0 and side // patch >= 4 and 3 * patch**2 <= 192
    with pytest.raises(ValueError, match="3 latents along a side, expected 4 or more"):
        patch_for((3, 3), 3)


def test_image_sizes():
    """At most 32 pixels, and a multiple of 4 for smaller pictures."""
    assert [side_for(side) for side in (500, 32, 31, 28, 8, 3)] == [32, 32, 28, 28, 8, 4]


@pytest.mark.parametrize("size", [8, 16, 28, 32, 64, [64, 128]])
def test_a_network_fits_the_size(size):
    """4 to 16 latents along the shorter side, and its stride divides it."""
    flags = small_tokenizer(1000, 3, size, "kl")
    side = min(size) if isinstance(size, list) else size
    stride = 2 ** flags["ch_mult"].count(",")
    assert side % stride == 0 and 4 <= side // stride <= 16
    assert small_tokenizer(10, 3, size, "kl")["batch_size"] == 1
    assert small_tokenizer(1, 3, size, "kl")["epochs"] >= 1


def test_principal_components_are_the_choice():
    """Unless another tokenizer is given; Inception is left out where the pictures are small."""
    assert small_tokenizer(1000, 3, 32)["tokenizer"] == "pca"
    assert "extractor" in small_tokenizer(1000, 3, 32)
    assert "extractor" not in small_tokenizer(1000, 3, 64)
    assert [components_for(n) for n in (12, 48, 147, 192)] == [12, 16, 18, 24]


def test_without_classes_there_is_no_guidance():
    """An unconditional model refuses it; otherwise the preset's guidance stays."""
    assert small(Facts(1000, 16, 192, has_classes=False))["cfg"] == 1.0
    assert "cfg" not in small(Facts(1000, 16, 192))


@pytest.mark.parametrize("origin", ["", "checkpoint.pth"])
def test_weights_that_a_run_begins_with_fix_the_model(origin):
    """Their flags are not chosen anew, and the learning rate is that of their model."""
    args = main_mar.get_parser().parse_args(["--preset", "small", "--init_from", origin])
    args.model, args.img_size, args.buffer_size = "mar_small", 32, 64
    data = mock.MagicMock(classes=["a", "b"], __len__=lambda _: 1000)
    fit_preset(args, set(), mock.Mock(stride=1, channels=3), data, {}, {})
    chosen = args.model, args.buffer_size, args.lr
    assert chosen == (("mar_small", 64, 8e-4) if origin else ("mar_mini", 4, 2e-3))


# ---- in the scripts ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 2 × 6 pictures of 20×18 pixels."""
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(12):
        path = root / "train" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (18, 20, 3), np.uint8)).save(path)
    return root


def train(folder, *flags):
    out = ("--device", "cpu", "--num_workers", 0, "--output_dir", folder, "--resume", folder)
    main_mar.main([str(f) for f in ("--preset", "small", *out, *flags)])
    return load_checkpoint(folder / "checkpoint-last.pth")


def test_a_run_and_its_continuation(pictures, tmp_path, capsys):
    """One command for a folder of pictures: their size and number decide, flags override; resumed
    it keeps its schedule, unless told otherwise."""
    cheap = ("--eval_freq", 99, "--num_iter", 1, "--num_sampling_steps", 2)
    first = train(tmp_path, "--data_path", pictures, *cheap, "--epochs", 2, "--lr", 0.0001)
    model, args = first["config"]["model"], first["args"]
    assert model["img_size"] == 16 and model["patch_size"] == 4 and model["class_num"] == 2
    assert args["lr"] == 0.0001 and args["batch_size"] == 1
    said = re.search("NOTE: --preset small: (.*)", capsys.readouterr().out)[1]
    assert "--model mar_mini" in said and "--lr" not in said and "--epochs" not in said
    again = train(tmp_path, "--data_path", pictures, *cheap, "--batch_size", 2, "--epochs", 3)
    assert again["args"]["warmup_epochs"] == args["warmup_epochs"] and again["epoch"] == 2
    assert again["args"]["batch_size"] == 2
    assert "sets --" not in capsys.readouterr().out  # nothing that the checkpoint contradicts


def test_three_commands_without_a_number(pictures, tmp_path):
    """Tokenizer, cache and model: each learns from the file before it what its flags do not say."""
    fitted, cache = tmp_path / "pca", tmp_path / "cache"
    machine = ("--device", "cpu", "--num_workers", "0")
    chosen = ("--preset", "small", "--data_path", str(pictures))
    main_tokenizer.main([*chosen, "--output_dir", str(fitted), *machine])
    file = ("--vae_path", str(fitted / "tokenizer.ckpt"))
    where = ("--data_path", str(pictures), "--cached_path", str(cache))
    main_cache.main([*file, *where, "--layout", "shards", *machine])
    short = ("--epochs", 1, "--eval_freq", 99, "--num_iter", 1, "--num_sampling_steps", 2)
    config = train(tmp_path / "mar", "--use_cached", "--cached_path", cache, *short)["config"]
    assert config["tokenizer"]["name"] == "pca" and config["model"]["img_size"] == 16
    assert config["model"]["vae_stride"] == 4 and config["tokenizer"]["vae_path"] == file[1]


def test_a_listing_has_it():
    """--list_presets says what the preset sets for all data."""
    assert "small\n    --lr_schedule cosine" in presets.listing()
    assert "--optimizer muon --no_vlb --loss_weight min-snr" in presets.listing()


def test_a_file_says_what_it_sets(tmp_path, capsys):
    """--vae_path sets tokenizer and image size, in a line; also in place of a preset's."""
    config = {"network": {"embed_dim": 4}, "img_size": 16, "tokenizer": "kl"}
    torch.save({"model": {}, "config": config}, path := tmp_path / "tokenizer.ckpt")
    args, given = presets.apply(main_mar.get_parser(), ["--vae_path", str(path)])
    found.complete(args, given)
    assert (args.tokenizer, args.img_size) == ("kl", 16)
    assert f"NOTE: --tokenizer kl --img_size 16, by {path}" in capsys.readouterr().out
    flags = ["--preset", "table2-kl8", "--vae_path", str(path)]
    args, given = presets.apply(main_mar.get_parser(), flags)
    found.complete(args, given)
    assert (args.tokenizer, args.img_size, args.patch_size) == ("kl", 16, None)
    args, given = presets.apply(main_mar.get_parser(), [*flags, "--img_size", "32", "16"])
    found.complete(args, given)
    assert (args.tokenizer, args.img_size) == ("kl", [32, 16])
