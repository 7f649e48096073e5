"""Weight files: read them safely, load them strictly, and report clearly what does not fit.

Nothing in a file is ever executed: `.safetensors` files hold tensors only, and everything else goes
through `torch.load(weights_only=True)`. A flipped bit is found: by the checksums in the zips of
`torch.save`, and by the sha256 that `write_safetensors` adds.
"""

import argparse
import hashlib
import os
import re
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

from util.files import check_zip, replacing
from util.stored import check_tensors

# A weight that every one has
A_MODEL, A_TOKENIZER = "class_emb.weight", "encoder.conv_in.weight"
OF_TOKENIZERS = (A_TOKENIZER, "components")  # the second is of principal components
_WRAPPERS = {"module", "_orig_mod"}  # what DDP and torch.compile put into names
_SHOWN = 3  # differences of each kind that a message lists
# Files are memory-mapped, so that the processes of a node share one copy; not on Windows, where a
# mapped file cannot be replaced: the first save of a resumed run would fail.
_MAP = os.name != "nt"


class _Ignored:
    """Stand-in for an object of another library: accepts anything and does nothing."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def _ignored(name):
    """A subclass of `_Ignored` with the dotted `name`."""
    module, _, attribute = name.rpartition(".")
    return type(attribute, (_Ignored,), {"__module__": module})


# Objects that published checkpoints pickle besides tensors. A Namespace only has attributes; the
# others, from Lightning's record of its callbacks, are replaced by classes that do nothing.
_HARMLESS = [
    argparse.Namespace,
    _ignored("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    _ignored("numpy.core.multiarray.scalar"),
    _ignored("numpy._core.multiarray.scalar"),
    _ignored("numpy.dtype"),
]


def read_weights(path, entries=("model", "state_dict"), missing=""):
    """The state dict (name -> tensor, on the CPU) that the file at `path` holds, `unwrapped`.

    Args:
        path: a `.safetensors` file, or one that `torch.save` wrote.
        entries: keys to look under, in this order; if none exists, the file itself is the dict.
        missing: advice for the error message if the file does not exist, e.g. a download command.

    Raises:
        ValueError: there is no such file, it is damaged, it holds pickled objects that are not
            known to be harmless, or it holds no tensors. The message starts with the path.
    """
    content = read_file(path, missing)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a dict of weights")
    content = entry_of(content, entries)
    weights = {k: v for k, v in content.items() if isinstance(v, torch.Tensor) and type(k) is str}
    if not weights:
        names = ", ".join(str(name) for name in list(content)[:5]) or "nothing at all"
        raise ValueError(f"{path}: holds no weights; what it holds: {names}")
    return unwrapped(weights)


def entry_of(content, entries=("model", "state_dict")):
    """The first of the entries of a dict that is a dict itself, else the whole."""
    return next((content[key] for key in entries if isinstance(content.get(key), dict)), content)


def unwrapped(state):
    """A state dict under the names that a network has without DDP and torch.compile.

    The same dict if it has these; and if two names would become one.
    """
    names = [".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in state]
    if names == list(state) or len(set(names)) < len(names):
        return state
    return dict(zip(names, state.values(), strict=True))


def read_file(path, missing=""):
    """The whole content of the file at `path`. Raises ValueError as `read_weights` does."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file. {missing}".rstrip())
    try:
        if Path(path).suffix == ".safetensors":
            return _read_safetensors(path)
        with torch.serialization.safe_globals(_HARMLESS):
            zipped = zipfile.is_zipfile(path)
            if zipped:
                check_zip(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped and _MAP)
        check_tensors(content, path)
        return content
    except (MemoryError, Damaged):
        raise
    except Exception as error:  # a damaged file can raise nearly anything, even OSError
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise ValueError(
                f"{path}: refused, because it holds a pickled {refused[1]}, and unpickling may run "
                "any code; if you trust the file, load it once with weights_only=False and save "
                "its state dict alone"
            ) from error
        reason = f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0].rstrip(": ")
        raise ValueError(
            f"{path}: cannot be read ({reason}); it is damaged, truncated, or no weight file"
        ) from error


class Damaged(ValueError):
    """The content of a file does not fit its checksum."""


def read_metadata(path):
    """The metadata of a `.safetensors` file, name -> text: ours are `config` and `sha256`."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def _read_safetensors(path):
    """Name -> tensor; raises Damaged, and the library's own errors.

    A file without our sha256 is accepted: of another library, or an export of an earlier version.
    """
    weights = load_file(path) if _MAP else load(Path(path).read_bytes())
    metadata = read_metadata(path)
    # an export has a configuration; what else it has may be `sha256` with a flipped bit
    more = set(metadata) - {"config", "format"} if "config" in metadata else ()
    stated = "sha256" in metadata or more
    if stated and metadata.get("sha256") != _digest_of_all(weights, metadata):
        raise Damaged(f"{path}: its content does not fit its sha256: it is damaged")
    return weights


def write_safetensors(path, weights, metadata):
    """Write name -> tensor and metadata, name -> text, with a sha256 of both. Raises ValueError."""
    weights = {name: value.contiguous() for name, value in weights.items()}
    metadata = {**metadata, "sha256": _digest_of_all(weights, metadata)}
    size = sum(value.nbytes for value in weights.values())
    with replacing(path, size, durable=True) as beside:
        with open(beside, "wb"):  # with the usual permissions, or an error that says why not
            mode = os.stat(beside).st_mode
        save_file(weights, beside, metadata)  # replaces it
        os.chmod(beside, mode)


def _digest_of_all(weights, metadata):
    said = sorted((name, text) for name, text in metadata.items() if name != "sha256")
    return hashlib.sha256(f"{said} {digest(weights)}".encode()).hexdigest()


@contextmanager
def never_unpickling():
    """Let torch.load read weights only, whatever other libraries pass to it.

    torch's own switch, which its opposite, if set, would contradict.
    """
    switches = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    before = {name: os.environ.get(name) for name in switches}
    os.environ.update(switches)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def load_strictly(module, state, source, hint=""):
    """Load `state` into `module`; all names and shapes must match, and all values be finite.

    Args:
        module: any `nn.Module`.
        state: name -> tensor.
        source: name of the state in the error message, usually its path.
        hint: a sentence to append to the error message.

    Raises:
        ValueError: they differ, or values are not finite. The module is then unchanged. The message
            lists the first few differences of each kind and counts all.
    """
    check_fits(module, state, source, hint)
    bad = [name for name, value in state.items() if not value.isfinite().all()]
    if bad:
        raise ValueError(
            f"{source}: {len(bad)} of its {len(state)} weights have values that are not "
            f"finite, such as {bad[0]}: it is damaged, or of a run that diverged"
        )
    module.load_state_dict(state, strict=True)


def check_fits(module, state, source, hint=""):
    """Raises ValueError unless the names and shapes of a state are those of a module.

    For the arguments, and the message, see `load_strictly`.
    """
    own = module.state_dict()
    shapes = [
        f"{name}: {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} here"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    unexpected = [f"{name}: in the file, not in this model" for name in state if name not in own]
    missing = [f"{name}: in this model, not in the file" for name in own if name not in state]
    kinds = (shapes, unexpected, missing)
    if not (count := sum(map(len, kinds))):
        return
    shown = [difference for kind in kinds for difference in kind[:_SHOWN]]
    rest = f"; and {count - len(shown)} more" if count > len(shown) else ""
    raise ValueError(
        f"{source} does not fit this {type(module).__name__}: {'; '.join(shown)}{rest} "
        f"(in all {len(shapes)} shapes differ, {len(unexpected)} names unexpected, "
        f"{len(missing)} missing). {hint}".rstrip()
    )


def digest(state):
    """The sha256 of a state dict: of its names, shapes and values, on any device."""
    sha = hashlib.sha256()
    for name, value in sorted(state.items()):
        sha.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
