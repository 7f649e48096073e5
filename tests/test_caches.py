"""What can happen to a cache of latents, and where it is found. Run: pytest tests/test_caches.py

`CHANGES` lists kinds of file and kinds of change, as the table of docs/caches.md does.
"""

import json
import shlex
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import main_cache
from util.data import cached, convert, manifest, shards
from util.data.cached import open_cache
from util.data.manifest import read_manifest
from util.files import file_sha256

SHAPE = (32, 2, 2)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Eight images make three shards."""
    monkeypatch.setattr(shards, "SHARD_SIZE", 3)


def command(images, vae_path, folder, layout, *flags):
    common = f"--img_size 32 --vae_path {vae_path} --device cpu --num_workers 0 --batch_size 2"
    common += f" --data_path {images} --cached_path {folder} --layout {layout}"
    return [*shlex.split(common), *map(str, flags)]


def make_both(images, vae_path, folder):
    """Caches of eight images in each layout, in three shards; returns the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_SIZE", 3)
        for layout in ("images", "shards"):
            main_cache.main(command(images, vae_path, folder / layout, layout))
    return folder


@pytest.fixture(scope="module")
def made(images, vae_path, tmp_path_factory):
    """A folder with caches of eight images by this version, by earlier ones and the published."""
    folder = make_both(images, vae_path, tmp_path_factory.mktemp("made"))
    shutil.copytree(folder / "images", folder / "published")
    for path in (folder / "published").glob("cache.*"):
        path.unlink()
    shutil.copytree(folder / "shards", folder / "old")
    make_old(folder / "old")
    return folder


def make_old(folder):
    """Leave of shards what earlier versions wrote."""
    for part in ("checksums", "sources"):
        for path in folder.glob(f"*.{part}.npy"):
            path.unlink()
    content = read_manifest(folder)
    for shard in content["shards"]:
        for part in ("checksums", "sources"):
            del shard["bytes"][part], shard["sha256"][part]
        (folder / f"{shard['file']}.json").write_text(json.dumps(shard))
    (folder / "cache.json").write_text(json.dumps(content))


def contents(folder):
    """Path -> content of the files of latents, and of what is said of them."""
    own = ("data_checked.txt", "run.lock")  # of a run, not of the latents
    paths = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in own)
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


# ---- kinds of change: functions of a file --------------------------------------------------------


def bit(path, place=-5):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def empty(path):
    path.write_bytes(b"")


def gone(path):
    path.unlink()


def zeros(path):
    _edit(path, lambda rows: rows * 0)


def not_finite(path):
    _edit(path, lambda rows: np.where(np.arange(rows.size).reshape(rows.shape) == 7, np.nan, rows))


def permuted(path):
    _edit(path, lambda rows: rows[::-1])


def _edit(path, change):
    rows = np.load(path)
    np.save(path, change(rows).astype(rows.dtype))


def exchanged(path):
    """With the same part of another of the first two shards."""
    here, there = ("00000", "00001") if "00000" in path.name else ("00001", "00000")
    swap(path, path.with_name(path.name.replace(here, there)))


def swap(one, other):
    """Exchange two files or folders."""
    beside = one.with_name("beside")
    one.rename(beside)
    other.rename(one)
    beside.rename(other)


def hidden(path):
    """NaN, with all checksums as if it had been so from the beginning."""
    not_finite(path)
    folder, content = path.parent, read_manifest(path.parent)
    shard = content["shards"][0]
    rows = [np.load(folder / f"shard-00000.{part}.npy") for part in shards.ROWS]
    sums = folder / "shard-00000.checksums.npy"
    if sums.exists():
        np.save(sums, np.stack([shards.checksums_of(part) for part in rows], 1))
    for part in shard["sha256"]:
        shard["sha256"][part] = file_sha256(folder / f"shard-00000.{part}.npy")
    manifest.write_manifest(folder, content)


def said(path, **changes):
    """Change entries of a manifest, but not its sha256."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def unfinished(path):
    content = read_manifest(path.parent)
    content.pop("shards", None)
    manifest.write_manifest(path.parent, {**content, "finished": False})


def half(folder):
    """A run that was killed in the middle."""
    unfinished(folder / "cache.json")
    for path in (*sorted(folder.rglob("*.npz"))[4:], *folder.glob("shard-00002.*")):
        path.unlink()


def latents(path, change):
    """Other latents in a file of its own, which is intact."""
    moments = cached.read_moments(path)
    cached.write_moments(path, *(change(values) for values in moments.values()))


def set_nan(values):
    return np.where(np.arange(values.size).reshape(values.shape) == 7, np.float32(np.nan), values)


def add_file(folder):
    shutil.copy(folder / "cat/0.jpg.npz", folder / "cat/9.jpg.npz")


def add_class(folder):
    shutil.copytree(folder / "cat", folder / "emu")


def in_shards(part, change, where, message=None, shard=0):
    """A row of CHANGES about a part of a shard. change: a function, or (its name, function)."""
    file = f"shard-{shard:05d}.{part}.npy"
    name, change = change if isinstance(change, tuple) else (change.__name__, change)
    return f"{file} {name}", lambda folder: change(folder / file), where, message or file


def in_file(label, change, where, message, name="cat/1.jpg.npz"):
    return f"{name} {label}", lambda folder: change(folder / name), where, message


# Name, change, where it is found first, and a part of the message. "opening": when training starts;
# "batch": when the image is read in training; "verify": not in training. --verify finds them all.
ROWS = [
    in_shards(part, change, where, message)
    for part in ("moments", "flips")
    for change, where, message in (
        (bit, "batch", None),
        (("bit of the header", partial(bit, place=70)), "opening", None),
        (cut, "opening", None),
        (empty, "opening", None),
        (gone, "opening", None),
        (zeros, "batch", None),
        (permuted, "batch", None),
        (exchanged, "batch", None),
        (not_finite, "batch", None),
        (hidden, "verify", "not finite"),
    )
]
SMALL = [  # of the second shard, which has images of both classes
    in_shards(part, change, "verify" if part == "sources" else "opening", f".{part}.npy", 1)
    for part in ("labels", "names", "checksums", "sources")
    for change in (bit, cut, empty, gone, exchanged, permuted)
]
FILES = [
    in_file("bit", bit, "batch", "1.jpg.npz"),  # of the zip's directory
    in_file("bit of the moments", partial(bit, place=400), "batch", "1.jpg.npz: not a cached"),
    in_file("cut", cut, "batch", "1.jpg.npz: not a cached"),
    in_file("empty", empty, "batch", "1.jpg.npz: not a cached"),
    in_file("gone", gone, "opening", "1 images are missing: cat/1.jpg"),
    in_file("NaN", partial(latents, change=set_nan), "batch", "1.jpg.npz: not the latents"),
    in_file("others", partial(latents, change=lambda x: x + 1), "batch", "1.jpg.npz: not the lat"),
    in_file("shape", partial(latents, change=lambda x: x[:, :1]), "batch", "1.jpg.npz: not the"),
    in_file(
        "of another image",
        lambda path: shutil.copy(path.with_name("2.jpg.npz"), path),
        "batch",
        "1.jpg.npz: not the latents",
    ),
    in_file(
        "of another class",
        lambda path: swap(path, path.parents[1] / "dog/1.jpg.npz"),
        "batch",
        "1.jpg.npz: not the latents",
    ),
    in_file(
        "of the first image",
        partial(latents, change=lambda x: -x),
        "opening",
        "0.jpg.npz: not the latents",
        "dog/0.jpg.npz",
    ),
]
FOLDERS = [
    (
        "classes exchanged",
        lambda folder: swap(folder / "cat", folder / "dog"),
        "opening",
        "not the",
    ),
    ("a class renamed", lambda f: (f / "dog").rename(f / "eel"), "opening", "missing: dog/0.jpg"),
    ("a class gone", lambda folder: shutil.rmtree(folder / "dog"), "opening", "missing: dog/0.jpg"),
    ("a class added", add_class, "opening", "did not finish: emu/0.jpg"),
    ("an image added", add_file, "opening", "did not finish: cat/9.jpg"),
]
INDEX = [
    in_file(change.__name__, change, "opening", f"cache.{part}.npy", f"cache.{part}.npy")
    for part in cached.INDEX
    for change in (bit, gone, permuted)
]
MANIFESTS = [
    ("manifest bit", lambda f: bit(f / "cache.json", 30), "opening", "cache.json: "),
    ("manifest bit of the count", lambda f: said(f / "cache.json", count=9), "opening", "damaged"),
    ("manifest cut", lambda f: cut(f / "cache.json"), "opening", "cache.json: not the manifest"),
    ("manifest empty", lambda f: empty(f / "cache.json"), "opening", "cache.json: not the manif"),
    (
        "classes permuted",
        lambda f: said(f / "cache.json", classes=["dog", "cat"]),
        "opening",
        "dam",
    ),
    ("another tokenizer", lambda f: said(f / "cache.json", tokenizer="a"), "opening", "damaged"),
    ("stopped", half, "opening", "as the run that"),
    ("killed at the end", lambda f: unfinished(f / "cache.json"), "opening", "as the run that"),
]
CHANGES = {
    "shards": [
        *ROWS,
        *SMALL,
        *MANIFESTS,
        ("manifest gone", lambda f: gone(f / "cache.json"), "opening", "expected one folder"),
    ],
    "images": [
        *FILES,
        *FOLDERS,
        *INDEX,
        *MANIFESTS,
        ("manifest gone", lambda f: gone(f / "cache.json"), "opening", "cache.json is missing"),
    ],
    # by earlier versions: without checksums of rows, but all is read once before training
    "old": [
        (name, change, "opening", message) for name, change, where, message in (*ROWS, *SMALL[:12])
    ],
    # by the published code: without a manifest, damage is what can be found
    "published": [
        *FILES[:4],
        in_file("NaN", partial(latents, change=set_nan), "batch", "1.jpg.npz: moments"),
        in_file(
            "shape", partial(latents, change=lambda x: x[:, :1]), "batch", "1.jpg.npz: moments"
        ),
        (
            "a class emptied",
            lambda folder: [path.unlink() for path in (folder / "dog").iterdir()],
            "opening",
            "dog",
        ),
        (
            "a class gone",
            lambda folder: shutil.rmtree(folder / "dog"),
            "opening",
            "found 1 classes",
        ),
    ],
}
CASES = [
    pytest.param(kind, *row[1:], id=f"{kind}: {row[0]}")
    for kind, rows in CHANGES.items()
    for row in rows
]


def read_all(folder):
    """Open a cache as training does, and read all images, both views."""
    torch.manual_seed(0)
    dataset = open_cache(folder, SHAPE, 2)
    yield "opening"
    for _ in range(20):
        if hasattr(dataset, "__getitems__"):
            dataset.__getitems__(list(range(len(dataset))))
        else:
            [dataset[i] for i in range(len(dataset))]
    yield "batch"


def find(folder):
    """(where a change is found first, the message) of a cache."""
    found = "opening"
    try:
        for done in read_all(folder):
            found = {"opening": "batch", "batch": "verify"}[done]
        convert.verify(folder)
    except ValueError as error:
        return found, str(error)
    return None, ""


@pytest.mark.parametrize("kind", CHANGES)
def test_what_was_not_changed_is_accepted(made, kind, capsys):
    """A cache of any version trains and is verified, and verifying says what was compared."""
    assert find(made / kind) == (None, "")
    before = contents(made / kind)
    main_cache.main(["--verify", "--cached_path", str(made / kind), "--num_workers", "0"])
    output = capsys.readouterr().out
    assert "8 images, all whole" in output and "\nchecked: " in output
    assert contents(made / kind) == before


@pytest.mark.parametrize(("kind", "change", "where", "message"), CASES)
def test_a_change_is_found(made, tmp_path, kind, change, where, message):
    """Where docs/caches.md says, in a line with a name; and by --verify, whatever training says."""
    folder = Path(shutil.copytree(made / kind, tmp_path / kind))
    change(folder)
    found, told = find(folder)
    assert (found, message in told, "\n" in told) == (where, True, False), (found, told)
    if "classes" not in message:  # which only training expects
        with pytest.raises(ValueError, match=r"."):
            convert.verify(folder)
