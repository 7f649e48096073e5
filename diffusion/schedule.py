"""Timesteps: respacing of the reverse process, and annealing of the number of steps."""

import math

TRAIN_STEPS = 1000  # paper, implementation details


def spaced_timesteps(spacing, steps=TRAIN_STEPS):
    """The timesteps that remain when `steps` are respaced, ascending.

    `spacing` is a count ("100"), comma-separated counts for equal sections of the process, earliest
    first ("10,10,20"), or "ddimN" for N timesteps at one integer stride from 0. Empty means all.
    Raises ValueError for anything else, and if the process is too short for it.
    """
    spacing = str(spacing).strip()
    if not spacing:
        return list(range(steps))
    if spacing.startswith("ddim"):
        return _strided(spacing, _count(spacing[4:], spacing), steps)
    counts = [_count(part, spacing) for part in spacing.split(",")]
    kept, start = [], 0
    for section, count in enumerate(counts):
        size = steps // len(counts) + (section < steps % len(counts))
        if count > size:
            raise ValueError(
                f"diffusion steps {spacing!r}: {count} steps do not fit into a section of {size}"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 0.0
        kept += [start + round(k * stride) for k in range(count)]
        start += size
    return kept


def _strided(spacing, count, steps):
    for stride in range(1, steps):
        kept = range(0, steps, stride)
        if len(kept) == count:
            return list(kept)
    raise ValueError(f"diffusion steps {spacing!r}: no integer stride takes {count} of {steps}")


def _count(text, spacing):
    if not text.strip().isdigit() or int(text) < 1:
        raise ValueError(
            f"diffusion steps {spacing!r}: expected a count such as 100, "
            "comma-separated counts such as 10,10,20, or ddimN such as ddim50"
        )
    return int(text)


ANNEALING = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: math.cos(math.pi / 2 * done),
    "two-stage": lambda done: float(done < 0.5),
}


def annealing(text):
    """The number of diffusion steps as a function of the fraction of autoregressive steps done.

    text: "linear", "cosine" or "two-stage", followed by the first and the last number if these are
    not 50 and 5: "linear:100:10" (DiSA, Zhao et al. 2025). It decreases in steps of five. "none"
    is no annealing and gives None. Raises ValueError for anything else, and for a last number above
    the first.
    """
    if text in (None, "none"):
        return None
    kind, *counts = str(text).split(":")
    if kind not in ANNEALING or not all(c.isdigit() and int(c) for c in counts) or len(counts) > 2:
        raise ValueError(
            f"anneal {text!r}: expected {', '.join(ANNEALING)}, numbers as in linear:50:5, or none"
        )
    first, last = (*map(int, counts), *(50, 5)[len(counts) :])
    if last > first:
        raise ValueError(f"anneal {text!r}: expected a first number of at least the last, {last}")

    def count(done):
        steps = (first - last) * ANNEALING[kind](done)
        return min(first, last + 5 * math.ceil(round(steps, 6) / 5))

    return count
