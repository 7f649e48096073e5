"""Features, statistics, numbers; references; reports. Run: pytest tests/test_metrics.py"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import torchrun
from torch_fidelity import calculate_metrics
from torch_fidelity import feature_extractor_inceptionv3 as inception

from util.classifier import fit_classifier
from util.data.digits import digits
from util.evaluation import __main__ as door
from util.evaluation import features, image_sets, references
from util.evaluation.accumulator import (
    Accumulator,
    RunningInceptionScore,
    RunningStatistics,
    summarize,
)
from util.evaluation.evaluator import Evaluator, open_evaluator
from util.evaluation.features import Extractor
from util.evaluation.image_sets import open_images
from util.evaluation.metrics import (
    INCEPTION,
    SPATIAL,
    frechet_distance,
    kernel_distance,
    pick_metrics,
    precision_recall,
    psnr,
    ssim,
)
from util.evaluation.references import load_reference
from util.evaluation.reports import caveats
from util.evaluation.settings import Evaluation
from util.flags import run
from util.images import to_uint8

ROOT = Path(__file__).parent.parent


def pictures(count, seed, side=24):
    """Random images with some structure, uint8 (count, side, side, 3)."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (count, 3, 3, 3)).astype(np.uint8)
    fine = [np.asarray(Image.fromarray(c).resize((side, side))) for c in coarse]
    return (np.stack(fine) * 0.8 + draw.integers(0, 50, (count, side, side, 3))).astype(np.uint8)


def folder(path, images):
    path.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:04d}.png")
    return path


def summary(images, extractor, batch=7):
    accumulator = Accumulator(extractor, len(images), True, "torch-fidelity")
    for start in range(0, len(images), batch):
        indices = range(start, min(start + batch, len(images)))
        accumulator.add(indices, images[start : start + batch])
    return accumulator.summary()


def compare(summary, reference, extractor):
    """The metrics of a Summary against a Reference."""
    chosen, held = pick_metrics(None, extractor.name), {extractor.name: extractor}
    evaluator = Evaluator(Evaluation(), held, chosen, {extractor.name: reference})
    return evaluator.metrics({extractor.name: summary})


def agree(ours, theirs, tolerance=1e-6):
    names = {
        "fid": "frechet_inception_distance",
        "frechet_distance": "frechet_inception_distance",
        "inception_score": "inception_score_mean",
        "inception_score_std": "inception_score_std",
        "precision": "precision",
        "recall": "recall",
        "kid": "kernel_inception_distance_mean",
    }
    assert len(ours) == 6
    for name in names.keys() & ours.keys():
        value, other = ours[name], theirs[names[name]]
        assert abs(value - other) <= tolerance * max(1, abs(other)), (name, value, other)


def their_metrics(one, other, **kwargs):
    return calculate_metrics(
        input1=str(one), input2=str(other), isc=True, fid=True, prc=True, kid=True, cuda=False,
        cache=False, verbose=False, save_cpu_ram=True, **kwargs,
    )  # fmt: skip


def test_all_metrics_agree_with_torch_fidelity(tmp_path):
    """FID, IS, precision, recall and KID of the same two folders, with the tiny extractor."""
    one = folder(tmp_path / "one", pictures(60, 1))
    other = folder(tmp_path / "other", pictures(50, 2))
    extractor = Extractor("tiny")
    reference = load_reference(str(other), extractor, 24, tmp_path, workers=0)
    accumulator = Accumulator(extractor, 60, True, "torch-fidelity")
    ours = summarize(open_images(one), accumulator, None, 16, 0)
    found = compare(ours, reference, extractor)
    found["kid"] = kernel_distance(ours.features, reference.features)
    assert found.pop("kernel_distance") != found["kid"]
    agree(found, their_metrics(one, other, feature_extractor="tiny", kid_subset_size=50))


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A file of random Inception weights, Kaiming-initialised."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    network = inception.FeatureExtractorInceptionV3
    with (
        mock.patch.object(inception, "load_state_dict_from_url", return_value={}),
        mock.patch.object(network, "load_state_dict", lambda self, state: None),
    ):
        model = network(INCEPTION, ["2048", "logits_unbiased"])
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(model.state_dict(), path)
    return path


@pytest.mark.slow
def test_inception_agrees_with_torch_fidelity(tmp_path, inception_weights):
    """The same with Inception itself and a file of weights."""
    one = folder(tmp_path / "one", pictures(24, 1))
    other = folder(tmp_path / "other", pictures(20, 2))
    extractor = Extractor(INCEPTION, str(inception_weights))
    assert (extractor.width, extractor.classes) == (2048, 1008)
    reference = load_reference(str(other), extractor, 24, tmp_path, workers=0)
    accumulator = Accumulator(extractor, 24, True, "torch-fidelity")
    ours = summarize(open_images(one), accumulator, None, 12, 0)
    theirs = their_metrics(
        one,
        other,
        feature_extractor=INCEPTION,
        feature_layer_prc="2048",
        kid_subset_size=20,
        feature_extractor_weights_path=str(inception_weights),
    )
    agree(compare(ours, reference, extractor), theirs)
    assert Extractor(SPATIAL, str(inception_weights)).width == 17 * 17 * 7


def statistics(features):
    running = RunningStatistics(features.shape[1])
    running.add(features)
    return running.result()


def test_running_statistics_are_those_of_all():
    """Sums over batches give NumPy's mean and covariance of the whole."""
    features = torch.randn(500, 6, dtype=torch.float64) * 3 + 100
    running = RunningStatistics(6)
    for batch in features.split(37):
        running.add(batch)
    result = running.result()
    np.testing.assert_allclose(result["mu"], features.mean(0).numpy(), rtol=1e-12)
    np.testing.assert_allclose(result["sigma"], np.cov(features.T.numpy()), rtol=1e-8, atol=1e-9)
    assert result["count"] == 500


def test_distance_of_a_set_to_itself_is_zero():
    """FID(x, x) = 0 to 1e-6."""
    features = torch.randn(400, 16)
    assert abs(frechet_distance(statistics(features), statistics(features))) < 1e-6


def test_distance_of_known_gaussians():
    """‖Δμ‖² + Σ(σ₁ − σ₂)² for diagonal covariances, and not symmetric tricks: a rotated one too."""
    mu = np.array([1.0, -2.0, 0.5])
    s1, s2 = np.diag([1.0, 4.0, 9.0]), np.diag([4.0, 4.0, 1.0])
    expected = (mu**2).sum() + (1 - 2) ** 2 + 0 + (3 - 1) ** 2
    one, other = {"mu": mu, "sigma": s1}, {"mu": np.zeros(3), "sigma": s2}
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    turned = [{"mu": q @ s["mu"], "sigma": q @ s["sigma"] @ q.T} for s in (one, other)]
    assert frechet_distance(*turned) == pytest.approx(expected, rel=1e-9)


def test_inception_score_of_known_cases():
    """All images alike: 1. Each sure of one of five classes, evenly: 5."""
    score = RunningInceptionScore(100, 5)
    score.add(range(100), torch.ones(100, 5))
    assert score.result() == pytest.approx((1.0, 0.0), abs=1e-9)
    score = RunningInceptionScore(5000, 5, splits="adm")
    score.add(range(5000), torch.eye(5).repeat(1000, 1) * 1000)
    assert score.result()[0] == pytest.approx(5.0)


def test_splits_of_the_inception_score():
    """ADM's split is of consecutive images, torch-fidelity's of shuffled ones."""
    logits = torch.eye(2).repeat_interleave(5000, 0) * 50  # one class, then the other
    scores = {}
    for splits in ("adm", "torch-fidelity"):
        score = RunningInceptionScore(10000, 2, splits=splits)
        score.add(range(10000), logits)
        scores[splits] = score.result()[0]
    assert scores["adm"] == pytest.approx(1.0, abs=1e-6)
    assert scores["torch-fidelity"] == pytest.approx(2.0, abs=0.01)


def test_collapsed_samples_have_high_precision_and_low_recall():
    """Not the reverse; and the two sets can only be given by name."""
    draw = torch.Generator().manual_seed(0)
    real = torch.randn(500, 8, generator=draw)
    collapsed = real[:1] + 0.05 * torch.randn(500, 8, generator=draw)
    precision, recall = precision_recall(generated=collapsed, real=real)
    assert precision > 0.95 and recall < 0.05
    assert precision_recall(generated=real, real=collapsed) == (recall, precision)
    with pytest.raises(TypeError):
        precision_recall(collapsed, real)


def test_psnr_and_ssim_of_known_cases():
    """Equal images: infinite and 1. An offset of 0.2 of a range of 2: 20 dB."""
    images = torch.rand(2, 3, 16, 16) * 1.6 - 0.9
    assert psnr(images, images).isinf().all()
    torch.testing.assert_close(ssim(images, images), torch.ones(2).double())
    torch.testing.assert_close(psnr(images, images + 0.2), torch.full((2,), 20.0).double())
    noisy = images + 0.5 * torch.randn(images.shape)
    assert (ssim(images, noisy) < 0.9).all()
    # a constant image against a constant image: only the luminance term is left
    a, b = torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 0.5)
    expected = (2 * 0.5 * 0.75 + 1e-4) / (0.5**2 + 0.75**2 + 1e-4)
    assert ssim(a, b).item() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="at least 11×11"):
        ssim(images[..., :8], images[..., :8])


def test_batches_do_not_matter():
    """A Summary of batches of 7 equals one of a single batch."""
    extractor, images = Extractor("tiny"), pictures(40, 3)
    one, many = summary(images, extractor, 40), summary(images, extractor, 7)
    np.testing.assert_allclose(one.statistics["sigma"], many.statistics["sigma"], atol=1e-9)
    assert one.inception_score == pytest.approx(many.inception_score, rel=1e-9)
    torch.testing.assert_close(one.features, many.features)


def test_references_of_every_kind_agree(tmp_path):
    """A folder, an .npz of its images and an .npz of its statistics give the same distance."""
    images, extractor = pictures(50, 4), Extractor("tiny")
    root = folder(tmp_path / "images", images)
    np.savez(tmp_path / "images.npz", arr_0=images)
    held = summary(images, extractor)
    np.savez(tmp_path / "stats.npz", mu=held.statistics["mu"], sigma=held.statistics["sigma"])
    np.savez(tmp_path / "adm.npz", arr_0=images, **held.statistics)
    samples = summary(pictures(30, 5), extractor)
    found = {}
    for name in (root, "images.npz", "stats.npz", "adm.npz"):
        reference = load_reference(str(tmp_path / name), extractor, 24, tmp_path, workers=0)
        found[name] = compare(samples, reference, extractor)
    expected = found[root]
    assert {"frechet_distance", "precision", "recall"} <= set(expected)
    for name in ("images.npz", "adm.npz"):
        assert found[name] == pytest.approx(expected, rel=1e-6)
    assert "precision" not in found["stats.npz"]
    assert found["stats.npz"]["frechet_distance"] == pytest.approx(expected["frechet_distance"])


def data_set(path, count=30):
    for i, name in enumerate(("a", "b")):
        folder(path / "train" / name, pictures(count, 10 + i, side=40))
    return path


def test_statistics_of_a_data_set_are_kept_by_what_they_depend_on(tmp_path, monkeypatch):
    """The second time they are read; another crop or other weights are another file."""
    data, cache = data_set(tmp_path / "data"), tmp_path / "cache"
    first = load_reference(str(data), Extractor("tiny"), 24, cache, workers=0)
    assert first.num_images == 60 and len(first.features) == 60
    assert len(list(cache.iterdir())) == 1
    counted = mock.Mock(wraps=summarize)
    monkeypatch.setattr(references, "summarize", counted)
    again = load_reference(str(data), Extractor("tiny"), 24, cache, workers=0)
    assert not counted.called
    np.testing.assert_array_equal(first.statistics["sigma"], again.statistics["sigma"])
    moved = data.rename(tmp_path / "moved")
    kept = references.kept_path(cache, moved, "x", "y", "npz")
    assert kept.name.startswith("moved-x-")
    kept.with_name(kept.name.replace("moved", "data")).touch()
    assert references.kept_path(cache, moved, "x", "y", "npz").name.startswith("data-x-")
    next(cache.glob("*-x-*")).unlink()
    data = moved.rename(data)
    load_reference(str(data), Extractor("tiny"), 16, cache, workers=0)
    other = Extractor("tiny")
    other.sha256 = "0" * 64
    load_reference(str(data), other, 24, cache, workers=0)
    assert counted.call_count == 4
    assert len(list(cache.iterdir())) == 3


def open_tiny(data, tmp_path, num_images=60, **settings):
    """An Evaluator of the tiny extractor against a data set of 24×24 images."""
    settings = Evaluation(**{"extractor": "tiny", "stats_dir": tmp_path / "cache", **settings})
    return open_evaluator(settings, str(data), img_size=24, num_images=num_images)


def test_real_images_are_the_baseline(tmp_path):
    """Beside every metric, that of as many real images: here of the reference itself."""
    metrics, count = open_tiny(data_set(tmp_path / "data"), tmp_path).baseline
    assert count == 60
    assert abs(metrics["frechet_distance"]) < 1e-6
    assert metrics["precision"] == metrics["recall"] == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "none.npz", "no such file"),
        (lambda p: p / "none", "expected a folder of images, an .npz, a data set"),
        (
            lambda p: npz(p, other=1),
            "expected arrays mu and sigma, .*; found other",
        ),
        (lambda p: npz(p, mu=np.zeros(64), sigma=np.eye(64)), "64 features, .* have 12"),
        (lambda p: npz(p, mu=np.zeros(12), sigma=np.eye(12), sha256="ff"), "other weights"),
        (lambda p: npz(p, arr_0=pictures(9, 0, side=32)), r"\(9, 32, 32, 3\), expected uint8"),
        (lambda p: damaged(p), "0003.png: not a readable image"),
        (lambda p: truncated(p), "not a readable .npz"),
        (lambda p: flipped(p), "not a readable .npz .*the checksum of arr_0.npy"),
        (lambda p: npz(p, arr_0=np.zeros(9, np.uint8)), r"arr_0 is uint8 \(9,\), expected uint8"),
    ],
)
def test_bad_references(tmp_path, make, message):
    """Each is one line that names the file and what was expected."""
    with pytest.raises(ValueError, match=message) as error:
        load_reference(str(make(tmp_path)), Extractor("tiny"), 24, tmp_path, workers=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_of_an_npz_stay_on_the_disk(tmp_path, save):
    """Where they are not compressed, as ours and ADM's; what is read is the same."""
    images = pictures(7, 3)
    save(tmp_path / "a.npz", mu=np.zeros(3), arr_0=images)
    opened = open_images(tmp_path / "a.npz")
    assert isinstance(opened.images, np.memmap) == (save is np.savez)
    assert len(opened) == 7
    assert all(np.array_equal(opened[i][0], images[i]) for i in range(7))


def test_a_worker_is_sent_a_place_not_images(tmp_path, monkeypatch):
    """An .npz has up to 10 GB, and its checksum is not verified again; a compressed one is in
    memory, and is read without workers."""
    images = pictures(70, 3)
    np.savez(tmp_path / "a.npz", arr_0=images)
    opened = open_images(tmp_path / "a.npz")
    monkeypatch.setattr(image_sets, "check_zip", None)
    sent = pickle.dumps(torch.utils.data.Subset(opened, range(70)))
    assert len(sent) < 1000 < images.nbytes
    again = pickle.loads(sent).dataset
    assert isinstance(again.images, np.memmap) and np.array_equal(again.images, images)
    monkeypatch.undo()
    np.savez_compressed(tmp_path / "b.npz", arr_0=images)
    with mock.patch("util.evaluation.accumulator.plain_loader", return_value=[]) as loader:
        for name in ("a", "b"):
            summarize(open_images(tmp_path / f"{name}.npz"), mock.Mock(), None, workers=2)
    assert [call.args[2] for call in loader.call_args_list] == [2, 0]


def npz(path, **arrays):
    np.savez(path / "reference.npz", **arrays)
    return path / "reference.npz"


def damaged(path):
    root = folder(path / "damaged", pictures(9, 0))
    (root / "0003.png").write_bytes(b"nothing")
    return root


def flipped(path):
    file = npz(path, arr_0=pictures(9, 0))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file


def truncated(path):
    file = npz(path, mu=np.zeros(12), sigma=np.eye(12))
    file.write_bytes(file.read_bytes()[:100])
    return file


@pytest.mark.parametrize("count", [9, 2])
def test_too_few_images(tmp_path, count):
    """Refused before any image is generated."""
    with pytest.raises(ValueError, match=f"{count} images: expected at least 10"):
        settings = Evaluation(reference="digits", extractor="tiny", stats_dir=tmp_path)
        open_evaluator(settings, "digits", img_size=8, num_images=count)


def test_too_few_images_for_k_and_for_a_covariance():
    """Not more than k, and not two."""
    with pytest.raises(ValueError, match="3 real images: expected more than 3"):
        precision_recall(generated=torch.randn(10, 2), real=torch.randn(3, 2))
    with pytest.raises(ValueError, match="1 images: expected at least 2"):
        statistics(torch.randn(1, 4))


def test_fewer_images_than_features_is_reported(tmp_path):
    """The number is given, with what it then means."""
    reference = load_reference("digits", Extractor("tiny"), 8, tmp_path, workers=0)
    notes = list(caveats(11, reference, Extractor("tiny")))
    assert notes[0].startswith("11 images for 12 features: the covariance is singular")


def test_missing_inception_weights(tmp_path):
    """Offline, and with a wrong file: one line that says how to get them."""
    with (
        mock.patch.object(inception, "load_state_dict_from_url", side_effect=OSError("offline")),
        pytest.raises(ValueError, match=r"could not be fetched .*--inception_weights FILE"),
    ):
        Extractor()
    with pytest.raises(ValueError, match=r"none.pth: no such file. .*weights-inception-2015"):
        Extractor(INCEPTION, str(tmp_path / "none.pth"))
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth: not the weights of inception"):
        Extractor(INCEPTION, str(tmp_path / "other.pth"))
    with pytest.raises(ValueError, match="extractor 'vgg': expected one of .*inception-v3-compat"):
        Extractor("vgg")


def whole_classifier():
    return fit_classifier(*digits("train").tensors, classes=10)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["digits", "folder"])
def test_two_processes_give_what_one_gives(tmp_path, reference, monkeypatch):
    """At the door that needs no model, against a data set, and against a folder of images."""
    monkeypatch.setattr(features, "_digits_classifier", whole_classifier)  # as processes have it
    train, test = (to_uint8(digits(split).tensors[0][:101]) for split in ("train", "test"))
    images = folder(tmp_path / "images", train)
    if reference == "folder":
        reference = folder(tmp_path / "reference", test)
    flags = [images, "--reference", reference, "--extractor", "digits-classifier"]
    flags += ["--device", "cpu", "--stats_dir", tmp_path / "stats", "--metrics", "pixel_distance"]
    flags += ["frechet_distance", "inception_score", "precision_recall"]
    one, two = tmp_path / "one", tmp_path / "two"
    status, output = torchrun("-m", "util.evaluation", *flags, "--output_dir", two)
    assert status == 0, output
    door.main([*map(str, flags), "--output_dir", str(one)])
    one, two = (json.loads((path / "results.jsonl").read_text()) for path in (one, two))
    assert one["images"] == two["images"] == 101
    for name in ("frechet_distance", "pixel_distance", "inception_score", "precision", "recall"):
        assert one[name] == pytest.approx(two[name], rel=1e-6), name


def test_bad_input_at_the_door(tmp_path, capsys):
    """One line, status 2."""
    with pytest.raises(SystemExit) as stop:
        run(door.main, [str(tmp_path), "--extractor", "tiny"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: expected images there, found none\n"


def test_door_as_a_module(tmp_path):
    """python -m util.evaluation works as it stands in the README."""
    root = folder(tmp_path / "images", pictures(20, 1))
    flags = ["--reference", root, "--extractor", "grey-pixels", "--device", "cpu"]
    command = [sys.executable, "-m", "util.evaluation", root, *flags]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.strip().splitlines()[-1])
    assert record["precision"] == record["recall"] == 1.0
    assert record["reference_images"] == record["images"] == 20
