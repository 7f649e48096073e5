"""Fetch published weights: python -m util.download kl16 mar_base mar_large mar_huge.

What a broken connection or a killed process leaves as PATH.part, the next call resumes.
"""

import json
import os
import re
import shutil
import time
import urllib.request
import zipfile
from argparse import ArgumentTypeError
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from safetensors import SafetensorError, safe_open

from util.files import (
    check_room,
    check_zip,
    expecting_room,
    file_sha256,
    first_line,
    in_bytes,
    replacing,
)
from util.flags import Parser, run
from util.progress import Progress
from util.published import FILES, MIRRORS, mirror

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

WAITS = (1, 4, 15, 60)  # seconds before a broken connection is tried again
TIMEOUT = 60  # seconds without a byte after which a connection counts as broken
CHUNK = 1 << 20
BROKEN = (OSError, HTTPException)


class _Differs(Exception):
    """A file is not the one that was published."""


_PLAIN = re.compile("[!-~]+").fullmatch  # ASCII without blanks
TRUSTED = "a file that you trust and put there is used as it is; --verify then says how it differs"
DAMAGED = (_Differs, zipfile.BadZipFile, SafetensorError)


def download(name, overwrite=False, url=None, folder=""):
    """Download one of FILES, unless it exists, and return its path.

    url: another place to fetch it from, see `mirror`. folder: where its path begins. The file is
    verified with its size and sha256, where they are known, and with the checksums inside. Raises
    ValueError for an unknown name, and if the file cannot be downloaded or is damaged; what has
    arrived of it is then kept for the next call.
    """
    file = FILES[name]
    path, url = Path(folder, file.path), url or file.url
    if path.is_file() and not overwrite:
        print(f"{path}: there already")
        return str(path)
    part = path.with_name(f"{path.name}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with _alone(part, name):
            if path.is_file() and not overwrite:  # by now, by another process
                return str(path)
            _receive_all(url, part, name)
            digest = _store(part, path, file)
    except (*BROKEN, *DAMAGED) as error:
        raise ValueError(_advice(name, url, path, part, error)) from error
    known = "as known" if file.sha256 else "none is known to compare with"
    print(f"{path}: {in_bytes(path.stat().st_size)}, sha256 {digest} ({known})")
    return str(path)


def _advice(name, url, path, part, error):
    """The message for a file that could not be downloaded: why, and what to do."""
    file = FILES[name]
    reason = error.reason if type(error) is URLError else error  # without <urlopen error >
    kept = f"; {in_bytes(_size(part))} are kept, to be resumed" if _read_note(part, url) else ""
    trusted = f"; {TRUSTED}" if isinstance(error, _Differs) else ""
    others = [f"--mirror {place}" for place, copy in file.mirrors.items() if copy != url]
    return (
        f"{name}: could not be fetched from {url} ({first_line(reason)}){kept}; other ways: "
        f"{''.join(f'{other}, ' for other in others)}--url, or put {file.what} at {path} "
        f"({file.size_in_words}){trusted}"
    )


# ---- receiving -----------------------------------------------------------------------------------


@contextmanager
def _alone(part, name):
    """Hold a partial file; another process that downloads it is waited for."""
    with _note(part).open("a") as held:
        if fcntl:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{name}: waiting for another process that downloads it")
                fcntl.flock(held, fcntl.LOCK_EX)
            except OSError:  # a file system without locks
                pass
        try:
            yield
        finally:
            if not part.exists():
                _note(part).unlink(missing_ok=True)


def _note(part):
    """The file that says whose bytes a partial file holds."""
    return part.with_name(f"{part.name}.json")


def _size(path):
    return path.stat().st_size if path.is_file() else 0


def _receive_all(url, part, name):
    """Download to a partial file until it is whole; a connection that breaks is tried again."""
    waits = iter(())  # where nothing arrives at all, waiting is no help
    while True:
        before = _size(part)
        try:
            return _receive(url, part, name)
        except BROKEN as error:
            waits = iter(WAITS) if _size(part) > before else waits
            if (wait := next(waits, None)) is None:
                raise
            print(f"{name}: {first_line(error)}; trying again in {wait} s")
            time.sleep(wait)


def _receive(url, part, name):
    """Download what is missing of a partial file, or all of it if the source has changed."""
    done, known = _size(part), _read_note(part, url)
    if known and done == known["total"]:
        return
    with _open(url, done if known else 0, known) as response:
        length = _length(response.headers)
        if response.status != 206:  # all of it: of no ranges, or changed
            done = 0
            part.unlink(missing_ok=True)
        total = done + length
        known = {"url": url, "total": total, "validator": _validator(response.headers)}
        with expecting_room(part, total - done):
            check_room(part, total - done)
            _note(part).write_text(json.dumps(known), "utf-8")
            _copy(response, part, done, total, name)
    if total and _size(part) != total:
        raise OSError(f"{_size(part)} bytes arrived, expected {total}")


def _length(headers):
    """Bytes that an answer says it has, 0 if it does not. Raises OSError."""
    text = headers.get("Content-Length") or "0"
    if not re.fullmatch("[0-9]{1,18}", text):
        raise OSError(f"the answer says it has {text!r:.40} bytes")
    return int(text)


def _open(url, done, known):
    """The response of a server: what follows byte `done` if it can (status 206), else the whole."""
    headers = {"User-Agent": "Wget/1.21"}
    if done:
        headers |= {"Range": f"bytes={done}-", "If-Range": known["validator"]}
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416 and done:  # there is no such range: not the file that was begun
            return _open(url, 0, known)
        raise
    if response.status == 206 and not done:
        response.close()
        raise OSError("a part of the file was sent, though the whole was asked for")
    if response.status == 206 and not _follows(response.headers, done, known):
        response.close()
        return _open(url, 0, known)
    if response.headers.get_content_type() == "text/html":
        response.close()
        raise OSError("the answer is a page of HTML, not the file: perhaps a login, or a limit")
    return response


def _follows(headers, done, known):
    """Whether a part of a file is what follows byte `done` of the version that was begun."""
    same = _validator(headers) in ("", known["validator"])
    return same and headers.get("Content-Range", "").startswith(f"bytes {done}-")


def _validator(headers):
    """What tells a version of a file from others, for If-Range; "" if there is nothing."""
    tag = headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")


def _read_note(part, url):
    """What is known of a partial file of this URL, {} if it cannot be gone on with."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        known = json.loads(_note(part).read_text("utf-8"))
        if known["url"] == url and known["validator"] and known["total"]:
            return known
    return {}


def _copy(response, part, done, total, name):
    progress = Progress(total, name if total else None, "B", done)
    try:
        with part.open("ab") as file:
            while chunk := response.read1(CHUNK):
                file.write(chunk)
                progress.update(len(chunk))
    finally:
        progress.close()


# ---- verifying -----------------------------------------------------------------------------------


def _store(part, path, file):
    """Verify what has arrived and give it its name; returns its sha256. What is damaged is removed.

    Raises DAMAGED, and ValueError where there is no room for what is in an archive.
    """
    try:
        checkpoint = _packed(part)
        digest = _unpack(part, checkpoint, path, file) if checkpoint else _check(part, file)
    except DAMAGED:
        part.unlink()
        raise
    if checkpoint:
        part.unlink()
    else:
        os.replace(part, path)
    return digest


def _unpack(part, checkpoint, path, file):
    check_zip(part)
    with zipfile.ZipFile(part) as archive:
        size = archive.getinfo(checkpoint).file_size
        with replacing(path, size) as beside, archive.open(checkpoint) as source:
            with beside.open("wb") as target:
                shutil.copyfileobj(source, target, CHUNK)
            return _check(beside, file)


def _packed(path):
    """Name of the one checkpoint in an archive; None if it is not one. Raises _Differs."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/data.pkl") for name in names):  # torch.save writes zips too
        return None
    found = [name for name in names if name.endswith(".ckpt")]
    if len(found) != 1:
        raise _Differs(f"expected one .ckpt in it, found {', '.join(names)}")
    return found[0]


def _check(path, file):
    """The sha256 of a file. Raises DAMAGED if it is not as known, or its checksums say so."""
    if file.size and path.stat().st_size != file.size:
        raise _Differs(f"it has {path.stat().st_size} bytes, expected {file.size}")
    digest = file_sha256(path)
    if file.sha256 and digest != file.sha256:
        raise _Differs(f"its sha256 is {digest}, expected {file.sha256}, {file.stated}")
    if file.path.endswith(".safetensors"):
        with safe_open(path, "numpy"):
            pass
    elif not _is_pickle(path):
        check_zip(path)
    return digest


def _is_pickle(path):
    """Whether a file is of a torch that wrote no zips; it then has no checksums."""
    with open(path, "rb") as file:
        return file.read(1) == b"\x80"


def verify(name, folder=""):
    """One line on a file that was downloaded. Raises ValueError if it is not there, or damaged."""
    file = FILES[name]
    path = Path(folder, file.path)
    if not path.is_file():
        raise ValueError(f"{name}: no file {path}. To fetch it: python -m util.download {name}")
    try:
        digest = _check(path, file)
    except (OSError, *DAMAGED) as error:
        raise ValueError(
            f"{name}: {path} is not the file that this fetches ({first_line(error)}); to fetch it: "
            f"python -m util.download {name} --overwrite"
        ) from error
    known = "as known" if file.sha256 else "none is known to compare with"
    return f"{name}: {path}, {in_bytes(path.stat().st_size)}, sha256 {digest} ({known})"


def _verify_all(names):
    wrong = []
    for name in names:
        try:
            print(verify(name))
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("; ".join(wrong))


def download_pretrained_vae(overwrite=False):
    return download("kl16", overwrite)


def download_pretrained_marb(overwrite=False):
    return download("mar_base", overwrite)


def download_pretrained_marl(overwrite=False):
    return download("mar_large", overwrite)


def download_pretrained_marh(overwrite=False):
    return download("mar_huge", overwrite)


def _url(text):
    try:
        parts = urlsplit(text)
        fits = parts.scheme == "file" or (parts.hostname and parts.port != 0 and _PLAIN(text))
    except ValueError:  # of brackets that do not match, or of the port
        fits = False
    if not fits:
        raise ArgumentTypeError(f"{text}: expected a URL, such as https://… or file:///…")
    return text


def main(argv=None):
    parser = Parser(description=__doc__)
    listed = "; ".join(f"{name}: to {f.path}, {f.size_in_words}" for name, f in FILES.items())
    parser.add_argument("names", nargs="+", choices=FILES, metavar="NAME", help=listed)
    parser.add_argument("--overwrite", action="store_true", help="download again if it exists")
    parser.add_argument("--url", type=_url, help="another place to fetch one file from")
    parser.add_argument("--mirror", choices=MIRRORS, help="place of copies; hf: Hugging Face")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="check the files that are there by size, sha256 and the checksums inside; downloads "
        "nothing; exit status 2 if one is not as published",
    )
    args = parser.parse_args(argv)
    if args.verify:
        return _verify_all(args.names)
    if args.url and (args.mirror or len(args.names) > 1):
        raise ValueError(f"--url {args.url}: expected one NAME, and no --mirror")
    urls = {name: args.url or mirror(name, args.mirror) for name in args.names}
    for name, url in urls.items():
        download(name, args.overwrite, url)


if __name__ == "__main__":
    run(main)
