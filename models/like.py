"""`sample.py --like FILE.png`: the flags and labels that make a picture again.

`made` is what the picture says it was made by, see util.provenance. Flags that were given win.
"""

import os
from pathlib import Path

from util import hub, provenance


def is_again(args):
    """Whether the very picture of --like is asked for, not a number of images like it."""
    return not args.num_images and not args.per_class


def read_like(args, given):
    """What the picture of --like was made by, see util.provenance; completes flags not given.

    given: names of the flags that were given. Raises ValueError.
    """
    made = provenance.read(args.like)
    if made["edited"]:
        raise ValueError(
            f"{args.like}: edited ({made['edited']}): it does not hold its original, without which "
            "it cannot be made again"
        )
    for name in ("ckpt", "weights", "seed", "precision"):
        if name not in given:
            setattr(args, name, made[name])
    if made["guide"] and "guide" not in given:
        args.guide = made["guide"]["ckpt"]
        if not (os.path.exists(args.guide) or hub.is_name(args.guide)):
            raise ValueError(
                f"{args.like}: guided by {args.guide}, which is not there: --guide takes its new "
                "place"
            )
    if is_again(args):
        return one_batch(args, made, "batch_size" in given)
    return made | {"labels": shown_labels(made)}


def one_batch(args, made, smaller):
    """`made` for the batches to sample: an image needs its batch only, at most --batch_size of it.

    smaller: whether --batch_size was given; rounding then differs.
    """
    index, labels = made["index"], made["labels"]
    if not smaller:
        args.batch_size = len(labels) if index is not None else made["batch_size"] or len(labels)
    if index is None:
        return made
    if others := [path for path in args.out if Path(path).suffix != ".png"]:
        raise ValueError(f"--out {others[0]}: one image like {args.like}, expected a name in .png")
    start = index - index % args.batch_size
    labels = labels[start : start + args.batch_size]
    return made | {"labels": labels, "first": made["first"] + start, "index": index - start}


def shown_labels(made):
    """The labels of what a picture shows, each once: one image or a grid."""
    labels, index = made["labels"], made["index"]
    return list(dict.fromkeys(labels if index is None else labels[index : index + 1]))


def find_ckpt(args, made):
    """The checkpoint's file, fetched if it is a name of the hub. Raises ValueError."""
    from models.stored import check_made
    from util.checkpoint import find_weights

    check_made(made, args.like)
    there = os.path.exists(args.ckpt) or hub.is_name(args.ckpt)
    if not there and args.ckpt == made["ckpt"]:
        raise ValueError(
            f"{args.like}: made by {args.ckpt}, which is not there: --ckpt takes its new place"
        )
    return find_weights(args.ckpt)


def find_tokenizer(args, made):
    """The tokenizer's arguments. Raises ValueError if its file is not there."""
    own = made["tokenizer"]
    path = args.vae_path or own.get("vae_path")
    if not path:
        return own
    beside = Path(args.ckpt).parent / Path(path).name
    if not args.vae_path and path.startswith(hub.HERE) and beside.exists():
        path = str(beside)
    if not os.path.exists(path):
        raise ValueError(
            f"{args.like}: its tokenizer is {path}, which is not there: --vae_path takes its new "
            "place"
        )
    return {**own, "vae_path": path}


def compare_digests(args, made, model, tokenizer, guide=None):
    """Say it if weights are not those that the picture of --like was made with."""
    from util.dist import print0
    from util.weights import digest

    parts = {"weights": model, "tokenizer": tokenizer}
    before = {name: made[f"{name}_sha256"] for name in parts}
    if made["guide"]:
        parts["guide"], before["guide"] = guide, made["guide"]["sha256"]
    others = [name for name in parts if digest(parts[name].state_dict()) != before[name]]
    if others:
        print0(
            f"NOTE: {args.ckpt}: not the {' and '.join(others)} that {args.like} was made with: "
            "the picture will differ"
        )


def check_labels(args, like, chosen, class_num):
    """Raises ValueError for labels that --like cannot have, in a model of class_num classes."""
    if unknown := [label for label in chosen if label is not None and label >= class_num]:
        raise ValueError(
            f"{args.like}: of class {unknown[0]}, and {args.ckpt} has {class_num} classes: "
            "expected --labels"
        )
    if is_again(args) and args.labels and len(chosen) > 1 and like["index"] is not None:
        raise ValueError(
            f"--labels {args.labels}: {args.like} is one image, expected one class, or --num_images"
        )
