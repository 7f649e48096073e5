"""The paper's tables in small. Run: python -m pytest tests/test_reproduce.py"""

from dataclasses import dataclass

import pytest
import torch

import main_mar
import models
import reproduce
from models import presets
from models.fast.denoiser import FastSampler
from util.flags import run

FAST = ["--epochs", "1", "--tokenizer_epochs", "1", "--num_images", "20", "--device", "cpu"]


@pytest.mark.slow
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
    # of two seeds, three metrics each, without and with guidance
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


@dataclass
class Latents:
    """In the place of a tokenizer whose weights are not there: what a model asks of one."""

    stride: int
    channels: int
    patch_size: int = 1
    num_codes: int | None = None
    token_norm: bool = False
    scale: float = 1.0
    shift: float = 0.0


PUBLISHED = {
    "kl16": Latents(16, 16),
    "kl8": Latents(8, 4, patch_size=2),
    "consistency": Latents(8, 4, patch_size=2),
    "vq16": Latents(16, 1, num_codes=16384),
    "vq16_latent": Latents(16, 8),
}
SMALL = {"kl": Latents(2, 4), "vq": Latents(2, 1, num_codes=256), "vq_latent": Latents(2, 4)}


@pytest.fixture
def built(monkeypatch):
    """A function from flags of main_mar.py to the model that they build, on the meta device."""
    build_tokenizer = models.build_tokenizer

    def latents(name, **arguments):
        found = {**PUBLISHED, **SMALL}.get(name)
        return found or build_tokenizer(name, **arguments)

    def built(*flags):
        args, given = presets.apply(main_mar.get_parser(), [str(flag) for flag in flags])
        config, sampling, _ = main_mar.configure(args, given, {}, None, None)
        with torch.device("meta"):
            model = models.build_model(**config["model"])
        model.check(sampling)
        return args, config["model"], model

    monkeypatch.setattr(models, "build_tokenizer", latents)
    monkeypatch.setattr(FastSampler, "start", lambda *args: None)  # which arranges real weights
    return built


@pytest.mark.parametrize("name", [n for n in presets.PRESETS if n not in presets.FITTED])
def test_every_preset_can_be_built(name, built):
    """Its flags are known, its model is as they say, and can be sampled as they say."""
    args, arguments, model = built("--preset", name, "--epochs", "7")
    assert args.epochs == 7
    for flag, value in presets.PRESETS[name].items():
        assert flag == "epochs" or getattr(args, flag) == value
    assert arguments["name"] == presets.PRESETS[name]["model"]
    assert type(model).__name__.lower() == arguments["name"].split("_")[0]
    head = presets.PRESETS[name].get("head", "diffloss")
    assert arguments["head"] == head and model.head_name == head
    if head == "diffloss":
        width = presets.PRESETS[name]["diffloss_w"]
        assert model.head.net.cond_embed.out_features == width
        assert len(model.head.net.res_blocks) == presets.PRESETS[name]["diffloss_d"]


# of the published models, by table 4 of the paper
@pytest.mark.parametrize(("size", "millions"), [("base", 208), ("large", 479), ("huge", 943)])
def test_published_models_are_as_large_as_the_paper_says(size, millions, built):
    """To within 1%."""
    _, _, model = built("--preset", f"table4-{size}")
    found = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found == pytest.approx(millions * 1e6, rel=0.01)


@pytest.mark.parametrize("name", reproduce.RUNS)
def test_every_run_can_be_built(name, built, tmp_path, monkeypatch):
    """With the flags that reproduce.py gives main_mar.py: all of equally many tokens."""
    calls = []
    monkeypatch.setattr(reproduce, "call", lambda main, flags, *more: calls.append((main, flags)))
    args = reproduce.get_parser().parse_args(["table1", "--output_dir", str(tmp_path)])
    (tmp_path / name / "seed1").mkdir(parents=True)
    reproduce.train(args, name, 1)
    ((main, flags),) = calls
    assert main is main_mar.main
    args, arguments, model = built(*(part for k, v in flags.items() for part in (f"--{k}", v)))
    assert model.seq_len == 16 and arguments["class_num"] == 10
    for flag, value in reproduce.RUNS[name].items():
        assert getattr(args, flag) == value


def test_rows_name_runs():
    """Every row of a table is trained by a run, and every run has a row, but for the figures'."""
    rows = {row.run for rows in reproduce.TABLES.values() for row in rows}
    assert rows | {"dit-diff"} == set(reproduce.RUNS)


def test_wrong_number_of_images(capsys):
    """One line, status 2."""
    with pytest.raises(SystemExit) as stop:
        run(reproduce.main, ["table1", "--num_images", "15"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --num_images 15: expected the same number per class\n"
