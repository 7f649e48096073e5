"""Files and folders: written whole or not at all, with room for them, and checked.

While a file is written, it has another name beside its own: `.NAME.PID@HOST.part`. What a process
that was killed leaves behind can so be told from what another process is writing.
"""

import errno
import hashlib
import os
import re
import shutil
import socket
import time
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

HOST = socket.gethostname() or "localhost"
QUIET = 3600  # seconds without a write after which a writer on another host counts as dead
STUCK = 24 * QUIET  # the same for a process id of this host, which may be another process's now

_PART = re.compile(r"\..+\.(\d+)(?:@(.+))?\.part")  # without a host: written by earlier versions
_writing = set()  # names that this process is writing, as real paths

_FULL = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG")} - {None}
# what torch, numpy and safetensors say instead of passing the error of the system on
_FULL_SAID = re.compile(
    r"unexpected pos \d+ vs|PytorchStreamWriter failed|iostream error"
    r"|requested and \d+ written|StorageFull|No space left|[Qq]uota exceeded|os error 112\b"
)


def make_folder(path, flag):
    """Create an output folder, before any work starts. Raises ValueError if that fails."""
    if not str(path):
        raise ValueError(f"{flag} '': expected the name of a folder")
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{flag} {path}: not a folder to write to ({error.strerror})") from None


def check_writable(path, what):
    """Raises ValueError unless a file can be written at `path`, which is left as it is.

    what: flag and path that the message names.
    """
    try:
        beside = _beside(Path(path))
        beside.touch()
        beside.unlink()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ValueError(f"{what}: cannot be written ({reason})") from None


def is_foreign(path, own):
    """Whether a name is that of a picture or array by its suffix, but has none of `own`."""
    from PIL import Image

    suffix, others = Path(path).suffix, {*Image.registered_extensions(), ".npy", ".npz"}
    return suffix.lower() in others and suffix not in own


def first_few(names, shown=3):
    """The first names, and the number of others, for a message."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{', '.join(names[:shown])}{more}"


def first_line(error):
    """The first line of an error's text, its type if it has none; for a message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_zip(path):
    """Read all of a zip, the format of torch and numpy files, to verify its checksums.

    Memory-mapping such a file would not notice damage. Raises zipfile.BadZipFile.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile raises nearly anything for a damaged file
        raise zipfile.BadZipFile(first_line(error)) from None
    if damaged:
        raise zipfile.BadZipFile(f"the checksum of {damaged} inside does not fit")


def file_sha256(path, progress=None):
    """The sha256 of a file. progress: a Progress that counts its bytes."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
            if progress:
                progress.update(len(chunk))
    return sha.hexdigest()


# ---- writing -------------------------------------------------------------------------------------


def cache_folder():
    """Where this user's programs keep what they can make again: MAR_CACHE, or as XDG says."""
    if own := os.environ.get("MAR_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mar-diffloss"
    except RuntimeError:  # a user without a home
        return Path(os.devnull) / "none"


@contextmanager
def replacing(path, needed=0, durable=False):
    """A temporary path beside `path` to write to; it replaces `path` if no error occurs.

    needed: bytes that will be written, if known; durable: whether the file must outlast a crash of
    the machine, too. Raises ValueError, with the old file still there, if there is no room.
    """
    path = Path(path)
    check_room(path, needed)
    beside = _beside(path)
    with expecting_room(path, needed):
        _writing.add(real := os.path.realpath(beside))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield beside
            if durable:
                _to_disk(beside)
            os.replace(beside, path)
        finally:
            _writing.discard(real)
            beside.unlink(missing_ok=True)
        if durable:
            _names_to_disk(path.parent)


def _beside(path):
    """The name under which this process writes a file that is not yet whole."""
    return path.with_name(f".{path.name}.{os.getpid()}@{HOST}.part")


def _to_disk(path):
    with open(path, "r+b") as file:  # Windows wants a handle that may write
        os.fsync(file.fileno())


def _names_to_disk(folder):
    """Make names in a folder outlast a crash, where a system has a way to."""
    if os.name != "posix":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems do not know it
            os.fsync(opened)
    finally:
        os.close(opened)


# ---- room ----------------------------------------------------------------------------------------


def free_bytes(path):
    """Free bytes where the file or folder `path` is or would be; None if the system cannot say."""
    path = Path(path).absolute()
    try:
        return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
    except (OSError, StopIteration):
        return None


def check_room(path, needed):
    """Raises ValueError if fewer than `needed` bytes are free for a file at `path`."""
    free = free_bytes(path) if needed else None
    if free is not None and free < needed:
        raise ValueError(_no_room(path, needed, free, "No space left on device"))


@contextmanager
def expecting_room(path, needed=0):
    """Raise ValueError, in one line, where a file at `path` cannot be written for want of room.

    needed: bytes that it has, if known. Other errors pass.
    """
    free = free_bytes(path)
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) or not (reason := _full(error)):
            raise
        raise ValueError(_no_room(path, needed, free, reason)) from error


def _full(error):
    """The first line of an error that a full disk explains, else None."""
    while error is not None:
        if getattr(error, "errno", None) in _FULL:
            return error.strerror
        if _FULL_SAID.search(str(error)):
            return str(error).splitlines()[0]
        error = error.__cause__ or error.__context__
    return None


def _no_room(path, needed, free, reason):
    asked = f"{in_bytes(needed)} needed" if needed else "what is needed is not known"
    left = "unknown" if free is None else in_bytes(free)
    return f"{path}: not written, for want of room: {asked}, {left} free ({reason})"


def in_bytes(count):
    """A number of bytes in words, such as 1.25 GB (of 10^9 bytes)."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


# ---- leftovers -----------------------------------------------------------------------------------


def remove_leftovers(folder, recursive=False):
    """Delete what writers that are dead left in a folder; returns the number of files.

    Dead is a process of this host that has ended, and a writer elsewhere (or of an earlier version,
    which did not say where) that has not written for an hour. recursive: in folders below, too.
    Processes that write there may go on.
    """
    removed = 0
    for path in (Path(folder).rglob if recursive else Path(folder).glob)(".*.part"):
        if (found := _PART.fullmatch(path.name)) and _is_dead(path, int(found[1]), found[2]):
            with suppress(OSError):  # another user's, or open on Windows
                path.unlink()
                removed += 1
    return removed


def _is_dead(path, pid, host):
    """Whether the writer of a file is dead. host: its host's name, or None if unknown."""
    try:
        quiet = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return False  # complete in the meantime
    if host != HOST or os.name != "posix":  # where a process cannot be looked up
        return quiet > QUIET and not _is_ours(path)
    if pid == os.getpid():
        return not _is_ours(path)
    return quiet > STUCK or not is_alive(pid)


def _is_ours(path):
    return os.path.realpath(path) in _writing


def is_alive(pid):
    """Whether there is a process of this id here."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True
