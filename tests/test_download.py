"""Fetching, from the disk instead of the network. Run: python -m pytest tests/test_download.py"""

import zipfile

import pytest
import torch

from util import download
from util.flags import run

WEIGHTS = {"model": {"w": torch.arange(4096.0)}}


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A file and an archive of it to be fetched, as `file` and `archive`, into a folder."""
    there = tmp_path / "there"
    there.mkdir()
    torch.save(WEIGHTS, there / "weights.pth")
    with zipfile.ZipFile(there / "weights.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(there / "weights.pth", "logs/model.ckpt")
        archive.writestr("config.yaml", "of no use")
    files = {
        "file": (str(tmp_path / "here" / "a.pth"), (there / "weights.pth").as_uri()),
        "archive": (str(tmp_path / "here" / "b.ckpt"), (there / "weights.zip").as_uri()),
        "nothing": (str(tmp_path / "here" / "c.pth"), (there / "none.pth").as_uri()),
    }
    monkeypatch.setattr(download, "FILES", files)
    return there


@pytest.mark.parametrize("name", ["file", "archive"])
def test_fetches_once(source, name, capsys):
    """What comes is what was there, out of its archive; what is there is not fetched again."""
    path = download.download(name)
    assert torch.equal(torch.load(path, weights_only=True)["model"]["w"], WEIGHTS["model"]["w"])
    assert "sha256" in capsys.readouterr().out
    download.download(name)
    assert "there already" in capsys.readouterr().out
    assert len(list((source.parent / "here").iterdir())) == 1


@pytest.mark.parametrize("name", ["file", "archive", "nothing"])
def test_what_arrives_damaged_is_not_kept(source, name, capsys):
    """Nor what does not arrive: one line, status 2."""
    for path in source.iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        run(download.main, [name])
    assert stop.value.code == 2
    assert f"error: {name}: could not be fetched from file:" in capsys.readouterr().err
    assert not list((source.parent / "here").iterdir())


def test_an_archive_without_a_checkpoint(source):
    """Its content is named."""
    with zipfile.ZipFile(source / "weights.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(ValueError, match="expected one .ckpt in it, found readme.txt"):
        download.download("archive")


def test_advice():
    """By the name of a file that is not there."""
    assert download.source_of("x/ldm_kl16.ckpt").endswith("util.download ldm_kl16")
    for name in ("other.ckpt", "checkpoint-last.pth"):
        assert "main_tokenizer.py trains small ones" in download.source_of(f"x/{name}")
