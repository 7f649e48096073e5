"""Noise schedules and the timesteps that a shorter reverse process keeps."""

import math

import torch

TRAIN_STEPS = 1000  # paper, implementation details


def cosine_betas(steps=TRAIN_STEPS):
    """β_i of the cosine schedule (Nichol and Dhariwal 2021, eq. 17): (steps,), float64."""

    def alpha_bar(s):
        return math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps) for i in range(steps)]
    return torch.tensor(betas, dtype=torch.float64, device="cpu").clamp(max=0.999)


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


def even_log_snr(count, alphas_cumprod, highest):
    """`count` timesteps from `highest` to 0 at even steps of log(ᾱ/(1 − ᾱ)), ascending.

    As the solvers of higher order want it (Lu et al. 2022). alphas_cumprod: (T,). Fewer where two
    fall on the same.
    """
    log_snr = (alphas_cumprod / (1 - alphas_cumprod)).log()
    wanted = torch.linspace(0, 1, count, dtype=log_snr.dtype, device=log_snr.device)
    wanted = log_snr[highest] + (log_snr[0] - log_snr[highest]) * wanted
    return sorted({int((log_snr - value).abs().argmin()) for value in wanted})


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


def annealing(text):
    """How many diffusion steps a token gets, as a function of the share of the tokens' steps done.

    text: "linear", "cosine" or "two-stage", with the first and the last count behind it if they are
    not 50 and 5: "linear:100:10" (DiSA, Zhao et al. 2025). They fall by fives.
    Raises ValueError for anything else, and for a last count above the first.
    """
    kind, *counts = str(text).split(":")
    if kind not in ANNEALING or not all(c.isdigit() and int(c) for c in counts) or len(counts) > 2:
        raise ValueError(
            f"anneal {text!r}: expected {', '.join(ANNEALING)}, or counts as in linear:50:5"
        )
    first, last = (*map(int, counts), *(50, 5)[len(counts) :])
    if last > first:
        raise ValueError(f"anneal {text!r}: expected a first count of at least the last, {last}")

    def count(progress):
        steps = (first - last) * ANNEALING[kind](progress)
        return min(first, last + 5 * math.ceil(round(steps, 6) / 5))

    return count


ANNEALING = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: math.cos(math.pi / 2 * progress),
    "two-stage": lambda progress: float(progress < 0.5),
}
