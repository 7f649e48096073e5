"""Which kind of data a path is, by its name or a look into a folder. Imports little."""

import os
from contextlib import suppress

from util.data.listing import PICTURE, kind_of_name

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
# what `save_to_disk` of Hugging Face's datasets writes into the folder of a set, and of its splits
ONE_SET, SPLIT_SETS = "state.json", "dataset_dict.json"
BELOW = ("", "data", "train")  # where a folder of the Hub has its .parquet files


def is_zip(path):
    """Whether it is the name of a zip."""
    return _ends(path, ".zip")


def are_tars(path):
    """Whether it is the name of a tar, or a pattern of such names."""
    return _ends(path, ".tar", *PACKED)


def is_hugging_face(path):
    """Whether it is a folder of Hugging Face's datasets, or names .parquet files."""
    if _ends(path, ".parquet"):
        return True
    files = (os.path.join(path, name) for name in (ONE_SET, SPLIT_SETS))
    return any(map(os.path.isfile, files)) or any(
        _holds_parquet(os.path.join(path, folder)) for folder in BELOW
    )


def _ends(path, *endings):
    return str(path).lower().endswith(endings)


def _holds_parquet(folder):
    """Whether a folder holds such a file; one in which a picture is met first does not."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _ends(entry.name, ".parquet"):
                return True
            if kind_of_name(entry.name) is PICTURE:
                return False
    return False
