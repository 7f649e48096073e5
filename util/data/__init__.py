"""Data sets, identified by --data_path. Imports neither torch nor numpy.

A kind of data is a row of DATASETS. Its `open` gives a torch Dataset of (image (C, H, W) in
[-1, 1], label) with the attributes

    classes      names of the classes
    channels     C; with `take_channels(C)` images are read with 1 or 3
    img_size     H if it is W, else [H, W]
    description  text that identifies the images, computed on access

and, if the kind supports them,

    check(workers, record)        reads every image once; raises ValueError for damaged ones
    name(index), targets          class/name.ext of an image, and all labels, for caching latents
    stat(index), crc(index)       (size, time in ns) and CRC32 of the file of an image, by which
                                  caching notices that it was edited
    keep()                        keeps decoded images in memory, where they fit
    unflipped()                   the same images without random mirroring
    follow(classes)               takes another order of the same classes, as in a checkpoint
    training_loader(batch_size, num_workers, seed, pin_memory)
                                  a special loader, with `steps`, `images` and
                                  `epoch(n, start=0)` as in util.data.loader.Loader. For a
                                  streaming data set, which has no length and no indices: models
                                  can be trained on it, but nothing is compared with it, and its
                                  row has held_out=None
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name

from util.data import claims
from util.data.listing import holds_pictures
from util.data.settings import PLAIN, Reading
from util.files import first_few
from util.settings import add_flags
from util.table import Table

# files beside the checkpoints of a run
IMAGES_CHECKED = "data_checked.txt"  # which images were found intact
CACHE_CHECKED = "cache_checked.npz"  # what was found whole of an older cache


@dataclass(frozen=True)
class Kind:
    """A kind of data that --data_path can name."""

    open: str | Callable  # open(path, split, img_size, reading), or its "module:function"
    claims: Callable  # claims(path): whether a path is of this kind
    path: str = ""  # description of such a path; the name of the row if not given
    channels: int = 3  # of the images, if the data set does not say
    defaults: dict = field(default_factory=dict)  # default flags for such data: name -> value
    # split that generated images are compared with; None for streaming data
    held_out: str | None = "train"
    # plain(path): whether --reference means all images below a path, not a split of a data set
    plain: Callable = lambda path: False
    extractor: str | None = None  # usual feature extractor; None for Inception
    workers: int | None = None  # most loader workers that are useful; None for no limit


# The first row that claims a path opens it.
DATASETS = Table(
    "data set",
    {
        "digits": Kind(
            open="util.data.digits:open_digits",
            claims=lambda path: str(path) == "digits",
            path="'digits': the built-in 8×8 digits",
            channels=1,
            defaults={"img_size": 8, "class_num": 10, "tokenizer": "pixels", "patch_size": 2},
            held_out="test",
            extractor="digits-classifier",
            workers=0,  # the images are in memory
        ),
        "zip": Kind(
            open="util.data.zips:open_zip",
            claims=claims.is_zip,
            path="a .zip of such a folder, or of StyleGAN or EDM",
        ),
        "webdataset": Kind(
            open="util.data.tars:open_tars",
            claims=claims.are_tars,
            path="tars, as a WebDataset's '{0000..0146}.tar'",
        ),
        "hugging-face": Kind(
            open="util.data.hugging_face:open_hugging_face",
            claims=claims.is_hugging_face,
            path="a folder or .parquet files of Hugging Face's datasets",
        ),
        "folder": Kind(  # FIDs are published against ImageNet's training images
            open="util.data.folder:open_folder",
            claims=lambda path: (Path(path) / "train").is_dir() or holds_pictures(path),
            path="a folder with train/class/image files, class/image files or images alone",
            plain=lambda path: not (Path(path) / "train").is_dir(),
        ),
    },
)


def kind_of(path):
    """The Kind of a --data_path; None if no row claims it."""
    kinds = DATASETS.values() if path is not None else ()
    return next((kind for kind in kinds if kind.claims(path)), None)


def kind_or_folder(path):
    """The Kind of a --data_path; a path that no row claims counts as a folder yet to be made."""
    return kind_of(path) or DATASETS["folder"]


def is_data_set(path):
    """Whether a path denotes a data set."""
    return kind_of(path) is not None


def has_images(path):
    """Whether a path denotes a data set whose images can be compared with others."""
    kind = kind_of(path)
    return kind is not None and kind.held_out is not None


def is_reference_set(path):
    """Whether a --reference is a split of a data set, not just a folder with images or a file."""
    return has_images(path) and not kind_of(path).plain(path)


def describe_paths():
    """A description of valid --data_path values."""
    return ", or ".join(kind.path or name for name, kind in reversed(DATASETS.items()))


def add_data_flags(group):
    """Flags for the training data."""
    group.add_argument(
        "--data_path", default="./data/imagenet", metavar="PATH", help=describe_paths()
    )
    group.add_argument(
        "--use_cached", action="store_true", help="train on latents cached by main_cache.py"
    )
    group.add_argument(
        "--cached_path", default="", metavar="DIR", help="folder of these (default: none)"
    )
    add_flags(group, Reading)


def check_data_set(path):
    """Raises ValueError for a --data_path that does not denote a data set."""
    if not is_data_set(path):
        raise ValueError(f"--data_path {path}: expected {describe_paths()}")


def check_classes(dataset, class_num, source):
    """Raises ValueError unless a data set, opened from `source`, has class_num classes."""
    if len(dataset.classes) != class_num:
        raise ValueError(
            f"{source}: found {len(dataset.classes)} classes, --class_num is {class_num}: "
            f"pass --class_num {len(dataset.classes)}, or, where a checkpoint has other classes, "
            "begin a run with its weights by --init_from"
        )


def open_data(path, split, img_size, reading=PLAIN, workers=4, record=None, class_num=None):
    """Open a split of the data set at `path`. Raises ValueError.

    reading: a util.data.settings.Reading. class_num: expected number of classes; None for any.
    record: file that records which images were found intact, so that a resumed run does not read
    them all again; None: the images are not checked. workers: number of threads that check them.
    """
    kind = kind_or_folder(path)
    opener = resolve_name(kind.open) if isinstance(kind.open, str) else kind.open
    dataset = opener(path, split, img_size, reading)
    if class_num is not None:
        check_classes(dataset, class_num, path)
    if record is not None:
        check_images(dataset, workers, record)
    return dataset


def check_images(dataset, workers, record):
    """Check the images of a data set that can. Raises ValueError for damaged ones."""
    if hasattr(dataset, "check"):
        dataset.check(workers, record)


def match_channels(dataset, tokenizer, flag, follow=False):
    """Read a data set's images with as many channels as the tokenizer takes.

    flag: the value of --channels, or None. follow: whether colour may be dropped for it, as in the
    run that is resumed. Raises ValueError if the images do not fit.
    """
    wanted, found = tokenizer.image_channels, getattr(dataset, "channels", None)
    if None in (wanted, found) or wanted == found:
        return
    if flag:
        raise ValueError(f"--channels {flag}: the tokenizer takes images with channels: {wanted}")
    if not hasattr(dataset, "take_channels"):
        raise ValueError(f"the images have channels: {found}, the tokenizer takes {wanted}")
    if wanted < found and not follow:
        raise ValueError(
            "the tokenizer takes grey images, these are in colour: pass --channels 1 to drop it"
        )
    dataset.take_channels(wanted)


def follow_classes(dataset, classes, source):
    """Give the classes of a data set the order that they have in `source`, which is said.

    Nothing is done where the order is that already, or other classes are named, or None.
    """
    from util.dist import print0

    ours = [str(name) for name in dataset.classes]
    if ours == classes or sorted(ours) != sorted(classes or ()) or not hasattr(dataset, "follow"):
        return
    print0(f"NOTE: the classes are in the order of {source}: {first_few(classes, 4)}")
    dataset.follow(classes)


def facts_of(dataset):
    """What a checkpoint keeps of its training data: name -> plain data.

    classes: their names; counts: the number of images of each, if the data set knows; reading: how
    pictures are read, or were for a cache, as far as it says.
    """
    facts = {"classes": [str(name) for name in dataset.classes]}
    if hasattr(dataset, "reading"):
        facts["reading"] = dataset.reading.asdict()
    elif hasattr(dataset, "noted"):
        facts["reading"] = dict(dataset.noted)
    if hasattr(dataset, "val_share"):
        facts["val_share"] = dataset.val_share
    if labels := labels_of(dataset):
        found = Counter(labels)
        facts["counts"] = [found[i] for i in range(len(facts["classes"]))]
    return facts


def labels_of(dataset):
    """The labels of all images, a list; None if unknown."""
    labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
    return labels.tolist() if hasattr(labels, "tolist") else labels
