"""Names of classes: their order, and how --labels finds them. Imports neither torch nor numpy.

A class is a folder, or a value in a file of labels; its index is its place in the order.
"""

import re
from difflib import get_close_matches

from util.files import first_few

ALL = "all"  # name of the class of pictures without classes: models of it are unconditional


def in_order(names):
    """Names of classes, sorted; as numbers if all are integers, so that 2 precedes 10."""
    names = list(names)
    if are_numbers(names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def are_numbers(names):
    """Whether all names of classes are integers."""
    return all(re.fullmatch(r"-?[0-9]+", name) for name in names)


def are_imagenet(names):
    """Whether names of classes are those of ImageNet-1k: 1,000 WordNet ids."""
    return len(names) == 1000 and all(re.fullmatch(r"n[0-9]{8}", name) for name in names)


def are_none(names):
    """Whether names of classes are those of pictures without classes."""
    return list(names) == [ALL]


def known_names(config):
    """The names of a model's classes, or None. config: a configuration, see models.

    A published checkpoint has none: its 1,000 classes are ImageNet's.
    """
    names = (config.get("data") or {}).get("classes")
    if not names and config["model"].get("class_num") == 1000:
        from timm.data import ImageNetInfo

        names = ImageNetInfo().label_names()
    return names or None


def same_classes(names, others):
    """For each of the names, the index of its class among the others, or None.

    The same name is the same class. So is a word that ImageNet has for the WordNet id of one class
    among the others only.
    """
    indices, lemmas, words = {name: i for i, name in enumerate(others)}, _lemmas(others), {}
    for name in others:
        for word in lemmas.get(name, "").split(", "):
            words.setdefault(_plain(word), []).append(indices[name])
    named = {word: found[0] for word, found in words.items() if len(found) == 1}
    return [indices.get(name, named.get(_plain(name))) for name in names]


def find_labels(text, class_num, names=None):
    """The class indices that a text such as "207,360,980-989" denotes; [None] for "none".

    "all" denotes every class. Each part is the name of a class if there is one of this name, else
    an index or a range of them. names: of the classes, or None. WordNet ids have ImageNet's names,
    too. In names, case does not matter, and _ stands for a space. If names are integers, a number
    is a name, and a range covers the names in it. Raises ValueError.
    """
    if text == "none":
        return [None]
    if text == "all":
        return list(range(class_num))
    found = _by_name(names or ())
    parts = [text] if _plain(text) in found else text.split(",")
    return [label for part in parts for label in _labels_of(part.strip(), text, class_num, found)]


def _labels_of(part, text, class_num, found):
    """The indices of the classes that a part of the text denotes. found: see `_by_name`."""
    named = found.get(_plain(part), [])
    if len(named) > 1:
        shown = ", ".join(map(str, named))
        raise ValueError(f"--labels {part}: the name of classes {shown}, expected one of these")
    if named:
        return named
    numbers = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part)
    if not numbers:
        raise ValueError(f"--labels {text!r}: expected {_instead(part, found)}")
    low, high = int(numbers[1]), int(numbers[2] or numbers[1])
    indices, expected = {i: i for i in range(class_num)}, f"classes from 0 to {class_num - 1}"
    if found and are_numbers(found) and [*found] != [str(i) for i in range(class_num)]:
        indices = {int(name): classes[0] for name, classes in found.items()}
        expected = f"classes among {first_few(list(found))}"
    if low > high or not {low, high} <= indices.keys():
        raise ValueError(f"--labels {text!r}: expected {expected}")
    return [index for number, index in indices.items() if low <= number <= high]


def _instead(part, found):
    """What was expected in place of a part that is the name of no class."""
    names = [name for name in found if not are_numbers([name])]
    if part and (near := get_close_matches(_plain(part), names, 1)):
        return f"{near[0]!r} in place of {part!r}"
    shown = f"names such as {first_few(names)}, " if names else ""
    return f"{shown}numbers, ranges as 0-9, all or none"


def _by_name(names):
    """Name in plain form -> the indices of the classes that have it."""
    lemmas, found = _lemmas(names), {}
    for index, name in enumerate(names):
        more = lemmas[name].split(", ") if name in lemmas else ()
        for each in {_plain(name), *map(_plain, more)}:
            found.setdefault(each, []).append(index)
    return found


def _lemmas(names):
    """WordNet id -> ImageNet's names of it, if any of the names is one."""
    if not any(re.fullmatch(r"n[0-9]{8}", name) for name in names):
        return {}
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-22k")
    return dict(zip(info.label_names(), info.label_descriptions(), strict=True))


def _plain(name):
    return name.strip().lower().replace("_", " ")


def spoken(names):
    """The names of classes for people: ImageNet's first word for a WordNet id."""
    lemmas = _lemmas(names)
    return [lemmas.get(name, name).split(", ")[0] for name in names]
