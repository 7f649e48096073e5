"""Names and half-lives of the averages of a run's weights (EMA), util/ema.py. Nothing here imports
torch.

The main average is "ema". With --ema_images N M …, N is its half-life, and each further one has the
name ema_M: in checkpoints, logs and pictures, and for --weights.
"""

import math
import re

FURTHER = re.compile(r"ema_[1-9]\d{0,17}")
LEFT = 0.05  # the most that an average should hold of the initial weights at the end


def expect_weights(text):
    """Raises ValueError unless a text is a name of weights."""
    if text not in ("ema", "raw") and not FURTHER.fullmatch(text):
        raise ValueError(f"{text}: expected ema, raw, or ema_N with N of --ema_images")


def names_of(half_lives):
    """Name -> half-life, in images, of the averages of --ema_images, in their order."""
    main, *others = half_lives
    return {"ema": main, **{f"ema_{images}": images for images in others}}


def rate_of(half_life, images):
    """The decay rate of an average whose weights halve every half_life images, for a step of
    `images`; so the average depends on the batch size as little as can be."""
    return 0.5 ** (images / half_life)


def check(args, given):
    """Raises ValueError for half-lives that contradict the flags given, or each other."""
    images = args.ema_images or ()
    shown = " ".join(map(str, images))
    if images and "ema_rate" in given:
        raise ValueError(f"--ema_rate {args.ema_rate}: expected no --ema_images {shown} beside it")
    if len(set(images)) < len(images):
        raise ValueError(f"--ema_images {shown}: expected each half-life once")


def check_resumed(half_lives, before, source):
    """Raises ValueError if the main average of a checkpoint would continue as a further one, or the
    other way round.

    half_lives, before: those of --ema_images, of this run and of the one in `source`; may be None.
    """
    new, old = list(half_lives or ()), list(before or ())
    moved = {*new[:1]} & {*old[1:]} | {*new[1:]} & {*old[:1]}
    if moved:
        raise ValueError(
            f"--ema_images {' '.join(map(str, new))}: the main average of {source} is that of "
            f"{old[0]}, expected it first"
        )


def misfits(half_lives, images):
    """Sentences on half-lives too long for a run of so many images, each with one that fits."""
    most = int(images / math.log2(1 / LEFT))
    for half_life in half_lives:
        if half_life > most:
            left = 0.5 ** (images / half_life)
            yield (
                f"--ema_images {half_life}: after the {images} images of the run, this EMA still "
                f"holds {left:.0%} of the initial weights; at most {most} would fit"
            )
