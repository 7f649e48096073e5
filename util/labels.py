"""Labels of images to sample, one each, with what reports say of them.

A function returns (labels, entries of reports): `labels` says how classes are balanced, `classes`
names them where that is known and they are few. config: a model's configuration, see models.
"""

from collections import Counter

from util.data.classes import known_names, spoken
from util.table import Table

MOST_NAMED = 20  # classes


def cycle_labels(chosen, count, config, text=None):
    """`count` labels that cycle through the chosen ones: consecutive images, of which splits of the
    Inception Score consist, are of all classes.

    chosen: class indices, or [None] for no class. text: how the user chose them, unless by all.
    """
    labels = [chosen[i % len(chosen)] for i in range(count)]
    text = text or state_balance(labels, config["model"]["class_num"])
    return labels, _entries(labels, text, config)


def balanced_labels(count, config, seed):
    """`count` labels, equally many of each class."""
    return cycle_labels(range(config["model"]["class_num"]), count, config)


def random_labels(count, config, seed):
    """`count` labels drawn at random, each class as often as in the training data.

    Where the number of images of each class is not known, all are equally likely.
    """
    import torch

    counts = (config.get("data") or {}).get("counts") or []
    known = any(counts)
    ends = torch.tensor(counts if known else [1] * config["model"]["class_num"]).cumsum(0)
    places = torch.randint(int(ends[-1]), (count,), generator=torch.Generator().manual_seed(seed))
    labels = torch.searchsorted(ends, places, right=True).tolist()
    odds = "as in the data" if known else "all classes equally likely (the data's are not known)"
    return labels, _entries(labels, f"{odds}, drawn at random (seed {seed})", config)


# functions of (number of images, configuration, seed)
LABELS = Table("labels", {"balanced": balanced_labels, "random": random_labels})


def state_balance(labels, class_num):
    """In words, how many of each class there are."""
    if class_num == 1:
        return "all of the only class"
    found = Counter(labels)
    least, most = min(found.values()), max(found.values())
    each = f"{least}" if least == most else f"{least} to {most}"
    if len(found) == class_num and most <= least + 1:
        return f"balanced, {each} of each of {class_num} classes"
    return f"{each} of each of {len(found)} of {class_num} classes"


def _entries(labels, text, config):
    """The entries of reports. text: how classes are balanced."""
    names, shown = known_names(config), sorted({label for label in labels if label is not None})
    if not names or not 0 < len(shown) <= MOST_NAMED or names == [*map(str, range(len(names)))]:
        return {"labels": text}
    return {"labels": text, "classes": spoken([names[label] for label in shown])}
