"""Metrics as rows, and the Evaluator that they drive. Run: pytest tests/test_evaluation.py"""

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from test_metrics import data_set, folder, npz, open_tiny, pictures

from util.data.settings import Reading
from util.evaluation import __main__ as door
from util.evaluation import baseline, features, image_sets, metrics
from util.evaluation.evaluator import open_evaluator
from util.evaluation.features import EXTRACTORS, Extractor
from util.evaluation.metrics import METRICS, Metric
from util.evaluation.references import find_reference
from util.evaluation.settings import Evaluation
from util.evaluation.sweep import find_result, write_sweep
from util.flags import Parser, run
from util.settings import add_flags, from_flags

ROOT = Path(__file__).parent.parent


def kernel_distance(generated, reference):
    """A metric that is not in the table: the distance in a polynomial kernel, whose biased form is
    0 for equal sets."""
    x, y = generated.features.double(), reference.features.double()
    kernels = [(a @ b.T / x.shape[1] + 1).pow(3).mean().item() for a, b in ((x, x), (y, y), (x, y))]
    return kernels[0] + kernels[1] - 2 * kernels[2]


@pytest.fixture
def kernel_row(monkeypatch):
    """METRICS with one more row."""
    row = Metric("biased KID", kernel_distance, ("features", "reference features"))
    monkeypatch.setitem(METRICS, "biased_distance", row)


@pytest.fixture
def data(tmp_path):
    """A data set of 60 images."""
    return data_set(tmp_path / "data")


def measured(opened, images, labels=None):
    """The summaries of images."""
    measurement = opened.start(len(images))
    measurement.add(range(len(images)), images, labels)
    return measurement.summary()


def test_rows_drive_everything(tmp_path, data, kernel_row, capsys):
    """One row more: it is in the numbers, beside real images, in the table, in results.jsonl, in
    TensorBoard, in a sweep's columns and plots."""
    opened, logger = open_tiny(data, tmp_path), mock.Mock()
    assert "biased_distance" in opened.promised
    summaries = measured(opened, pictures(30, 1))
    for cfg in (1.0, 2.0):
        settings = {"cfg": cfg, "seconds_per_image": 0.5, "weights": "ema"}
        found = opened.report(summaries, settings, tmp_path, logger)
    assert found["biased_distance"] > 0
    assert opened.baseline[0]["biased_distance"] == pytest.approx(0, abs=1e-6)
    assert "biased_distance" in capsys.readouterr().out.split("\nimages ")[0]
    assert "eval_ema/biased_distance" in logger.scalars.call_args.args[0]
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert records[1]["biased_distance"] == found["biased_distance"]
    more = {"accuracy", "kernel_distance", "images"}
    assert records[1]["real"].keys() == {*opened.promised, *more}

    points, drawn = [{"cfg": 1.0}, {"cfg": 2.0}], []
    with mock.patch("matplotlib.axes.Axes.set", lambda panel, **names: drawn.append(names)):
        files = write_sweep(records, points, tmp_path)
    assert files[-1].name == "sweep_guidance.png"
    assert {"xlabel": "guidance", "ylabel": "biased KID"} in drawn
    columns = (tmp_path / "sweep.csv").read_text().splitlines()[0].split(",")
    assert columns == [
        "cfg", "frechet_distance", "inception_score", "precision", "recall", "kernel_distance",
        "biased_distance", "seconds_per_image", "images",
    ]  # fmt: skip


def test_coarse_pixels_are_means_of_colors():
    """192 features for any size: each the mean of a part of the image in one colour."""
    images = pictures(3, 1)
    features, logits = Extractor("coarse-pixels", img_size=images.shape[1:3])(images)
    side = images.shape[1] // 8
    corner = images[:, :side, :side].mean((1, 2)) / 127.5 - 1
    assert features.shape == (3, 192) and logits is None
    assert torch.allclose(features[:, ::64], torch.from_numpy(corner).float(), atol=1e-5)


def test_a_distance_in_another_extractor_is_one_row(tmp_path, data, monkeypatch):
    """It is measured beside the own one, of the same images, where it is asked for by name."""
    row = Metric("FD, tiny", metrics._distance, ("reference",), extractor="tiny")
    monkeypatch.setitem(METRICS, "tiny_distance", row)
    images = pictures(30, 1)
    both = open_tiny(
        data, tmp_path, extractor="grey-pixels", metrics=("frechet_distance", "tiny_distance")
    )
    found = both.metrics(measured(both, images))
    assert list(found) == ["frechet_distance", "tiny_distance"] == list(both.baseline[0])
    one = open_tiny(data, tmp_path)
    alone = one.metrics(measured(one, images))
    assert "tiny_distance" not in alone
    assert found["tiny_distance"] == alone["frechet_distance"] != found["frechet_distance"]
    assert both.stated(30)["more_extractors"] == {"tiny": both.extractors["tiny"].sha256}
    assert "more_extractors" not in one.stated(30)
    assert [note for note in both.notes(10) if note.startswith("tiny: 10 images for 12 features")]


def test_an_extractor_is_one_row(monkeypatch):
    """A module from bytes to features."""

    class Mean(torch.nn.Module):
        def forward(self, images):
            return (images.float().mean((2, 3)),)

    monkeypatch.setitem(EXTRACTORS, "mean", Mean)
    extractor = Extractor("mean")
    assert (extractor.width, extractor.classes) == (3, None)
    with pytest.raises(ValueError, match="extractor 'vgg': expected one of .*grey-pixels, .*mean"):
        Extractor("vgg")


@pytest.mark.parametrize(("own", "times"), [("tiny", 2), ("grey-pixels", 1)])
def test_an_extractor_is_opened_once(tmp_path, data, own, times):
    """However many metrics are in its features."""
    names = ("frechet_distance", "pixel_distance", "precision_recall")
    with mock.patch.object(features, "Extractor", side_effect=Extractor) as opened:
        open_tiny(data, tmp_path, extractor=own, metrics=names)
    assert opened.call_count == times


def test_metrics_of_real_images_are_kept_by_name(tmp_path, data, request):
    """A new one alone is computed, and nothing the second time; a damaged file is made again."""
    first = open_tiny(data, tmp_path).baseline
    request.getfixturevalue("kernel_row")
    with mock.patch.object(baseline, "_measure", side_effect=baseline._measure) as measure:
        second = open_tiny(data, tmp_path).baseline
        assert [list(call.args[-1]) for call in measure.call_args_list] == [["biased_distance"]]
        assert second == ({**first[0], "biased_distance": second[0]["biased_distance"]}, 60)
        assert open_tiny(data, tmp_path).baseline == second
        assert measure.call_count == 1
        kept = next((tmp_path / "cache").glob("*.json"))
        kept.write_text(kept.read_text()[:20])
        assert open_tiny(data, tmp_path).baseline == second
        assert measure.call_count == 2


def test_default_metrics_are_those_of_the_own_extractor(tmp_path):
    """FID is the name with Inception, which has no accuracy: its classes are not the labels."""
    assert [*metrics.pick_metrics(None, "inception-v3-compat")] == [
        "fid", "inception_score", "precision_recall", "kid"
    ]  # fmt: skip
    others = ["frechet_distance", "inception_score", "accuracy", "precision_recall"]
    others += ["kernel_distance"]
    assert [*metrics.pick_metrics(None, "grey-pixels")] == others
    opened = open_evaluator(
        Evaluation(extractor="grey-pixels", reference="none"), img_size=24, num_images=20
    )
    assert not opened.rows  # it has no classes, and there is no reference


def test_accuracy_needs_labels(tmp_path, data):
    """Without them it is left out; no sweep waits for it."""
    opened = open_tiny(data, tmp_path, metrics=("frechet_distance", "accuracy"))
    images = pictures(30, 1)
    assert "accuracy" not in opened.metrics(measured(opened, images))
    assert 0 <= opened.metrics(measured(opened, images, [0] * 30))["accuracy"] <= 1
    assert opened.promised == ["frechet_distance"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ("beauty",)}, "metric 'beauty': expected one of fid, "),
        (
            {"metrics": ("fid",)},
            "metric 'fid': is not for the extractor tiny, expected some of fre",
        ),
        (
            {"metrics": ("pixel_distance",), "reference": "none"},
            "--metrics pixel_distance: needs a reference; here are .* --reference none",
        ),
        (
            {"metrics": ("inception_score",), "extractor": "grey-pixels"},
            "--metrics inception_score: needs an extractor with classes; .* grey-pixels",
        ),
        (
            {"metrics": ("precision_recall",), "reference": "stats"},
            "--metrics precision_recall: needs a reference with images, not statistics alone",
        ),
        (
            {"metrics": ("pixel_distance",), "reference": "stats"},
            "statistics of one extractor only, expected images for grey-pixels",
        ),
    ],
)
def test_metrics_that_cannot_be_had(tmp_path, data, settings, message):
    """One line each, before any image is generated."""
    if settings.get("reference") == "stats":
        settings = {**settings, "reference": str(npz(tmp_path, mu=np.zeros(12), sigma=np.eye(12)))}
    with pytest.raises(ValueError, match=message) as error:
        open_tiny(data, tmp_path, **settings)
    assert "\n" not in str(error.value)


def test_statistics_alone_are_said(tmp_path, data):
    """Metrics that need images are left out by default, with a note."""
    opened = open_tiny(
        data, tmp_path, reference=str(npz(tmp_path, mu=np.ones(12), sigma=np.eye(12)))
    )
    assert "precision_recall" not in opened.rows
    notes = list(opened.notes(30))
    assert notes == [
        f"no {names}: the reference has statistics only, no images"
        for names in ("precision and recall", "kernel_distance")
    ]
    assert "precision" not in opened.baseline[0] and "frechet_distance" in opened.baseline[0]


def test_images_beside_statistics_serve_other_extractors(tmp_path, data):
    """ADM's reference batch has both: the statistics are of the own features."""
    images = pictures(40, 2)
    both = npz(tmp_path, mu=np.ones(12), sigma=np.eye(12), arr_0=images)
    settings = {"metrics": ("frechet_distance", "pixel_distance")}
    one = open_tiny(data, tmp_path, reference=str(both), **settings)
    two = open_tiny(data, tmp_path, reference=str(folder(tmp_path / "images", images)), **settings)
    assert one.references["tiny"].statistics["mu"].tolist() == [1] * 12
    one, two = (each.metrics(measured(each, images)) for each in (one, two))
    assert one["pixel_distance"] == pytest.approx(two["pixel_distance"], abs=1e-6)
    assert one["frechet_distance"] != pytest.approx(two["frechet_distance"], abs=1e-6)


def test_unknown_metric_at_the_door(tmp_path, capsys):
    """One line, status 2."""
    with pytest.raises(SystemExit) as stop:
        run(door.main, [str(tmp_path), "--metrics", "beauty"])
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: argument --metrics: invalid choice: 'beauty'")
    assert line.count("\n") == 1


def test_flags_make_settings(kernel_row):
    """And choose from the table as it is."""
    parser = Parser()
    add_flags(parser, Evaluation, reference=None)
    args = parser.parse_args(["--metrics", "fid", "biased_distance", "--isc_splits", "adm"])
    settings = from_flags(Evaluation, args)
    assert settings.metrics == ("fid", "biased_distance") and settings.reference is None
    assert from_flags(Evaluation, parser.parse_args([])) == Evaluation(reference=None)


def test_a_point_without_a_metric_is_not_done(tmp_path):
    """A record counts only with every number that is asked for."""
    path = tmp_path / "results.jsonl"
    path.write_text('{"cfg": 1.0, "fid": 2.0, "images": 9, "seconds_per_image": 0.5}\n')
    assert find_result(path, {"cfg": 1.0}, ["fid"])["fid"] == 2.0
    assert find_result(path, {"cfg": 1.0}, ["fid", "biased_distance"]) is None


def test_a_sweep_shows_what_all_its_points_have(tmp_path):
    """A point measured earlier may have more metrics than the others."""
    points = [{"cfg": 1.0}, {"cfg": 2.0}]
    records = [{**p, "fid": 3.0, "seconds_per_image": 1.0, "images": 9} for p in points]
    write_sweep([{**records[0], "pixel_distance": 1.0}, records[1]], points, tmp_path)
    header = (tmp_path / "sweep.csv").read_text().splitlines()[0]
    assert header == "cfg,fid,seconds_per_image,images"


WORDNET = [f"n{i:08}" for i in range(1000)]  # names as ImageNet's


@pytest.mark.parametrize(
    ("path", "classes", "trained", "file", "expected"),
    [
        ("data", ["a", "b"], WORDNET, True, ("data", "the data are not known to be ImageNet")),
        ("data", WORDNET, None, True, ("file", "the data are ImageNet")),
        ("data", WORDNET, None, False, ("data", "there is no fid_stats/adm_in24_stats.npz")),
        ("none", None, WORDNET, True, ("file", "the data are ImageNet")),
        ("none", None, ["a", "b"], True, (None, "the data are not known to be ImageNet")),
        ("none", None, None, True, (None, "the data are not known to be ImageNet")),
        ("digits", None, None, True, ("digits", "ADM's statistics are of Inception's features")),
    ],
)
def test_statistics_of_imagenet_are_for_imagenet(
    path, classes, trained, file, expected, tmp_path, monkeypatch
):
    """Other data of this size are compared with their own images, though the file is there."""
    (tmp_path / "data" / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    if file:
        (tmp_path / "fid_stats").mkdir()
        (tmp_path / "fid_stats" / "adm_in24_stats.npz").touch()
    opened = mock.Mock(return_value=mock.Mock(classes=classes))
    source, why = find_reference(Evaluation(), path, 24, opened, trained)
    assert source == {"file": "fid_stats/adm_in24_stats.npz"}.get(expected[0], expected[0])
    assert why.startswith(expected[1])


@pytest.mark.parametrize("asked", ["auto", "none", "digits"])
def test_the_reference_is_said(asked, tmp_path, data, capsys):
    """In one line, and why, if it was chosen."""
    settings = {"reference": asked, "extractor": "grey-pixels", "stats_dir": tmp_path}
    path, side = (data, 24) if asked == "auto" else ("digits", 8)
    open_evaluator(Evaluation(**settings), path, img_size=side, num_images=20)
    line = {
        "auto": f"reference: {data}, train images (--reference auto: ADM's statistics are of "
        "Inception's features)",
        "none": "no reference: only metrics that need none",
        "digits": "reference: digits, test images",
    }
    assert capsys.readouterr().out.splitlines()[0] == line[asked]


def test_real_pictures_are_read_as_in_training(tmp_path, data, monkeypatch):
    """By every field of Reading, but never mirrored; for the reference and for the baseline."""

    opened = mock.Mock(side_effect=image_sets.open_data)
    monkeypatch.setattr(image_sets, "open_data", opened)
    settings = Evaluation(extractor="grey-pixels", reference=str(data), stats_dir=tmp_path)
    reading = Reading(background="black")
    open_evaluator(settings, "digits", img_size=8, num_images=20, reading=reading)
    read = [(call.args[0], call.args[3]) for call in opened.call_args_list]
    assert read == [(path, reading.but(flip=False)) for path in ("digits", str(data))]


def loaded(*modules):
    """Names of the modules that importing these loads."""
    code = f"import {', '.join(modules)}, sys; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_flags_need_no_torch():
    """Names of metrics and the settings are there before anything heavy is loaded."""
    heavy = {"torch", "numpy", "scipy", "torchvision", "torch_fidelity", "matplotlib"}
    names = loaded("util.evaluation", "util.evaluation.settings", "util.evaluation.metrics")
    assert not heavy & names


def test_libraries_are_imported_where_they_are_used():
    """Importing everything loads neither torch-fidelity nor matplotlib, and picks no backend."""
    names = loaded("util.evaluation.evaluator", "util.evaluation.sweep", "demo.digits", "reproduce")
    assert not {"torch_fidelity", "matplotlib"} & names
