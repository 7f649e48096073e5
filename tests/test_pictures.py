"""What happens to each kind of file, and the table of docs/pictures.md. Run: pytest this file.

The table is written anew by

    PYTHONPATH=. python tests/test_pictures.py > page.md && mv page.md docs/pictures.md
"""

import contextlib
import io
import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from kinds import FILES, SIDE, colours
from PIL import features

import main_cache
import main_mar
import main_tokenizer
from models.found import open_training_data
from util.data import check_images
from util.data.cached import read_moments
from util.evaluation.image_sets import RealImages
from util.images import to_uint8

PAGE = Path(__file__).parents[1] / "docs" / "pictures.md"
RULE = "| --- | --- | --- | --- | --- | --- |\n"  # of the table's head


def flags_of(script, root, *more):
    flags = ["--data_path", str(root), "--img_size", str(SIDE), "--num_workers", "0", *more]
    return script.get_parser().parse_args(flags)


def by_training(root):
    """Images as main_mar.py trains on them."""
    args = flags_of(main_mar, root, "--no_flip", "--output_dir", str(root / "out"))
    dataset = open_training_data(args, {"img_size", "tokenizer"}, {})
    check_images(dataset, 1, root / "out" / "data_checked.txt")
    return uint8(dataset)


def by_cache(root):
    """The latents of main_cache.py, which are pixels here."""
    flags = ["--tokenizer", "pixels", "--cached_path", str(root / "cache"), "--device", "cpu"]
    args = flags_of(main_cache, root, *flags)
    dataset = main_cache.open_images(args)
    tokenizer = main_cache.open_tokenizer(args, dataset)
    with main_cache.held(args, root / "cache"):
        device = torch.device("cpu")
        main_cache.encode_images(args, root / "cache", tokenizer, dataset, device)
    files = {
        dataset.name(i): root / "cache" / f"{dataset.name(i)}.npz" for i in range(len(dataset))
    }
    moments = {name: torch.from_numpy(read_moments(p)["moments"]) for name, p in files.items()}
    return {name: to_uint8(each[None])[0] for name, each in moments.items()}


def by_tokenizer(root):
    """Images as main_tokenizer.py trains on them."""
    args = flags_of(main_tokenizer, root, "--no_flip", "--output_dir", str(root / "tokenizer"))
    return uint8(main_tokenizer.open_split(args, "train", flip=True))


def by_evaluation(root):
    """Real images as generated ones are compared with them."""
    images = RealImages(root, "train", SIDE)
    return {images.dataset.name(i): images[i][0] for i in range(len(images))}


DOORS = {
    "images": by_training,
    "cache": by_cache,
    "tokenizer training": by_tokenizer,
    "evaluation": by_evaluation,
}


def uint8(dataset):
    """The images of a data set: name -> (H, W, 3)."""
    return {dataset.name(i): to_uint8(dataset[i][0][None])[0] for i in range(len(dataset))}


def outcome(door, root, place):
    """(what a door does with a file: used, refused or passed over, what it says, its pixels)."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
            found = door(root)
    except ValueError as error:
        return "refused", plain_reason(str(error), root), None
    words = "; ".join(line for line in said.getvalue().splitlines() if f"{root}/train" in line)
    files = [p for p in (place, *place.rglob("*")) if p.is_file()] if place.exists() else []
    mine = [pixels for name, pixels in found.items() if root / "train" / name in files]
    return "used" if mine else "passed over", plain_reason(words, root), *(mine or [None])


def plain_reason(text, root):
    """A message without places and counts."""
    for known in (f"{root}/train: ", f"{root}/train/some/", f"{root}/train/", f"{root}/train"):
        text = text.replace(f"left out of {known}", "left out: ").replace(known, "")
    text = text.replace("\n", " ")
    for words in ("1 unreadable or truncated images: ", "; repair or delete them"):
        text = text.replace(words, "")
    text = re.sub(r" \(\d+ bytes not processed\)", "", text)
    return text.replace(": 1 of 2,", ":").replace(": 1 of 3,", ":")


def row(title):
    """What happens to a file of a kind: (outcome of each door, what is said, pixels of each)."""
    name, write = FILES[title]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "data"
        for path in (root / "train" / "some" / "a.png", root / "train" / "other" / "a.png"):
            path.parent.mkdir(parents=True)
            colours().save(path)
        place = Path(os.path.normpath(root / "train" / "some" / name))
        write(place)
        found = [outcome(door, root, place) for door in DOORS.values()]
    return [each[0] for each in found], found[0][1], [each[2] for each in found]


def line(title, outcomes, said):
    return f"| {title} | {' | '.join(outcomes)} | {said.replace('|', '')} |"


def page():
    """The text of docs/pictures.md, with the table as it is now."""
    head = PAGE.read_text(encoding="utf-8").partition(RULE)[0]
    return head + RULE + "\n".join(line(title, *row(title)[:2]) for title in FILES) + "\n"


@pytest.mark.parametrize("title", FILES)
def test_each_kind_of_file(title):
    """All four doors do what the table says, and give the same pixels."""
    if title == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    if title.endswith("Pillow 13") and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("an older Pillow, which gradio asks for, cannot read back what it writes")
    *found, pixels = row(title)
    assert line(title, *found) in PAGE.read_text(encoding="utf-8").splitlines()
    for other in pixels[1:]:
        assert (pixels[0] is None) == (other is None)
        assert pixels[0] is None or np.array_equal(pixels[0], other)


def test_the_page_is_whole():
    """Its rows are those of all kinds, in order."""
    rows = PAGE.read_text(encoding="utf-8").partition(RULE)[2].splitlines()
    assert [row.split(" | ")[0][2:] for row in rows] == [*FILES]


if __name__ == "__main__":
    os.environ["MAR_CACHE"] = tempfile.mkdtemp()
    sys.stdout.reconfigure(encoding="utf-8")
    print(page(), end="")
