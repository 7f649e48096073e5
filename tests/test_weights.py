"""Files of weights: nothing in them runs, and damage is found. Run: pytest tests/test_weights.py"""

import json
import os
import pickle
import re
import struct
import subprocess

import numpy as np
import pytest
import torch
from cli import ROOT
from safetensors.torch import save_file
from torch_fidelity import feature_extractor_clip as clip

from models import export
from util import weights
from util.checkpoint import export_ema, load_checkpoint
from util.evaluation import features
from util.evaluation.metrics import INCEPTION
from util.weights import Damaged, never_unpickling, read_file, write_safetensors

FLIPS = 400


@pytest.fixture
def exported(tmp_path):
    """An export of a few small weights."""
    torch.manual_seed(0)
    state = {
        "mask_token": torch.randn(1, 1, 8),
        "a.half": torch.randn(3, 4).bfloat16(),
        "count": torch.tensor(3),
    }
    path = tmp_path / "ema.safetensors"
    export_ema({"model_ema": state}, path, {"model": {"name": "mar_tiny"}, "latent_range": 0.5})
    return path, state


# ---- damage --------------------------------------------------------------------------------------


def test_an_export_is_read_as_written(exported, capsys):
    """Names, dtypes, values and configuration; nothing needs to be said."""
    path, state = exported
    content = load_checkpoint(path)
    assert content["config"] == {"model": {"name": "mar_tiny"}, "latent_range": 0.5}
    assert content["model"].keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(content["model"][name], value)
        assert content["model"][name].dtype == value.dtype
    assert not capsys.readouterr().out


def test_every_flipped_bit_of_an_export_is_found(exported):
    """In weights, names, shapes, configuration and the checksum itself: one line with the path."""
    path, _ = exported
    whole, draw = path.read_bytes(), np.random.default_rng(0)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    places = {*range(header), *draw.integers(0, len(whole), FLIPS).tolist(), len(whole) - 1}
    for place in places:
        content = bytearray(whole)
        content[place] ^= 1 << int(draw.integers(8))
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(path))) as got:
            load_checkpoint(path)
        assert "\n" not in str(got.value)


def test_exports_of_earlier_versions(exported, capsys):
    """Without a sha256 they are accepted, and it is said."""
    path, state = exported
    save_file(state, path, {"config": json.dumps({"model": {}})})
    assert load_checkpoint(path)["config"] == {"model": {}}
    assert capsys.readouterr().out.startswith(f"NOTE: {path}: without a sha256")
    save_file(state, path, {"config": "{"})
    with pytest.raises(ValueError, match=r"ema\.safetensors: its configuration cannot be read"):
        load_checkpoint(path)


def test_files_of_other_libraries(tmp_path):
    """What they say beside the weights is their matter."""
    path = tmp_path / "a.safetensors"
    for metadata in (None, {"format": "pt"}, {"format": "pt", "by": "them"}):
        save_file({"a": torch.ones(2)}, path, metadata)
        assert torch.equal(read_file(path)["a"], torch.ones(2))


def test_a_full_disk_refuses_an_export(exported, monkeypatch):
    """With the room that it needs, before it is written."""
    path, _ = exported
    before = path.read_bytes()
    monkeypatch.setattr("util.files.free_bytes", lambda path: 1000)
    with pytest.raises(ValueError, match="ema.safetensors: not written.* 4 MB needed, 1 kB free"):
        write_safetensors(path, {"a": torch.zeros(1_000_000)}, {})
    assert path.read_bytes() == before


# ---- Windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("mapped", [True, False])
def test_nothing_stays_mapped_on_windows(tmp_path, monkeypatch, name, mapped):
    """There a mapped file cannot be replaced, so it is read; elsewhere it is mapped."""
    if not os.path.isfile("/proc/self/maps"):
        pytest.skip("cannot ask what is mapped")
    monkeypatch.setattr(weights, "_MAP", mapped)
    path = tmp_path / name
    value = torch.arange(100_000.0)
    save_file({"a": value}, path) if name.endswith("s") else torch.save({"a": value}, path)
    held = read_file(path)
    with open("/proc/self/maps") as file:
        assert (str(path) in file.read()) == mapped
    assert torch.equal(held["a"], value)


# ---- nothing runs --------------------------------------------------------------------------------


class Runs:
    """Unpickled, this would make a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def malicious(path, kind, made):
    """A file that would make a folder when it is unpickled."""
    content = {"mask_token": torch.zeros(2), "extra": Runs(made)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"extra": Runs(made)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    return path


KINDS = ("zip", "legacy", "pickle")
SWITCHES = ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD")


@pytest.fixture(params=[None, *SWITCHES])
def switch(request, monkeypatch):
    """The environment of a user who has set one of torch's switches, or none."""
    if request.param:
        monkeypatch.setenv(request.param, "1")
    return request.param


@pytest.mark.parametrize("kind", KINDS)
def test_malicious_weights_do_not_run(tmp_path, kind, switch, monkeypatch):
    """Neither in a checkpoint nor as --inception_weights, whatever the environment says."""
    made = tmp_path / "made"
    path = malicious(tmp_path / "evil.pth", kind, made)
    for read in (load_checkpoint, lambda path: features.Extractor(INCEPTION, str(path))):
        with pytest.raises(ValueError, match=r"evil\.pth: "):
            read(path)
    assert not made.exists()
    monkeypatch.delenv(SWITCHES[1], raising=False)
    made.mkdir()
    with pytest.raises(FileExistsError):  # it is what it should be
        torch.load(path, weights_only=False)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_fidelity_cannot_unpickle(tmp_path, kind, switch, monkeypatch):
    """Given the path itself, as if the file had been exchanged after it was read; and its own
    downloads."""
    made = tmp_path / "made"
    path = malicious(tmp_path / "weights-inception-2015-12-05-6726825d.pth", kind, made)
    monkeypatch.setattr(features, "_reread", str)
    with pytest.raises(ValueError, match=r"6726825d\.pth: not the weights of inception"):
        features.Extractor(INCEPTION, str(path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    path.rename(tmp_path / "checkpoints" / path.name)
    with pytest.raises(ValueError, match="could not be fetched"):
        features.Extractor(INCEPTION)
    assert not made.exists()


def test_the_environment_stays(monkeypatch):
    """The switches are as before, also after an error."""
    monkeypatch.setenv(SWITCHES[0], "1")
    monkeypatch.delenv(SWITCHES[1], raising=False)
    with pytest.raises(KeyError), never_unpickling():
        assert (os.environ[SWITCHES[0]], os.environ[SWITCHES[1]]) == ("0", "1")
        raise KeyError
    assert os.environ[SWITCHES[0]] == "1" and SWITCHES[1] not in os.environ


def test_clip_is_fetched_once_and_read_as_a_script(tmp_path, monkeypatch):
    """torch.load would refuse TorchScript; torch-fidelity is given the path, which it scripts."""
    fetched, given = [], []
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def download(url, path, sha256, progress):
        fetched.append((url, sha256))
        torch.jit.script(torch.nn.Linear(2, 2)).save(path)

    def build(state, dtype):
        given.append(sorted(state))
        raise RuntimeError("as far as this goes")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(clip, "build_model", build)
    for _ in range(2):
        with pytest.raises(ValueError, match="as far as this goes"):
            features.Extractor("clip-rn50")
    sha256 = clip.MODEL_METADATA["clip-rn50"]["hash"]
    assert fetched == [(clip.MODEL_URLS["clip-rn50"], sha256)]
    assert given == [["bias", "weight"]] * 2


def test_sources_never_ask_to_unpickle():
    """Every torch.load says weights_only=True, and nothing allows pickles in arrays."""
    found = 0
    done = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    for name in done.stdout.splitlines():
        if name.startswith("tests/"):
            continue
        text = (ROOT / name).read_text()
        calls = re.findall(r"torch\.load\([^()]*\)", text)
        found += len(calls)
        assert all("weights_only=True" in call for call in calls), name
        unsafe = r"allow_pickle=True|import (pickle|joblib|dill|shelve|marshal)"
        assert not re.search(unsafe, text), name
    assert found or done.returncode


def test_export_of_a_published_checkpoint_has_a_checksum(tmp_path):
    """By the script, too."""
    out = tmp_path / "out.safetensors"
    export.main([str(ROOT / "tests" / "golden" / "checkpoint-published.pth"), str(out)])
    assert len(weights.read_metadata(out)["sha256"]) == 64
    with open(out, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    with pytest.raises(Damaged, match=r"out\.safetensors: its content does not fit its sha256"):
        read_file(out)
