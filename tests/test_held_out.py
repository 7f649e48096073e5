"""The held-out loss. Run: python -m pytest tests/test_held_out.py"""

import json
import math
import pickle
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image
from rule import by_rule

import main_mar
from models.ar import AR
from models.dit import DiT
from models.found import without_share
from models.held_out import LEVELS, HeldOut, batches_of, held_out_losses
from models.mar import MAR
from models.tokenizer import PixelTokenizer
from util import dist
from util.checkpoint import LAST, load_checkpoint
from util.data import labels_of, open_data
from util.data.cached import open_cache
from util.data.digits import digits
from util.data.held_out import Part, WithoutShare, held_indices, open_val, spread
from util.data.settings import PLAIN, Reading
from util.rng import image_generators

SIZE = {"img_size": 8, "vae_stride": 1, "patch_size": 2, "vae_embed_dim": 1, "class_num": 10}
BLOCKS = {"encoder_embed_dim": 16, "encoder_depth": 1, "encoder_num_heads": 2, "buffer_size": 2}
BLOCKS |= {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
NARROW = {"embed_dim": 16, "depth": 1, "num_heads": 2}
HEAD = {"diffloss_d": 1, "diffloss_w": 16}
CODES = {**SIZE, "patch_size": 1, "num_codes": 17}  # the pixels 0 … 16
MODELS = {
    "mar": partial(MAR, **SIZE, **BLOCKS, **HEAD),
    "ar": partial(AR, **SIZE, **NARROW, **HEAD),
    "dit": partial(DiT, **SIZE, **NARROW),
    "l2": partial(MAR, **SIZE, **BLOCKS, head="l2"),
    "codes": partial(MAR, **CODES, **BLOCKS),
}
FAST = [
    *("--preset", "digits", "--device", "cpu", "--batch_size", "512", "--warmup_epochs", "0"),
    *("--diffloss_d", "1", "--diffloss_w", "32", "--num_sampling_steps", "3", "--num_iter", "2"),
    *("--diffusion_batch_mul", "1", "--save_last_freq", "1"),
]


class Codes(PixelTokenizer):
    """Pixels 0 … 16 as code indices."""

    def sample(self, moments, generator=None):
        return ((moments + 1) * 8).round()


def held_out(name="mar", count=40, **more):
    """The HeldOut of so many digits, for a model of this name."""
    tokenizer = Codes(1) if name == "codes" else PixelTokenizer(1)
    dataset = Part(digits("test"), range(count))
    return HeldOut(dataset, tokenizer, torch.device("cpu"), **more)


def same(one, other):
    """Whether losses agree but for rounding."""
    return one.keys() == other.keys() and all(one[k] == pytest.approx(other[k]) for k in one)


@pytest.mark.parametrize("name", MODELS)
def test_a_loss_is_the_same_each_time_in_any_batch_in_any_process(name, monkeypatch):
    """Twice to the bit, with batches of 3, and as the sum of what two processes have."""
    monkeypatch.setattr("models.held_out.LEVELS", 4)
    model, images = by_rule(MODELS[name]()), held_out(name)
    found = images.losses(model)
    torch.manual_seed(1)
    assert images.losses(model) == found
    assert same(held_out(name, batch_size=3).losses(model), found)
    parts, gathered = [], []
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        parts.append(held_out(name, batch_size=3))
    monkeypatch.setattr(dist, "all_gather", lambda sums: gathered.append(sums) or [sums])
    for part in parts:
        part.losses(model)
    monkeypatch.setattr(dist, "all_gather", lambda sums: gathered)
    empty = HeldOut(Part(digits("test"), range(40)), PixelTokenizer(1), torch.device("cpu"))
    empty.batches = []
    assert same(empty.losses(model), found)


def test_the_model_is_left_as_it_was():
    """Training's mode, statistics and random numbers are not touched; dropout has no effect."""
    model, images = by_rule(MODELS["mar"]()), held_out()
    found = images.losses(model)
    before = torch.get_rng_state()
    assert images.losses(model.train()) == found
    assert model.training and model.statistics() == {}
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["mar", "ar", "dit"])
def test_quarters_average_to_the_whole(name):
    """Each quarter of the timesteps has the same weight."""
    found = held_out(name).losses(by_rule(MODELS[name]()))
    quarters = [found[f"mse_t{q * 250}-{q * 250 + 249}"] for q in range(4)]
    assert found["mse"] == pytest.approx(sum(quarters) / 4)
    assert len({*quarters}) == 4
    assert found["loss"] > found["mse"]  # by the variational term


def test_the_mean_is_that_of_training_by_another_way():
    """At one mask ratio it is the training loss, up to which draws it has."""
    model = by_rule(MODELS["mar"](mask_ratio_min=0.999, vlb=False))
    (_, indices, latents, labels) = held_out(count=360).batches[-1]
    generators = image_generators(1, indices)
    with torch.no_grad():
        own = model.held_out_losses(latents, labels, generators, 1.0)["loss"].mean().item()
        draws = [
            model(latents, labels, torch.Generator().manual_seed(seed), torch.Generator())
            for seed in range(20)
        ]
    assert own == pytest.approx(torch.stack(draws).mean().item(), rel=0.05)


def test_cross_entropy_is_in_bits():
    """A model that knows nothing needs log2(17) bits for one of 17 codes."""
    model = MODELS["codes"]().eval()
    torch.nn.init.zeros_(model.head.linear.weight)
    found = held_out("codes").losses(model)
    assert found["loss"] == pytest.approx(math.log(17))
    assert found["bits_per_token"] == pytest.approx(math.log2(17))


def test_masks_are_spread_evenly():
    """Of 16 tokens, 1, 2, … and 16 are masked, in equally many images; each image is there once."""
    batches = batches_of(32 * LEVELS, 20)
    assert sorted(i for _, indices in batches for i in indices) == [*range(32 * LEVELS)]
    counts = dict.fromkeys(range(1, 17), 0)
    for ratio, indices in batches:
        counts[math.ceil(16 * ratio)] += len(indices)
    assert {*counts.values()} == {32}


def test_few_images_have_all_mask_ratios():
    """Two images: one with a quarter of the tokens masked, one with three."""
    assert batches_of(2, 20) == [(0.25, [0]), (0.75, [1])]


def test_it_does_not_depend_on_what_training_masked():
    """--mask_ratio_min, which no checkpoint fixes, changes nothing."""
    models = [by_rule(MODELS["mar"](mask_ratio_min=low)) for low in (0.1, 0.7)]
    one, other = (held_out().losses(model) for model in models)
    assert one == other


def test_at_most_so_many_images():
    """Spread evenly over the data, which are in the order of classes."""
    assert spread(10, 20) == [*range(10)]
    assert spread(10, 3) == [0, 3, 6]
    model = by_rule(MODELS["l2"]())
    some = Part(digits("test"), spread(360, 20))
    found = held_out_losses(model, PixelTokenizer(1), digits("test"), most=20)
    assert found == held_out_losses(model, PixelTokenizer(1), some)


# ---- the images ----------------------------------------------------------------------------------


def test_a_share_is_of_each_class_and_the_same_for_another_order_of_classes():
    """A tenth of each class, one image stays, and the sets are disjoint."""
    labels = [0] * 20 + [1] * 30 + [2]
    held = held_indices(labels, 0.1)
    assert [labels[i] for i in held] == [0, 0, 1, 1, 1]
    assert held == held_indices([2 - label for label in labels], 0.1)
    assert held_indices([0, 0], 0.99) == [0] or held_indices([0, 0], 0.99) == [1]
    whole = digits("train")
    data = WithoutShare(whole, 0.1)
    rest = data.rest()
    assert len(data) + len(rest) == len(whole) and not {*data.indices} & {*rest.indices}
    assert torch.equal(data[0][0], whole[data.indices[0]][0])
    assert labels_of(data) == [whole.targets[i] for i in data.indices]
    for share, said in ((0.0001, "less than one image"), (0.0, "less than one image")):
        with pytest.raises(ValueError, match=said):
            WithoutShare(whole, share)


def test_a_part_of_any_layout_has_its_own_images(images, vae_path, tmp_path):
    """Folders, and caches with a file for each image or shards: names, labels, latents."""
    import main_cache

    flags = ["--data_path", str(images), "--vae_path", str(vae_path), "--img_size", "16"]
    flags += ["--device", "cpu", "--num_workers", "0", "--batch_size", "4"]
    folder = open_data(images, "train", 16, Reading())
    sets = [folder]
    for layout in ("images", "shards"):
        path = tmp_path / layout
        main_cache.main([*flags, "--layout", layout, "--cached_path", str(path)])
        sets.append(open_cache(path))
    names = [folder.name(i) for i in range(8)]
    for whole in sets:
        data = pickle.loads(pickle.dumps(WithoutShare(whole, 0.25)))
        rest = data.rest()
        assert [rest.name(i) for i in range(2)] == [names[i] for i in data.held]
        assert [data.name(i) for i in range(6)] == [names[i] for i in data.indices]
        assert labels_of(data) == [0, 0, 0, 1, 1, 1] and labels_of(rest) == [0, 1]
        assert whole.flip and not rest.flip  # nothing that is held out is mirrored
        first, again = (rest.__getitems__([1]) for _ in range(2))
        assert str(first) == str(again)
    losses = []
    for whole in sets[1:]:
        rest = WithoutShare(whole, 0.5).rest()
        found = HeldOut(rest, _Moments(), torch.device("cpu"), cached=True, batch_size=2)
        losses.append(torch.cat([latents for _, _, latents, _ in found.batches]))
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)  # shards are float16


class _Moments:
    """A tokenizer whose latents are the moments."""

    def sample(self, moments, generators):
        return moments


def test_where_held_out_images_are(tmp_path, capsys):
    """The split val, else test, of a data set; a folder of class folders; not the training data."""
    write_images(tmp_path)
    for split, count in (("test", 1), ("val", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(folder / f"{i}.png")
        found, cached = open_val(tmp_path, 16, ["dog", "cat"], PLAIN)
        assert (len(found), cached) == (2 * count, False)
    assert "the classes are in the order of training" in capsys.readouterr().out
    assert found.classes == ["dog", "cat"]
    plain, _ = open_val(tmp_path / "test", 16, 2, PLAIN)
    assert len(plain) == 2
    assert len(open_val("digits", 8, 10, PLAIN)[0]) == 360
    with pytest.raises(ValueError, match="its classes are not those of training: .*bird"):
        open_val(tmp_path, 16, ["bird", "cat"], PLAIN)
    with pytest.raises(ValueError, match="the training data; expected others"):
        open_val(tmp_path / "test", 16, 2, PLAIN, [tmp_path / "test"])
    write_images(tmp_path / "other")
    with pytest.raises(ValueError, match="has train, expected one of val"):
        open_val(tmp_path / "other", 16, 2, PLAIN)
    with pytest.raises(ValueError, match="nowhere: no data set"):
        open_val(tmp_path / "nowhere", 16, 2, PLAIN)


# ---- the script ----------------------------------------------------------------------------------


def test_training_reports_it_and_is_not_changed_by_it(ckpt, tmp_path, capsys):
    """The same weights with and without; log, results, page, and `--evaluate` have the numbers."""
    argv = ["--preset", "digits", "--device", "cpu", "--epochs", "1", "--batch_size", "256"]
    argv += ["--num_sampling_steps", "5", "--val_path", "digits", "--val_images", "50"]
    main_mar.main([*argv, "--output_dir", str(tmp_path / "with")])
    found, expected = (load_checkpoint(path)["model"] for path in (tmp_path / "with" / LAST, ckpt))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert "held-out loss (raw): loss " in capsys.readouterr().out
    lines = (tmp_path / "with" / "log.jsonl").read_text().splitlines()
    log = {name: value for line in lines for name, value in json.loads(line).items()}
    assert {f"eval_{w}/val_mse_t750-999" for w in ("ema", "raw")} <= log.keys()
    assert "val loss" in (tmp_path / "with" / "index.html").read_text()
    argv = ["--device", "cpu", "--evaluate", "--num_images", "0", "--resume", str(ckpt)]
    argv += ["--output_dir", str(tmp_path / "measured")]
    with pytest.raises(ValueError, match="without --val_path or --val_share"):
        main_mar.main(argv)
    main_mar.main([*argv, "--val_path", "digits", "--val_images", "50"])
    records = (tmp_path / "measured" / "results.jsonl").read_text().splitlines()
    for record in map(json.loads, records):
        expected = log[f"eval_{record['weights']}/val_loss"]
        assert record["val_loss"] == pytest.approx(expected, rel=1e-5)
    assert len(records) == 2


@pytest.mark.slow
def test_a_share_is_not_trained_on_and_is_kept_when_resumed(tmp_path, capsys):
    """Of 1,437 digits 142 are held out; a resumed run has the share of its checkpoint."""
    argv = [*FAST, "--output_dir", str(tmp_path), "--eval_freq", "9"]
    main_mar.main([*argv, "--epochs", "1", "--val_share", "0.1"])
    main_mar.main([*argv, "--epochs", "2", "--resume", str(tmp_path)])
    said = capsys.readouterr().out
    assert said.count("held-out loss on 142 of 142 images: 0.1 of the training data") == 2
    assert said.count("1295 images of 10 classes") == 2
    assert "NOTE: --val_share 0.1, by the checkpoint" in said
    assert "not as before: --epochs 2 (was 1)\n" in said
    main_mar.main([*argv, "--evaluate", "--num_images", "0", "--resume", str(tmp_path)])
    assert "held-out loss on 142 of 142 images" in capsys.readouterr().out


def test_a_resumed_run_holds_out_what_it_did():
    """Unless the flag says otherwise: 0 is none."""
    data = digits("train")
    for given, share, before, expected in (
        ((), None, 0.2, 287),
        (("val_share",), 0.0, 0.2, 0),
        (("val_share",), 0.1, 0.2, 142),
        ((), None, None, 0),
    ):
        args = Namespace(val_path=None, val_share=share)
        assert len(without_share(data, args, {*given}, before)) == len(data) - expected


@pytest.mark.parametrize(
    ("share", "before", "said"), [(0.1, 0.0, True), (0.1, 0.2, True), (0.1, 0.1, False)]
)
def test_a_share_that_was_trained_on_is_said(share, before, said, capsys):
    """That of a checkpoint whose run held out nothing, or another share."""
    args = Namespace(val_path=None, val_share=share)
    without_share(digits("train"), args, {"val_share"}, before)
    assert (f"held out {before:g}; if" in capsys.readouterr().out) == said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--val_path digits --val_share 0.1", "expected one of them"),
        ("--val_share 1", "expected below 1"),
        ("--val_share 1.5", "from 0 to 1"),
        ("--num_images 0", "with --evaluate alone"),
        ("--num_images 0 --evaluate --val_path digits --out a.png", "no images to save"),
        ("--val_path nowhere", "nowhere: no data set"),
    ],
)
def test_wrong_flags_are_one_line(flags, said, tmp_path, capsys):
    """The value, and what was expected."""
    with pytest.raises((ValueError, SystemExit)) as error:
        main_mar.main([*FAST, *flags.split(), "--output_dir", str(tmp_path)])
    assert said in str(error.value) + capsys.readouterr().err
