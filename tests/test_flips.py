"""Training and caching without mirror images. Run: python -m pytest tests/test_flips.py"""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import complain
from conftest import write_images
from test_caches import bit, contents, gone

import main_cache
import main_mar
import main_tokenizer
from models import found
from util.data import caching, open_data, shards
from util.data.cached import open_cache, read_arrays, read_moments, write_moments
from util.data.loader import open_loader
from util.data.manifest import read_manifest

SHAPE = (3, 8, 8)
LAYOUTS = pytest.mark.parametrize("layout", ["images", "shards"])
SMALL = "--tokenizer pixels --img_size 8 --device cpu --num_workers 0"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Eight images make three shards."""
    monkeypatch.setattr(shards, "SHARD_SIZE", 3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of eight images of 8×8 pixels."""
    return write_images(tmp_path_factory.mktemp("pictures"), size=(8, 8))


def cache(pictures, folder, layout, *flags):
    """Cache the pixels of images."""
    own = ("--data_path", pictures, "--cached_path", folder, "--layout", layout, *flags)
    main_cache.main([*shlex.split(SMALL), "--batch_size", "2", *map(str, own)])


@pytest.fixture(scope="module")
def made(pictures, tmp_path_factory):
    """A folder with caches of either layout: "shards", and "shards-plain" without mirror images."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_SIZE", 3)
        for layout in ("images", "shards"):
            cache(pictures, folder / layout, layout)
            cache(pictures, folder / f"{layout}-plain", layout, "--no_flip")
    return folder


@pytest.fixture
def plain(made, layout, tmp_path):
    """A copy of a cache without mirror images."""
    return Path(shutil.copytree(made / f"{layout}-plain", tmp_path / "plain"))


def same_pixels(dataset, pictures):
    """Whether each of many draws of each image is the image as it is in its file."""
    files = open_data(pictures, "train", 8)
    return all(
        torch.allclose(dataset[i][0].float(), files[i][0], atol=1e-3)
        for i in range(len(files))
        for _ in range(6)  # of 48 draws, all are plain by chance once in 2^48
    )


# ---- images --------------------------------------------------------------------------------------


def test_images_are_not_mirrored(pictures):
    """By the flag, in training of a model and of a tokenizer; without it half of them are."""
    flags = ["--data_path", str(pictures), *shlex.split(SMALL)]
    for flip in ([], ["--no_flip"]):
        args, given = main_mar.get_parser().parse_given([*flags, *flip])
        assert same_pixels(found.open_training_data(args, given, {}), pictures) == bool(flip)
        args, given = main_tokenizer.get_parser().parse_given([*flags, *flip])
        args.output_dir = pictures
        assert same_pixels(main_tokenizer.open_split(args, "train", True), pictures) == bool(flip)
        assert same_pixels(main_tokenizer.open_split(args, "train", False), pictures)


def test_it_is_said_and_a_resumed_run_keeps_it(pictures, tmp_path, capsys):
    """A line where images are mirrored; --no_flip need not be given again."""
    model = "--model mar_tiny --buffer_size 4 --diffloss_d 1 --diffloss_w 16 --num_sampling_steps 2"
    common = f"{SMALL} {model} --batch_size 8 --lr 1e-4 --data_path {pictures} --num_iter 1"
    for name, flags, said in (
        ("with", "--epochs 1", True),
        ("without", "--epochs 1 --no_flip", False),
        ("without", f"--epochs 2 --resume {tmp_path / 'without'}", False),
    ):
        main_mar.main(shlex.split(f"{common} {flags} --output_dir {tmp_path / name}"))
        assert ("half the images are mirrored" in capsys.readouterr().out) == said


# ---- caches with mirror images -------------------------------------------------------------------


@LAYOUTS
def test_a_cache_may_be_read_without_them(pictures, made, layout):
    """By the flag no moments of a mirror image are taken, and nothing is drawn."""
    assert not same_pixels(open_cache(made / layout), pictures)
    flags = f"{SMALL} --data_path {pictures} --use_cached --no_flip --cached_path {made / layout}"
    args, given = main_mar.get_parser().parse_given(shlex.split(flags))
    dataset, state = found.open_training_data(args, given, {}), torch.get_rng_state()
    assert same_pixels(dataset, pictures)
    assert torch.equal(torch.get_rng_state(), state)


@LAYOUTS
def test_flips_are_drawn_as_before(made, layout):
    """From each batch's own seed; without flips, batches hold the same images in the same order."""
    loaders = [open_loader(open_cache(made / layout, flip=f), 4, 0, 7) for f in (True, False)]
    plain = [open_cache(made / layout).views(i) for i in range(8)]
    for (one, labels), (other, same), n in zip(
        *(loader.epoch(3) for loader in loaders), range(2), strict=True
    ):
        assert torch.equal(labels, same)
        indices, (seed, _) = loaders[0].indices(3, n), next(iter(loaders[0].sampler))
        drawn = torch.rand(4, generator=torch.Generator().manual_seed(seed)) < 0.5
        for k, (i, flip) in enumerate(zip(indices, drawn.tolist(), strict=True)):
            assert np.array_equal(one[k], plain[i][flip])
            assert np.array_equal(other[k], plain[i][0])


# ---- caches without ------------------------------------------------------------------------------


@LAYOUTS
def test_it_is_made_with_half_the_work(pictures, made, layout, tmp_path, monkeypatch):
    """Each image is encoded once, and what is written has no place for its mirror image."""
    encode, views = caching.moments_and_flips, []
    monkeypatch.setattr(
        caching,
        "moments_and_flips",
        lambda *args: views.append(len(found := encode(*args))) or found,
    )
    cache(pictures, tmp_path / "new", layout, "--no_flip")
    assert set(views) == {1}
    assert contents(tmp_path / "new") == contents(made / f"{layout}-plain")
    assert read_manifest(tmp_path / "new")["flips"] is False
    assert "flips" not in read_manifest(made / layout)  # as before
    assert not [p for p in tmp_path.rglob("*") if "flips" in p.name]
    for path in (tmp_path / "new").rglob("*.npz"):
        assert set(np.load(path)) == {"moments"}
    sizes = [sum(map(len, contents(f).values())) for f in (made / layout, tmp_path / "new")]
    assert sizes[1] < 0.75 * sizes[0]  # headers and names are most of these
    assert same_pixels(open_cache(tmp_path / "new"), pictures)


@LAYOUTS
def test_training_says_it_once(pictures, made, layout, tmp_path, capsys):
    """Unless --no_flip is given; and it trains."""
    train = f"--model mar_tiny --patch_size 2 --buffer_size 4 {SMALL} --use_cached --epochs 1"
    train += " --diffloss_d 1 --diffloss_w 32 --batch_size 4 --num_sampling_steps 2 --num_iter 2"
    train += f" --warmup_epochs 0 --class_num 2 --cached_path {made / layout}-plain"
    train += f" --output_dir {tmp_path}"
    note = f"NOTE: {made / layout}-plain: this cache has no mirrored images"
    main_mar.main(shlex.split(train))
    assert capsys.readouterr().out.count(note) == 1
    assert [1 for line in (tmp_path / "log.jsonl").open() if "loss" in json.loads(line)]
    open_cache(f"{made / layout}-plain", flip=False)
    assert note not in capsys.readouterr().out


@LAYOUTS
def test_it_is_verified_and_repaired(pictures, plain, made, layout, capsys):
    """Damage is found, and what is missing is made again, without mirror images."""
    flags = ["--cached_path", str(plain), "--num_workers", "0", "--verify"]
    main_cache.main([*flags, "--data_path", str(pictures), "--img_size", "8"])
    assert "the content of 8 pictures" in capsys.readouterr().out
    name, more = "cat/1.jpg.npz", "cat/2.jpg.npz"
    if layout == "shards":
        name, more = "shard-00000.moments.npy", "shard-00001.checksums.npy"
    bit(plain / name, 600)
    for find in (lambda: main_cache.main(flags), lambda: open_cache(plain).views(1)):
        with pytest.raises(ValueError, match=name):
            find()
    gone(plain / more)
    cache(pictures, plain, layout, "--no_flip")
    assert f"{2 if layout == 'images' else 6} written" in capsys.readouterr().out
    assert contents(plain) == contents(made / f"{layout}-plain")


@LAYOUTS
def test_the_other_setting_is_refused(pictures, made, plain, layout, capsys):
    """One line that says what is there and what to pass; nothing is changed."""
    flags = (*SMALL.split(), "--layout", layout, "--data_path", pictures, "--cached_path")
    line = complain(capsys, main_cache.main, *flags, plain)
    assert f"{plain}: its images are cached with no mirrored ones" in line
    assert "add --no_flip" in line
    line = complain(capsys, main_cache.main, *flags, made / layout, "--no_flip")
    assert "with also mirrored ones" in line and "leave out --no_flip" in line
    assert contents(plain) == contents(made / f"{layout}-plain")


@LAYOUTS
def test_conversion_keeps_or_drops_them(made, layout, tmp_path, capsys):
    """Of a cache without them, one without; --no_flip drops them; the same bytes as made so."""
    other = {"images": "shards", "shards": "images"}[layout]
    flags = ("--layout", other, "--num_workers", "0", "--convert_from")
    kept, dropped = tmp_path / "kept", tmp_path / "dropped"
    for _ in range(2):
        main_cache.main([*flags, f"{made / layout}-plain", "--cached_path", str(kept)])
        main_cache.main([*flags, str(made / layout), "--cached_path", str(dropped), "--no_flip"])
        assert contents(kept) == contents(dropped)
    assert capsys.readouterr().out.count("0 written, 8 there already") == 2
    assert read_manifest(kept)["flips"] is False
    if other == "shards":  # the other way, moments are rounded
        assert contents(kept) == contents(made / "shards-plain")
    line = complain(capsys, main_cache.main, *flags, made / layout, "--cached_path", kept)
    assert "its images are cached with no mirrored ones" in line


def test_a_cache_of_other_code_with_moments_only(made, tmp_path):
    """Without a manifest the files say it; one that cannot be read does not decide."""
    for path in (made / "images").rglob("*.npz"):
        moments = read_moments(path, ("moments",))["moments"]
        write_moments(tmp_path / "own" / path.relative_to(made / "images"), moments)
    dataset = open_cache(tmp_path / "own", SHAPE, 2)
    assert dataset.arrays == ("moments",) and not dataset.flip and len(dataset.views(0)) == 1
    assert set(read_arrays(dataset.samples[0][0])) == {"moments"}
    Path(dataset.samples[0][0]).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a cached latent"):
        open_cache(tmp_path / "own", SHAPE, 2)
