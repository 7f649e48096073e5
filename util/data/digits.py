"""scikit-learn's handwritten digits, 8×8: a data set that needs no files."""

import numpy as np
import torch
from torch.utils.data import TensorDataset

from util.sizes import shown

DIGITS = "digits"  # as a --data_path


def open_digits(path, split, img_size, reading):
    """Open the digits, for a row of DATASETS; they are never flipped."""
    if img_size is not None and shown(img_size) != "8":
        raise ValueError(f"img_size {shown(img_size)}: the digits are 8×8, expected 8")
    return digits(split)


def digits(split):
    """The digits as images (1, 8, 8) in [-1, 1]: a fixed 80/20 split.

    split: "train" (1,437 images) or "test" (360, held out), stratified by class. Raises ValueError
    for another.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if split not in ("train", "test"):
        raise ValueError(f"split {split!r}: the digits have train and test")
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1  # 0..16 to [-1, 1]
    labels = torch.from_numpy(data.target).long()
    parts = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=data.target, random_state=0
    )
    indices = parts[("train", "test").index(split)]
    dataset = TensorDataset(images[indices], labels[indices])
    dataset.classes, dataset.targets = [str(digit) for digit in range(10)], labels[indices].tolist()
    dataset.channels, dataset.img_size = 1, 8
    dataset.description = f"digits {split}"
    return dataset
