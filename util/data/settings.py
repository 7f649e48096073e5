"""Settings of how pictures are listed and read, from which scripts create their flags."""

from dataclasses import dataclass

from util.flags import checked, fraction, positive_int
from util.settings import Settings, setting


def check_colour(text):
    """Raises ValueError for a text that is no colour: a name, or #rrggbb."""
    if text == "white":
        return
    from PIL import ImageColor

    try:
        opaque = len(ImageColor.getrgb(text)) == 3
    except ValueError:
        opaque = False
    if not opaque:
        raise ValueError(f"{text!r}: expected the name of a colour, or #rrggbb")


@dataclass(frozen=True)
class Reading(Settings):
    """How the pictures of a data set are listed and read.

    `pixels` fields decide what a picture's pixels are: evaluation takes them from the checkpoint.
    """

    flip: bool = setting(
        True,
        "never mirror images, as for letters, digits, or left and right in medicine; main_cache.py "
        "then caches none mirrored. Else half the images of a training batch are",
        "no_flip",
    )
    orientation: str = setting(
        "auto",
        "exif: turn pictures as their EXIF orientation says; stored: leave them as they are "
        "stored; auto: stored for ImageNet, as in the published code, else exif",
        choices=("auto", "exif", "stored"),
        pixels=True,
    )
    background: str = setting(
        "white",
        "what partly transparent pictures are shown over: the name of a colour, or #rrggbb",
        type=checked(check_colour),
        metavar="COLOUR",
        pixels=True,
    )
    channels: int = setting(
        None,
        "channels of the images: 1 for grey ones, 3 for colour",
        type=int,
        choices=(1, 3),
        otherwise="1 if all pictures are grey and the tokenizer takes 1, else 3",
        pixels=True,
    )
    label_file: str = setting(
        None,
        "the classes of pictures: JSON or CSV, such as EDM's dataset.json or lines file_name,label",
        metavar="FILE",
        otherwise="class folders; in a folder of pictures, a file that is there, such as "
        "labels.csv",
    )
    check_data: str = setting(
        "full",
        "pictures before use: full: read those that are not known, and decode what is new; sizes: "
        "only that none is missing or empty; none: nothing",
        choices=("full", "sizes", "none"),
    )


@dataclass(frozen=True)
class Validation(Settings):
    """The images that the held-out loss is of."""

    val_path: str = setting(
        None,
        "data for the held-out loss, which is logged at each evaluation: as --data_path, of "
        "which a held-out split such as val or test is used, or a folder of images for each class, "
        "or a cache of latents",
        metavar="PATH",
        otherwise="no held-out loss",
    )
    val_share: float = setting(
        None,
        "fraction of the training data that is not trained on, the same images in every run, but "
        "used for the held-out loss",
        type=fraction,
        metavar="X",
        otherwise="none; a resumed run has that of its checkpoint",
    )
    val_images: int = setting(
        2000, "images of these at most, spread evenly", type=positive_int, metavar="N"
    )


def check_validation(args):
    """Raises ValueError for flags of main_mar.py that contradict one another."""
    if args.val_path and args.val_share:
        raise ValueError(
            f"--val_path {args.val_path}, --val_share {args.val_share}: expected one of them"
        )
    if args.val_share == 1:
        raise ValueError("--val_share 1.0: expected below 1, as the rest is trained on")
    if args.num_images:
        return
    if not args.evaluate or args.online_eval:
        raise ValueError("--num_images 0: expected 1 or more, but with --evaluate alone")
    if args.out:
        raise ValueError(f"--num_images 0: no images to save as --out {args.out[0]}")


PLAIN = Reading(flip=False)  # for evaluation
PLAIN_NAMES = (*Reading.names(pixels=True), "label_file")  # what evaluation can be told


def plain_reading(data, said):
    """The Reading of real images that samples are compared with.

    data: what a checkpoint knows of its training data; its `reading`, name -> value, is that in
    training. said: name -> value according to flags, which override it; None where not given.
    """
    stored = (data or {}).get("reading") or {}
    values = {name: stored[name] for name in Reading.names(pixels=True) if name in stored}
    said = {name: said[name] for name in PLAIN_NAMES if said.get(name) is not None}
    return PLAIN.but(**values | said)
