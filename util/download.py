"""Fetch published weights: python -m util.download kl16 mar_base mar_large mar_huge."""

import hashlib
import shutil
import urllib.request
import zipfile
from pathlib import Path

from tqdm import tqdm

from util.files import check_zip, replacing
from util.flags import Parser, run

_DROPBOX = "https://www.dropbox.com/scl/fi/"
_LDM = "https://ommer-lab.com/files/latent-diffusion/"

# name -> (path, URL); the authors publish no checksums. Of an archive, the one checkpoint in it is
# stored at the path
FILES = {
    "kl16": (
        "pretrained_models/vae/kl16.ckpt",
        _DROPBOX + "hhmuvaiacrarfg28qxhwz/kl16.ckpt?rlkey=l44xipsezc8atcffdp4q7mwmh&dl=1",
    ),
    "ldm_kl16": ("pretrained_models/vae/ldm_kl16.ckpt", _LDM + "kl-f16.zip"),
    "ldm_vq16": ("pretrained_models/vae/ldm_vq16.ckpt", _LDM + "vq-f16.zip"),
    "mar_base": (
        "pretrained_models/mar/mar_base/checkpoint-last.pth",
        _DROPBOX + "f6dpuyjb7fudzxcyhvrhk/checkpoint-last.pth?rlkey=a6i4bo71vhfo4anp33n9ukujb&dl=1",
    ),
    "mar_large": (
        "pretrained_models/mar/mar_large/checkpoint-last.pth",
        _DROPBOX + "pxacc5b2mrt3ifw4cah6k/checkpoint-last.pth?rlkey=m48ovo6g7ivcbosrbdaz0ehqt&dl=1",
    ),
    "mar_huge": (
        "pretrained_models/mar/mar_huge/checkpoint-last.pth",
        _DROPBOX + "1qmfx6fpy3k7j9vcjjs3s/checkpoint-last.pth?rlkey=4lae281yzxb406atp32vzc83o&dl=1",
    ),
}


def download(name, overwrite=False):
    """Download one of FILES, unless it exists, and return its path.

    The download is verified with the checksums inside the file. Raises ValueError for an unknown
    name, and if the file cannot be downloaded or is damaged.
    """
    if name not in FILES:
        raise ValueError(f"{name!r}: expected one of {', '.join(FILES)}")
    path, url = FILES[name]
    if Path(path).is_file() and not overwrite:
        print(f"{path}: there already")
        return path
    request = urllib.request.Request(url, headers={"User-Agent": "Wget/1.21"})
    digest = hashlib.sha256()
    try:
        with replacing(path) as beside:
            with urllib.request.urlopen(request, timeout=60) as source, beside.open("wb") as file:
                total = int(source.headers.get("Content-Length") or 0)
                with tqdm(total=total or None, unit="B", unit_scale=True, desc=name) as bar:
                    while chunk := source.read(1 << 20):
                        file.write(chunk)
                        digest.update(chunk)
                        bar.update(len(chunk))
            size = beside.stat().st_size
            if total and size != total:
                raise OSError(f"{size} bytes arrived, expected {total}")
            check_zip(beside)  # torch.save writes zips too
            if url.endswith(".zip"):
                _unpack(beside)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name}: could not be fetched from {url} ({error})") from error
    print(f"{path}: sha256 of what was fetched {digest.hexdigest()}")
    return path


def _unpack(path):
    """Replace an archive by the checkpoint in it."""
    with zipfile.ZipFile(path) as archive:
        found = [name for name in archive.namelist() if name.endswith(".ckpt")]
        if len(found) != 1:
            raise OSError(f"expected one .ckpt in it, found {', '.join(archive.namelist())}")
        with replacing(path) as beside, archive.open(found[0]) as source, beside.open("wb") as file:
            shutil.copyfileobj(source, file)


def source_of(path):
    """Advice for a tokenizer's file that does not exist."""
    for name, (known, _) in FILES.items():
        if "vae" in Path(known).parts and Path(path).name == Path(known).name:
            return f"To fetch it: python -m util.download {name}"
    return "Published ones: python -m util.download --help; main_tokenizer.py trains small ones"


def download_pretrained_vae(overwrite=False):
    return download("kl16", overwrite)


def download_pretrained_marb(overwrite=False):
    return download("mar_base", overwrite)


def download_pretrained_marl(overwrite=False):
    return download("mar_large", overwrite)


def download_pretrained_marh(overwrite=False):
    return download("mar_huge", overwrite)


def main(argv=None):
    parser = Parser(description=__doc__)
    listed = "; ".join(f"{name}: to {path}" for name, (path, _) in FILES.items())
    parser.add_argument("names", nargs="+", choices=FILES, metavar="NAME", help=listed)
    parser.add_argument("--overwrite", action="store_true", help="download again if it exists")
    args = parser.parse_args(argv)
    for name in args.names:
        download(name, args.overwrite)


if __name__ == "__main__":
    run(main)
