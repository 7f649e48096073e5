"""Flipped bits in what evaluation keeps and is given. Run: pytest tests/test_damage.py

Exports are in test_weights.py, caches in test_shards.py.
"""

import json
import re
import zipfile

import numpy as np
import pytest
from test_metrics import data_set, npz, pictures

from util.evaluation import baseline, references
from util.evaluation.features import Extractor
from util.evaluation.image_sets import open_images
from util.evaluation.references import load_reference
from util.evaluation.sweep import find_result, write_sweep

FLIPS = 150


def flips(path, count=FLIPS, seed=0):
    """Flip one bit of a file after the other; yields, and repairs it at the end."""
    whole, draw = path.read_bytes(), np.random.default_rng(seed)
    for place in draw.permutation(len(whole))[:count]:
        content = bytearray(whole)
        content[place] ^= 1 << int(draw.integers(8))
        path.write_bytes(content)
        yield
    path.write_bytes(whole)


def same(one, other):
    """Whether two References hold the same."""
    arrays = [(one.statistics[n], other.statistics[n]) for n in ("mu", "sigma")]
    arrays += [(one.features, other.features)] if one.features is not None else []
    whole = all(np.array_equal(a, b) for a, b in arrays)
    return whole and one.num_images == other.num_images and one.accuracy == other.accuracy


def test_kept_statistics_are_computed_again(tmp_path, monkeypatch, capsys):
    """Whatever bit flips: the same statistics, and a line that names the file if it was read."""
    data, cache, extractor = data_set(tmp_path / "data"), tmp_path / "cache", Extractor("tiny")
    first = load_reference(str(data), extractor, 24, cache, workers=0)
    (path,) = cache.iterdir()
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if name not in ("sha256", "depends")}
    monkeypatch.setattr(references, "_measure_data", lambda *args: dict(arrays))
    capsys.readouterr()
    noticed = 0
    for _ in flips(path):
        assert same(first, load_reference(str(data), extractor, 24, cache, workers=0))
        said = capsys.readouterr().out
        assert re.fullmatch(rf"(NOTE: {re.escape(str(path))}: .*: computed again\n)?", said), said
        noticed += bool(said)
    assert noticed > 0.8 * FLIPS  # the rest are times and permissions in the zip
    assert same(first, load_reference(str(data), extractor, 24, cache, workers=0))
    assert not capsys.readouterr().out


@pytest.mark.parametrize("change", ["mu", "features", "depends", "count"])
def test_kept_statistics_of_something_else(tmp_path, change, capsys):
    """A whole zip, but not of what it should be, is not used either."""
    data, extractor = data_set(tmp_path / "data"), Extractor("tiny")
    first = load_reference(str(data), extractor, 24, tmp_path / "cache", workers=0)
    (path,) = (tmp_path / "cache").iterdir()
    with np.load(path) as file:
        held = {name: file[name] for name in file.files}
    wrong = {"mu": np.full(12, np.nan), "features": np.zeros(3), "depends": "other", "count": "x"}
    np.savez(path, **{**held, change: wrong[change]})
    again = load_reference(str(data), extractor, 24, tmp_path / "cache", workers=0)
    assert same(first, again) and "computed again" in capsys.readouterr().out


def test_a_damaged_reference_is_refused(tmp_path):
    """A file of statistics, as the official ones, is used as it was or not at all."""
    draw, extractor = np.random.default_rng(0), Extractor("tiny")
    path = npz(tmp_path, mu=draw.normal(size=12), sigma=draw.normal(size=(12, 12)))
    first, refused = load_reference(str(path), extractor, 24, tmp_path), 0
    for _ in flips(path):
        try:
            assert same(first, load_reference(str(path), extractor, 24, tmp_path))
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 0.8 * FLIPS


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_images_are_refused(tmp_path, save):
    """An .npz of images likewise, mapped or not."""
    images, path = pictures(4, 0), tmp_path / "a.npz"
    save(path, arr_0=images)
    refused = 0
    for _ in flips(path):
        try:
            assert np.array_equal([image for image, _ in open_images(path)], images)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 0.8 * FLIPS


@pytest.mark.parametrize("shape", [(10**6, 10**6), (10**12, 4, 4, 3), (-1, 4, 4, 3)])
def test_arrays_that_are_not_there_are_not_allocated(tmp_path, shape, monkeypatch):
    """A header may claim any shape; the bytes of the file are counted first."""
    header = b"\x93NUMPY\x01\x00v\x00" + repr(
        {"descr": "|u1", "fortran_order": False, "shape": shape}
    ).encode().ljust(117) + b"\n"  # fmt: skip
    monkeypatch.setattr(np.lib.format, "read_array", lambda *args, **more: pytest.fail("read"))
    for name in ("mu", "arr_0"):
        path = tmp_path / f"{name}.npz"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{name}.npy", header + b"x" * 100)
            archive.writestr("sigma.npy", header + b"x" * 100)
        with pytest.raises(ValueError, match=rf"{name}\.npz: not a readable \.npz"):
            load_reference(str(path), Extractor("tiny"), 4, tmp_path)


# ---- metrics of real images ----------------------------------------------------------------------


def test_kept_metrics_are_computed_again(tmp_path, capsys):
    """A flipped bit of their file is found, also where it is still JSON."""
    path, numbers = tmp_path / "kept.json", {"fid": 2.5, "recall": 0.75}
    path.write_text(json.dumps({**numbers, baseline.SEAL: baseline._seal(numbers)}))
    assert baseline._read(path) == numbers and not capsys.readouterr().out
    for _ in flips(path, 10**6):
        assert baseline._read(path) in ({}, numbers)
        said = capsys.readouterr().out
        assert re.fullmatch(
            rf"NOTE: {re.escape(str(path))}: not readable .*: computed again\n", said
        )
    path.write_text(json.dumps(numbers))  # of an earlier version
    assert baseline._read(path) == numbers and not capsys.readouterr().out


# ---- results -------------------------------------------------------------------------------------


def test_damaged_results_are_measured_again(tmp_path):
    """A line that is no record does not stand in the way of the others, and is no result."""
    good = {"cfg": 1.0, "fid": 2.0, "images": 9, "seconds_per_image": 0.5, "real": {"fid": 1.0}}
    path, bad = tmp_path / "results.jsonl", ["", "{", "7", "[1]", "null", "[" * 9999, '"cfg"', "\0"]
    bad += [json.dumps({**good, **more}) for more in (
        {"fid": "2"}, {"images": None}, {"images": []}, {"real": 3}, {"real": {"fid": "x"}},
        {"real": ["fid"]}, {"seconds_per_image": {}},
    )]  # fmt: skip
    path.write_bytes("\n".join(bad).encode() + b"\n\xff\xfe{\n")
    assert find_result(path, {"cfg": 1.0}, ["fid"]) is None
    with path.open("a") as file:
        file.write(json.dumps(good) + "\n" + "\n".join(bad))
    assert find_result(path, {"cfg": 1.0}, ["fid"]) == good
    write_sweep([good, good], [{"cfg": 1.0}] * 2, tmp_path)
