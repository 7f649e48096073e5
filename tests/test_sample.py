"""Images, sweeps and the demo of a checkpoint. Run: python -m pytest tests/test_sample.py"""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli import ROOT, read_lines

import engine_mar
import sample
from demo import digits
from models.settings import Sampling
from util.checkpoint import LAST
from util.evaluation.sweep import parse_grid


def test_sampling_writes_every_kind_of_output(tmp_path, ckpt):
    """Labels by number and range, so many of each; a grid, a folder and an .npz of the same."""
    out = [tmp_path / "grid.png", tmp_path / "folder", tmp_path / "all.npz"]
    flags = ["--ckpt", ckpt, "--device", "cpu", "--labels", "7,0-1", "--per_class", "2"]
    flags += ["--num_iter", "4", "--batch_size", "4", "--out", *out]
    sample.main([str(f) for f in flags])
    images = np.load(out[2])["arr_0"]
    assert (images.shape, images.dtype) == ((6, 8, 8, 3), np.uint8)
    from PIL import Image

    names = sorted(p.name for p in out[1].glob("*.png"))
    assert names == [f"{i:06d}.png" for i in range(6)]
    assert {p.name for p in out[1].iterdir()} == {*names, "sampling.json", "run.lock"}
    for name, image in zip(names, images, strict=True):
        assert np.array_equal(np.asarray(Image.open(out[1] / name)), image)
    assert Image.open(out[0]).size[0] < Image.open(out[0]).size[1]  # two columns, three rows
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all.npz", "folder", "grid.png"]


def test_sampling_without_a_class(tmp_path, ckpt):
    """--labels none samples with the embedding of no class."""
    flags = ["--ckpt", ckpt, "--device", "cpu", "--labels", "none", "--out", tmp_path / "a.npz"]
    sample.main([str(f) for f in flags])
    assert np.load(tmp_path / "a.npz")["arr_0"].shape == (8, 8, 8, 3)


def test_the_model_s_own_settings_are_stated(ckpt):
    """Where the stored Sampling leaves them to the model, and where it never had them."""
    args = sample.get_parser().parse_args(["--ckpt", str(ckpt)])
    model, _, config = sample.open_checkpoint(args)
    assert config["model"]["max_timestep"] == 950
    config["sampling"] |= {"max_timestep": None, "num_sampling_steps": None}
    stated = sample.pick_sampling(args, config, model, [])
    assert stated.max_timestep == 950
    assert stated.num_sampling_steps == config["model"]["num_sampling_steps"]


def sweep(ckpt, folder, *axes):
    flags = ["--ckpt", ckpt, "--device", "cpu", "--labels", "all", "--per_class", "2"]
    flags += ["--reference", "digits", "--stats_dir", folder / "stats", "--output_dir", folder]
    sample.main([str(f) for f in (*flags, "--sweep", *axes)])


def test_sweep_is_resumed_and_drawn(ckpt, tmp_path, monkeypatch, capsys):
    """Each point once, though asked for again with another: a table, a CSV and the plots."""
    calls = []
    evaluate = engine_mar.evaluate
    monkeypatch.setattr(
        engine_mar,
        "evaluate",
        lambda *args, **kwargs: (calls.append(args[3]), evaluate(*args, **kwargs)),
    )
    steps = ("num_sampling_steps=3,5", "num_iter=2,3")
    sweep(ckpt, tmp_path, "temperature=0.9", *steps)
    assert len(calls) == 4
    sweep(ckpt, tmp_path, "temperature=0.9,1", *steps)
    assert len(calls) == 8
    assert {sampling.temperature for sampling in calls[4:]} == {1.0}
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 8
    rows = (tmp_path / "sweep.csv").read_text().splitlines()
    assert len(rows) == 9 and rows[0].startswith("temperature,num_sampling_steps,num_iter,frechet")
    assert len((tmp_path / "sweep.md").read_text().splitlines()) == 10
    plots = {path.name for path in tmp_path.glob("*.png")}
    assert plots == {f"sweep_{name}.png" for name in ("diffusion_steps", "temperature", "speed")}


def test_a_new_metric_is_measured_at_every_point(ckpt, tmp_path, capsys):
    """Points that lack it are done again; metrics are chosen by --metrics."""
    flags = ["--labels", "all", "--reference", "digits", "--sweep", "num_iter=2,3", "--metrics"]
    flags = ["--ckpt", ckpt, "--device", "cpu", "--output_dir", tmp_path, *flags]
    for more in ([], ["pixel_distance"], []):
        sample.main([*map(str, flags), "frechet_distance", *more])
        columns = (tmp_path / "sweep.csv").read_text().splitlines()[0]
        assert "frechet_distance" in columns and set(more) <= set(columns.split(","))
    lines = read_lines(tmp_path / "results.jsonl")
    assert ["pixel_distance" in line for line in lines] == [False, False, True, True]
    assert not any("precision" in line for line in lines)


def test_the_demo(ckpt, tmp_path, capsys):
    """Pictures, and a table of samples at several guidance scales beside real images; then what to
    look at, of which a page only if there is one."""
    folder = shutil.copytree(ckpt.parent, tmp_path / "a run")
    digits.main(["--ckpt", str(folder / LAST), "--num_images", "20"])
    lines = (folder / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| sampled")] == [
        f"| sampled, guidance {cfg}" for cfg in ("1", "1.5", "2")
    ]
    assert lines[2].startswith("| real, for training | 20 | ")
    assert {"samples.png", "strip.png", "loss.png"} <= {path.name for path in folder.iterdir()}
    said = capsys.readouterr().out
    called = next(shlex.split(line) for line in said.splitlines() if "--logdir" in line)
    assert Path(called[0]).is_file() and called[1:] == ["--logdir", str(folder)]
    assert "index.html" not in said
    (folder / "index.html").touch()
    assert f"    '{folder / 'index.html'}'" in digits.advise(folder).splitlines()


def test_the_sweep_of_the_demo_has_its_table(ckpt, monkeypatch):
    """`make demo-sweep` samples what the table's rows are of: labels, seed, batches, metrics."""
    rule = next(r for r in (ROOT / "Makefile").read_text().split("\n\n") if "--sweep" in r)
    words = shlex.split(rule.split("sample.py")[1].replace("\\\n", " "))
    args = sample.get_parser().parse_args([w.replace("$(DIGITS)", str(ckpt.parent)) for w in words])
    points = parse_grid(args.sweep, Sampling)
    assert set(digits.GUIDANCE) == {p["cfg"] for p in points if p["temperature"] == 1}
    assert (args.reference, args.metrics) == ("digits", [*digits.METRICS])
    _, _, config = digits.open_checkpoint(ckpt)
    drawn = {}

    def generate(model, tokenizer, labels, sampling, **how):
        drawn.update(labels=labels, seed=how["seed"], batch_size=how["batch_size"])
        raise StopIteration

    monkeypatch.setattr(engine_mar, "generate_images", generate)
    monkeypatch.setattr(digits, "write_samples", lambda *args: None)
    monkeypatch.setattr(digits, "write_strip", lambda *args: None)
    with pytest.raises(StopIteration):
        digits.main(["--ckpt", str(ckpt)])
    labels, _ = sample.pick_labels(args, config)
    assert drawn == {"labels": labels, "seed": args.seed, "batch_size": args.batch_size}


def test_a_sweep_of_other_labels_is_another(ckpt, tmp_path, capsys):
    """As many images of other classes, or from other data, are not taken for those there."""
    flags = ["--ckpt", ckpt, "--device", "cpu", "--reference", "digits", "--output_dir", tmp_path]
    flags += ["--stats_dir", tmp_path / "stats", "--sweep", "num_iter=2", "--batch_size", "10"]
    for labels in (("0-9", "1"), ("3", "10"), ("3", "10")):
        sample.main([str(f) for f in (*flags, "--labels", labels[0], "--per_class", labels[1])])
        # a run that was killed leaves half a line
        with (tmp_path / "results.jsonl").open("a") as file:
            file.write('{"cfg": 1.0, "ima')
    assert capsys.readouterr().out.count("there already") == 1
    whole = [line for line in (tmp_path / "results.jsonl").read_text().splitlines() if "}" in line]
    assert [json.loads(line)["labels"] for line in whole] == ["0-9", "3"]
