"""What a cache of latents says of itself: `cache.json`, and arrays beside it whose sha256 it holds.

The manifest holds its own sha256, too. Those of earlier versions do not, and caches of the
published code have none at all.
"""

import hashlib
import io
import json
from pathlib import Path

import numpy as np

from util.files import replacing

MANIFEST = "cache.json"
AGAIN = "call main_cache.py again as before"
DTYPES = ("float16", "float32", "int32")


def read_manifest(folder):
    """The manifest of the cache in `folder`, in either layout; {} if it has none.

    Raises ValueError for one that is damaged, or not that of a cache.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not the manifest of a cache ({error})") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"{path}: not the manifest of a cache")
    if "sha256" in manifest and manifest.pop("sha256") != fingerprint(manifest):
        raise ValueError(f"{path}: damaged: not what main_cache.py wrote; delete it and {AGAIN}")
    for name, value in manifest.items():
        if not _CHECKS.get(name, lambda value: True)(value):
            shown = repr(value)[:40]
            raise ValueError(f"{path}: not the manifest of a cache: {name} {shown}")
    return manifest


def write_manifest(folder, manifest):
    """Write the manifest, with its own sha256."""
    with replacing(Path(folder) / MANIFEST) as beside:
        beside.write_text(json.dumps({**manifest, "sha256": fingerprint(manifest)}))


def has_flips(manifest):
    """Whether a cache holds latents of mirror images; without an entry that says so, it does."""
    return manifest.get("flips", True)


def fingerprint(manifest):
    """The sha256 of what a manifest says."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def layout_of(folder):
    """The layout of the cache in `folder`: "shards", "images" (one file each), or None."""
    manifest = read_manifest(folder)
    if manifest or any(Path(folder).rglob("*.npz")):
        return manifest.get("layout", "images")
    return None


# ---- what entries are, where any are given -------------------------------------------------------


def _is_count(value):
    return type(value) is int and value > 0


def _is_shape(value):
    return isinstance(value, list) and len(value) == 3 and all(map(_is_count, value))


def _are_names(value):
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_map(value, kind):
    return isinstance(value, dict) and all(isinstance(each, kind) for each in value.values())


def _are_shards(value):
    return isinstance(value, list) and all(map(_is_shard, range(len(value)), value))


def _is_shard(k, value):
    return (
        isinstance(value, dict)
        and value.get("file") == f"shard-{k:05d}"
        and _is_count(value.get("count"))
        and _is_map(value.get("bytes"), int)
        and _is_map(value.get("sha256"), str)
        and {"moments", "labels", "names"} <= value["sha256"].keys()
        and value["bytes"].keys() == value["sha256"].keys()
    )


_CHECKS = {
    "layout": lambda value: value in ("shards", "images"),
    "shape": _is_shape,
    "dtype": lambda value: value in DTYPES,
    "classes": _are_names,
    "count": _is_count,
    "shard_size": _is_count,
    "shards": _are_shards,
    "flips": lambda value: isinstance(value, bool),
    "finished": lambda value: isinstance(value, bool),
    "parts": lambda value: _is_map(value, str),
    "reading": lambda value: _is_map(value, str | int),
}


# ---- arrays beside it ----------------------------------------------------------------------------


def write_part(path, array):
    """Write a small array; returns its sha256."""
    content = io.BytesIO()
    np.save(content, array)
    with replacing(path, content.getbuffer().nbytes) as beside:
        beside.write_bytes(content.getbuffer())
    return hashlib.sha256(content.getbuffer()).hexdigest()


def read_part(path, sha256, shape=None):
    """An array that `write_part` wrote. Raises ValueError if its sha256 or its shape is another."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}, expected a part of a cache; {AGAIN}") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path}: damaged: not the sha256 of {MANIFEST}; {AGAIN} to repair it")
    array = parse_array(content)
    if shape is not None and array.shape != shape:
        raise ValueError(f"{path}: of shape {array.shape}, expected {shape}")
    return array


def parse_array(content):
    """The array of the bytes of a .npy file, writable. Raises ValueError if they are none."""
    size = 10 + int.from_bytes(content[8:10], "little")
    shape, fortran_order, dtype = _parse_header(bytes(content[:size]))
    if fortran_order or dtype.hasobject:
        raise ValueError(f"an array of {dtype} in an order that is not written here")
    return np.frombuffer(bytearray(memoryview(content)[size:]), dtype).reshape(shape)


def _parse_header(content):
    if found := _headers.get(content):
        return found
    file = io.BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not an array of version 1.0")
    found = np.lib.format.read_array_header_1_0(file)
    if len(_headers) < 100:  # nearly all images of a cache have one
        _headers[content] = found
    return found


_headers = {}
