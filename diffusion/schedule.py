"""Noise schedules and the timesteps that a shorter reverse process keeps."""

import math

import torch

TRAIN_STEPS = 1000  # paper, implementation details


def cosine_betas(steps=TRAIN_STEPS):
    """β_i of the cosine schedule (Nichol and Dhariwal 2021, eq. 17): (steps,), float64."""

    def alpha_bar(s):
        return math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps) for i in range(steps)]
    return torch.tensor(betas, dtype=torch.float64).clamp(max=0.999)


def spaced_timesteps(spacing, steps=TRAIN_STEPS):
    """The timesteps kept when `steps` are respaced, ascending.

    `spacing` is a count ("100"), comma-separated counts for equal sections of the process, earliest
    first ("10,10,20"), or "ddimN" for N timesteps at one integer stride from 0. Empty keeps all.
    Raises ValueError for anything else, and where the process is too short for it.
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
