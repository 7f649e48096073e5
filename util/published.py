"""Table of the published files: where they are, how large, and with which sha256."""

from dataclasses import dataclass, field
from pathlib import Path

from util.files import file_sha256, in_bytes
from util.table import Table

_DROPBOX = "https://www.dropbox.com/scl/fi/"
_LDM = "https://ommer-lab.com/files/latent-diffusion/"
_HF = "https://huggingface.co/"
_SD = _HF + (  # Stable Diffusion's KL-8, with the decoder that Stability AI trained on
    "stabilityai/sd-vae-ft-mse/resolve/31f26fdeee1355a5c34592e401dd41e45d25a493/"
    "diffusion_pytorch_model.safetensors"
)
# a copy of the authors' files, at a commit before its owner replaced them by .safetensors. Those of
# the models are no copies: in mar-base's, others found the weights without EMA
_COPY = _HF + "jadechoghari/mar/resolve/773c9bdcd98740c7b876ce0d66f684a0e2468990/"


@dataclass(frozen=True)
class File:
    """A published file; what nobody has published is None.

    path: where it is stored; of an archive, the one checkpoint in it. url: its publisher's. size,
    sha256: in bytes, and in hexadecimal digits, of what is stored. mirrors: name of a place ->
    URL of a copy there, the same bytes. tokenizers: names of those that it is the weights of.
    """

    path: str
    url: str
    size: int | None = None
    sha256: str | None = None
    mirrors: dict = field(default_factory=dict)
    tokenizers: tuple = ()

    @property
    def what(self):
        """What is stored, in words."""
        return "the .ckpt in it" if self.url.endswith(".zip") else "the file"

    @property
    def stated(self):
        """Whose its sha256 is, in words."""
        if self.url in self.mirrors.values():
            return "that of this file on Hugging Face"
        return "that of a copy on Hugging Face, as the authors state none"

    @property
    def size_in_words(self):
        return in_bytes(self.size) if self.size else "size not published"


# The authors of MAR and of LDM publish neither sizes nor checksums. Those of kl16 and mar_base are
# the copy's: sha256 by its Git LFS pages, size by public projects that pin both, and as many MiB as
# the official download.py expects. Those of kl8 are by public projects that pin them.
FILES = Table(
    "file",
    {
        "kl16": File(
            "pretrained_models/vae/kl16.ckpt",
            _DROPBOX + "hhmuvaiacrarfg28qxhwz/kl16.ckpt?rlkey=l44xipsezc8atcffdp4q7mwmh&dl=1",
            265_900_046,
            "34ce001bcfffb7af67ec8af1e683a30d7bd45760855ddc7deedc1330f2cfd38f",
            {"hf": _COPY + "kl16.ckpt"},
            ("kl16",),
        ),
        "kl8": File(
            "pretrained_models/vae/kl8.safetensors",
            _SD,
            334_643_276,
            "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
            {"hf": _SD},
            ("kl8",),
        ),
        "ldm_kl16": File("pretrained_models/vae/ldm_kl16.ckpt", _LDM + "kl-f16.zip"),
        "ldm_vq16": File(
            "pretrained_models/vae/ldm_vq16.ckpt",
            _LDM + "vq-f16.zip",
            tokenizers=("vq16", "vq16_latent"),
        ),
        "mar_base": File(
            "pretrained_models/mar/mar_base/checkpoint-last.pth",
            _DROPBOX
            + "f6dpuyjb7fudzxcyhvrhk/checkpoint-last.pth?rlkey=a6i4bo71vhfo4anp33n9ukujb&dl=1",
            1_663_614_946,
            "7e970a33bc90353e2fabe3498ed1f2d194dd8d17cd387665f80b2984dfca538c",
            {"hf": _COPY + "checkpoint-last.pth"},
        ),
        "mar_large": File(
            "pretrained_models/mar/mar_large/checkpoint-last.pth",
            _DROPBOX
            + "pxacc5b2mrt3ifw4cah6k/checkpoint-last.pth?rlkey=m48ovo6g7ivcbosrbdaz0ehqt&dl=1",
        ),
        "mar_huge": File(
            "pretrained_models/mar/mar_huge/checkpoint-last.pth",
            _DROPBOX
            + "1qmfx6fpy3k7j9vcjjs3s/checkpoint-last.pth?rlkey=4lae281yzxb406atp32vzc83o&dl=1",
        ),
    },
)
MIRRORS = sorted({mirror for file in FILES.values() for mirror in file.mirrors})


def mirror(name, place):
    """URL of the copy of a file at a place, None for its publisher's. Raises ValueError."""
    there = FILES[name].mirrors
    if place is not None and place not in there:
        having = ", ".join(each for each, file in FILES.items() if place in file.mirrors)
        raise ValueError(f"--mirror {place}: no copy of {name} there, expected one of {having}")
    return there.get(place)


def _is_named(file, path):
    """Whether a path, or None, has the name of a published tokenizer's file."""
    return bool(path) and "vae" in Path(file.path).parts and Path(path).name == Path(file.path).name


def _is_of(file, path):
    """Whether a path, or None, is that of a published tokenizer: by its name and, if it is there,
    its size and sha256 as far as they are known."""
    if not _is_named(file, path) or not Path(path).is_file():
        return _is_named(file, path)
    if file.size and Path(path).stat().st_size != file.size:
        return False
    return not file.sha256 or file_sha256(path) == file.sha256


def usual_place(path, tokenizer):
    """Where a published tokenizer's file lies once it is fetched; None if it is no published one.

    path: of a file of this name, or None for the usual one of a tokenizer. tokenizer: its name.
    """
    for file in FILES.values():
        if _is_of(file, path) or (not path and tokenizer in file.tokenizers):
            return file.path
    return None


def source_of(path):
    """Advice for a tokenizer's file that does not exist."""
    for name, file in FILES.items():
        if _is_named(file, path):
            return f"To fetch it: python -m util.download {name}"
    return "Published ones: python -m util.download --help; main_tokenizer.py trains small ones"


def file_of_tokenizer(tokenizer):
    """Name of the published file of a tokenizer. Raises ValueError if there is none."""
    files = {each: name for name, file in FILES.items() for each in file.tokenizers}
    if tokenizer not in files:
        raise ValueError(
            f"tokenizer {tokenizer}: no file is published, expected one of {', '.join(files)}"
        )
    return files[tokenizer]
