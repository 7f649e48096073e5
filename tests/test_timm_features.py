"""Features of timm's classifiers. Run: pytest tests/test_timm_features.py"""

import json
from unittest import mock

import pytest
import timm
import torch
from test_metrics import folder, pictures

from util.evaluation import __main__ as door
from util.evaluation import features
from util.evaluation.features import SMALLEST, Extractor, open_extractors
from util.evaluation.metrics import INCEPTION, pick_metrics
from util.evaluation.settings import Evaluation
from util.flags import run

NAME = "timm:test_resnet"


@pytest.fixture(scope="module")
def model():
    """A tiny classifier with random weights."""
    torch.manual_seed(1)
    return timm.create_model("test_resnet", pretrained=False).eval()


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("timm") / "model.pth"
    torch.save(model.state_dict(), path)
    return str(path)


def test_features_are_what_the_classifier_is_given(model, file):
    """Features are pooled, logits the model's own, of images normalized as it was trained."""
    images = torch.from_numpy(pictures(3, 0, side=SMALLEST))
    features, logits = Extractor(NAME, file)(images)
    mean, std = (torch.tensor(model.pretrained_cfg[name]) for name in ("mean", "std"))
    with torch.no_grad():
        normalized = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
        expected = model.forward_features(normalized).mean((2, 3))
        torch.testing.assert_close(features, expected)
        torch.testing.assert_close(logits, model(normalized))


def test_without_a_classifier_there_are_no_logits(monkeypatch, file):
    """Features remain, and the Inception Score falls away."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **how: create(name, num_classes=0))
    extractor = Extractor(NAME)
    assert extractor.classes is None and extractor.width > 1


@pytest.mark.parametrize(
    ("size", "expected"),
    [((32, 32), (96, 96)), ((32, 64), (96, 192)), ((96, 100), (96, 100)), ((128, 128), (128, 128))],
)
def test_small_images_are_enlarged(file, size, expected):
    """To SMALLEST pixels on the smaller side, in proportion; others stay as they are."""
    network = Extractor(NAME, file).network
    assert network.enlarged(torch.zeros(1, 3, *size)).shape[2:] == expected


def test_a_network_of_one_size_is_given_it(file):
    """Whatever the size of the images."""
    network = Extractor(NAME, file).network
    network.side = (160, 160)
    assert network.enlarged(torch.zeros(1, 3, 200, 180)).shape[2:] == (160, 160)


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("vit_small_patch14_dinov2", True),
        ("vit_small_patch14_reg4_dinov2", True),
        ("vit_small_plus_patch16_dinov3", False),
    ],
)
def test_dino(monkeypatch, name, token):
    """At 224 pixels, without logits: the class token, or the mean of the patches, not registers."""
    create, small = timm.create_model, {"embed_dim": 32, "depth": 1, "num_heads": 2}
    monkeypatch.setattr(timm, "create_model", lambda name, **how: create(name, **small))
    extractor = Extractor(f"timm:{name}", img_size=32)
    assert (extractor.width, extractor.classes) == (32, None)
    images, network = torch.from_numpy(pictures(2, 0, side=32)), extractor.network
    assert network.enlarged(torch.zeros(1, 3, 32, 32)).shape[2:] == (224, 224)
    with mock.patch.object(network.model, "forward_head", wraps=network.model.forward_head) as head:
        features, _ = extractor(images)
    tokens = head.call_args.args[0]
    patches = (224 // network.model.patch_embed.patch_size[0]) ** 2
    expected = tokens[:, 0] if token else tokens[:, -patches:].mean(1)
    torch.testing.assert_close(features, expected)


def test_the_hash_knows_the_normalization(file, monkeypatch):
    """The same weights, but images normalized in another way: another hash."""
    before, create = Extractor(NAME, file).sha256, timm.create_model
    assert before == Extractor(NAME, file).sha256
    other = {"pretrained_cfg_overlay": {"mean": (0.1, 0.2, 0.3)}}
    monkeypatch.setattr(timm, "create_model", lambda name, **how: create(name, **other))
    assert before != Extractor(NAME, file).sha256


def test_at_the_door(tmp_path, file):
    """A distance in these features is called frechet_distance, and the extractor is named."""
    root = folder(tmp_path / "images", pictures(20, 1))
    flags = [root, "--reference", root, "--extractor", NAME, "--extractor_weights", file]
    flags += ["--device", "cpu", "--output_dir", tmp_path, "--metrics", "frechet_distance"]
    door.main([*map(str, flags)])
    record = json.loads((tmp_path / "results.jsonl").read_text())
    assert record["extractor"] == NAME
    assert record["frechet_distance"] == pytest.approx(0, abs=1e-6)


def test_accuracy_is_left_out():
    """The classes of timm's models are not those of the data."""
    assert "accuracy" not in pick_metrics(None, NAME)
    with pytest.raises(ValueError, match="metric 'accuracy': is not for the extractor timm:test"):
        pick_metrics(["accuracy"], NAME)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--extractor", "timm:nonsense"], "--extractor timm:nonsense: not available (Unknown"),
        (["--extractor", NAME, "--extractor_weights", "none.pth"], "none.pth: no such file."),
        (
            ["--extractor", "timm:test_vit", "--extractor_weights", "FILE"],
            "FILE does not fit this VisionTransformer",
        ),
        (
            ["--extractor", "grey-pixels", "--extractor_weights", "FILE"],
            "--extractor_weights FILE: the extractor grey-pixels has none",
        ),
        (
            ["--extractor", NAME, "--extractor_weights", "FILE", f"{NAME}=b"],
            f"--extractor_weights FILE b: two files of {NAME}, expected",
        ),
        (["--extractor", "none"], "--extractor none: nothing can be measured; it is for the"),
        (["--extractor", "none", NAME], f"--extractor none {NAME}: expected different extractors"),
        (["--extractor", NAME, NAME], f"--extractor {NAME} {NAME}: expected different extractors"),
    ],
)
def test_wrong_flags(tmp_path, file, capsys, flags, expected):
    """One line, status 2."""
    root = folder(tmp_path / "images", pictures(20, 1))
    flags = [flag.replace("FILE", file) for flag in flags]
    with pytest.raises(SystemExit) as stop:
        run(door.main, [str(root), "--reference", str(root), "--device", "cpu", *flags])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: " + expected.replace("FILE", file))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a", ["a", None, "i"]),
        (None, [None, None, "i"]),
        (("a", "timm:two=b"), ["a", "b", "i"]),
        (("timm:two=b", f"{NAME}=a", f"{INCEPTION}=c"), ["a", "b", "c"]),
        ("timm:three=b", ["timm:three=b", None, "i"]),
    ],
)
def test_which_file_is_whose(monkeypatch, given, expected):
    """The file without a name is the main extractor's; Inception's flag is for it alone."""
    opened = []
    monkeypatch.setattr(features, "Extractor", lambda *given: opened.append(given[:2]))
    settings = Evaluation(extractor_weights=given, inception_weights="i")
    names = NAME, "timm:two", INCEPTION
    open_extractors(names, settings)
    assert opened == list(zip(names, expected, strict=True))
