"""Labels of samples, and what reports say of them. Run: python -m pytest tests/test_labels.py"""

from collections import Counter

import pytest
from cli import complain, read_lines

import main_mar
import sample
from util.labels import balanced_labels, cycle_labels, random_labels

DATA = {"classes": ["cat", "dog", "eel"], "counts": [10, 0, 30]}


def config(class_num, data=None, **entries):
    return {"model": {"class_num": class_num}, "data": data or entries}


def test_balanced_labels():
    """Consecutive images are of all classes; the report says how many there are of each."""
    labels, said = balanced_labels(7, config(3, DATA), 0)
    assert labels == [0, 1, 2, 0, 1, 2, 0]
    assert said["labels"] == "balanced, 2 to 3 of each of 3 classes"
    assert said["classes"] == ["cat", "dog", "eel"]
    assert balanced_labels(6, config(3), 0)[1] == {"labels": "balanced, 2 of each of 3 classes"}
    assert balanced_labels(6, config(9), 0)[1] == {"labels": "1 of each of 6 of 9 classes"}
    assert balanced_labels(6, config(1), 0)[1] == {"labels": "all of the only class"}
    assert cycle_labels([0, 2], 4, config(3), "0,2") == ([0, 2, 0, 2], {"labels": "0,2"})
    assert cycle_labels([None], 2, config(3, DATA), "none") == ([None] * 2, {"labels": "none"})


def test_random_labels():
    """As often as in the data, of which a class may have no image; the seed alone decides."""
    labels, said = random_labels(4000, config(3, DATA), 5)
    found = Counter(labels)
    assert found[1] == 0 and found[0] + found[2] == 4000
    assert abs(found[0] - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5
    assert said["labels"] == "as in the data, drawn at random (seed 5)"
    assert said["classes"] == ["cat", "eel"]
    same, other = (random_labels(4000, config(3, DATA), seed)[0] for seed in (5, 6))
    assert same == labels != other


@pytest.mark.parametrize("data", [None, {}, {"counts": [0, 0]}])
def test_unknown_frequencies(data):
    """All classes are equally likely, which is said."""
    labels, said = random_labels(1000, config(2, data), 1)
    assert abs(sum(labels) - 500) < 65
    odds = "all classes equally likely (the data's are not known), drawn at random (seed 1)"
    assert said == {"labels": odds}


def test_names_of_classes():
    """Those of few classes: ImageNet's words, and none where names are but the indices."""
    names = ["n01440764", "n01443537", "n99999999"]
    shown = cycle_labels([1, 2], 2, config(3, classes=names), "1,2")[1]["classes"]
    assert shown == ["goldfish", "n99999999"]
    for names in ([*map(str, range(9))], [f"class{i}" for i in range(99)]):
        assert "classes" not in balanced_labels(99, config(len(names), classes=names), 0)[1]


def test_reports_state_them(ckpt, tmp_path):
    """Both scripts, for balanced and for drawn labels; of the same seed they are the same."""
    sampled, evaluated = tmp_path / "sampled", tmp_path / "evaluated"
    common = ["--device", "cpu", "--num_images", 20, "--stats_dir", tmp_path, "--reference", "none"]
    common += ["--metrics", "inception_score", "--extractor", "tiny", "--num_iter", 2, "--seed", 3]
    for labels in ("random", "all"):
        flags = [*common, "--ckpt", ckpt, "--labels", labels, "--output_dir", sampled]
        sample.main([*map(str, flags)])
        labels = ["--labels", labels] if labels == "random" else []
        flags = [*common, "--resume", ckpt, "--evaluate", *labels, "--output_dir", evaluated]
        main_mar.main([*map(str, flags)])
    sampled, evaluated = (read_lines(path / "results.jsonl") for path in (sampled, evaluated))
    said = ["as in the data, drawn at random (seed 3)", "balanced, 2 of each of 10 classes"]
    assert [line["labels"] for line in sampled] == [line["labels"] for line in evaluated] == said
    for one, other in zip(sampled, evaluated, strict=True):
        assert one["labels_sha256"] == other["labels_sha256"] and one["images"] == 20


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--labels", "random"], "--labels random: expected --num_images, how many there"),
        (["--num_images", "5", "--per_class", "2"], "--num_images 5: expected no --per_class"),
    ],
)
def test_counts_that_contradict(flags, message, capsys):
    """One line, before a checkpoint is read."""
    assert message in complain(capsys, sample.main, "--ckpt", "none", *flags)
