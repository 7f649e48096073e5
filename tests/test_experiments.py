"""Trainings compared at equal time. Run: python -m pytest tests/test_experiments.py"""

import numpy as np
import pytest

import main_mar
import sample
from benchmarks import experiment_tables as tables
from benchmarks import experiments
from benchmarks.experiment_rows import SETS, in_proportion


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


def test_the_recipe_is_in_proportion(tmp_path):
    """A quarter of a run is warm-up, and the EMA remembers a 25th, whatever its length."""
    assert in_proportion(8, 100) == {"warmup_epochs": 2.0, "ema_rate": 1 - 1 / 32}
    assert in_proportion(80, 100)["warmup_epochs"] == 20.0


def test_table_and_pictures(tmp_path):
    """Mean and deviation over the seeds, a dash for what a row has not; a grid for each row."""
    records = {}
    for seed, distance in enumerate((10.0, 14.0)):
        folder = tmp_path / f"{seed}"
        folder.mkdir()
        np.savez(folder / "samples.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
        records[folder] = {"frechet_distance": distance, "images": 4, "per_class": 2}
        records[folder] |= {"extractor": "grey-pixels", "precision": 0.5}
    losses = [{"val_mse": 0.25}, {"val_mse": 0.75}]
    points = [
        tables.Point("MAR, Diff", "steps", 2, 2, 1.25, 1.0, records, losses),
        tables.Point("MAR, CE", "time", 2, 4, 1.25, 1.0, records, []),
    ]
    tables.write(tmp_path, "tables", points)
    text = (tmp_path / "tables.md").read_text()
    row = "| MAR, Diff | 2 | 1.2 | 1 | 12.0 ± 2.8 | – | 0.5000 ± 0.0000 | – | 0.5000 ± 0.3536 |"
    assert row in text
    assert "## 2 epochs, equal time" in text and "| MAR, CE | 4 |" in text
    assert (tmp_path / "tables.png").is_file()
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "mar-ce.png",
        "mar-diff.png",
    ]
