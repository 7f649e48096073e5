"""Averages by half-lives in images, several at once. Run: pytest tests/test_averages.py"""

import json

import pytest
import torch
from test_checkpoint import CONFIG, save, trained
from test_train import equal, stopping_after, train

import engine_mar
import main_mar
from models import load_model
from util.averages import check_resumed, names_of, rate_of
from util.checkpoint import LAST, TrainState, load_checkpoint
from util.ema import EMA
from util.evaluation.metrics import ranking
from util.recipe import Recipe

SEVERAL = ("--optimizer", "muon", "--ema_images", "300", "1000")
ONLINE = ["--online_eval", "--num_images", "16", "--extractor", "grey-pixels", "--stats_dir"]


@pytest.mark.parametrize("batch", [1, 10, 250])
def test_half_life(batch):
    """After a half-life of images the average is half way, after two a quarter is left, whatever
    the batch size."""
    model = torch.nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.fill_(0)
        ema = EMA(model, rate_of(500, batch))
        model.weight.fill_(1)
    for expected in (0.5, 0.75):
        for _ in range(500 // batch):
            ema.update(model)
        assert ema.module.weight.detach().tolist()[0] == pytest.approx([expected] * 3, rel=1e-4)


def test_a_step_is_of_all_its_images():
    """Those of all processes and of all batches that are accumulated; the first half-life is that
    of the main average."""
    recipe = Recipe(lr=1e-3, accum_iter=2, ema_images=(800, 100))
    state = engine_mar.new_state(trained(0)[0], recipe, torch.device("cpu"), "fp32", 50)
    assert {name: ema.rate for name, ema in state.emas.items()} == {
        "ema": 0.5 ** (1 / 8),
        "ema_100": 0.5,
    }
    assert state.ema is state.emas["ema"] and state.networks() == ["ema", "ema_100", "raw"]


def further(checkpoint):
    """The state of the second average."""
    return checkpoint["parts"]["ema_1000"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, checkpoint) of a run with Muon and two averages, each of which is evaluated."""
    folder = tmp_path_factory.mktemp("run")
    return folder, train(folder, *SEVERAL, *ONLINE, str(folder))


@pytest.mark.slow
def test_resumed_run_equals_the_uninterrupted_one(run, tmp_path, monkeypatch):
    """Weights, both averages and Muon's state have the same bits after a stop within an epoch."""
    monkeypatch.setattr(Recipe, "rate", stopping_after(1.5))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, *SEVERAL, "--save_steps", "3")
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / LAST)["place"]["batch"] == 4
    resumed, expected = train(tmp_path, *SEVERAL, "--resume", str(tmp_path)), run[1]
    for part in ("model", "model_ema"):
        assert equal(resumed[part], expected[part]), part
    assert equal(further(resumed), further(expected))
    states = (checkpoint["optimizer"]["state"].values() for checkpoint in (resumed, expected))
    for one, other in zip(*states, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(*map(torch.as_tensor, (one[k], other[k]))) for k in one)


def test_each_average_is_kept_shown_and_loaded(run):
    """Three sets of weights, a grid of each, and all of them by name for sampling."""
    folder, checkpoint = run
    grids = {path.name for path in (folder / "samples").iterdir()}
    assert grids == {f"epoch0002_{name}.png" for name in ("ema", "ema_1000", "raw")}
    for name, held in (("ema_1000", further(checkpoint)), ("ema", checkpoint["model_ema"])):
        model, config = load_model(folder / LAST, name)
        assert equal(model.state_dict(), held)
        assert config["training"]["ema_images"] == {"ema": 300, "ema_1000": 1000}[name]
        assert "--ema_images 300 1000" in config["training"]["flags"]
    assert not equal(further(checkpoint), checkpoint["model_ema"])
    with pytest.raises(
        ValueError, match="weights 'ema_300': expected 'ema' or 'ema_1000' or 'raw'"
    ):
        load_model(folder / LAST, "ema_300")


def state_with(name):
    """A TrainState with a further average."""
    model, ema, optimizer = trained(0)
    emas = {name: EMA(model, 0.9)}
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainState(model, ema, optimizer, scaler, emas=emas)


def test_an_older_checkpoint_begins_further_averages_with_its_main_one(tmp_path, capsys):
    """Not with the weights before training; and one that is not asked for any more is told."""
    _, ema = save(tmp_path / LAST)
    state = state_with("ema_7")
    state.load(load_checkpoint(tmp_path / LAST), "it")
    assert equal(state.emas["ema_7"].state_dict(), ema.state_dict())
    assert "it has no ema_7: it begins as the main average" in capsys.readouterr().out
    state.save(tmp_path / LAST, CONFIG, {})
    state_with("ema_8").load(load_checkpoint(tmp_path / LAST), "it")
    assert "the ema_7 in it is not used" in capsys.readouterr().out


def test_a_damaged_average_is_refused(tmp_path):
    """In one line, when it is read and when it is loaded."""
    state = state_with("ema_7")
    state.save(tmp_path / LAST, CONFIG, {})
    content = load_checkpoint(tmp_path / LAST)
    content["parts"]["ema_7"]["mask_token"] *= float("nan")
    with pytest.raises(ValueError, match="it: its ema_7 does not fit: .*not finite"):
        state.load(content, "it")
    content["parts"]["ema_7"]["mask_token"] = "?"
    torch.save(content, tmp_path / "damaged.pth")
    with pytest.raises(ValueError, match="ema_7 mask_token is '\\?', expected a tensor"):
        load_checkpoint(tmp_path / "damaged.pth")


def test_the_best_is_named():
    """By every distance, lower is better; what is no distance, or of one kind alone, has none."""
    found = {
        "ema": {"fid": 4.0, "inception_score": 1.0},
        "ema_9": {"fid": 2.5, "inception_score": 2.0},
        "raw": {"fid": 3.0, "pixel_distance": 1.0},
    }
    assert [*ranking(found)] == ["fid: best is ema_9 2.5000, then raw 3.0000, ema 4.0000"]
    assert not [*ranking({"ema": {"fid": 1.0}})] and not [*ranking({"ema": {}, "raw": {}})]


def test_half_lives_too_long_for_the_run():
    """A note each, with the longest that leaves at most 5% of the initial weights."""
    recipe = Recipe(epochs=1, warmup_epochs=0, batch_size=16, lr=1.0, ema_images=(300, 400, 1600))
    assert [*recipe.misfits(100, 1)] == [
        f"--ema_images {n}: after the 1600 images of the run, this EMA still holds {left} of the "
        "initial weights; at most 370 would fit"
        for n, left in ((400, "6%"), (1600, "50%"))
    ]
    assert names_of((300, 400)) == {"ema": 300, "ema_400": 400}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--ema_images 0", "--ema_images: 0: expected an integer, at least 1"),
        ("--ema_images 5 6 5", "--ema_images 5 6 5: expected each half-life once"),
        ("--ema_images 5 --ema_rate 0.9", "--ema_rate 0.9: expected no --ema_images 5 beside it"),
        ("--optimizer lion", "argument --optimizer: invalid choice: 'lion'"),
    ],
)
def test_wrong_flags(flags, said, tmp_path, capsys):
    """One line each, before anything is read."""
    with pytest.raises((ValueError, SystemExit)) as error:
        main_mar.main(["--output_dir", str(tmp_path), *flags.split()])
    assert said in f"{error.value} {capsys.readouterr().err}"


@pytest.mark.parametrize("half_lives", [[2000, 500], [2000], [100, 500]])
def test_the_main_average_stays_it(half_lives):
    """A resumed run continues each average as what it was; others may be new, or be left out."""
    with pytest.raises(ValueError, match="the main average of c.pth is that of 500, expected it"):
        check_resumed(half_lives, [500, 2000], "c.pth")
    for fitting in ([500, 2000], [500], [500, 100], [100], None):
        check_resumed(fitting, [500, 2000], "c.pth")
    check_resumed(half_lives, None, "c.pth")


def test_every_average_is_evaluated(run):
    """Metrics of each by name in the log, and the best on the page."""
    folder = run[0]
    logged = {k: v for line in (folder / "log.jsonl").open() for k, v in json.loads(line).items()}
    found = {n: logged[f"eval_{n}/frechet_distance"] for n in ("ema", "ema_1000", "raw")}
    best = min(found, key=found.get)
    assert f"lowest: {best}, step 22" in (folder / "index.html").read_text()
