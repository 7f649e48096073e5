"""Fetching, from this machine instead of a network. Run: python -m pytest tests/test_download.py"""

import hashlib
import http.server
import io
import os
import re
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from util import download
from util.flags import run
from util.published import FILES, File, file_of_tokenizer, source_of, usual_place

WEIGHTS = {"model": {"w": torch.arange(4096.0)}}


def saved(weights):
    """The bytes of torch.save."""
    file = io.BytesIO()
    torch.save(weights, file)
    return file.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serves one file, as its attributes say; `asked` are the ranges that were asked for.

    cuts: numbers of bytes after which the next connections break.
    """

    daemon_threads = True
    content, tag, ranges, kind = saved(WEIGHTS), '"1"', True, "application/octet-stream"
    length = None  # what it says it has, if not what it has
    partial = False  # whether the whole file is sent as if it were a part

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.cuts, self.asked = [], []
        self.url = f"http://127.0.0.1:{self.server_port}/file.pth"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        begin = int(re.search(r"\d+", asked)[0]) if asked and server.ranges else 0
        begin = begin if self.headers.get("If-Range") == server.tag else 0
        self.send_response(206 if begin or server.partial else 200)
        if begin:
            size = len(server.content)
            self.send_header("Content-Range", f"bytes {begin}-{size - 1}/{size}")
        self.send_header("Content-Type", server.kind)
        self.send_header("Content-Length", server.length or str(len(server.content) - begin))
        if server.tag:
            self.send_header("ETag", server.tag)
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else None
        self.wfile.write(server.content[begin:][:cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server of this machine; FILES has its file as `file`, known by size and sha256."""
    monkeypatch.setattr(download, "WAITS", (0, 0))
    monkeypatch.chdir(tmp_path)
    server = Server()
    digest = hashlib.sha256(server.content).hexdigest()
    copy = {"hf": server.url + "?copy"}
    row = File("here/a.pth", server.url, len(server.content), digest, copy)
    monkeypatch.setitem(FILES, "file", row)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def arrived():
    """Names of the files that there are."""
    return sorted(path.name for path in Path("here").iterdir())


def fails(capsys, *argv):
    """The line of a command that fails."""
    with pytest.raises(SystemExit) as stop:
        run(download.main, list(argv))
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def is_whole():
    assert Path("here/a.pth").read_bytes() == Server.content
    return arrived() == ["a.pth"]


def test_fetches_once(server, capsys):
    """What comes is what was there, known by its sha256; what is there is not fetched again."""
    assert download.download("file") == os.path.join("here", "a.pth")
    assert is_whole()
    assert "(as known)" in capsys.readouterr().out
    download.download("file")
    assert "there already" in capsys.readouterr().out
    assert server.asked == [None]
    download.download("file", overwrite=True, url=server.url + "?other")
    assert server.asked == [None, None]


def test_a_broken_connection_is_tried_again(server, capsys):
    """From the byte on at which it broke, as long as each attempt brings something."""
    server.cuts = [5000, 3000, 0, 3000]
    download.download("file")
    assert is_whole()
    ranges = [None, "bytes=5000-", "bytes=8000-", "bytes=8000-", "bytes=11000-"]
    assert server.asked == ranges
    assert f"5000 bytes arrived, expected {len(server.content)}" in capsys.readouterr().out


def test_the_next_call_goes_on(server, capsys):
    """Where attempts end, the message says what is kept; the next call asks for the rest."""
    server.cuts = [5000, 0, 0]
    line = fails(capsys, "file")
    assert "5 kB are kept, to be resumed" in line and "here/a.pth" in line
    assert arrived() == ["a.pth.part", "a.pth.part.json"]
    run(download.main, ["file"])
    assert server.asked[-1] == "bytes=5000-" and is_whole()


def test_all_of_it_had_arrived(server):
    """A process that was killed while it verified: nothing is asked for again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "_store", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            download.download("file")
    download.download("file")
    assert server.asked == [None] and is_whole()


@pytest.mark.parametrize("change", ["no ranges", "another file", "no version", "another place"])
def test_starts_again(server, change):
    """Without ranges, and where the rest may be another file's: so says ETag, by If-Range."""
    server.cuts = [5000, 0, 0]
    if change == "no version":
        server.tag = None
    with pytest.raises(ValueError):
        download.download("file")
    server.ranges = change != "no ranges"
    server.tag = '"2"' if change == "another file" else server.tag
    part = Path("here/a.pth.part")
    part.write_bytes(b"x" * part.stat().st_size)  # what would be wrong to keep
    download.download("file", url=f"{server.url}?2" if change == "another place" else None)
    assert is_whole()


def test_a_part_of_another_version():
    """Of a server that ignores If-Range, or answers with another range, is not added."""
    known, headers = {"validator": '"1"'}, {"Content-Range": "bytes 5000-6000/6001"}
    assert download._follows({**headers, "ETag": '"1"'}, 5000, known)
    assert not download._follows({**headers, "ETag": '"2"'}, 5000, known)
    assert not download._follows({**headers, "ETag": '"1"'}, 4000, known)


def test_a_part_that_nobody_asked_for(server, capsys):
    """Is not put behind what is there."""
    server.cuts = [100, 0, 0, 0]
    fails(capsys, "file")
    server.tag, server.partial = '"2"', True
    assert "a part of the file was sent, though the whole" in fails(capsys, "file")
    server.partial = False
    download.main(["file"])
    assert is_whole()


def test_a_page_instead_of_the_file(server, capsys):
    """Such as one that asks for a login: said, not stored."""
    server.kind, server.content = "text/html; charset=utf-8", b"<html>Sign in</html>"
    line = fails(capsys, "file")
    assert "the answer is a page of HTML, not the file" in line and server.url in line
    assert not arrived()


@pytest.mark.parametrize(
    "wrong, said", [("size", "bytes, expected"), ("sha256", "its sha256 is"), ("both", "has 9")]
)
def test_another_file_is_not_kept(server, capsys, wrong, said):
    """Of another size or sha256 than known, though it came whole."""
    other = saved({"model": {"w": torch.ones(4096)}})
    assert len(other) == len(Server.content)
    server.content = {"size": Server.content + b"1", "sha256": other, "both": b"123456789"}[wrong]
    line = fails(capsys, "file")
    assert said in line and "a file that you trust and put there is used" in line and not arrived()
    assert ("of a copy on Hugging Face" in line) == (wrong == "sha256")


@pytest.mark.parametrize("length", ["many", "-5", "9" * 5000])
def test_a_length_that_is_none(server, capsys, length):
    """One line says what the server said."""
    server.length = length
    assert f"the answer says it has '{length[:20]}" in fails(capsys, "file") and not arrived()


def test_without_a_network(server, capsys):
    """One line with the URL, what else there is, and where to put the file; nothing is repeated."""
    server.shutdown()
    server.server_close()
    line = fails(capsys, "file")
    size = f"{len(server.content) / 1000:.3g} kB"
    assert f"could not be fetched from {server.url} ([Errno" in line
    assert f"--mirror hf, --url, or put the file at {Path('here/a.pth')} ({size})" in line
    assert not arrived()


def test_a_full_disk(server, monkeypatch, capsys):
    """Is found before anything arrives."""
    monkeypatch.setattr("util.files.free_bytes", lambda path: 1000)
    assert "1 kB free" in fails(capsys, "file") and not arrived()


def test_other_places(server, capsys, monkeypatch):
    """--mirror and --url; a name without that mirror, and several names of one URL, are refused."""
    run(download.main, ["file", "--mirror", "hf"])
    assert is_whole()
    monkeypatch.setitem(FILES, "lone", File("here/b.pth", server.url))
    assert "no copy of lone there, expected one of" in fails(
        capsys, "file", "lone", "--mirror", "hf", "--overwrite"
    )
    run(download.main, ["lone", "--url", server.url + "?3"])
    assert "none is known to compare with" in capsys.readouterr().out
    assert "expected one NAME" in fails(capsys, "file", "lone", "--url", server.url)
    for url in (
        "nowhere",
        "https://",
        "http://[::1/a",
        "http://a:b/c",
        "http://a/b c",
        "http://ü/",
    ):
        assert f"--url: {url}: expected a URL" in fails(capsys, "file", "--url", url)
    assert "--mirror: invalid choice: 'moon'" in fails(capsys, "file", "--mirror", "moon")


def test_verify(server, capsys, monkeypatch):
    """Says of each file what is known of it; one that is damaged or not there is an error."""
    monkeypatch.setitem(FILES, "lone", File("here/b.pth", server.url))
    download.download("file")
    download.download("lone")
    capsys.readouterr()
    run(download.main, ["--verify", "file", "lone"])
    first, second = capsys.readouterr().out.splitlines()
    assert "(as known)" in first and "(none is known to compare with)" in second
    content = bytearray(server.content)
    content[len(content) // 2] ^= 1
    for path in ("here/a.pth", "here/b.pth"):
        Path(path).write_bytes(content)
    line = fails(capsys, "--verify", "file", "lone", "kl16")
    for said in ("its sha256 is", "the checksum of", "no file", "util.download kl16"):
        assert said in line
    assert len(server.asked) == 2


def test_two_at_once(server):
    """Processes that want the same file: one fetches it, the others wait."""
    server.cuts = [5000]
    together = [threading.Thread(target=download.download, args=["file"]) for _ in range(4)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    assert server.asked == [None, "bytes=5000-"] and is_whole()


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """An archive on this disk, the row `archive`; called with the names in it, it is written."""
    path = tmp_path / "weights.zip"
    monkeypatch.setitem(FILES, "archive", File("here/b.ckpt", path.as_uri()))
    monkeypatch.chdir(tmp_path)

    def write(*names):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.writestr(name, Server.content)
        return path

    return write


def test_an_archive(archive):
    """The one checkpoint in it is stored."""
    archive("logs/model.ckpt", "config.yaml")
    download.download("archive")
    assert Path("here/b.ckpt").read_bytes() == Server.content and arrived() == ["b.ckpt"]


def test_an_archive_without_a_checkpoint(archive):
    """Its content is named."""
    archive("readme.txt")
    with pytest.raises(ValueError, match="expected one .ckpt in it, found readme.txt"):
        download.download("archive")
    assert not arrived()


@pytest.mark.parametrize("place", [-3000, -22])
def test_a_damaged_archive(archive, place):
    """Is not kept, whether a file in it or its list is damaged."""
    path = archive("model.ckpt")
    content = bytearray(path.read_bytes())
    content[place] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match="archive: could not be fetched from file:"):
        download.download("archive")
    assert not arrived()


def test_a_damaged_file_of_safetensors(server, monkeypatch):
    """Its header says how long it is."""
    save_file({"w": torch.ones(9)}, "there.safetensors")
    monkeypatch.setitem(FILES, "kl", File("here/kl.safetensors", server.url))
    server.content = Path("there.safetensors").read_bytes()
    download.download("kl")
    server.content = server.content[:-4]
    with pytest.raises(ValueError, match="could not be fetched"):
        download.download("kl", overwrite=True)
    assert arrived() == ["kl.safetensors"]


def test_advice():
    """By the name of a file that is not there, and by the name of a tokenizer."""
    assert source_of("x/ldm_kl16.ckpt").endswith("util.download ldm_kl16")
    for name in ("other.ckpt", "checkpoint-last.pth"):
        assert "main_tokenizer.py trains small ones" in source_of(f"x/{name}")
    assert [file_of_tokenizer(name) for name in ("kl16", "vq16_latent")] == ["kl16", "ldm_vq16"]
    with pytest.raises(ValueError, match="tokenizer pca: no file is published, expected one of"):
        file_of_tokenizer("pca")


def test_a_published_tokenizer_is_known_by_its_bytes(tmp_path, monkeypatch):
    """One of the same name and size is another's; one that is not there is known by its name."""
    path = tmp_path / "kl16.ckpt"
    facts = {"size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    monkeypatch.setitem(FILES, "kl16", replace(FILES["kl16"], **facts))
    found = [usual_place(path, "kl16")]
    for content in (b"abc", b"abd", b"abcd"):
        path.write_bytes(content)
        found.append(usual_place(path, "kl16"))
    assert found == [FILES["kl16"].path] * 2 + [None] * 2


def test_the_table():
    """Paths differ; a sha256 has 64 digits; copies are of files whose sha256 is known."""
    assert len({file.path for file in FILES.values()}) == len(FILES)
    for file in FILES.values():
        assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
        assert file.sha256 or not file.mirrors
