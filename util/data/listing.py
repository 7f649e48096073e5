"""Which files of a folder are its pictures, and of which classes. Imports neither torch nor PIL.

Every file is a picture, by the ending of its name, or is counted by kind among what is left out, or
is named by a ValueError, such as a link to nothing. No file is opened but one of labels.
"""

import os
import posixpath
import stat
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from util.data.classes import ALL, in_order
from util.data.label_files import LABEL_FILES, NoClasses, one_class_each, read_labels
from util.files import first_few

PICTURES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib"),
        *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".j2k"),
        *(".avif", ".heic", ".heif", ".jxl"),  # Pillow reads some of these with a plug-in only
    )
)
# in lower case: what systems put beside files, and never a class
OF_SYSTEMS = frozenset(
    (
        *("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information"),
        *("lost+found", "thumbs.db", "desktop.ini"),
    )
)
SPLITS = ("train", "val", "valid", "validation", "test", "dev")
FOLDER, PICTURE = "a folder", "a picture"
SHOWN = 8  # kinds of files in a sentence


@dataclass
class Listing:
    """The pictures of a data set and their classes.

    paths: below `root`, with / between their parts. labels: of these, indices in `classes`.
    left_out: what there is besides, kind -> number. notes: sentences on what else was decided.
    """

    root: str
    classes: list
    paths: list
    labels: list
    left_out: Counter
    notes: list
    by_folders: bool = False  # whether the first part of a path is the class

    def name(self, index):
        """Class and name of a picture, class/name.ext; the folder of a class is its name."""
        path = self.paths[index]
        return path if self.by_folders else f"{self.classes[self.labels[index]]}/{path}"

    def follow(self, classes):
        """Give the classes another order, and the pictures that of their classes."""
        index = {name: i for i, name in enumerate(classes)}
        labels = [index[self.classes[label]] for label in self.labels]
        order = sorted(range(len(labels)), key=labels.__getitem__)
        self.paths, self.labels = [self.paths[i] for i in order], [labels[i] for i in order]
        self.classes = list(classes)

    def sentences(self):
        """What the user is told of it."""
        counted = describe_left_out(self.root, self.left_out)
        return [*self.notes, *([counted] if counted else [])]


# ---- folders -------------------------------------------------------------------------------------


def pictures_below(root):
    """(paths of all pictures below a folder, in order; a sentence on what is left out, or "")."""
    paths, _, left_out = walk(root)
    return [Path(root, path) for path in paths], describe_left_out(root, left_out)


def walk(root):
    """(paths of the pictures below `root`, names of the folders in it, what is left out).

    Folders are in the order of their paths, as torchvision's; pictures in that of their names. A
    link to a folder is followed, unless it leads to one that holds it. Raises ValueError.
    """
    root = os.fspath(root)
    found, left_out, todo = {}, Counter(), [("", _holding(root))]
    while todo:
        folder, above = todo.pop()
        names = {FOLDER: [], PICTURE: []}
        for entry in _entries(os.path.join(root, folder)):
            kind = _kind(entry)
            names[kind].append(entry.name) if kind in names else left_out.update((kind,))
        found[folder] = sorted(names[PICTURE])
        for name in names[FOLDER]:
            here = _identity(os.path.join(root, folder, name))
            if here in above:
                left_out["link{s} to a folder that holds it"] += 1
            else:
                todo.append((f"{folder}{name}/", above | {here}))
    in_order = sorted(found, key=lambda folder: folder[:-1])
    paths = [folder + name for folder in in_order for name in found[folder]]
    return paths, [folder[:-1] for folder in in_order if folder.count("/") == 1], left_out


def describe_left_out(root, left_out):
    """A sentence on what there is besides pictures, most frequent first; "" if nothing."""
    kinds = sorted(left_out.items(), key=lambda each: (-each[1], each[0]))
    counts = [f"{n} {kind.replace('{s}', '' if n == 1 else 's')}" for kind, n in kinds if n > 0]
    if len(counts) > SHOWN:
        rest = sum(n for _, n in kinds[SHOWN:])
        counts[SHOWN:] = [f"{rest} others"]
    return f"left out of {root}: {', '.join(counts)}" if counts else ""


def holds_pictures(path):
    """Whether there is a picture in a folder, or in a folder in it."""
    with suppress(ValueError, OSError):  # which listing them will raise
        kinds = {entry.path: _kind(entry) for entry in _entries(path)}
        inside = (_entries(folder) for folder, kind in kinds.items() if kind is FOLDER)
        return PICTURE in kinds.values() or any(map(_some_picture, inside))
    return False


def _some_picture(entries):
    return any(_kind(entry) is PICTURE for entry in entries)


def _entries(folder):
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}, expected a folder to read") from None


def _kind(entry):
    """FOLDER, PICTURE, or the kind of what is left out. Raises ValueError for a link to nothing."""
    is_folder = _holds(entry.is_dir)
    kind = kind_of_name(entry.name, is_folder)
    if is_folder or entry.name.startswith(".") or kind == entry.name or _holds(entry.is_file):
        return kind
    return _kind_of_other(entry, os.path.splitext(entry.name)[1].lower())


def kind_of_name(name, is_folder=False):
    """FOLDER, PICTURE, or the kind of what is left out, by its name alone."""
    if name.startswith("."):
        return "hidden folder{s}" if is_folder else "hidden file{s}"
    if name.lower() in OF_SYSTEMS:
        return name
    if is_folder:
        return FOLDER
    ending = os.path.splitext(name)[1].lower()
    return PICTURE if ending in PICTURES else ending or "file{s} without an ending"


def _holds(question):
    with suppress(OSError):  # links in a circle
        return question()
    return False


def _kind_of_other(entry, ending):
    try:
        mode = os.stat(entry.path).st_mode
    except OSError as error:
        if ending in PICTURES:
            return PICTURE  # the check of the pictures names all of these
        raise ValueError(f"{entry.path}: a link to nothing ({error.strerror}); delete it") from None
    kinds = {stat.S_IFIFO: "named pipe{s}", stat.S_IFSOCK: "socket{s}"}
    return kinds.get(stat.S_IFMT(mode), "device{s}")


def _holding(root):
    """What identifies a folder and those that hold it."""
    real = Path(os.path.realpath(root))
    return {_identity(folder) for folder in (real, *real.parents)}


def _identity(folder):
    try:
        status = os.stat(folder)
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}, expected a folder to read") from None
    return status.st_dev, status.st_ino


# ---- layouts -------------------------------------------------------------------------------------


def list_data(path, split, label_file=None):
    """The Listing of a split of the data at `path`. Raises ValueError.

    Classes are folders, or, with label_file, what this file says. Without either, all pictures are
    of the class ALL.
    """
    root = data_folder(path, split)
    if not os.path.isdir(root):
        raise ValueError(f"{root}: expected a folder of images for each class, found no folder")
    paths, folders, left_out = walk(root)
    if not paths:
        seen = describe_left_out(root, left_out)
        raise ValueError(
            f"{root}: expected a folder of images for each class, or of images, found no picture "
            f"there{seen and f' ({seen})'}"
        )
    if label_file:
        return by_labels(root, paths, left_out, Path(label_file))
    own = next((file for name in LABEL_FILES if (file := Path(root, name)).is_file()), None)
    if any("/" in path for path in paths):
        listing = by_folders(root, paths, folders, left_out)
        if own:
            listing.notes.append(f"{own} is not used: --label_file takes classes from it")
        return listing
    left_out["folder{s} without pictures"] += len(folders)
    try:
        return by_labels(root, paths, left_out, own) if own else of_one(root, paths, left_out)
    except NoClasses as error:
        return of_one(root, paths, left_out, f"{error}: not used")


def data_folder(path, split):
    """The folder of a split: `path`/`split` or, of the training pictures, `path` itself."""
    path = Path(path).expanduser()
    inner = path / split
    is_split = split != "train" or (inner.is_dir() and not _is_class(path, inner))
    return str(inner if is_split else path)


def _is_class(path, inner):
    """Whether `path`/train is a class of vehicles, say: pictures only, and so are others beside."""
    kinds = {_kind(entry) for entry in _entries(inner)}
    if FOLDER in kinds or PICTURE not in kinds:
        return False
    others = (e for e in _entries(path) if _kind(e) is FOLDER and e.name.lower() not in SPLITS)
    return any(_some_picture(_entries(other.path)) for other in others)


def class_folders(path):
    """Names of the class folders of the training data at `path`, in order; [] if there are none."""
    root = data_folder(path, "train")
    entries = _entries(root) if os.path.isdir(root) else []
    return in_order(entry.name for entry in entries if _kind(entry) is FOLDER)


def by_folders(root, paths, folders, left_out):
    """The Listing of pictures in class folders, of these names. Raises ValueError."""
    classes, of = in_order(folders), {name: [] for name in folders}
    for path in paths:
        folder, inside, _ = path.partition("/")
        of[folder].append(path) if inside else left_out.update(("picture{s} beside class folders",))
    if empty := [name for name in classes if not of[name]]:
        raise ValueError(f"{root}: class folders without pictures: {first_few(empty)}; delete them")
    if {name.lower() for name in classes} <= {*SPLITS}:
        raise ValueError(f"{root}: found {', '.join(classes)}, but no folder train")
    labels = [label for label, name in enumerate(classes) for _ in of[name]]
    paths = [path for name in classes for path in of[name]]
    notes = [f"{root}: {classes[0]} is the only class folder"] if len(classes) == 1 else []
    return Listing(root, classes, paths, labels, left_out, notes, by_folders=True)


def of_one(root, paths, left_out, why="no class folders and no labels"):
    """The Listing of pictures without classes."""
    notes = [f"{root}: {why}: all pictures are of one class"]
    return Listing(root, [ALL], paths, [0] * len(paths), left_out, notes)


def by_labels(root, paths, left_out, file, content=None):
    """The Listing of pictures whose classes a file says. content: see `read_labels`."""
    named = read_labels(file, content)
    if file.parent.resolve() == Path(root).resolve():
        left_out[file.suffix.lower()] -= 1
    if named is None:
        return of_one(root, paths, left_out, f"no classes in {file}")
    of = _found(root, {*paths}, named, file)
    left_out[f"picture{{s}} that {file.name} does not name"] += len(paths) - len(of)
    paths, classes = [path for path in paths if path in of], in_order({*of.values()})
    names = [of[path] for path in paths]
    index = {name: i for i, name in enumerate(classes)}
    note = f"classes: those of {file}"
    listing = Listing(root, classes, paths, [index[n] for n in names], left_out, [note])
    listing.follow(classes)
    return listing


def _found(root, known, named, file):
    """Path of a picture -> its class. named: name in the file of labels -> class."""

    def path_of(name):
        path = posixpath.normpath(name.replace("\\", "/"))
        if path in known:
            return path
        return os.path.relpath(os.path.join(file.parent, path), root).replace(os.sep, "/")

    found = one_class_each(file, ((path_of(name), label) for name, label in named.items()))
    if missing := sorted(found.keys() - known):
        raise ValueError(
            f"{file}: {len(missing)} of its {len(named)} files are no pictures below {root}: "
            f"{first_few(missing)}"
        )
    return found
