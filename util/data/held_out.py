"""Images that are held out from training: of a path of their own, or a share of the data set."""

from collections import defaultdict
from pathlib import Path

from torch.utils.data import Dataset

from util.data import check_classes, follow_classes, kind_of, labels_of, open_data
from util.data.manifest import layout_of
from util.files import first_few

SPLITS = ("val", "valid", "validation", "dev", "test")  # the first one that is there is used
PER_IMAGE = ("targets", "labels", "samples", "crcs")  # attributes of a data set, or None
BY_INDEX = ("name", "views", "stat", "crc", "pixels")  # methods


class Part(Dataset):
    """The images of a data set with these indices, and all else that the data set has."""

    def __init__(self, base, indices):
        self.base, self.indices = base, list(indices)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return self.base[self.indices[index]]

    def __getitems__(self, indices):
        indices = [self.indices[i] for i in indices]
        if hasattr(self.base, "__getitems__"):
            return self.base.__getitems__(indices)
        return [self.base[i] for i in indices]

    def __getattr__(self, name):
        if name in ("base", "indices") or name.startswith("__"):  # as when it is unpickled
            raise AttributeError(name)
        value = getattr(self.base, name)
        if name in PER_IMAGE:
            return self._own(value)
        if name == "names":
            return lambda: self._own(value())
        return (lambda index: value(self.indices[index])) if name in BY_INDEX else value

    def _own(self, values):
        """The entries of this part's images: a list, or an array of one."""
        if values is None or hasattr(values, "shape"):
            return values if values is None else values[self.indices]
        return [values[i] for i in self.indices]


class WithoutShare(Part):
    """A data set without the share of it that `rest` gives. Raises ValueError for none.

    share: the fraction of each class that is held out, spread evenly over its images: the same ones
    in every run, whatever the order of the classes.
    """

    def __init__(self, base, share):
        if hasattr(base, "training_loader"):
            raise ValueError(f"--val_share {share}: the data are a stream; expected --val_path")
        held = held_indices(labels_of(base) or [0] * len(base), share)
        if not held:
            raise ValueError(f"--val_share {share}: less than one image of each class")
        self.held, self.val_share = held, share
        hidden = {*held}
        super().__init__(base, [i for i in range(len(base)) if i not in hidden])

    def rest(self):
        """The images that are held out, none of them mirrored."""
        return Part(unflipped(self.base), self.held)


def held_indices(labels, share):
    """Indices of a share of the images of each class, which keeps one at least; sorted."""
    classes = defaultdict(list)
    for index, label in enumerate(labels):
        classes[label].append(index)
    chosen = []
    for own in classes.values():
        count = min(round(share * len(own)), len(own) - 1)
        chosen += [own[(2 * k + 1) * len(own) // (2 * count)] for k in range(count)]
    return sorted(chosen)


def spread(count, most):
    """At most so many of `count` indices, evenly spread."""
    most = min(most, count)
    return [i * count // most for i in range(most)]


def unflipped(dataset):
    """A data set that mirrors no image, of the same images."""
    return dataset.unflipped() if hasattr(dataset, "unflipped") else dataset


def open_val(path, img_size, classes, reading, training=()):
    """(data set of held-out images, whether it is a cache of latents) of --val_path.

    classes: names of those of training, or their number. training: paths of the training data,
    which are not held out. Raises ValueError.
    """
    if kind_of(path) is None and Path(path).is_dir() and layout_of(path):
        from util.data.cached import open_cache

        _check_other(path, training)
        dataset, cached = open_cache(path, flip=False), True
    else:
        dataset, cached = open_images(path, img_size, reading, training), False
    if isinstance(classes, int):
        check_classes(dataset, classes, path)
        return dataset, cached
    ours = [str(name) for name in dataset.classes]
    if others := sorted({*ours} ^ {*classes}):
        raise ValueError(
            f"--val_path {path}: its classes are not those of training: {first_few(others)}"
        )
    follow_classes(dataset, classes, "training")
    return dataset, cached


def open_images(path, img_size, reading, training=()):
    """The data set of the held-out split at `path`, or of all images there if it has no splits.

    Arguments and errors are those of `open_val`.
    """
    kind = kind_of(path)
    if kind is None:
        raise ValueError(f"--val_path {path}: no data set, expected as for --data_path, or a cache")
    if kind.held_out is None:
        raise ValueError(f"--val_path {path}: a stream, expected a data set with a length")
    if kind.held_out != "train":
        return open_data(path, kind.held_out, img_size, reading)
    for split in () if kind.plain(path) else SPLITS:
        try:
            return open_data(path, split, img_size, reading)
        except ValueError:  # there is none of this name
            continue
    if not kind.plain(path) and (Path(path) / "train").is_dir():
        raise ValueError(f"--val_path {path}: has train, expected one of {', '.join(SPLITS)}")
    _check_other(path, training)
    return open_data(path, "train", img_size, reading)


def _check_other(path, training):
    if Path(path).resolve() in [Path(other).resolve() for other in training if other]:
        raise ValueError(f"--val_path {path}: the training data; expected others, or --val_share")
