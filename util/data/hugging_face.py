"""Data sets of Hugging Face's `datasets` on disk: folders of `save_to_disk`, and .parquet files."""

import glob
import os
import re
from functools import cached_property
from pathlib import Path

from util.data.archive import open_members
from util.data.claims import BELOW, ONE_SET, SPLIT_SETS
from util.data.classes import in_order
from util.data.label_files import CLASS, class_name
from util.data.listing import Listing, of_one
from util.files import first_line

SPLITS = {"train": ("train",), "val": ("val", "validation", "valid", "dev"), "test": ("test",)}
IMAGE = ("image", "img", "jpg", "png", "picture")  # columns, the first one preferred


def open_hugging_face(path, split, img_size, reading):
    """Open the images of a split, for a row of DATASETS. Raises ValueError."""
    if reading.label_file:
        raise ValueError(f"--label_file {reading.label_file}: {path} has a column for the classes")
    table = _load(_package(path), os.path.expanduser(str(path)), split)
    column, label = _image_column(path, table.features), _label_column(table.features)
    listing = _listing(f"{path}:{split}", table, column, label)
    rows = {name: row for row, name in enumerate(listing.paths)}
    return open_members(listing, Rows(table, column), rows, img_size, reading)


def _package(path):
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{path}: to read it, the package `datasets` is needed: pip install datasets"
        ) from None
    datasets.disable_progress_bars()
    return datasets


def _load(datasets, path, split):
    """The table of a split. Raises ValueError."""
    if os.path.isfile(os.path.join(path, ONE_SET)):
        return _split_of({"train": _opened(path, datasets.load_from_disk, path)}, path, split)
    if os.path.isfile(os.path.join(path, SPLIT_SETS)):
        return _split_of(_opened(path, datasets.load_from_disk, path), path, split)
    files = {split: _split_of(_parquet(path), path, split)}
    return _opened(path, datasets.load_dataset, "parquet", data_files=files, split=split)


def _opened(path, call, *arguments, **more):
    try:
        return call(*arguments, **more)
    except Exception as error:  # of datasets, pyarrow and the system
        cause = error.__cause__ or error
        raise ValueError(f"{path}: not a readable data set ({first_line(cause)})") from error


def _parquet(path):
    """Split -> its .parquet files, by what their names or their folder begin with."""
    if os.path.isdir(path):
        patterns = [os.path.join(glob.escape(path), below, "*.parquet") for below in BELOW]
    else:
        patterns = [path]
    found = sorted({file for pattern in patterns for file in glob.glob(pattern)})
    if not found:
        raise ValueError(f"{path}: expected .parquet files, found none")
    splits = {}
    for file in found:
        folder, name = os.path.split(file)
        first = re.split(r"[-_.]", name.lower())[0]
        known = [s for each in SPLITS.values() for s in each]
        name = next((n for n in (first, os.path.basename(folder).lower()) if n in known), "train")
        splits.setdefault(name, []).append(file)
    return splits


def _split_of(splits, path, wanted):
    """The value of a split, by one of its names. Raises ValueError."""
    names = SPLITS.get(wanted, (wanted,))
    if not (known := [name for name in names if name in splits]):
        raise ValueError(f"{path}: expected a split {wanted}, found {', '.join(splits)}")
    return splits[known[0]]


def _image_column(path, features):
    """The name of the column of pictures. Raises ValueError."""
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    found = [name for name, kind in kinds.items() if kind == "Image"] or [
        name for name, feature in features.items() if _is_file(feature)
    ]
    if not found:
        shown = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise ValueError(f"{path}: expected a column of images, found {shown}")
    return _preferred(found, IMAGE)


def _is_file(feature):
    """Whether a column holds files as bytes, as in a .parquet that says no more."""
    of = getattr(feature, "dtype", None)
    return of in ("binary", "large_binary") or (isinstance(feature, dict) and "bytes" in feature)


def _label_column(features):
    """The name of the column of classes; None if there is none."""
    named = [name for name, feature in features.items() if hasattr(feature, "int2str")]
    plain = [name for name in CLASS if _is_plain(features.get(name))]
    return _preferred(named, CLASS) if named else next(iter(plain), None)


def _is_plain(feature):
    return str(getattr(feature, "dtype", "")).startswith(("int", "uint", "string", "large_string"))


def _preferred(found, names):
    return next((name for name in names if name in found), found[0])


def _listing(root, table, column, label):
    """The Listing of a table's rows, whose paths are their numbers."""
    paths = [f"{row:08d}" for row in range(len(table))]
    if not paths:
        raise ValueError(f"{root}: expected images, found none")
    if label is None:
        return of_one(root, paths, {}, "no column of classes")
    classes, labels = _classes(root, label, list(table[label]), table.features[label])
    return Listing(root, classes, paths, labels, {}, [f"classes: the column {label} of {root}"])


def _classes(root, label, values, feature):
    """(names of the classes, labels). Named classes keep their numbers."""
    if hasattr(feature, "int2str"):
        names = [re.sub(r"[/\\]", "_", name) for name in feature.names]
        labels = values
    else:
        values = [class_name(root, f"the column {label}", value) for value in values]
        names = in_order({*values})
        index = {name: i for i, name in enumerate(names)}
        labels = [index[value] for value in values]
    if wrong := [n for n, i in enumerate(labels) if i is None or not 0 <= i < len(names)]:
        raise ValueError(
            f"{root}: {len(wrong)} rows have no class in the column {label}, such as row {wrong[0]}"
        )
    return names, labels


class Rows:
    """The files in a column of a table, by row."""

    def __init__(self, table, column):
        self.files = [str(each["filename"]) for each in table.cache_files]
        if hasattr(table.features[column], "decode"):
            table = table.cast_column(column, type(table.features[column])(decode=False))
        self.table, self.column = table.select_columns([column]), column

    def read(self, row):
        """The bytes of a file."""
        value = self.table[row][self.column]
        if isinstance(value, dict):
            content, path = value["bytes"], value.get("path")
            return Path(path).read_bytes() if content is None and path else content or b""
        return value or b""

    @cached_property
    def sizes(self):
        """The numbers of bytes of all files, without reading them, where they are in the table."""
        from pyarrow import compute, types

        column = self.table.with_format("arrow")[:].column(self.column)
        if types.is_struct(column.type):
            column = compute.struct_field(column, "bytes")
        return compute.binary_length(column).to_pylist()

    def size(self, row):
        """The number of bytes of a file."""
        return len(self.read(row)) if self.sizes[row] is None else self.sizes[row]

    def time(self, row):
        """When the table was written, in ns."""
        return max(os.stat(file).st_mtime_ns for file in self.files)
