"""Edit pictures with a model: fill in a part, vary, extend. `python edit.py --help`."""

import argparse
from pathlib import Path

import sample
from models.settings import Editing
from util.data.classes import find_labels, known_names
from util.data.settings import plain_reading
from util.files import check_writable, is_foreign, make_folder
from util.flags import Parser, add_machine_flags, machine, nonnegative_int, positive_int, run
from util.settings import add_flags, said_flags
from util.sizes import sides

SIDES = ("left", "right", "top", "bottom")


def get_parser():
    """The parser of all flags; those for editing and sampling are fields of settings."""
    parser = Parser(description=__doc__)
    group = parser.add_argument_group("pictures")
    sample.add_checkpoint_flags(group)
    add_picture_flags(group)
    group = parser.add_argument_group("editing")
    add_part_flags(group)
    add_flags(group, Editing, strength=None)
    sample.add_model_flags(parser)
    add_machine_flags(parser, num_workers=None)
    return parser


def add_picture_flags(group):
    """Flags for the pictures, the number of results and the files to write."""
    group.add_argument(
        "--image",
        nargs="+",
        metavar="FILE",
        help="pictures to edit, each scaled and cropped to the model's size, as in training "
        "(default: new ones, with --outpaint)",
    )
    group.add_argument(
        "--labels",
        help="what is drawn, a class by name or index: one for all pictures or one for each; for "
        "a single picture, a result for each (default: no class, and no guidance)",
    )
    group.add_argument(
        "--per_image",
        type=positive_int,
        default=1,
        metavar="N",
        help="results for each picture",
    )
    group.add_argument(
        "--out",
        nargs="+",
        metavar="PATH",
        help=".png: the result, or a grid of all; any other name: a folder of PNGs (default: "
        "edited.png)",
    )
    group.add_argument(
        "--compare",
        metavar="FILE",
        help="a .png of each picture, its part to fill in, and its results, side by side (default: "
        "none)",
    )
    group.add_argument("--batch_size", type=positive_int, default=64, help="results per batch")


def add_part_flags(group):
    """Flags for the part of a picture to fill in; without any, all of it is varied."""
    group.add_argument(
        "--mask",
        nargs="+",
        metavar="FILE",
        help="pictures of the size of --image, white where it is to be filled in: one for all or "
        "one for each (default: none)",
    )
    group.add_argument(
        "--box",
        nargs="+",
        type=box,
        default=[],
        metavar="X,Y,W,H",
        help="rectangles to fill in: left, top, width and height in pixels of the picture's file "
        "(default: none)",
    )
    group.add_argument(
        "--outpaint",
        nargs="+",
        type=extension,
        default=[],
        metavar="SIDE=N",
        help="extend pictures by N pixels at the left, right, top or bottom, as in left=64 "
        "right=64, rounded up to whole tokens (default: none)",
    )


def box(text):
    """An argparse type: X,Y,W,H to four integers."""
    try:
        left, top, width, height = map(int, text.split(","))
    except ValueError:
        left = top = width = height = -1
    if min(left, top, width - 1, height - 1) < 0:
        raise argparse.ArgumentTypeError(
            f"{text}: expected left, top, width and height in pixels, as in 10,20,64,32"
        )
    return left, top, width, height


def box_text(corner):
    """A box as it is given to --box."""
    return ",".join(map(str, corner))


def extension(text):
    """An argparse type: SIDE=N to (side, integer)."""
    side, _, pixels = text.partition("=")
    if side not in SIDES:
        raise argparse.ArgumentTypeError(f"{text}: expected SIDE=N, with {', '.join(SIDES)}")
    return side, nonnegative_int(pixels)


def main(argv=None):
    """Run the script."""
    args = get_parser().parse_args(argv)
    check(args)
    check_pictures(args)

    from models.editing import inpaint
    from util import dist
    from util.dist import print0
    from util.precision import pick_precision
    from util.rng import image_generators

    device = dist.init(**machine(args))
    if dist.world_size() > 1:
        raise ValueError(f"{dist.world_size()} processes: editing takes one")
    model, tokenizer, config = sample.open_checkpoint(args)
    sampling = sample.pick_sampling(args, config, model, [{}])
    labels, sampling = pick_labels(args, config, model, sampling)
    pictures, masks = read(args, config, tokenizer, model.patch_size * tokenizer.stride)
    jobs = plan(args, len(pictures), labels)
    shown = ", ".join(f"{name} {value}" for name, value in sampling.asdict().items())
    print0(f"{args.ckpt} ({args.weights}): {len(jobs)} results, {shown}, seed {args.seed}")
    model, tokenizer = model.to(device), tokenizer.to(device)
    how = {"precision": pick_precision(args.precision, device), **settings(args)}
    results, batches = [], range(0, len(jobs), args.batch_size)
    for batch, start in enumerate(batches, 1):
        how["progress"] = f"batch {batch} of {len(batches)}"
        indices = range(start, min(start + args.batch_size, len(jobs)))
        rows, classes = map(list, zip(*(jobs[i] for i in indices), strict=True))
        given = pictures[rows], masks[rows], None if classes[0] is None else classes
        given = *given, sampling, image_generators(args.seed, indices)
        results += [*inpaint(model, tokenizer, *given, **how)]
    write(args, pictures, masks, jobs, results)


def check(args):
    """Raises ValueError for flags that contradict each other, and for unwritable outputs."""
    part = args.mask or args.box
    if args.outpaint and (part or args.strength is not None):
        other = "--strength" if args.strength is not None else "--mask" if args.mask else "--box"
        raise ValueError(f"--outpaint extends whole pictures: expected no {other} beside it")
    if not args.image and not args.outpaint:
        raise ValueError("--image: expected a picture, or --outpaint for new ones")
    if not part and not args.outpaint and args.strength is None:
        raise ValueError(
            "--strength: expected how much of the picture to draw anew, or --mask, --box or "
            "--outpaint for a part of it"
        )
    if args.mask and len(args.mask) not in (1, len(args.image)):
        raise ValueError(
            f"--mask: {len(args.mask)} for {len(args.image)} pictures, expected one, or one each"
        )
    twice = [side for side in SIDES if sum(side == name for name, _ in args.outpaint) > 1]
    if twice:
        raise ValueError(f"--outpaint {twice[0]}: given twice, expected once")
    args.out = args.out or ["edited.png"]
    for path in [*args.out, *([args.compare] if args.compare else [])]:
        if Path(path).suffix == ".png":
            check_writable(path, path)
        elif path == args.compare or is_foreign(path, (".png",)):
            flag, more = ("--compare", "") if path == args.compare else ("--out", " or a folder")
            raise ValueError(f"{flag} {path}: expected a .png{more}")
        else:
            make_folder(path, "--out")


def pick_labels(args, config, model, sampling):
    """The classes that --labels asks for, [None] for no class; and the Sampling, which then has no
    guidance. Raises ValueError."""
    from util.dist import print0

    if args.labels is None and model.class_num == 1:
        return [0], sampling
    labels = find_labels(args.labels or "none", model.class_num, known_names(config))
    if labels != [None]:
        return labels, sampling
    if not model.label_drop_prob:
        raise ValueError(
            "--labels: expected a class; the model was trained with --label_drop_prob 0, so it has "
            "no unconditional mode"
        )
    if args.labels is None:
        print0("NOTE: no --labels: sampled without a class, and so without guidance")
    return labels, sampling.but(cfg=1.0)


def plan(args, count, labels):
    """(index of the picture, class) of each result. Raises ValueError."""
    if 1 in (count, len(labels)):
        jobs = [(i, label) for i in range(count) for label in labels]
    elif len(labels) == count:
        jobs = list(enumerate(labels))
    else:
        raise ValueError(
            f"--labels {args.labels}: {len(labels)} classes for {count} pictures, expected one, or "
            "one each"
        )
    return [job for job in jobs for _ in range(args.per_image)]


def settings(args):
    """The fields of Editing that are given."""
    return {k: v for k, v in said_flags(Editing, args).items() if v is not None}


# ---- pictures ------------------------------------------------------------------------------------


def check_pictures(args):
    """Raises ValueError for pictures and masks that cannot be opened, and boxes outside of them."""
    from util.data.pictures import size_of
    from util.data.settings import Reading

    upright = Reading(orientation="exif")
    for path in args.image or ():
        height, width = size_of(path, upright)
        for left, top, *more in args.box:
            if left >= width or top >= height:
                raise ValueError(
                    f"--box {box_text((left, top, *more))}: outside of {path}, which is "
                    f"{width}×{height} pixels"
                )
    for path in args.mask or ():
        size_of(path, upright)


def read(args, config, tokenizer, token):
    """Pictures uint8 (n, H, W, 3) and what to fill in of each, booleans (n, H, W).

    token: side of a token in pixels.
    """
    import numpy as np

    from models.editing import extended

    size = sides(config["model"]["img_size"])
    reading = plain_reading(config.get("data"), {})
    reading = reading.but(orientation="exif", channels=tokenizer.image_channels or 3)
    names = args.image or []
    masks = args.mask if args.mask and len(args.mask) > 1 else (args.mask or [None]) * len(names)
    found = [read_one(*pair, args, size, reading) for pair in zip(names, masks, strict=True)]
    found = found or [(np.zeros((*size, 3), np.uint8), np.ones(size, bool))]
    pictures, masks = (np.stack(parts) for parts in zip(*found, strict=True))
    if not args.outpaint:
        return pictures, masks
    say_rounding(args, token)
    pictures, margins = extended(pictures, token, **dict(args.outpaint))
    return pictures, margins | (not args.image)


def say_rounding(args, token):
    """Say it if --outpaint is no multiple of the tokens' side in pixels."""
    from util.dist import print0

    for side, pixels in args.outpaint:
        if pixels % token:
            whole = -(-pixels // token) * token
            print0(f"NOTE: --outpaint {side}={pixels}: {whole} pixels, whole tokens of {token}")


def read_one(path, mask_path, args, size, reading):
    """A picture uint8 (H, W, 3), as the model sees it, and what to fill in of it (H, W)."""
    import numpy as np

    from util.data.crop import center_crop_arr
    from util.data.pictures import read_picture

    picture = read_picture(path, reading)
    seen = np.asarray(center_crop_arr(picture, size).convert("RGB"))
    if not mask_path and not args.box:
        return seen, np.ones(size, bool)
    return seen, read_part(path, mask_path, args.box, picture.size, size)


def read_part(path, mask_path, corners, picture_size, size):
    """What to fill in of a picture, (H, W). Raises ValueError if the model sees nothing of it.

    corners: of boxes. picture_size: (width, height) of the picture's file.
    """
    import numpy as np

    from util.dist import print0

    mask = read_mask(mask_path, picture_size, size) if mask_path else np.zeros(size, bool)
    boxes = [(corner, draw_box(corner, picture_size, size)) for corner in corners]
    mask = np.any([mask, *(box for _, box in boxes)], 0)
    said = f"marks nothing of what the model sees of {path}"
    if not mask.any():
        raise ValueError(f"{f'--mask {mask_path}' if mask_path else '--box'}: {said}")
    for corner in [corner for corner, box in boxes if not box.any()]:
        print0(f"NOTE: --box {box_text(corner)}: {said}")
    return mask


def read_mask(path, picture_size, size):
    """Where a mask is white, (H, W). picture_size: (width, height) of the picture's file.

    A mask of the model's size is taken as it is, another scaled and cropped like the picture.
    Raises ValueError.
    """
    import numpy as np

    from util.data.pictures import read_picture
    from util.data.settings import Reading

    mask = read_picture(path, Reading(orientation="exif", channels=1))
    if mask.size == size[::-1]:
        return np.asarray(mask) > 127
    (width, height), (w, h) = mask.size, picture_size
    if abs(width * h - height * w) > max(w, h, width, height):
        raise ValueError(f"--mask {path}: {width}×{height} pixels, expected {w}×{h}, the picture's")
    return cropped(mask, picture_size, size)


def draw_box(corner, picture_size, size):
    """Where a box is, (H, W)."""
    from PIL import Image

    (left, top, width, height), (w, h) = corner, picture_size
    mask = Image.new("L", picture_size)
    mask.paste(255, (left, top, min(left + width, w), min(top + height, h)))
    return cropped(mask, picture_size, size)


def cropped(mask, picture_size, size):
    """A mask, scaled to the size of the picture's file, as `center_crop_arr` shows it: (H, W)."""
    import numpy as np
    from PIL import Image

    from util.data.crop import center_crop_arr

    mask = mask.resize(picture_size, Image.Resampling.NEAREST)
    return np.asarray(center_crop_arr(mask, size)) > 127


# ---- results -------------------------------------------------------------------------------------


def write(args, pictures, masks, jobs, results):
    """Write the results to --out and --compare."""
    import numpy as np

    from util.dist import print0
    from util.images import grid, save_image

    for path in args.out:
        if Path(path).suffix == ".png":
            several = len(results) > 1
            image = grid(np.stack(results), args.per_image, min_side=64) if several else results[0]
            save_image(path, image)
            continue
        for i, ((row, _), image) in enumerate(zip(jobs, results, strict=True)):
            stem = f"-{Path(args.image[row]).stem}" if args.image else ""
            save_image(Path(path) / f"{i:04d}{stem}.png", image)
    if args.compare:
        save_image(args.compare, compare(args, pictures, masks, jobs, results))
    print0(f"wrote {', '.join([*args.out, *([args.compare] if args.compare else [])])}")


def compare(args, pictures, masks, jobs, results):
    """A grid uint8 (H, W, 3), a row per picture: itself, its part to fill in, its results."""
    import numpy as np
    import torch

    from util.images import grid, hide_unknown

    rows = []
    for i, (picture, mask) in enumerate(zip(pictures, masks, strict=True)):
        hidden = hide_unknown(picture[None], torch.from_numpy(mask[None]))[0]
        shown = [picture] * (not args.outpaint) + [hidden] * (not mask.all())
        shown += [image for (row, _), image in zip(jobs, results, strict=True) if row == i]
        rows.append(np.stack(shown))
    return grid(np.concatenate(rows), len(rows[0]), min_side=64)


if __name__ == "__main__":
    run(main)
