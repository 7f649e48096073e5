"""Which members of an archive are pictures, and of which classes, by their names.

The rules are those of folders (util/data/listing.py). Imports neither torch nor PIL.
"""

import posixpath
from collections import Counter
from pathlib import Path

from util.data.label_files import LABEL_FILES, NoClasses
from util.data.listing import (
    FOLDER,
    PICTURE,
    SPLITS,
    by_folders,
    by_labels,
    describe_left_out,
    kind_of_name,
    of_one,
)

EDM = "dataset.json"  # of the zips of StyleGAN and EDM, whose folders are no classes


def clean(archive, name):
    """The path of a member, with / between its parts. Raises ValueError if it leads elsewhere."""
    path = posixpath.normpath(name.replace("\\", "/"))
    if path.startswith(("/", "../")) or path == ".." or path[1:3] == ":/":
        raise ValueError(f"{archive}: holds {name!r}, a path out of the archive; pack it again")
    return path


def kind_of_member(path):
    """As util.data.listing.kind_of_name, of a path with its folders."""
    *folders, name = path.split("/")
    kinds = (kind_of_name(folder, is_folder=True) for folder in folders)
    return next((kind for kind in kinds if kind is not FOLDER), kind_of_name(name))


def list_members(archive, paths, split, label_file=None, read=None):
    """(the Listing of a split, the path that its names begin with). Raises ValueError.

    archive: its name. paths: of all members. read: function of a path that gives a member's bytes.
    Folders above the classes are passed over; a split is a folder, and train, if there is none, is
    all. EDM's dataset.json says the classes, other files of labels as in folders.
    """
    kinds = {path: kind_of_member(path) for path in paths}
    top = _top(archive, [p for p in paths if kinds[p] is PICTURE], {*paths}, split)
    inside = {path: kind for path, kind in kinds.items() if path.startswith(top)}
    left_out = Counter(kind for kind in inside.values() if kind is not PICTURE)
    found = [path.removeprefix(top) for path, kind in inside.items() if kind is PICTURE]
    root, found = posixpath.join(str(archive), top).rstrip("/"), sorted(found, key=posixpath.split)
    if not found:
        seen = describe_left_out(root, left_out)
        raise ValueError(f"{root}: expected images, found none{seen and f' ({seen})'}")
    return _arranged(root, found, left_out, label_file, _labels_in(top, inside, read)), top


def _labels_in(top, inside, read):
    """Name -> function that gives the content of the first file of labels; {} if there is none."""
    name = next((name for name in LABEL_FILES if top + name in inside), None)
    return {name: lambda: read(top + name)} if name and read else {}


def _arranged(root, paths, left_out, label_file, own):
    if label_file:
        return by_labels(root, paths, left_out, Path(label_file))
    folders = {path.partition("/")[0] for path in paths if "/" in path}
    name = next((name for name in own if name == EDM or not folders), None)
    if not name and not folders:
        return of_one(root, paths, left_out)
    if not name:
        return by_folders(root, paths, folders, left_out)
    try:
        return by_labels(root, paths, left_out, Path(root, name), own[name]())
    except NoClasses as error:
        return of_one(root, paths, left_out, f"{error}: not used")


def _top(archive, pictures, paths, split):
    """What the paths of a split's pictures begin with: "" or a folder and /."""
    top = ""
    while True:
        below = [path.removeprefix(top) for path in pictures if path.startswith(top)]
        folders = {path.partition("/")[0] for path in below if "/" in path}
        if split in folders and not _is_class(split, below, folders):
            return f"{top}{split}/"
        labelled = any(top + name in paths for name in LABEL_FILES)
        if len(folders) != 1 or labelled or any("/" not in path for path in below):
            break
        inner = f"{top}{folders.pop()}/"
        deeper = any(path.count("/") > 1 for path in below)
        if not deeper and not any(inner + name in paths for name in LABEL_FILES):
            break
        top = inner
    if split != "train":
        raise ValueError(f"{archive}: expected a folder {split} in it, found none")
    return top


def _is_class(split, below, folders):
    """Whether the folder is a class of vehicles, say: pictures only, beside other classes."""
    inside = (path.removeprefix(f"{split}/") for path in below if path.startswith(f"{split}/"))
    others = {folder for folder in folders if folder.lower() not in SPLITS}
    return bool(others) and not any("/" in path for path in inside)
