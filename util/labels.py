"""Labels of images to sample, one each, with what reports say of them.

A function returns (labels, entries of reports): `labels` says how classes are balanced, `classes`
names them where that is known and they are few. names: those of all classes, or None.
"""

from collections import Counter

from util.data.classes import spoken

MOST_NAMED = 20  # classes


def cycle_labels(chosen, count, class_num, names=None, text=None):
    """`count` labels that cycle through the chosen ones: consecutive images, of which splits of the
    Inception Score consist, are of all classes.

    chosen: class indices, or [None] for no class. text: how the user chose them, unless by all.
    """
    labels = [chosen[i % len(chosen)] for i in range(count)]
    return labels, _entries(labels, text or state_balance(labels, class_num), names)


def draw_labels(count, class_num, data, seed, names=None):
    """`count` labels drawn at random, each class as often as in the training data.

    data: what a checkpoint knows of these, see util.data.facts_of, or None. Where it does not know
    the number of images of each class, all are equally likely.
    """
    import torch

    counts = (data or {}).get("counts") or []
    known = any(counts)
    ends = torch.tensor(counts if known else [1] * class_num).cumsum(0)
    places = torch.randint(int(ends[-1]), (count,), generator=torch.Generator().manual_seed(seed))
    labels = torch.searchsorted(ends, places, right=True).tolist()
    odds = "as in the data" if known else "all classes equally likely (the data's are not known)"
    return labels, _entries(labels, f"{odds}, drawn at random (seed {seed})", names)


def state_balance(labels, class_num):
    """In words, how many of each class there are."""
    found = Counter(labels)
    least, most = min(found.values()), max(found.values())
    each = f"{least}" if least == most else f"{least} to {most}"
    if len(found) == class_num and most <= least + 1:
        return f"balanced, {each} of each of {class_num} classes"
    return f"{each} of each of {len(found)} of {class_num} classes"


def _entries(labels, text, names):
    """The entries of reports. text: how classes are balanced."""
    shown = sorted({label for label in labels if label is not None})
    if not names or not 0 < len(shown) <= MOST_NAMED or names == [*map(str, range(len(names)))]:
        return {"labels": text}
    return {"labels": text, "classes": spoken([names[label] for label in shown])}
