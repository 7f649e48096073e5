"""Any file is read, or refused in one line that names it. Run: python -m pytest tests/test_fuzz.py

Files are mutated in their bytes and, still whole, in what they hold. `make test-slow` tries 1,000
of each; -k with the name of a kind tries one.
"""

import copy
import json
import math
import re
import shutil
import signal
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import main_cache
from engine_mar import parameter_groups
from models import build_model, build_tokenizer, load_model
from models.settings import Sampling
from models.vae import AutoencoderKL
from models.vq import VQModel
from util.checkpoint import TrainState, export_ema, load_checkpoint, steps_done
from util.data.cached import open_cache
from util.data.convert import verify
from util.data.manifest import read_manifest, write_manifest
from util.ema import EMA
from util.evaluation import baseline, references
from util.evaluation.features import Extractor
from util.evaluation.references import load_reference
from util.evaluation.sweep import find_result, write_sweep
from util.run.record import check_resumed

FIXTURES = Path(__file__).parent / "fixtures"
QUICK, MANY = 10, 1000
SHAPE = (8, 4, 4)  # of the moments of the fixtures
SECONDS = 60  # for one file, on a machine that does much else

MODEL = {
    "name": "mar_tiny", "img_size": 8, "vae_stride": 1, "patch_size": 2, "vae_embed_dim": 1,
    "class_num": 10, "buffer_size": 4, "diffloss_d": 1, "diffloss_w": 16,
}  # fmt: skip
CONFIG = {
    "model": MODEL,
    "tokenizer": {"name": "pixels", "channels": 1, "scale": 1.0, "shift": 0.0},
    "sampling": Sampling(num_iter=4).asdict(),
    "latent_range": 1.0,
}

ARGS = {"epochs": 9, "lr": None, "precision": "auto", "cfg_interval": (0.0, 1.0), "no_vlb": True}
RUN = {
    "layout": "images", "processes": 1, "total_batch": 4, "lr": 1e-3, "precision": "fp32",
    "optimizer": "AdamW", "library": "0.2.0", "torch": "2.6", "tokenizer": "0" * 64,
    "classes": ["a", "b"], "images": 8, "names": "1" * 64, "labels": "2" * 64, "files": None,
}  # fmt: skip


def new_state():
    """A TrainState of a tiny model."""
    model = build_model(**MODEL)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.02), lr=1e-2)
    return TrainState(model, EMA(model, 0.5), optimizer, torch.amp.GradScaler("cpu", enabled=False))


# ---- kinds of files: how they are written, and all that is done with what they hold --------------


def write_checkpoint(path):
    state = new_state()
    state.model(torch.randn(4, 1, 8, 8), torch.arange(4)).backward()
    state.optimizer.step()
    state.epoch, state.batch = 3, 2
    generators = {n: torch.get_rng_state() for n in ("default", "generator", "step_generator")}
    state.draws = generators
    state.record = dict(RUN)
    state.save(path, CONFIG, ARGS)


def read_checkpoint(path):
    model, config = load_model(path)
    use_config(config)
    content = load_checkpoint(path)
    assert model.state_dict().keys() == content["model_ema"].keys()
    if "optimizer" not in content:
        return
    state = new_state()
    state.load(content, path)
    if "place" in content:
        state.resume_within(content["place"], 1, 4)
    math.isfinite(steps_done(content) + state.epoch)
    before = content["args"], content.get("record")
    list(check_resumed(path, ({**ARGS, "epochs": 10}, RUN), before, anyway=True))
    state.optimizer.zero_grad()
    state.model(torch.randn(2, 1, 8, 8), torch.arange(2)).backward()
    state.optimizer.step()


def use_config(config):
    Sampling.of(**config["sampling"])
    build_tokenizer(**config["tokenizer"])
    assert config.get("latent_range", 0.0) >= 0


def write_export(path):
    export_ema({"model_ema": new_state().model.state_dict()}, path, CONFIG)


def write_kl(path):
    network = AutoencoderKL(embed_dim=2, ch_mult=(1, 2), ch=32, in_channels=1)
    torch.save({"model": network.state_dict(), "scale": [0.5, 2.0], "shift": [0.0, 1.0]}, path)


def read_kl(path):
    build_tokenizer("kl", vae_path=str(path))


def write_vq(path):
    network = VQModel(embed_dim=2, ch_mult=(1, 2), ch=32, num_codes=8, in_channels=1)
    torch.save({"model": network.state_dict(), "scale": 0.5, "config": {"x": 1}}, path)


def read_vq(path):
    build_tokenizer("vq_latent", vae_path=str(path))


def write_statistics(path):
    draw = np.random.default_rng(0)
    np.savez(path, mu=draw.normal(size=12), sigma=np.eye(12), count=60)


def read_statistics(path):
    load_reference(str(path), Extractor("tiny"), 24, path.parent, workers=0)


def write_kept(path):
    features = np.zeros((3, 12), np.float32)
    arrays = {"mu": np.zeros(12), "sigma": np.eye(12), "count": 60, "features": features}
    np.savez(path, **arrays, accuracy=0.5, sha256="s", depends="d")


def read_kept(path):
    held = references._kept(path, "d", 12)
    assert held is None or held["features"].shape[1] == 12


METRICS = {"fid": 2.5, "recall": 0.75}


def write_metrics(path):
    path.write_text(json.dumps({**METRICS, baseline.SEAL: baseline._seal(METRICS)}))


def read_metrics(path):
    assert baseline.SEAL not in baseline._read(path)


RECORD = {
    "fid": 2.0, "inception_score": 9.0, "cfg": 1.0, "images": 9, "seconds_per_image": 0.5,
    "real": {"fid": 1.0, "images": 9}, "notes": ["few"], "time": "now",
}  # fmt: skip


def write_results(path):
    lines = [{**RECORD, "cfg": float(cfg)} for cfg in (1, 2, 3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_results(path):
    points = [{"cfg": 1.0}, {"cfg": 2.0}]
    found = [find_result(path, point, ["fid"]) for point in points]
    if all(found):
        write_sweep(found, points, path.parent)


CACHES = {name: FIXTURES / f"cache-{name}" for name in ("shards", "images")}


def write_cache(path, layout, old=False):
    """A cache around a file: of an earlier version, or converted from one of the other layout."""
    root = root_of(path)
    if old:
        shutil.copytree(CACHES[layout], root, dirs_exist_ok=True)
        return
    source = CACHES["images" if layout == "shards" else "shards"]
    flags = ["--convert_from", source, "--cached_path", root, "--layout", layout]
    main_cache.main([str(flag) for flag in (*flags, "--num_workers", 1)])


def root_of(path):
    """The folder of a cache, from one of its files."""
    return next(folder for folder in path.parents if folder.name.startswith("cache-"))


def read_cache(path):
    root = root_of(path)
    dataset = open_cache(root, SHAPE, 2)
    for i in range(len(dataset)):
        moments, label = dataset[i]
        assert tuple(moments.shape) == SHAPE and label in (0, 1)
        assert all(np.isfinite(x).all() for x in dataset.views(i))
    with suppress(AttributeError):
        assert len(dataset.names()) == len(dataset)
    verify(root, 1)


def load_manifest(path):
    return read_manifest(path.parent)


def save_manifest(content, path):
    write_manifest(path.parent, content)  # with a fitting sha256


def load_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def save_lines(lines, path):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def load_torch(path):
    return torch.load(path, weights_only=True)


def load_arrays(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def save_arrays(arrays, path):
    np.savez(path, **{name: np.array(value) for name, value in arrays.items()})


def load_json(path):
    return json.loads(path.read_text())


def save_json(content, path):
    path.write_text(json.dumps(content))


def load_config(path):
    return copy.deepcopy(CONFIG)


def save_config(config, path):
    export_ema({"model_ema": new_state().model.state_dict()}, path, config)


SHARDS = [
    partial(write_cache, layout="shards"), read_cache, load_manifest, save_manifest
]  # fmt: skip
IMAGES = [partial(write_cache, layout="images"), read_cache, load_manifest, save_manifest]
OLD_SHARDS = [partial(write_cache, layout="shards", old=True), *SHARDS[1:]]
OLD_IMAGES = [partial(write_cache, layout="images", old=True), *IMAGES[1:]]

# name of the file -> (write, read, functions that load and save its content, if it has structure)
KINDS = {
    "checkpoint-last.pth": (write_checkpoint, read_checkpoint, load_torch, torch.save),
    "export.safetensors": (write_export, read_checkpoint, load_config, save_config),
    "kl.ckpt": (write_kl, read_kl, load_torch, torch.save),
    "vq.ckpt": (write_vq, read_vq, load_torch, torch.save),
    "statistics.npz": (write_statistics, read_statistics, load_arrays, save_arrays),
    "kept.npz": (write_kept, read_kept, load_arrays, save_arrays),
    "kept.json": (write_metrics, read_metrics, load_json, save_json),
    "results.jsonl": (write_results, read_results, load_lines, save_lines),
    "cache-shards/cache.json": SHARDS,
    "cache-shards/shard-00000.moments.npy": SHARDS[:2],
    "cache-shards/shard-00000.labels.npy": SHARDS[:2],
    "cache-shards/shard-00000.names.npy": SHARDS[:2],
    "cache-shards/shard-00000.checksums.npy": SHARDS[:2],
    "cache-images/cache.json": IMAGES,
    "cache-images/cache.names.npy": IMAGES[:2],
    "cache-images/cache.sources.npy": IMAGES[:2],
    "cache-images/a/2.png.npz": IMAGES[:2],
    "cache-old/shards/cache.json": OLD_SHARDS,
    "cache-old/shards/shard-00000.flips.npy": OLD_SHARDS[:2],
    "cache-old/images/cache.json": OLD_IMAGES,
    "cache-old/images/b/1.png.npz": OLD_IMAGES[:2],
}
STRUCTURED = [name for name, kind in KINDS.items() if len(kind) == 4]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A function that writes a file of a kind; returns its path."""

    def write(name):
        path = tmp_path_factory.mktemp("fuzz") / name.replace("cache-old/", "cache-old-")
        torch.manual_seed(0)
        KINDS[name][0](path)
        return path

    return write


# ---- what may come of it -------------------------------------------------------------------------


@contextmanager
def in_time():
    """Raises TimeoutError in what hangs, where there are alarms."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def is_read_or_refused(read, path):
    """Nothing else: neither another error nor a hang, nor an attempt to take all memory."""
    try:
        with in_time():
            read(path)
    except ValueError as error:
        line = str(error)
        named = path.name in line or any(f.name in line for f in path.parents if "cache-" in f.name)
        assert named and len(line.splitlines()) == 1, line
        assert not re.search("allocate|TimeoutError", line), line


def tried(count):
    """Settings of so many examples, the same ones each time."""
    every = list(HealthCheck)
    return settings(max_examples=count, deadline=None, derandomize=True, database=None,
                    suppress_health_check=every)  # fmt: skip


COUNTS = [QUICK, pytest.param(MANY, marks=pytest.mark.slow)]


# ---- bytes ---------------------------------------------------------------------------------------


class Changed:
    """Changed content, shown by what was done to it."""

    def __init__(self, content):
        self.content, self.done = content, []

    def __repr__(self):
        return "; ".join(self.done)


@st.composite
def mutated(draw, whole):
    """Bytes, changed in one to three places: flipped, cut off, inserted, swapped or zeroed."""
    content, changed = bytearray(whole), Changed(None)
    for _ in range(draw(st.integers(1, 3))):
        size = len(content)
        first = draw(st.integers(0, max(0, size - 1)))
        if draw(st.booleans()):  # headers are at both ends
            first = draw(st.sampled_from([first % 300, max(0, size - 1 - first % 300)]))
        how = draw(st.sampled_from(["flip", "cut", "insert", "swap", "zero"]))
        if how == "flip" and size:
            content[first] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del content[first:]
        elif how == "insert":
            content[first:first] = draw(st.binary(min_size=1, max_size=20))
        elif how == "swap" and size:
            other = draw(st.integers(0, size - 1))
            content[first], content[other] = content[other], content[first]
        elif how == "zero":
            length = min(draw(st.integers(1, 4096)), size - first)
            content[first : first + length] = bytes(length)
        changed.done.append(f"{how} at {first} of {size}")
    changed.content = bytes(content)
    return changed


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", KINDS)
def test_mutated_bytes(written, name, count):
    """Bits flipped, files cut off, bytes inserted, exchanged, or zero."""
    path, read = written(name), KINDS[name][1]
    whole = path.read_bytes()
    read(path)

    @tried(count)
    @given(mutated(whole))
    def check(changed):
        path.unlink()  # it may still be mapped
        path.write_bytes(changed.content)
        is_read_or_refused(read, path)

    check()


# ---- structure -----------------------------------------------------------------------------------

PLAIN = [
    None, True, -1, 0, 1, 7, 10**12, 2**70, -0.5, 0.0, 1e300, math.nan, math.inf, "", "x", "100",
    "../../x", [], [1], [[]], ["x", 2], {}, {"a": 1}, {"1": {}},
]  # fmt: skip
TENSORS = [
    torch.zeros(3),
    torch.zeros(2, 0),
    torch.zeros(1).expand(10**12),
    torch.zeros(10**12, 0),
    torch.tensor(math.nan),
    torch.tensor(10**12),
    torch.zeros(2, dtype=torch.complex64),
    torch.zeros(3, dtype=torch.uint8),
    torch.eye(3).to_sparse(),
    (1, 2),
    {0: torch.zeros(1)},
]
ARRAYS = [
    np.zeros((0, 12)), np.full((12, 12), np.nan), np.zeros(12, np.complex64), np.array("x"),
    np.zeros((2, 3, 4)), np.zeros(12, bool), np.zeros(12, "M8[s]"), np.arange(12), np.array([]),
]  # fmt: skip
VALUES = {".json": PLAIN, ".jsonl": PLAIN, ".safetensors": PLAIN, ".npz": ARRAYS + PLAIN[:16]}


def places(content, found=None):
    """(container, key) of everything in nested dicts and lists."""
    found = [] if found is None else found
    if isinstance(content, dict | list):
        for key in list(content) if isinstance(content, dict) else range(len(content)):
            found.append((content, key))
            places(content[key], found)
    return found


@st.composite
def restructured(draw, content, values):
    """Content in which one or two values are others, missing, or under another name."""
    changed = Changed(copy.deepcopy(content))
    for _ in range(draw(st.integers(1, 2))):
        if not (there := places(changed.content)):
            break
        container, key = there[draw(st.integers(0, len(there) - 1))]
        how = draw(st.sampled_from(["replace", "replace", "delete", "rename"]))
        if how == "replace":
            container[key] = copy.deepcopy(values[draw(st.integers(0, len(values) - 1))])
        elif how == "delete" or isinstance(container, list):
            del container[key]
        else:
            container["other"] = container.pop(key)
        new = f" by {container[key]!r:.60}" if how == "replace" else ""
        changed.done.append(f"{how} {key!r}{new}")
    return changed


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", STRUCTURED)
def test_mutated_content(written, name, count):
    """Whole files in which a value has another type, size or name, or is missing."""
    path, (_, read, load, save) = written(name), KINDS[name]
    content = load(path)
    values = VALUES.get(path.suffix, PLAIN + TENSORS)

    @tried(count)
    @given(restructured(content, values))
    def check(changed):
        path.unlink()
        save(changed.content, path)
        is_read_or_refused(read, path)

    check()
