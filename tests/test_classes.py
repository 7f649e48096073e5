"""Names of classes. Run: python -m pytest tests/test_classes.py"""

import pytest
from cli import ROOT

from models import checkpoint_config
from util.checkpoint import load_checkpoint
from util.data.classes import are_imagenet, find_labels, in_order, known_names
from util.data.settings import PLAIN, plain_reading

NAMES = ["African_elephant", "goldfish", "school_bus"]
NUMBERS = ["1", "2", "10"]


def test_order():
    """Numbers as numbers; all else as text."""
    assert in_order(["10", "2", "1"]) == ["1", "2", "10"]
    assert in_order(["10", "2", "1a"]) == ["10", "1a", "2"]


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("goldfish,school_bus", NAMES, [1, 2]),
        ("School Bus", NAMES, [2]),
        ("african elephant,0-1", NAMES, [0, 0, 1]),
        ("2,0", NAMES, [2, 0]),
        ("all", NAMES, [0, 1, 2]),
        ("none", NAMES, [None]),
        ("0-2", None, [0, 1, 2]),
        ("2", NUMBERS, [1]),  # the folder 2, not the third one
        ("1-10", NUMBERS, [0, 1, 2]),
        ("3", ["02", "03", "4"], [1]),
        ("a,b", ["a,b", "c", "d"], [0]),
        ("goldfish", ["n01440764", "n01443537", "cat"], [1]),
        ("n01440764,Carassius auratus", ["n01440764", "n01443537", "cat"], [0, 1]),
    ],
)
def test_labels(text, names, expected):
    """Names, indices, ranges and mixtures."""
    assert find_labels(text, 3, names) == expected


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("1-3", NUMBERS, "classes among 1, 2, 10"),
        ("goldfihs", NAMES, "expected 'goldfish' in place of 'goldfihs'"),
        ("zebra", NAMES, "names such as african elephant, goldfish, school bus, numbers"),
        ("0-3", NAMES, "classes from 0 to 2"),
        ("2-1", None, "classes from 0 to 2"),
        ("", None, "expected numbers, ranges"),
        ("3-9", NUMBERS, "classes among 1, 2, 10"),
        ("same", ["Same", "same", "b"], "the name of classes 0, 1, expected one"),
    ],
)
def test_labels_that_do_not_exist(text, names, message):
    """One line, with the nearest name if one is near."""
    with pytest.raises(ValueError, match=f"--labels .*{message}"):
        find_labels(text, 3, names)


def test_published_models_know_imagenet():
    """A model of 1,000 classes without names takes ImageNet's; any other has none."""
    names = known_names({"model": {"class_num": 1000}})
    assert are_imagenet(names) and find_labels("golden retriever", 1000, names) == [207]
    assert known_names({"model": {"class_num": 10}, "data": None}) is None
    assert known_names({"model": {"class_num": 3}, "data": {"classes": NAMES}}) == NAMES


def test_earlier_versions_left_pictures_as_they_are_stored():
    """What they keep of the data is the names of classes: evaluation reads as they did."""
    content = load_checkpoint(ROOT / "tests/fixtures/checkpoint.pth")
    content["config"].pop("data", None)
    content["record"] = {"classes": [str(i) for i in range(10)]}
    data = checkpoint_config(content, "file")["data"]
    assert data["classes"] == content["record"]["classes"]
    assert plain_reading(data, {}) == PLAIN.but(orientation="stored")
