"""The paper's tables in small. Run: python -m pytest tests/test_reproduce.py"""

import pytest

import main_mar
import reproduce
from util import presets
from util.flags import run

FAST = ["--epochs", "1", "--tokenizer_epochs", "1", "--num_images", "20", "--device", "cpu"]


def test_a_table_is_made_and_resumed(tmp_path, monkeypatch, capsys):
    """Two rows of two seeds; the second time nothing is trained or sampled again."""
    rows = [reproduce.TABLES["table1"][i] for i in (0, 7)]
    monkeypatch.setitem(reproduce.TABLES, "table1", rows)
    monkeypatch.setattr(reproduce, "GUIDANCE", (1.0, 2.0))
    flags = ["table1", *FAST, "--seeds", "1", "2", "--output_dir", str(tmp_path)]
    reproduce.main(flags)
    text = (tmp_path / "table1.md").read_text()
    assert "| AR, raster, CE | 19.58/60.8 → 4.92/227.3 |" in text
    assert "| MAR, Diff | 3.50/201.4 → 1.98/290.3 |" in text
    # of two seeds, three figures each, without and with guidance
    assert [line.count(" ± ") for line in text.splitlines() if " → " in line] == [6, 6]
    assert (tmp_path / "table1.png").is_file()
    assert len(list((tmp_path / "table1").glob("*.png"))) == 2
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pth")}
    assert len(trained) == 4
    capsys.readouterr()
    reproduce.main(flags)
    output = capsys.readouterr().out
    assert output.count("there already") == 8 and "training:" not in output
    assert trained == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pth")}
    assert (tmp_path / "table1.md").read_text() == text
    with pytest.raises(ValueError, match="made with other flags; pass another --output_dir"):
        reproduce.main([*flags, "--epochs", "2"])


def test_every_run_and_preset_can_be_built():
    """Rows name runs that are there, and presets parse as flags."""
    for rows in reproduce.TABLES.values():
        assert {row.run for row in rows} <= set(reproduce.RUNS)
    parser = main_mar.get_parser()
    for name, (flags, _) in presets.PAPER.items():
        said = [part for k, v in flags.items() for part in (f"--{k}", str(v))]
        parser.parse_args(said)
        args, _ = presets.apply(main_mar.get_parser(), ["--preset", name, "--epochs", "7"])
        assert args.epochs == 7 and args.model == flags["model"]


def test_wrong_number_of_images(capsys):
    """One line, status 2."""
    with pytest.raises(SystemExit) as stop:
        run(reproduce.main, ["table1", "--num_images", "15"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --num_images 15: expected as many of each class\n"
