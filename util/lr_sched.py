"""The learning rate as a function of training progress."""

import math

SCHEDULES = ("constant", "cosine")


def learning_rate(epoch, *, lr, warmup_epochs, epochs, min_lr=0.0, schedule="constant"):
    """The learning rate at a fractional epoch: warm-up, then constant or half a cosine to min_lr.

    Raises ValueError for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"lr_schedule {schedule!r}: expected {' or '.join(SCHEDULES)}")
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    if schedule == "constant":
        return lr
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2
