"""Files that are whole or not there."""

import os
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path


def make_folder(path, flag):
    """Make a folder for what is to come, before any work. Raises ValueError where that fails."""
    if not str(path):
        raise ValueError(f"{flag} '': expected the name of a folder")
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{flag} {path}: not a folder to write to ({error.strerror})") from None


def check_zip(path):
    """Read all of a zip, which files of torch and numpy are, to compare its checksums.

    0.2 s a GB in memory; who maps such a file sees no damage. Raises zipfile.BadZipFile.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zlib.error, EOFError) as error:  # of what is compressed
        raise zipfile.BadZipFile(str(error)) from None
    if damaged:
        raise zipfile.BadZipFile(f"the checksum of {damaged} inside does not fit")


@contextmanager
def replacing(path):
    """A path beside `path` to write to; it takes the place of `path` when all went well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
