"""The checkpoint that a run resumes: found, whole, and the same for all processes.

Nodes need not share a disk: each process finds its own files, and then all compare what they have.
"""

import hashlib
import zipfile
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path

from util import hub
from util.checkpoint import (
    LAST,
    OWN_NAME,
    find_checkpoint,
    find_weights,
    load_checkpoint,
    own_checkpoints,
    steps_done,
)
from util.dist import is_main, print0, world_size
from util.files import check_zip, remove_leftovers
from util.run import lock
from util.run.record import PLACES, agree, library_version
from util.weights import digest

# Flags that may differ between processes: what is in such places is compared instead.
LOCAL = (*PLACES, "data_path", "cached_path", "vae_path", "init_from", "label_file")


@contextmanager
def hold_output(args):
    """Hold --output_dir; a run that torchrun restarted resumes its own checkpoint there."""
    with lock.folder(args.output_dir, "--output_dir") as last:
        if is_main():
            remove_leftovers(args.output_dir, recursive=True)
        if lock.is_own(last) and find_checkpoint(args.output_dir):
            args.resume = args.output_dir
        yield


def load_resumed(args, needed=False, of_tokenizer=False):
    """(content, path) of the checkpoint that --resume names, or (None, None) to start a new run.

    args: the parsed flags. needed: whether there must be one. of_tokenizer: see `load_checkpoint`.
    A collective call. Raises ValueError,
    on all processes, if it cannot be read, and if they have different flags or checkpoints.
    """
    flags = {f"--{k}": v for k, v in vars(args).items() if k not in LOCAL}
    agree({"version of this library": _version(), **flags})
    content, path = _load_alike("--resume", partial(_load, args.resume, needed, of_tokenizer))
    if args.resume and not path:
        print0(f"--resume {args.resume}: no {LAST} there, starting a new run")
    return content, path


def load_start(path):
    """(content, path) of the checkpoint that --init_from names, or (None, None) if it is "".

    A collective call.
    Raises ValueError, on all processes, if it cannot be read, and if they have different ones.
    """
    return _load_alike("--init_from", partial(_find_and_load, path))


def _find_and_load(path):
    if not path:
        return None, None
    try:
        found = find_weights(path)
    except ValueError as error:
        said = f"--init_from {path!r}: expected a checkpoint, found none ({error})"
        raise ValueError(said) from None
    return load_checkpoint(found), found


def _load_alike(flag, load):
    """The result of `load`, (content, path), of which all processes must have the same."""
    content = path = problem = None
    try:
        content, path = load()
    except (ValueError, OSError) as error:
        problem = str(error)
    key, text = (problem, problem) if problem else _identity(content, path)
    agree({flag: key}, {flag: text})
    if problem:
        raise ValueError(problem)
    return content, path


# ---- finding a checkpoint that is whole ----------------------------------------------------------


def _load(resume, needed, of_tokenizer):
    path = find_checkpoint(resume) if resume else None
    if not path and needed and hub.is_name(resume):
        path = find_weights(resume)
    if not path and (needed or Path(resume).suffix in hub.WEIGHT_FILES):
        raise ValueError(f"--resume {resume!r}: expected a checkpoint, found none")
    if not path:
        return None, None
    try:
        return load_checkpoint(path, of_tokenizer), path
    except ValueError as error:
        if not is_damaged(path) or not OWN_NAME.fullmatch(path.name):
            raise
        earlier = earlier_intact(path)
        if not earlier:
            raise
        if not Path(resume).is_dir():
            raise ValueError(f"{error}; {earlier} is intact") from None
        print0(f"NOTE: {error}; resuming {earlier}, an earlier one, instead")
    return load_checkpoint(earlier, of_tokenizer), earlier


def is_damaged(path):
    """Whether a file that can be opened is no intact zip, as a checkpoint of this library is."""
    open(path, "rb").close()
    try:
        check_zip(path)
    except (zipfile.BadZipFile, OSError):
        return True
    return False


def earlier_intact(path):
    """The newest intact checkpoint beside a damaged one; None if there is none."""
    found = [p for p in own_checkpoints(Path(path).parent) if p != path]
    newest_first = sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)
    return next((p for p in newest_first if not is_damaged(p)), None)


# ---- what all processes must have ----------------------------------------------------------------


def _identity(content, path):
    """(what two processes must have in common, text with the path) of a loaded checkpoint."""
    if world_size() == 1 or path is None:
        return None, "no checkpoint"
    place = "weights only"
    if "optimizer" in content:
        place = f"{content['epoch'] + 1} epochs, {steps_done(content)} steps"
    key = _checksums(path) or digest(content["model"])
    return (place, key), f"{path}, {place}, sha256 {key[:12]}"


def _checksums(path):
    """A sha256 of the checksums inside a zip, which reading it has verified; None for others."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        lines = [f"{info.filename} {info.file_size} {info.CRC}" for info in archive.infolist()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _version():
    """The version of this library and, to tell two checkouts apart, a sha256 of its source."""
    if world_size() == 1:
        return library_version()
    root, sha = Path(__file__).parents[2], hashlib.sha256()
    files = chain.from_iterable(
        (root / name).rglob("*.py") for name in ("diffusion", "models", "util")
    )
    for path in sorted([root / "engine_mar.py", *files]):
        sha.update(path.read_bytes())
    return f"{library_version()}, source {sha.hexdigest()[:12]}"
