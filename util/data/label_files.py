"""Files of labels: which picture is of which class. Imports neither torch nor numpy.

The forms are those of StyleGAN and EDM, {"labels": [[file, class], …]}; {file: class}; a list of
records {"file_name": file, "label": class}, also one a line; and CSV, with commas or tabs, with or
without a header. A class is a text or an integer.
"""

import csv
import io
import json

# found by these names in a folder without class folders
LABEL_FILES = ("dataset.json", "metadata.jsonl", "metadata.csv", "labels.csv", "labels.json")
FILE = ("file_name", "file", "filename", "image", "path", "name", "id")
CLASS = ("label", "class", "class_name", "labels", "category", "target")
EXPECTED = "expected file and class, as in file_name,label"


class NoClasses(ValueError):
    """A file that describes pictures, such as by captions, but not their classes."""


def read_labels(path, content=None):
    """Name of each file -> name of its class; None if it says that there are no classes.

    content: the bytes of the file, if it is not on disk but in an archive. Raises ValueError, and
    NoClasses if it is no file of classes at all.
    """
    try:
        with _opened(path, content) as file:
            pairs = _READERS.get(path.suffix.lower(), _rows)(file)
    except (OSError, UnicodeDecodeError, RecursionError, csv.Error, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a file of labels ({error}); {EXPECTED}") from None
    except NoClasses as error:
        raise NoClasses(f"{path}: {error}") from None
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: {_text(error)}; {EXPECTED}") from None
    if pairs is None:
        return None
    if not pairs:
        raise ValueError(f"{path}: names no file; {EXPECTED}")
    return one_class_each(path, ((name, class_name(path, name, label)) for name, label in pairs))


def one_class_each(path, pairs):
    """Pairs (name, class) of a file of labels as a dict. Raises ValueError for a name of two."""
    found = {}
    for name, label in pairs:
        if found.setdefault(name, label) != label:
            raise ValueError(f"{path}: {name} is of two classes, {found[name]} and {label}")
    return found


def _opened(path, content):
    if content is not None:
        return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def _text(error):
    return str(error) if type(error) is ValueError else "not a file of labels"


def class_name(path, name, label):
    """The name of a class, which is that of a folder in a cache. Raises ValueError."""
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise ValueError(f"{path}: {name} is of class {label!r}, expected a text or an integer")
    text = str(label).strip()
    if text in ("", ".", "..") or "/" in text or "\\" in text:
        raise ValueError(f"{path}: {name} is of class {label!r}, expected a name without slashes")
    return text


# ---- forms: each reader gives pairs (name of a file, class), or None -----------------------------


def _json(file):
    content = json.load(file)
    if isinstance(content, dict) and "labels" in content:
        content = content["labels"]
    if isinstance(content, dict):
        return list(content.items())
    return None if content is None else [_pair(each) for each in content]


def _lines(file):
    return [_pair(json.loads(line)) for line in file if line.strip()]


def _pair(record):
    """(file, class) of a record or of a list of both."""
    if isinstance(record, dict):
        return str(record[_key(record, FILE)]), record[_key(record, CLASS)]
    name, label = record
    return str(name), label


def _key(names, wanted):
    """The first of the wanted names that is among the names of columns."""
    found = next((name for name in wanted if name in names), None)
    if found is None:
        raise NoClasses(f"has no {wanted[0]}, expected one of {', '.join(wanted)}")
    return found


def _rows(file):
    first = file.readline()
    file.seek(0)
    rows = [row for row in csv.reader(file, delimiter="\t" if "\t" in first else ",") if row]
    head = [cell.strip().lower() for cell in rows[0]] if rows else []
    if not {*head} & {*FILE}:
        return [(row[0].strip(), row[1]) for row in rows]
    files, classes = (head.index(_key(head, wanted)) for wanted in (FILE, CLASS))
    return [(row[files].strip(), row[classes]) for row in rows[1:]]


_READERS = {".json": _json, ".jsonl": _lines}
