"""Models that are passed on: the files of their folder, and the Hugging Face hub.

A folder holds the weights, config.json, the file of a tokenizer that nobody else has, and the model
card, README.md. `models/pretrained.py` writes it. Importing this module does not import torch.
"""

import json
import re
from pathlib import Path

from util.files import first_line

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
TOKENIZER, SAMPLES = "tokenizer.ckpt", "samples.png"
HERE = "./"  # begins the path of a tokenizer's file that lies in the folder
LIBRARY, FORMAT = "mar-diffloss", 1
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
WEIGHT_FILES = (".pth", ".pt", ".ckpt", ".safetensors")


# ---- the folder ----------------------------------------------------------------------------------


def check_folder(folder):
    """Raises ValueError where a model must not be written: another's files would be replaced."""
    there = [name for name in (CONFIG, CARD, WEIGHTS) if Path(folder, name).exists()]
    try:
        if there:
            read_config(Path(folder, CONFIG))
    except ValueError:
        raise ValueError(
            f"{folder}: holds a {there[0]} that is not of a model of this library, expected a new "
            "folder"
        ) from None


def is_ours(config):
    """Whether a configuration is that of a folder of this library."""
    return isinstance(config, dict) and config.get("library") == LIBRARY


def read_config(source):
    """The content of a config.json. Raises ValueError for one that is not of this library."""
    try:
        config = json.loads(Path(source).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{source}: cannot be read ({first_line(error)})") from None
    if not is_ours(config):
        raise ValueError(f"{source}: not of a model of this library, there is no {LIBRARY!r} in it")
    return config


def digest_in(folder):
    """The sha256 of the weights that a folder was passed on with; None if it is no such folder."""
    try:
        return read_config(Path(folder, CONFIG)).get("weights_sha256")
    except ValueError:
        return None


def config_of(path, held):
    """The configuration of the weights at `path`, a .safetensors file; the file of a tokenizer that
    lies beside them has then its whole path.

    held: the one in the file of weights itself, or None. A config.json beside model.safetensors
    takes its place, if one of the two is ours. Raises ValueError if that is of other weights or of
    a newer version.
    """
    path, config = Path(path), held
    source = path.with_name(CONFIG)
    ours = is_ours(held) or (held is None and digest_in(path.parent))
    if path.name == WEIGHTS and source.is_file() and ours:
        config = read_config(source)
        if config.get("weights_sha256") != (held or {}).get("weights_sha256"):
            raise ValueError(f"{source}: of other weights than those in {WEIGHTS}")
    if not is_ours(config):
        return config
    found = config.get("format")
    if type(found) is not int or not 1 <= found <= FORMAT:
        raise ValueError(
            f"{path}: of format {found!s:.20}, expected at most {FORMAT}: it was written by a "
            "newer version of this library"
        )
    return _with_whole_path(config, path.parent)


def _with_whole_path(config, folder):
    own = config.get("tokenizer")
    name = own.get("vae_path") if isinstance(own, dict) else None
    if not isinstance(name, str) or not name.startswith(HERE):
        return config
    return {**config, "tokenizer": {**own, "vae_path": str(folder / Path(name).name)}}


def readable(config, indent=""):
    """A configuration as JSON, with a line for each value."""
    if not isinstance(config, dict) or not config:
        return json.dumps(config, ensure_ascii=False)
    deeper = f"{indent}  "
    lines = [f"{deeper}{json.dumps(k)}: {readable(v, deeper)}" for k, v in config.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


# ---- the hub -------------------------------------------------------------------------------------


def is_name(source):
    """Whether a source is the name of a repository of the hub, "user/name", and no local path."""
    text = str(source)
    return (
        bool(_NAME.fullmatch(text))
        and not text.endswith(WEIGHT_FILES)
        and not Path(text).exists()
        and not Path(text).parent.exists()
    )


def fetch(name):
    """The local folder with the files of a repository of the hub, fetched unless they are there.

    Raises ValueError if it cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[WEIGHTS, CONFIG, TOKENIZER]))
    except Exception as error:  # of the library, its client, or the system
        raise ValueError(
            f"{name}: no such file or folder, and not fetched from the Hugging Face hub "
            f"({first_line(error)})"
        ) from error


def check_name(name):
    """Raises ValueError unless a repository of the hub can have this name."""
    if not _NAME.fullmatch(str(name)):
        raise ValueError(f"push_to_hub {name!r}: expected a name like user/name")


def push(folder, name, private=False):
    """Upload a folder to the repository of this name, which is created if there is none.

    Returns its address. Raises ValueError without a network or a login.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:
        raise ValueError(
            f"push_to_hub {name!r}: not uploaded ({first_line(error)}); it needs a network, and "
            "a token that may write: hf auth login"
        ) from error
    return str(address)
