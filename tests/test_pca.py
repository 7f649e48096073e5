"""Principal components of patches. Run: python -m pytest tests/test_pca.py"""

import json

import pytest
import torch
from cli import complain

import main_tokenizer
from engine_tokenizer import fit_patches, latent_scale
from models import build_tokenizer
from models.pca import PatchPCA
from util.data import open_data

HOW = {"batch_size": 5, "num_workers": 0, "device": torch.device("cpu")}


def fitted(images, embed_dim, stride=4):
    """(network, data set, scale, shift) of colour pictures at 16 pixels."""
    dataset = open_data(images, "train", 16)
    network = PatchPCA(embed_dim, stride)
    fit_patches(network, dataset, **HOW)
    return network, dataset, *latent_scale(network, dataset, per_channel=True, **HOW)


def test_all_components_lose_nothing(images):
    """With as many channels as a patch has numbers, and the fewer, the larger the error."""
    errors = []
    for embed_dim in (48, 12, 2):
        network, dataset, *_ = fitted(images, embed_dim)
        batch = torch.stack([image for image, _ in dataset])
        errors.append((network.decode(network.encode(batch)) - batch).square().mean().item())
    assert errors[0] < 1e-10 < errors[1] < errors[2]


def test_components_are_those_of_an_eigendecomposition(images):
    """Orthonormal, in the order of variance, and uncorrelated; the signs are the same anywhere."""
    network, dataset, scale, _ = fitted(images, 6)
    rows = network.components.flatten(1)
    assert torch.allclose(rows @ rows.T, torch.eye(6), atol=1e-5)
    assert (rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all()
    assert scale == sorted(scale)  # one over standard deviations
    latents = network.encode(torch.stack([image for image, _ in dataset]))
    products = torch.corrcoef(latents.transpose(0, 1).flatten(1)) - torch.eye(6)
    assert products.abs().max() < 0.05  # the mean is subtracted per channel, not per pixel


def test_from_training_to_a_tokenizer(images, tmp_path):
    """main_tokenizer.py fits it; its file alone gives latents with mean 0 and std 1 each."""
    flags = ["--tokenizer", "pca", "--epochs", "1", "--stride", "4", "--vae_embed_dim", "5"]
    flags += ["--img_size", "16", "--data_path", images, "--output_dir", tmp_path]
    flags += ["--extractor", "grey-pixels", "--device", "cpu", "--num_workers", "0", "--no_flip"]
    main_tokenizer.main(list(map(str, flags)))
    tokenizer = build_tokenizer("pca", vae_path=tmp_path / "tokenizer.ckpt")
    assert (tokenizer.channels, tokenizer.stride, tokenizer.image_channels) == (5, 4, 3)
    batch = torch.stack([image for image, _ in open_data(images, "train", 16)])
    latents = tokenizer.sample(tokenizer.encode(batch))
    assert latents.shape == (len(batch), 5, 4, 4)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(5), atol=0.01)
    again = tokenizer.decode(latents)
    assert torch.allclose(again, tokenizer.vae.decode(tokenizer.vae.encode(batch)), atol=1e-5)
    assert json.loads((tmp_path / "results.jsonl").read_text())["psnr"] > 10


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--stride", "5"), "--stride 5: images of 16 pixels, expected a multiple of the stride 5"),
        (("--stride", "4", "--vae_embed_dim", "49"), "embed_dim 49: patches of 4×4 pixels have 48"),
    ],
)
def test_what_does_not_fit(images, tmp_path, capsys, flags, message):
    """One line, before any work."""
    known = ("--tokenizer", "pca", "--epochs", "1", "--img_size", "16", "--device", "cpu")
    more = ("--data_path", images, "--output_dir", tmp_path, "--extractor", "grey-pixels")
    assert message in complain(capsys, main_tokenizer.main, *known, *more, *flags)


def test_another_file_is_refused(tmp_path):
    """By its path."""
    torch.save({"model": {"components": torch.zeros(3, 4)}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="a.ckpt: not the components of patches"):
        build_tokenizer("pca", vae_path=tmp_path / "a.ckpt")
