"""Names of classes: their order, and whether they are ImageNet's. Imports neither torch nor numpy.

A class is a folder, or a value in a file of labels; its index is its place in the order.
"""

import re


def in_order(names):
    """Names of classes, sorted; as numbers if all are integers, so that 2 precedes 10."""
    names = list(names)
    if all(re.fullmatch(r"-?[0-9]+", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def are_imagenet(names):
    """Whether names of classes are those of ImageNet-1k: 1,000 WordNet ids."""
    return len(names) == 1000 and all(re.fullmatch(r"n[0-9]{8}", name) for name in names)
