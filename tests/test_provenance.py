"""A PNG says what it was made by, and is made again. Run: python -m pytest tests/test_provenance.py

The same bits on the same machine, from the file alone; flags given beside it change it.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from cli import complain
from PIL import Image

import engine_mar
import models
import sample
from util.images import save_image
from util.provenance import KEY, describe, dumps, read

MADE = describe(
    ckpt="run/checkpoint-last.pth",
    weights="ema",
    weights_sha256="0" * 64,
    tokenizer={"name": "pixels", "vae_path": None, "scale": [1.0, 2.5]},
    tokenizer_sha256="1" * 64,
    labels=[3, 5],
    index=1,
    seed=1,
    precision="fp32",
    sampling={"cfg": 1.5, "cfg_interval": (0.0, 1.0), "order": None},
)
GREY = np.full((8, 8, 3), 128, np.uint8)


def pixels(path):
    return np.asarray(Image.open(path))


def same(path, other):
    return np.array_equal(pixels(path), pixels(other))


@pytest.fixture(scope="module")
def made(ckpt, tmp_path_factory):
    """A grid, and a folder of two batches, of 9 images."""
    folder = tmp_path_factory.mktemp("made")
    flags = ["--ckpt", ckpt, "--device", "cpu", "--labels", "7,0-1", "--per_class", 3, "--cfg", 2]
    flags += [
        "--num_iter",
        3,
        "--batch_size",
        5,
        "--seed",
        4,
        "--vae_scale",
        9,
    ]  # few pixels are clipped
    sample.main([*map(str, flags), "--out", str(folder / "grid.png"), str(folder / "all")])
    return folder


def again(path, out, *flags):
    """Make the picture at `path` again; returns the path of the new one."""
    sample.main([str(f) for f in ("--like", path, "--out", out, "--device", "cpu", *flags)])
    return out


@pytest.mark.parametrize("name", ["grid.png", "all/000007.png"])
def test_the_same_bits(name, made, tmp_path):
    """A grid of two batches, and an image of the second; the new file says the same as the old."""
    assert len(np.unique(pixels(made / name))) > 20
    new = again(made / name, tmp_path / "new.png")
    assert same(new, made / name)
    assert read(new) == read(made / name)


def test_an_image_names_its_own_batch_only(made):
    """The second batch has four images, of which this is the third."""
    found = read(made / "all" / "000007.png")
    assert (found["labels"], found["first"], found["index"]) == ([1, 7, 0, 1], 5, 2)
    assert len(read(made / "grid.png")["labels"]) == 9


def test_from_functions(ckpt, tmp_path):
    """A picture that was drawn and described in Python, as the page does."""
    model, tokenizer, config = models.load(ckpt)
    sampling, labels = models.sampling_of(model, config, num_iter=2, cfg=1.5), [5, 2, 8]
    drawn = model, tokenizer, labels, sampling
    how = {"seed": 3, "batch_size": 3, "device": torch.device("cpu"), "first": 40}
    [(_, images)] = engine_mar.generate_images(*drawn, **how)
    own = engine_mar.origin(*drawn, **how)
    text = describe(
        **engine_mar.source_of(ckpt, config["tokenizer"], tokenizer),
        **{name: own[name] for name in ("weights_sha256", "tokenizer_sha256", "seed", "precision")},
        weights="ema",
        labels=labels,
        first=40,
        index=2,
        sampling=sampling.asdict(),
    )
    save_image(tmp_path / "a.png", images[2], {KEY: dumps(text)})
    assert same(again(tmp_path / "a.png", tmp_path / "b.png"), tmp_path / "a.png")


def test_flags_win(made, tmp_path, capsys):
    """Like it, but: another temperature or class; a part of the batch; more of its class."""
    old = made / "all" / "000003.png"
    new = again(old, tmp_path / "new.png", "--temperature", 0.5, "--labels", 3)
    assert not same(new, old)
    cooler = read(old)["sampling"] | {"temperature": 0.5}
    assert read(new) == read(old) | {"sampling": cooler, "labels": [3] * 5}
    alone = again(old, tmp_path / "alone.png", "--batch_size", 1)
    assert (read(alone)["labels"], read(alone)["first"], read(alone)["index"]) == ([7], 3, 0)
    assert np.abs(pixels(alone).astype(int) - pixels(old)).max() <= 1  # rounding
    more = again(old, tmp_path / "more", "--num_images", 3)
    assert [read(path)["labels"] for path in more.glob("*.png")] == [[7] * 3] * 3
    assert "NOTE" not in capsys.readouterr().out


def test_other_weights_are_said(ckpt, made, tmp_path, capsys):
    """One line, and the picture is made; a checkpoint that moved is named by --ckpt."""
    moved = shutil.copy(ckpt, tmp_path / "moved.pth")
    again(made / "grid.png", tmp_path / "a.png", "--ckpt", moved)
    assert "NOTE" not in capsys.readouterr().out and same(tmp_path / "a.png", made / "grid.png")
    again(made / "grid.png", tmp_path / "a.png", "--weights", "raw")
    (note,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("NOTE")]
    assert note.endswith("grid.png was made with: the picture will differ") and "weights" in note


def test_the_default_name(made, tmp_path, monkeypatch, capsys):
    """FILE_like.png, where the command is called; never FILE.png."""
    monkeypatch.chdir(tmp_path)
    old = made / "all" / "000003.png"
    sample.main(["--like", str(old), "--device", "cpu"])
    assert same("000003_like.png", old)
    message = complain(capsys, sample.main, "--like", old, "--out", old)
    assert message.endswith("000003.png: the picture of --like, expected another name")


def write(path, **changes):
    save_image(path, GREY, {KEY: dumps(MADE | changes)})
    return path


def test_what_contradicts_it(made, tmp_path, capsys):
    """One line each."""
    one = made / "all" / "000003.png"
    gone = write(tmp_path / "gone.png", ckpt="nowhere.pth")
    edited = write(tmp_path / "edited.png", edited="inpaint")
    interval = write(tmp_path / "interval.png", sampling={"cfg_interval": [0.5]})
    other = {"ckpt": read(one)["ckpt"], "tokenizer": {"name": "kl16"}}
    other = write(tmp_path / "other.png", **other, sampling={"cfg_interval": None})
    for flags, words in (
        ([], "error: expected --ckpt FILE, or --like FILE.png"),
        (["--like", one, "--labels", "1,2"], "is one image, expected one class, or --num_images"),
        (["--like", one, "--out", "folder"], "expected a name in .png"),
        (["--like", one, "--reference", "digits"], "with --like, expected --num_images"),
        (["--like", gone], "made by nowhere.pth, which is not there: --ckpt takes its new place"),
        (["--like", interval], "config's sampling cfg_interval is list, expected 2 values"),
        (["--like", other], "tokenizer kl16: "),
        (["--like", edited], "edited (inpaint): it does not hold its original"),
    ):
        assert words in complain(capsys, sample.main, *flags)


BAD = {
    "format": [None, "1", True, 0],
    "ckpt": [None, "", "a\nb", "\x1b[31m", "x" * 5000],
    "weights": ["both", None, []],
    "weights_sha256": ["0" * 63, 5],
    "tokenizer": [None, {}, {"name": {}}, {"name": "kl16", "scale": ["1"]}],
    "tokenizer_sha256": [None],
    "labels": [[], [-1], [True], [1, None], [0.5], 3, [0] * (2**16 + 1)],
    "seed": [-1, 1.5, 2**80],
    "precision": ["fp8"],
    "sampling": [[], {"cfg": {}}, {"": 1}, {"cfg": float("nan")}, {"cfg": 10**400}],
    "first": [-1, None],
    "index": [2, -1, "1"],
    "batch_size": [0],
    "columns": [0, "8"],
    "edited": [{}, "a\nb"],
    "guide": [{}, "a.pth", {"ckpt": "a.pth", "sha256": "0"}],
}


def test_nothing_but_its_form_is_believed(tmp_path):
    """Each entry of a wrong type or out of range, and each that is missing: one line that names
    it."""
    plain = MADE | {"guide": None}
    assert read(write(tmp_path / "a.png")) == plain and set(BAD) == set(plain)
    for name, values in BAD.items():
        for value in values:
            with pytest.raises(ValueError, match=name) as error:
                read(write(tmp_path / "a.png", **{name: value}))
            assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400
    for name in set(MADE) - {"index", "batch_size", "columns", "edited"}:
        text = json.dumps({key: value for key, value in MADE.items() if key != name})
        save_image(tmp_path / "a.png", GREY, {KEY: text})
        with pytest.raises(ValueError, match=name):
            read(tmp_path / "a.png")


def test_other_files(tmp_path):
    """None, no PNG, without it, with other text under its name, damaged, of a newer format."""
    path = tmp_path / "a.png"
    cases = {"no such file": lambda: None, "not a whole PNG": lambda: path.write_text("hello")}
    cases["does not say"] = lambda: save_image(path, GREY)
    cases["is damaged"] = lambda: save_image(path, GREY, {KEY: "[" * 10**5})
    many = {"labels": [1] * 4097}
    cases["one of a batch of 4097 images"] = lambda: write(path, **many)
    cases["format 3, expected 2"] = lambda: write(path, format=3)
    for words, prepare in cases.items():
        prepare()
        with pytest.raises(ValueError, match=words):
            read(path)
    assert read(write(path, **many, index=None))["labels"] == many["labels"]
    whole = write(path).read_bytes()
    for size in (10, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a whole PNG"):
            read(path)
    path.write_bytes(whole.replace(b'"seed":1', b'"seed":2'))  # the checksum does not fit
    with pytest.raises(ValueError, match="not a whole PNG"):
        read(path)
