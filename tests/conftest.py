"""What several test files use: tiny data and tiny weights, made on the spot."""

import numpy as np
import pytest
import torch
from PIL import Image

from models.vae import AutoencoderKL

TINY_KL16 = {"ch": 32}  # the published layout at a quarter of its width


def write_images(root, classes=("cat", "dog"), count=4, size=(40, 36)):
    """A folder of random JPEGs, `root`/train/class/i.jpg; returns `root`."""
    draw = np.random.default_rng(0)
    for name in classes:
        folder = root / "train" / name
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of eight JPEGs of two classes."""
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def vae_path(tmp_path_factory):
    """A weight file of a narrow KL-16, under `model` as the published one."""
    path = tmp_path_factory.mktemp("vae") / "kl16.ckpt"
    torch.manual_seed(0)
    torch.save({"model": AutoencoderKL(**TINY_KL16).state_dict()}, path)
    return path
