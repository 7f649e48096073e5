"""The page of a run's folder. Run: python -m pytest tests/test_run_page.py"""

import re
import time
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest

import main_mar
from util import jsonl
from util.images import save_image
from util.run import charts
from util.run.page import FILE, STYLE, Page, read_log, without
from util.run.stop import Stopped

VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Notes the tags of a page; an end that fits no start raises AssertionError."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, name, attribute):
        """The values of an attribute of all tags of a name."""
        return [values[attribute] for tag, values in self.found if tag == name]


def page_of(folder, argv=(), **flags):
    args = main_mar.get_parser().parse_args(["--output_dir", str(folder)])
    vars(args).update(flags)
    return Page(args, main_mar.get_parser(), argv, epochs=4)


@pytest.fixture
def folder(tmp_path):
    """The folder of a run with evaluations and three grids; its name has HTML's characters."""
    folder = tmp_path / "<b>&'run"
    for step in range(20, 101, 20):
        values = {"loss": 1 / step, "grad_norm": None, "loss_t0-249": 1.0, "loss_t250-499": 2.0}
        jsonl.append(folder / "log.jsonl", {"step": step, "epoch": step / 25, **values})
        for weights in ("ema", "raw"):
            jsonl.append(folder / "log.jsonl", {"step": step, f"eval_{weights}/fid": 50.0 - step})
    jsonl.append(folder / "results.jsonl", {"fid": 3.0, "real": {"fid": 1.75}})
    for epoch in (1, 2, 10):
        save_image(folder / f"samples/epoch{epoch:04d}_ema.png", np.zeros((4, 4, 3), np.uint8))
    return folder


def test_all_that_is_in_the_folder(folder):
    """Curves with their values, real images as a line, grids from the newest, flags, commands."""
    page_of(folder, cfg=2.5).write("done")
    text = (folder / FILE).read_text("utf-8")
    assert 'class="done">done' in text and "epoch 4 of 4, step 100" in text
    for words in ("step 40 (epoch 1.6): 0.025", "ema, step 60: -10", "real images: 1.75"):
        assert f"<title>{words}</title>" in text
    assert "gradient norm" not in text and "0-249</span>" in text  # it has no value that is finite
    changed, rest = text.split("<details>")
    assert "<td>--cfg</td><td>2.5</td>" in changed and "<td>--lr</td>" in rest
    images = Reader(text).all("img", "src")
    assert images == [f"samples/epoch{epoch:04d}_ema.png" for epoch in (10, 2, 1)]
    assert all((folder / unquote(name)).is_file() for name in images)


def test_nothing_is_taken_for_html_or_fetched(folder):
    """Names are escaped; the page has no script and no address but its own folder's."""
    jsonl.append(folder / "log.jsonl", {"step": 120, "eval_ema/<i>": 1.0, "eval_<u>/fid": 1.0})
    page_of(folder, ["--preset", "<script>"], data_path="<script>alert(1)</script>").write()
    text = (folder / FILE).read_text("utf-8")
    reader = Reader(text)
    assert not {"script", "i", "u", "link"} & {tag for tag, _ in reader.found}
    assert "<h1>&lt;b&gt;&amp;&#x27;run</h1>" in text and "http" not in text.replace(
        "http-equiv", ""
    )
    assert not re.search(r"url\(|@import", text)


def test_a_long_log_costs_little(folder):
    """10,000 lines: within 50 ms where nothing else runs; few points, the last one, evaluations."""
    record = jsonl.read(folder / "log.jsonl")[0]
    lines = [jsonl.dumps(record | {"step": step}) for step in range(10_000)]
    lines[5001] = jsonl.dumps({"step": 5001, "eval_ema/fid": 1.0})
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    start = time.process_time()
    page_of(folder).write()
    assert time.process_time() - start < 0.5
    found = read_log(folder / "log.jsonl")
    assert len(found) <= 510 and found[-1]["step"] == 9999 and 5001 in [x["step"] for x in found]
    assert (folder / FILE).stat().st_size < 200_000


def test_training_goes_on_without_it(folder, capsys, monkeypatch):
    """A page that cannot be written, or a log that makes no sense, is said once."""
    (folder / FILE).mkdir()
    page = page_of(folder)
    for _ in range(2):
        page.write()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("NOTE: ") and f"{FILE}: not written (" in line
    (folder / FILE).rmdir()
    lines = ["[]", '{"step": "x"}', '{"step": 1, "loss": [1]}', f'{{"step": 1{"0" * 400}}}']
    (folder / "log.jsonl").write_text("\n".join([*lines, '{"ste']))
    page.write()
    assert "nothing logged yet" in (folder / FILE).read_text("utf-8")


def test_the_end_is_told(folder, ckpt):
    """Stopped, failed, done, and that of a whole run of main_mar.py."""
    page = page_of(folder)
    with pytest.raises(Stopped), page.following():
        raise Stopped("SIGTERM")
    assert ">stopped</b>" in (folder / FILE).read_text("utf-8")
    with pytest.raises(FloatingPointError), page.following():
        raise FloatingPointError
    text = (folder / FILE).read_text("utf-8")
    assert ">failed</b>" in text and "http-equiv" not in text
    with page.following():
        pass
    assert ">done</b>" in (folder / FILE).read_text("utf-8")
    text = (ckpt.parent / FILE).read_text("utf-8")
    assert ">done</b>" in text and len(Reader(text).all("img", "src")) == 2
    assert "--preset digits --device cpu --epochs 1" in text and "http-equiv" not in text


def test_the_command_to_resume(tmp_path):
    """The flags as given, with this run's folder in place of what it resumed itself."""
    for given in (["--resume", "x"], ["--resume=x"], []):
        argv = ["--cfg", "2", *given, "--data_path", "a b"]
        assert without(argv, "--resume") == ["--cfg", "2", "--data_path", "a b"]
    page_of(tmp_path, ["--data_path", "a b"]).write()
    text = (tmp_path / FILE).read_text("utf-8")
    assert f"main_mar.py --data_path &#x27;a b&#x27; --resume {tmp_path}" in text


def test_frames_and_ticks():
    """Round numbers within the frame; of many values the largest few are cut, of few none."""
    for low, high in ((0, 1), (0.1537, 0.1542), (-3, 12_345), (1e-9, 3e-9)):
        marks = charts.ticks(low, high)
        assert 2 <= len(marks) <= 7 and low <= marks[0] and marks[-1] <= high * (1 + 1e-9)
    assert charts._range([1.0] * 99 + [50.0], [])[1] < 2
    assert charts._range([1.0, 50.0], [])[1] > 50
    assert [*map(charts.short, (0, 0.00025, 123456, 0.5, 2e-9))] == [
        *("0", "0.00025", "123456", "0.5", "2e-9")
    ]
    many = charts.chart("many", {f"curve {i}": [(1, 1.0, "")] for i in range(9)})
    assert many.count('class="key c0"') == 2  # the colours begin anew
    for i in range(charts.COLOURS):
        assert f'class="key c{i}"' in many and STYLE.count(f"--c{i}: #") == 2
    flat = charts.chart("flat", {"a": [(5, 2.0, "")]})
    assert "nan" not in flat and flat.count("<circle") == 1
