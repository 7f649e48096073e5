"""What several test files use: tiny data and tiny weights, made on the spot."""

import itertools
import os
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import register_feature_extractor

os.environ.setdefault("MAR_PRODUCTS", "torch")  # bits are compared across processes

from models.vae import AutoencoderKL
from util.classifier import fit_classifier
from util.evaluation import features

TINY_KL16 = {"ch": 32}  # the published layout at a quarter of its width


class Tiny(FeatureExtractorBase):
    """A fixed random projection: Inception takes minutes on a CPU. In float64, where the order of
    a product's sums, which depends on the batch, does not show."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)
        generator = torch.Generator().manual_seed(0)
        self.project = torch.nn.Parameter(torch.randn(48, 12, generator=generator).double() / 7)
        self.classify = torch.nn.Parameter(torch.randn(12, 5, generator=generator).double())

    @staticmethod
    def get_provided_features_list():
        return ("12", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "12"

    def forward(self, images):
        pooled = torch.nn.functional.adaptive_avg_pool2d(images.double() / 64, 4).flatten(1)
        features = (pooled @ self.project).relu()
        outputs = {"12": features, "logits": features @ self.classify}
        return tuple(outputs[name] for name in self.features_list)


register_feature_extractor("tiny", Tiny)


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


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What is known of pictures is not remembered from one test to the next."""
    monkeypatch.setenv("MAR_CACHE", str(tmp_path_factory.getbasetemp() / f"cache{next(_numbers)}"))


_numbers = itertools.count()


@pytest.fixture(scope="session", autouse=True)
def quick_classifier():
    """The classifier of the digits after one of its 40 epochs: each process fits its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "fit_classifier", partial(fit_classifier, epochs=1))
        yield


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


@pytest.fixture(scope="session")
def ckpt(tmp_path_factory):
    """A checkpoint after one short epoch on the digits."""
    import main_mar
    from util.checkpoint import LAST

    folder = tmp_path_factory.mktemp("digits")
    flags = ["--preset", "digits", "--device", "cpu", "--epochs", "1", "--batch_size", "256"]
    main_mar.main([*flags, "--num_sampling_steps", "5", "--output_dir", str(folder)])
    return folder / LAST
