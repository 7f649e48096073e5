"""Files and folders: atomic writes and checks."""

import os
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path


def make_folder(path, flag):
    """Create an output folder, before any work starts. Raises ValueError if that fails."""
    if not str(path):
        raise ValueError(f"{flag} '': expected the name of a folder")
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{flag} {path}: not a folder to write to ({error.strerror})") from None


def first_few(names, shown=3):
    """The first names, and the number of others, for a message."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{', '.join(names[:shown])}{more}"


def check_zip(path):
    """Read all of a zip, the format of torch and numpy files, to verify its checksums.

    0.2 s per GB in memory; memory-mapping such a file would not notice damage. Raises
    zipfile.BadZipFile.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zlib.error, EOFError) as error:  # from decompression
        raise zipfile.BadZipFile(str(error)) from None
    if damaged:
        raise zipfile.BadZipFile(f"the checksum of {damaged} inside does not fit")


@contextmanager
def replacing(path):
    """A temporary path beside `path` to write to; it replaces `path` if no error occurs."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
