"""Every bit of caches of latents, and fuzzed manifests. Run: pytest tests/test_cache_bits.py"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from util.data import cached, convert, shards
from util.data.cached import read_moments, write_moments
from util.data.shards import ShardedCache, checksums_of

SHAPE = (4, 2, 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a cache of eight images in each layout; in three shards."""
    folder, draw = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    for i in range(8):
        moments = draw.standard_normal((2, *SHAPE)).astype(np.float32)
        write_moments(folder / "published" / ["cat", "dog"][i // 4] / f"{i}.jpg.npz", *moments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_SIZE", 3)
        convert.convert(folder / "published", folder / "shards", "shards")
    convert.convert(folder / "shards", folder / "images", "images")
    return folder


def test_every_bit_of_a_file(tmp_path):
    """A flipped bit of an .npz is found, or changes nothing that is read, such as its date."""
    path = tmp_path / "a/0.jpg.npz"
    moments = np.random.default_rng(0).standard_normal((2, 2, 2, 2)).astype(np.float32)
    write_moments(path, *moments)
    whole, silent = path.read_bytes(), 0
    for place in range(8 * len(whole)):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        try:
            found = read_moments(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            continue
        silent += 1
        assert all(map(np.array_equal, found.values(), moments))
        assert [x.dtype for x in found.values()] == [np.float32] * 2
    assert silent < 0.4 * 8 * len(whole)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int32", "uint8"])
def test_every_bit_of_a_row(dtype):
    """Any flipped bit changes a checksum, for rows of any length, as do exchanged rows."""
    for length in (1, 3, 4, 18, 64):
        rows = np.random.default_rng(length).integers(0, 255, (2, length)).astype(dtype)
        before = checksums_of(rows)
        assert before.shape == (2,) and before.dtype == np.uint64
        bits = np.unpackbits(rows.view(np.uint8)[0])
        for place in range(len(bits)):
            flipped = bits.copy()
            flipped[place] ^= 1
            other = np.packbits(flipped).view(rows.dtype)
            assert checksums_of(other[None])[0] != before[0]
        assert (checksums_of(rows[::-1]) == before[::-1]).all()


def test_bits_of_shards(made, tmp_path):
    """300 flipped bits anywhere in the arrays of a shard: refused, or the same values are read."""
    draw = np.random.default_rng(0)
    whole = [ShardedCache(made / "shards").views(i) for i in range(8)]
    for part in shards.PARTS[:4]:
        folder = Path(shutil.copytree(made / "shards", tmp_path / part))
        path = folder / f"shard-00001.{part}.npy"
        content, refused = path.read_bytes(), 0
        for place in draw.integers(0, 8 * len(content), 75):
            flipped = bytearray(content)
            flipped[place // 8] ^= 1 << place % 8
            path.write_bytes(flipped)
            try:
                found = [ShardedCache(folder).views(i) for i in range(8)]
            except ValueError as error:
                refused += path.name in str(error)
                continue
            for one, other in zip(found, whole, strict=True):
                assert all(map(np.array_equal, one, other))
        assert refused > 60  # the others are spaces in a header


def test_fuzzed_manifests(made, tmp_path):
    """300 manifests with changed, lost or repeated parts: a line each, or the same cache."""
    draw = np.random.default_rng(0)
    for layout in ("images", "shards"):
        folder = Path(shutil.copytree(made / layout, tmp_path / layout))
        path, content = folder / "cache.json", (folder / "cache.json").read_bytes()
        content = content[: content.rindex(b', "sha256"')] + b"}"  # as by earlier versions
        for _ in range(150):
            path.write_bytes(mutated(content, draw))
            try:
                dataset = cached.open_cache(folder, SHAPE, 2)
            except ValueError as error:
                assert "\n" not in str(error)
            else:
                assert len(dataset) == 8


def mutated(content, draw):
    """Bytes with one to three changes."""
    content = bytearray(content)
    for _ in range(draw.integers(1, 4)):
        start, length = draw.integers(0, len(content)), draw.integers(0, 12)
        part = content[start : start + length]
        new = (
            b"",
            bytes(part) * 2,
            bytes(draw.integers(32, 127, length).astype(np.uint8)),
            b"null",
            b"-1",
        )
        content[start : start + length] = new[draw.integers(0, len(new))]
    return bytes(content)
