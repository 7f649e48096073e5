"""Trainings compared at equal time. Run: python -m pytest tests/test_experiments.py"""

from unittest import mock

import numpy as np
import pytest

import main_mar
import sample
from benchmarks import experiment_tables as tables
from benchmarks import experiments
from benchmarks.experiment_rows import SETS, in_proportion
from reproduce import draw_speed


def arguments(tmp_path, what, *flags):
    """Parsed flags of the benchmark, for a data set of 1,280 empty files."""
    folder = tmp_path / "data" / "train" / "a"
    folder.mkdir(parents=True)
    for i in range(1280):
        (folder / f"{i}.png").touch()
    argv = [what, "--data_path", str(tmp_path / "data"), "--tokenizers", "t"]
    argv += ["--output_dir", str(tmp_path / "out")]
    return experiments.get_parser().parse_args([*argv, *flags])


@pytest.mark.parametrize("what", SETS)
def test_every_row_is_flags_of_the_scripts(tmp_path, what):
    """Training and sampling know the flags of each row, and no two rows are the same run."""
    args, runs = arguments(tmp_path, what), set()
    for name, row in SETS[what].rows.items():
        flags = experiments.flags_of(args, name, seed=1, epochs=4)
        own, *switches = experiments.split(flags)
        lists = {k: v if isinstance(v, list) else [v] for k, v in own.items() if v is not None}
        argv = [str(part) for k, values in lists.items() for part in (f"--{k}", *values)]
        parsed = main_mar.get_parser().parse_args([*argv, *switches, "--use_cached"])
        runs.add(str(sorted(vars(parsed).items(), key=str)))
        for how in row.samples.values():
            flags = [str(part) for k, v in how.flags.items() for part in (f"--{k}", v)]
            sample.get_parser().parse_args(["--ckpt", "x", *flags])
    assert len(runs) == len(SETS[what].rows)


def test_a_run_is_guided_by_its_own_past(tmp_path):
    """The checkpoint of a quarter of the run is kept; its samples have one scale, others all."""
    args = arguments(tmp_path, "presets", "--cfg", "1", "3")
    assert experiments.flags_of(args, "baseline", seed=1, epochs=16)["keep_every"] == 4
    found = list(experiments.samplings(args, "preset fast"))
    assert ("", 1.0) in found and ("", 3.0) in found and (", autoguided by 4", 4) in found
    asked = []
    args.device = "cpu"
    with mock.patch.object(experiments, "call", lambda main, flags: asked.append(flags)):
        experiments.measure(args, "baseline", 1, 16, ", autoguided by 4", 4)
    assert asked[0]["guide"].name == "checkpoint-epoch0004.pth" and asked[0]["cfg"] == 4


def test_equal_time_is_more_of_the_cheaper_steps(tmp_path):
    """A row of half the cost has twice the epochs in equal time, and as many in equal steps."""
    args = arguments(tmp_path, "tables")
    costs = dict.fromkeys(SETS["tables"].rows, 0.01) | {"MAR, CE": 0.005}
    assert experiments.lengths(args, costs, "MAR, CE", 3) == {"steps": 3, "time": 6}
    assert experiments.lengths(args, costs, "MAR, Diff", 3) == {"steps": 3, "time": 3}


@pytest.mark.parametrize("row", ["no warm-up", "Muon"])
def test_some_rows_need_only_their_own_costs(tmp_path, monkeypatch, row):
    """Timed are the rows asked for and the one whose time is the measure, each once."""
    asked = []

    def timed(args, rows, known):
        asked.append(list(rows))
        return {**dict.fromkeys(rows, 0.5), **known}

    monkeypatch.setattr(experiments, "timed", timed)
    args = arguments(tmp_path, "log", "--rows", row)
    (tmp_path / "out").mkdir()
    expected = {"baseline", row} if row == "Muon" else {"baseline"}  # no warm-up costs nothing
    for _ in range(2):
        costs = experiments.seconds_per_image(args)
        assert expected <= {*costs} and costs[row] == 0.5
    assert len(asked) == 1 and {*asked[0]} == expected


def test_tables_alone_need_runs(tmp_path):
    """Nothing is trained where there is nothing."""
    argv = ["log", "--data_path", str(tmp_path), "--output_dir", str(tmp_path), "--tables_only"]
    with pytest.raises(ValueError, match="no costs.json in"):
        experiments.main(argv)
    with pytest.raises(ValueError, match="'DiT': figures need all"):
        experiments.main(["figures", *argv[1:-1], "--rows", "DiT"])


def test_the_recipe_is_in_proportion(tmp_path):
    """A quarter of a run is warm-up, and the EMA remembers a 25th, whatever its length."""
    assert in_proportion(8, 100) == {"warmup_epochs": 2.0, "ema_rate": 1 - 1 / 32}
    assert in_proportion(80, 100)["warmup_epochs"] == 20.0


def test_claims_are_about_rows():
    """Both rows of each of the paper's orderings are measured, and its numbers are in order."""
    for each in SETS.values():
        labels = {name + label for name, row in each.rows.items() for label in row.samples}
        for claim in each.claims:
            assert {claim.better, claim.worse} <= labels
            low, high = map(float, claim.paper.split(" < "))
            assert low < high


def test_claims_are_judged_seed_by_seed():
    """Only seeds that both rows have; a sign where they agree."""

    def point(row, distances):
        records = {s: {"frechet_distance": d} for s, d in distances.items()}
        return tables.Point(row, "steps", 2, 2, 1.0, 1.0, {}, records, [])

    low, high = point("a", {1: 10.0, 2: 12.0, 3: 9.0}), point("b", {1: 11.0, 2: 13.0})
    mixed = point("c", {1: 9.0, 2: 14.0})
    assert tables.compared(low, high) == "11.0 < 12.0 (2 of 2)"
    assert tables.compared(high, low) == "12.0 > 11.0 (0 of 2)"
    assert tables.compared(low, mixed) == "11.0 ≈ 11.5 (1 of 2)"
    assert tables.compared(low, None) is None
    claim = tables.Claim("a", "b", "1 < 2")
    assert tables.judged(claim, [low, high])["2 epochs, equal steps"] == "11.0 < 12.0 (2 of 2)"


def test_table_and_pictures(tmp_path):
    """Mean and deviation over the seeds, a dash for what a row has not; a grid for each row."""
    folders, records = {}, {}
    for seed, distance in enumerate((10.0, 14.0)):
        folders[seed] = tmp_path / f"{seed}"
        folders[seed].mkdir()
        np.savez(folders[seed] / "samples.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
        records[seed] = {"frechet_distance": distance, "images": 4, "per_class": 2}
        records[seed] |= {"extractor": "grey-pixels", "precision": 0.5}
    losses = [{"val_mse": 0.25}, {"val_mse": 0.75}]
    points = [
        tables.Point("MAR, Diff", "steps", 2, 2, 1.25, 1.0, folders, records, losses),
        tables.Point("MAR, CE", "time", 2, 4, 1.25, 1.0, folders, records, []),
    ]
    claims = [tables.Claim("MAR, Diff", "MAR, CE", "3.50 < 8.79")]
    tables.write(tmp_path, "tables", points, claims)
    text = (tmp_path / "tables.md").read_text()
    row = "| MAR, Diff | 2 | 1.2 | 1 | 12.0 ± 2.8 | – | 0.5000 ± 0.0000 | – | 0.5000 ± 0.3536 |"
    assert row in text
    assert "## 2 epochs, equal time" in text and "| MAR, CE | 4 |" in text
    assert "| MAR, Diff | MAR, CE | 3.50 < 8.79 | – | – |" in text
    assert (tmp_path / "tables.png").is_file()
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "mar-ce.png",
        "mar-diff.png",
    ]


def test_rows_of_one_length_are_drawn_below_each_other():
    """The smallest distance is at the top, and the first row is marked."""
    records = [{s: {"frechet_distance": d + s} for s in (1, 2)} for d in (20.0, 30.0, 10.0)]
    points = [
        tables.Point(row, "time", 2, 2, 1.0, 1.0, {}, record, [])
        for row, record in zip("abc", records, strict=True)
    ]
    (panel,) = tables.draw_rows(points).axes
    names = {label.get_text(): height for height, label in enumerate(panel.get_yticklabels())}
    assert names["c"] > names["a"] > names["b"]
    assert panel.lines[-1].get_xdata()[0] == 21.5


def test_figure_of_speed_is_of_the_models_own_sampling(tmp_path):
    """A folder of MAR has points of other figures, at other temperatures and diffusion steps."""
    own = {"cfg": 2.0, "temperature": 1.0, "num_sampling_steps": "25", "seconds_per_image": 0.1}

    def measure(run, steps, sweep):
        if run == "dit-diff":
            points = [{"num_sampling_steps": str(n)} for n in (5, 10, 25, 50, 100, 250)]
        else:
            others = [{"temperature": 1.05}, {"num_sampling_steps": "5"}, {"cfg": 3.0}]
            points = [{}, *others * (run == "mar-diff" and steps == 4)]
        return [{**own, **point, "frechet_distance": 7.0 + bool(point)} for point in points], None

    draw_speed(measure, 16, tmp_path)
    lines = (tmp_path / "figure_speed.md").read_text().splitlines()[2:]
    assert all(float(line.split("|")[3]) == 7 for line in lines if "DiT" not in line)
    assert sum("DiT" in line for line in lines) == 6
