"""Several extractors, none, and one fitted on the data. Run: pytest tests/test_extractors.py"""

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from test_metrics import data_set, folder, npz, open_tiny, pictures

import main_tokenizer
from util import model_card
from util.evaluation import __main__ as door
from util.evaluation import accumulator, features, fitted, metrics
from util.evaluation.evaluator import open_evaluator
from util.evaluation.features import Extractor
from util.evaluation.fitted import Labelled, Network
from util.evaluation.image_sets import RealImages
from util.evaluation.metrics import INCEPTION, kernel_distance, memorization, pick_metrics
from util.evaluation.settings import Evaluation
from util.evaluation.sweep import find_result, write_sweep

TWO = ("tiny", "grey-pixels")


@pytest.fixture
def data(tmp_path):
    """A data set of 60 images."""
    return data_set(tmp_path / "data")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few steps of the fit; loaders without processes."""
    monkeypatch.setattr(fitted, "STEPS", 3)
    for module in (accumulator, fitted):
        loader = module.plain_loader
        monkeypatch.setattr(module, "plain_loader", lambda *given, of=loader: of(*given[:2], 0))


def measured(opened, images):
    """The metrics of images."""
    measurement = opened.start(len(images))
    measurement.add(range(len(images)), images)
    return opened.metrics(measurement.summary())


# ---- several ---------------------------------------------------------------------------------


def test_every_metric_in_every_extractor(tmp_path, data):
    """Of one pass: each number is that of an evaluation in these features alone; so are those of
    real images, which are computed once."""
    images = pictures(30, 1)
    both = open_tiny(data, tmp_path, extractor=TWO)
    found = measured(both, images)
    alone = [open_tiny(data, tmp_path / name, extractor=name) for name in TWO]
    first, second = (measured(each, images) for each in alone)
    assert found == {**first, **{f"{name}@grey-pixels": second[name] for name in second}}
    real = alone[1].baseline[0]
    assert {f"{name}@grey-pixels": real[name] for name in real}.items() <= both.baseline[0].items()
    with mock.patch("util.evaluation.baseline._measure") as measure:
        assert open_tiny(data, tmp_path, extractor=TWO[::-1]).baseline[0]["frechet_distance"]
    assert not measure.called
    shas = {each.extractor.name: each.extractor.sha256 for each in alone}
    stated = both.stated(30)
    assert {stated["extractor"]: stated["extractor_sha256"]} | stated["more_extractors"] == shas


def test_metrics_that_fit_one_of_them():
    """The FID is of Inception alone, wherever it stands; others have its name in front of @."""
    two = "inception-v3-compat", "tiny"
    names = ["fid", "pixel_distance", "frechet_distance"]
    assert list(pick_metrics(names, *two)) == ["fid", "pixel_distance", "frechet_distance@tiny"]
    assert list(pick_metrics(["fid"], *two[::-1])) == ["fid@inception-v3-compat"]
    with pytest.raises(ValueError, match="metric 'fid': is not for the extractor tiny"):
        pick_metrics(["fid"], "tiny", "grey-pixels")


def test_further_numbers_are_in_every_report(tmp_path, data, capsys):
    """In results.jsonl, and so in a sweep's table and plots, a card, and what a sweep skips."""
    root = folder(tmp_path / "images", pictures(20, 1))
    flags = [root, "--reference", data, "--extractor", *TWO, "--stats_dir", tmp_path / "stats"]
    names = ["--metrics", "frechet_distance", "precision_recall"]
    flags += [*names, "--device", "cpu", "--img_size", "24", "--output_dir", tmp_path]
    door.main([*map(str, flags)])
    record = json.loads((tmp_path / "results.jsonl").read_text())
    name = "frechet_distance@grey-pixels"
    assert record[name] > 0 and name in record["real"]
    record |= {"cfg": 1.0, "seconds_per_image": 1.0}
    files = write_sweep([record, {**record, "cfg": 2.0}], [{"cfg": 1.0}, {"cfg": 2.0}], tmp_path)
    header = files[0].read_text().splitlines()[0]
    assert header == (
        f"cfg,frechet_distance,{name},precision,precision@grey-pixels,recall,recall@grey-pixels,"
        "seconds_per_image,images"
    )
    assert files[-1].name == "sweep_guidance.png"
    assert metrics.labels(record)[name] == "Fréchet distance, grey-pixels"
    assert f"| {name} |" in model_card.metrics_table([record], ["cfg"])
    assert find_result(tmp_path / "results.jsonl", {"images": 20}, [name])


# ---- the sFID --------------------------------------------------------------------------------


@pytest.fixture
def spatial(monkeypatch):
    """A network in Inception's place, with the layer of the sFID."""

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.Mixed_6d = torch.nn.Module()
            self.Mixed_6d.branch1x1 = torch.nn.AdaptiveAvgPool2d(2)

        def forward(self, images):
            return (self.Mixed_6d.branch1x1(images.double().repeat(1, 3, 1, 1)).mean((2, 3)),)

    published = features._published
    monkeypatch.setattr(
        features,
        "_published",
        lambda name, *more: Network() if name == INCEPTION else published(name, *more),
    )


def test_spatial_features(spatial):
    """Seven channels of each place, in ADM's order."""
    images = pictures(3, 1)
    found, logits = Extractor("inception-v3-spatial")(images)
    assert found.shape == (3, 2 * 2 * 7) and logits is None
    corner = images[:, :12, 12:].mean((1, 2))  # the second place of the first row
    expected = torch.from_numpy(np.concatenate([corner, corner, corner[:, :1]], 1)).float()
    torch.testing.assert_close(found[:, 7:14], expected)


def test_the_sfid(tmp_path, data, spatial):
    """Beside another extractor, by name; of a file of ADM's from its own statistics."""
    images = pictures(40, 1)
    names = {"metrics": ("frechet_distance", "sfid")}
    found = measured(open_tiny(data, tmp_path, **names), images)
    assert found["sfid"] > 0
    given = Extractor("inception-v3-spatial")(images)[0].double()
    arrays = {"mu_s": given.mean(0), "sigma_s": given.T.cov(), "mu": np.ones(12)}
    file = npz(tmp_path, **arrays, sigma=np.eye(12), sha256=Extractor("tiny").sha256)
    opened = open_tiny(data, tmp_path, reference=str(file), **names)
    assert abs(measured(opened, images)["sfid"]) < 1e-4 * found["sfid"]
    file = npz(tmp_path, mu=np.ones(12), sigma=np.eye(12))
    with pytest.raises(ValueError, match="expected images for inception-v3-spatial"):
        open_tiny(data, tmp_path, reference=str(file), **names)


# ---- none ------------------------------------------------------------------------------------


def test_a_tokenizer_without_features(tmp_path, data, monkeypatch):
    """No network is opened; PSNR and scale are measured, distances are not."""
    monkeypatch.setattr("util.evaluation.features.Extractor", None)
    flags = ["--data_path", data, "--img_size", 24, "--tokenizer", "pca", "--epochs", 1]
    flags += ["--stride", 8, "--extractor", "none", "--device", "cpu", "--num_workers", 0]
    main_tokenizer.main([*map(str, [*flags, "--output_dir", tmp_path / "run"])])
    record = json.loads((tmp_path / "run" / "results.jsonl").read_text())
    assert record["extractor"] == "none" and "extractor_sha256" not in record
    assert record["psnr"] > 5 and record["latent_std"] > 0 and "ssim" in record
    assert not {"rfid", "rfd"} & {*record}


def test_a_tokenizer_in_several_features(tmp_path, data):
    """One distance in each."""
    flags = ["--data_path", data, "--img_size", 24, "--tokenizer", "pca", "--epochs", 1]
    flags += ["--stride", 8, "--extractor", *TWO, "--device", "cpu", "--num_workers", 0]
    main_tokenizer.main([*map(str, [*flags, "--output_dir", tmp_path / "run"])])
    record = json.loads((tmp_path / "run" / "results.jsonl").read_text())
    assert record["rfd"] > 0 and record["rfd@grey-pixels"] > 0
    assert list(record["more_extractors"]) == ["grey-pixels"]


# ---- fitted ----------------------------------------------------------------------------------


def labelled(data, cache):
    return Labelled(str(data), lambda source: RealImages(source, "train", 24), str(cache))


def test_a_classifier_learns_and_is_kept(tmp_path, data, capsys, monkeypatch):
    """Fitted twice, it is the same; kept, it is not fitted again, unless its file is damaged."""
    sha256 = Extractor("classifier", data=labelled(data, tmp_path / "one")).sha256
    assert "of held-out images, now in" in capsys.readouterr().out
    assert Extractor("classifier", data=labelled(data, tmp_path / "two")).sha256 == sha256
    monkeypatch.setattr(fitted, "fit", mock.Mock(side_effect=fitted.fit))
    kept = Extractor("classifier", data=labelled(data, tmp_path / "two"))
    assert (kept.sha256, kept.width, kept.classes) == (sha256, 128, 2)
    assert not fitted.fit.called
    path = next(Path(tmp_path / "two").glob("data-classifier-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    assert Extractor("classifier", data=labelled(data, tmp_path / "two")).sha256 == sha256
    assert fitted.fit.called and ": fitted again" in capsys.readouterr().out


def test_a_classifier_tells_classes_apart(monkeypatch):
    """Bright pictures from dark ones, of any size; what was held out counts."""
    monkeypatch.setattr(fitted, "STEPS", 20)
    labels = torch.arange(60) % 2
    images = (labels * 150).view(-1, 1, 1, 1) + torch.randint(0, 90, (60, 3, 8, 12))
    assert fitted.fit(Network(2), images.to(torch.uint8), labels, None) == 1


def test_large_images_are_shrunk():
    """To 64 pixels on the smaller side; smaller ones stay as they are."""
    assert fitted.shrunk(torch.zeros(1, 3, 128, 192, dtype=torch.uint8)).shape == (1, 3, 64, 96)
    images = torch.zeros(1, 3, 24, 48, dtype=torch.uint8)
    assert fitted.shrunk(images) is images


def test_accuracy_by_a_fitted_classifier(tmp_path, data):
    """Its classes are those of the data; without a reference set, those of --data_path."""
    settings = Evaluation("none", ("accuracy",), "classifier", stats_dir=tmp_path / "stats")
    opened = open_evaluator(settings, str(data), img_size=24, num_images=30)
    measurement = opened.start(30)
    measurement.add(range(30), pictures(30, 1), [0] * 30)
    assert 0 <= opened.metrics(measurement.summary())["accuracy"] <= 1


@pytest.mark.parametrize(
    ("classes", "known"), [(None, True), (["a", "b"], True), (["b", "a"], False), (["a"], False)]
)
def test_accuracy_by_other_classes(tmp_path, data, classes, known):
    """Or by the same in another order is left out: labels would denote others."""
    settings = Evaluation("none", None, "classifier", stats_dir=tmp_path / "stats")
    opened = open_evaluator(settings, str(data), img_size=24, num_images=30, classes=classes)
    assert ("accuracy" in opened.rows) == known


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "is fitted on labelled images, expected a data set as --reference or --data_path"),
        ("plain", "plain has no classes, expected labelled images"),
        ("few", "few has 4 images, expected 20"),
    ],
)
def test_data_that_no_classifier_fits(tmp_path, source, message):
    """One line."""
    data = None
    if source:
        data = labelled(tmp_path / source, tmp_path)
        classes = ["all"] if source == "plain" else ["a", "b"]
        for name in classes:
            place = tmp_path / source / "train" / ("" if source == "plain" else name)
            folder(place, pictures(2, 1))
    with pytest.raises(ValueError, match=f"--extractor classifier: .*{message}$"):
        Extractor("classifier", data=data)


# ---- numbers ---------------------------------------------------------------------------------


def test_memorization():
    """Copies have 1, images as far as held-out ones 0.5, others 0; equal distances count half."""
    training = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    held_out = torch.tensor([[9.0, 0, 0, 0], [0, 9.0, 0, 0]])
    assert memorization(training[:50], held_out, training) == 1
    assert memorization(held_out, held_out, training) == 0.5
    assert memorization(2 * held_out, held_out, training) == 0
    assert memorization(torch.cat([training[:3], 2 * held_out[:1]]), held_out, training) == 0.75


def test_memorization_of_all_pairs():
    """It is the fraction of pairs of a sample and a held-out image."""
    draw = torch.Generator().manual_seed(1)
    samples, held_out, training = (torch.randn(n, 3, generator=draw) for n in (20, 30, 1100))
    near, far = (torch.cdist(each, training).amin(1) for each in (samples, held_out))
    expected = (near[:, None] < far[None]).double().mean().item()
    assert memorization(samples, held_out, training) == pytest.approx(expected, abs=1e-12)


def test_memorization_needs_other_images(tmp_path, data):
    """A reference of held-out images; the training images themselves are refused."""
    names = {"metrics": ("memorization", "frechet_distance")}
    with pytest.raises(ValueError, match="memorization: needs training images .*, and a reference"):
        open_tiny(data, tmp_path, **names)
    held_out = str(folder(tmp_path / "held_out", pictures(40, 5)))
    opened = open_tiny(data, tmp_path, reference=held_out, **names)
    training = np.stack([image for image, _ in RealImages(str(data), "train", 24)])
    assert measured(opened, training)["memorization"] == 1
    assert opened.baseline[0]["memorization"] == 0.5
    assert "memorization" not in open_tiny(data, tmp_path, reference=held_out).rows


def test_sweeps_of_earlier_versions_count(tmp_path, data):
    """Though they have no kernel distance; unless that is asked for."""
    opened = open_tiny(data, tmp_path)
    assert "kernel_distance" in opened.rows and "kernel_distance" not in opened.promised
    names = {"metrics": ("kernel_distance",)}
    assert open_tiny(data, tmp_path, **names).promised == ["kernel_distance"]


def test_a_kernel_distance():
    """About 0 for images of one kind, more for others, and the same for features of any scale."""
    draw = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 300, 8, generator=draw)
    assert abs(kernel_distance(one, two)) < 0.02 < 0.1 < kernel_distance(one, two + 0.5)
    with pytest.raises(ValueError, match="1 images: expected at least 2"):
        kernel_distance(one[:1], two)
    found = [
        metrics._kernel_distance(*(mock.Mock(features=scale * x) for x in (one, two + 0.5)))
        for scale in (1, 100)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
