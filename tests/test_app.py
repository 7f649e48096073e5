"""The page of demo/app.py: what it does, and one visit with a browser. Run: pytest this file"""

import io
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import kinds
import numpy as np
import pytest
import torch
from cli import ROOT, complain
from PIL import Image

import engine_mar as engine
import models
from demo import app
from demo.studio import (
    Pace,
    Studio,
    columns_of,
    frame,
    names_to_show,
    painted,
    read_seed,
    summary,
    zoom,
)
from models.settings import Sampling
from util import provenance

CHECKPOINT = ROOT / "tests" / "fixtures" / "checkpoint.pth"


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """The small model of the digits that an earlier version trained, at work for the page."""
    return Studio(CHECKPOINT, tmp_path_factory.mktemp("page"))


def tiny(name, **more):
    """A model of 4 tokens with random weights, in evaluation mode."""
    torch.manual_seed(0)
    size = {"img_size": 4, "vae_stride": 1, "patch_size": 2, "vae_embed_dim": 1}
    model = models.build_model(name, **{**size, "class_num": 3, "num_sampling_steps": "3", **more})
    for parameter in model.parameters():  # some begin as zeros
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


# ---- settings ------------------------------------------------------------------------------------


def test_an_empty_field_is_the_checkpoints_own(studio):
    """Whatever is on the page at first is the checkpoint's."""
    assert studio.settings({}) == studio.settings({"cfg": None, "order": ""}) == studio.sampling
    values = {"cfg": 2, "num_iter": 8, "cfg_interval": "0 0.5", "order": "raster"}
    own = studio.sampling.but(**{**values, "cfg_interval": (0.0, 0.5)})
    assert studio.settings(values) == own


def test_wrong_fields_are_answered_in_one_line(studio):
    """The name of the field, its value and what was expected."""
    for values, said in (
        ({"temperature": -3}, "temperature -3: expected a number, at least 0"),
        ({"cfg": "much"}, "cfg much: expected a number"),
        ({"cfg_interval": "0.5"}, "cfg_interval 0.5: expected 2 numbers"),
        ({"solver": "euler"}, "solver 'euler': expected one of"),
        ({"num_sampling_steps": "0"}, "^diffusion steps '0': expected"),
    ):
        with pytest.raises(ValueError, match=said):
            studio.settings(values)
    for text, count, said in (
        ("giraffe", 1, "giraffe"),
        ("7", 1000, "pictures 1000: expected an integer from 1 to 64"),
        ("7", None, "pictures : expected an integer"),
    ):
        with pytest.raises(ValueError, match=said):
            studio.labels(text, count)
    with pytest.raises(ValueError, match="seed -1: expected an integer from 0 to"):
        read_seed(-1)


def test_classes_by_name(studio):
    """All in turn, one, or none; a model of one class has nothing to choose from."""
    assert [text for _, text in studio.class_choices()] == ["all", *map(str, range(10)), "none"]
    assert studio.labels("all", 3) == [0, 1, 2] and studio.labels("3,7", 3) == [3, 7, 3]
    assert studio.labels("none", 2) == [None, None]


def test_a_thousand_classes_have_distinct_names():
    """ImageNet's, two of which are called crane; classes without names have numbers."""
    from timm.data import ImageNetInfo

    names = names_to_show(ImageNetInfo().label_names(), 1000)
    assert len(set(names)) == 1000 and (names[134], names[517]) == ("crane (134)", "crane (517)")
    assert names_to_show(["cat", "dog"], 2) == ["cat", "dog"]
    assert names_to_show(None, 3) == ["0", "1", "2"]
    assert names_to_show(["all"], 1) == names_to_show(None, 1) == []


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("mar_tiny", {}),
        ("ar_tiny", {"order": "raster"}),
        ("dit_tiny", {}),
        ("mar_tiny", {"head": "l2"}),
        ("mar_tiny", {"head": "ce", "patch_size": 1, "vae_stride": 2, "num_codes": 5}),
    ],
)
def test_settings_without_effect(name, more):
    """A setting that a model says it does not use is refused or changes no bit; another does."""
    model, plain = tiny(name, **more), Sampling(num_iter=4, cfg=2.0)
    other = {
        **{"num_iter": 2, "num_sampling_steps": "2", "cfg": 1.5, "cfg_schedule": "constant"},
        **{"token_schedule": "uniform", "order": "raster", "temperature": 0.5, "max_timestep": 900},
        **{"solver": "ddim", "anneal": "linear:3:2", "cfg_interval": (0.0, 0.5)},
        "refresh_every": 2,
    }

    def sample(sampling):
        generator = torch.Generator().manual_seed(0)
        labels = torch.tensor([1])
        try:
            model.check(sampling)
            return model.sample_tokens(1, labels=labels, generator=generator, **sampling.asdict())
        except ValueError:
            return before

    before = sample(plain)
    same = {name for name in other if torch.equal(sample(plain.but(**{name: other[name]})), before)}
    assert set(model.without_effect) <= same
    assert model.num_codes or not same - {*model.without_effect, "order", "token_schedule"}


# ---- pictures ------------------------------------------------------------------------------------


def test_tokens_appear_and_the_result_is_that_of_sample_py(studio):
    """Ever fewer tokens are hidden; the last images are, bit by bit, those of `generate_images`."""
    labels, sampling = [3, 7, 1], studio.settings({"num_iter": 8})
    frames = list(studio.generate(labels, sampling, 5))
    hidden = [int(unknown.sum()) for _, unknown in frames]
    assert hidden == sorted(hidden, reverse=True) and hidden[-1] == 0 and hidden[0] > 0
    drawn = studio.model, studio.tokenizer, labels, sampling
    how = {"seed": 5, "batch_size": 64, "device": torch.device("cpu")}
    ((_, images),) = engine.generate_images(*drawn, **how)
    assert np.array_equal(frames[-1][0], images)


def test_autocast_does_not_outlast_a_step(studio, monkeypatch):
    """Of the threads that serve the page, each may ask for the next step; none is left with it."""
    monkeypatch.setattr(studio, "precision", "bf16")
    frames = studio.generate([3], studio.settings({"num_iter": 2}), 5)
    assert [torch.is_autocast_enabled("cpu") for _ in frames] == [False, False]


def test_a_png_makes_its_picture_again(studio, tmp_path, monkeypatch):
    """`sample.py --like` draws, from a PNG of the page alone, the same bits."""
    import sample

    monkeypatch.chdir(tmp_path)
    labels, sampling = [3, 7], studio.settings({"temperature": 0.9})
    *_, (images, _) = studio.generate(labels, sampling, 5)
    kept = studio.keep(images, labels, sampling, 5)
    assert [(Path(path).name, name) for path, name in kept] == [
        ("3-seed5-0.png", "3"),
        ("7-seed5-1.png", "7"),
    ]
    assert studio.text_of(kept[1][0]) == "7" and "temperature 0.9" in summary(kept[1][0])
    sample.main(["--like", kept[1][0], "--out", "again.png", "--device", "cpu"])
    assert np.array_equal(np.asarray(Image.open("again.png")), images[1])


def test_inpainting_keeps_known_pixels(studio):
    """What is not painted is as it was in every picture; what is painted differs between them."""
    sampling = studio.settings({})
    *_, (images, _) = studio.generate([4], sampling, 1)
    mask = np.zeros((8, 8), np.uint8)
    mask[:4, :4] = 1
    frames = list(studio.inpaint(images[0], mask, [4, 4, 4], sampling, 2))
    for filled, _ in frames:
        assert np.array_equal(filled[:, mask == 0], images[:, mask == 0].repeat(3, 0))
    filled, hidden = frames[-1]
    assert len(frames) > 1 and not hidden.any() and not np.array_equal(filled[0], filled[1])
    (path, _), *_ = studio.keep(filled, [4, 4, 4], sampling, 2, edited="inpainted")
    assert provenance.read(path)["edited"] == "inpainted"


def test_pictures_of_the_user(studio, tmp_path):
    """Whatever kind of picture is cropped to the model's size; what is none is refused by name."""
    for i, (mode, size) in enumerate((("RGBA", (30, 50)), ("L", (8, 8)), ("CMYK", (1, 40)))):
        path = tmp_path / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}"
        kinds.colours().resize(size).convert(mode).save(path)
        picture = studio.open(path)
        assert picture.shape == (8, 8, 3) and picture.dtype == np.uint8
    (tmp_path / "a.png").write_text("nothing")
    with pytest.raises(ValueError, match="a.png: not a readable image"):
        studio.open(tmp_path / "a.png")


def test_what_is_painted():
    """A pixel of the picture is to be filled where its enlargement was touched; some must be."""
    picture = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    canvas = np.zeros((*zoom(picture).shape[:2], 4), np.uint8)
    assert canvas.shape[:2] == (512, 512) and np.array_equal(zoom(picture)[::64, ::64], picture)
    with pytest.raises(ValueError, match="nothing is painted"):
        painted([canvas], (8, 8))
    canvas[130:140, 0:100, 3] = 255
    assert [list(place) for place in np.argwhere(painted([canvas], (8, 8)))] == [[2, 0], [2, 1]]


def test_frames():
    """Small pictures are enlarged by repeating pixels, many large ones are reduced, hidden tokens
    are gray, and counted."""
    images, hidden = np.full((10, 8, 8, 3), 200, np.uint8), np.zeros((10, 4, 4))
    hidden[0, 0, 0] = 1
    shown, words = frame(images, hidden)
    assert words == "159 of 160 tokens" and min(shown.shape[:2]) > 200
    assert {tuple(shown[3, 3]), tuple(shown[-4, -4])} == {(110, 120, 140), (200, 200, 200)}
    many = np.zeros((64, 256, 256, 3), np.uint8), np.zeros((64, 16, 16))
    assert frame(*many)[0].shape == (1033, 1033, 3)
    assert [columns_of(n) for n in (1, 2, 3, 4, 7, 10, 64)] == [1, 2, 3, 2, 3, 5, 8]


def test_decoding_takes_no_more_than_half_of_the_time(monkeypatch):
    """What took 3 seconds to show is not shown again before 3 seconds have passed."""
    now = [0.0]
    monkeypatch.setattr("demo.studio.time.monotonic", lambda: now[0])
    pace, shown = Pace(), []
    for step in range(8):
        now[0] += 1
        if pace.due():
            shown.append(step)
            now[0] += 3
            pace.done()
    assert shown == [0, 3, 6]


def test_a_long_name(studio, monkeypatch):
    """The name of a class may be longer than that of a file."""
    monkeypatch.setattr(studio, "name", lambda label: "very long " * 100)
    images = np.zeros((1, 8, 8, 3), np.uint8)
    ((path, _),) = studio.keep(images, [3], studio.sampling, 1)
    assert Path(path).exists() and len(Path(path).name) < 100


# ---- the script ----------------------------------------------------------------------------------


def test_what_cannot_be_served(capsys, tmp_path, monkeypatch):
    """A missing or foreign file and a port in use are said in one line, before gradio is loaded."""
    monkeypatch.chdir(tmp_path)
    assert complain(capsys, app.main).endswith("no such file; `make demo` makes it")
    said = complain(capsys, app.main, "--ckpt", "a.pth")
    assert said == "error: --ckpt a.pth: no such file"
    (tmp_path / "a.pth").write_text("nothing")
    assert "a.pth" in complain(capsys, app.main, "--ckpt", "a.pth")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = complain(capsys, app.main, "--ckpt", CHECKPOINT, "--port", port)
        assert said.startswith(f"error: --port {port}: Address already in use")
    for host in ("1.2.3.4", "::1"):
        said = complain(capsys, app.main, "--ckpt", CHECKPOINT, "--host", host)
        assert f"--host {host}: " in said and "expected an IPv4 address" in said


# ---- with a browser ------------------------------------------------------------------------------

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PATIENCE = 120  # seconds; machines for tests are slow, and shared


@pytest.fixture
def address(tmp_path):
    """The address of a page that is being served."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[app]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "demo.app", "--device", "cpu"]
    command += ["--ckpt", str(CHECKPOINT), "--port", str(port)]
    log = open(tmp_path / "log", "w")  # noqa: SIM115
    served = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        served.terminate()
        served.wait(PATIENCE)
        print((tmp_path / "log").read_text())


class Visit:
    """A browser on the page."""

    def __init__(self):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (
            "headless=new",
            "no-sandbox",
            "disable-dev-shm-usage",
            "window-size=1000,1200",
            "enable-unsafe-swiftshader",  # WebGL without a GPU, for the brush
        ):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))

    def until(self, found):
        """What the function returns as soon as that is something."""
        from selenium.common.exceptions import WebDriverException
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(self.driver, PATIENCE, 0.2, [WebDriverException, IndexError])
        return wait.until(lambda driver: found())

    def all(self, css):
        return self.driver.find_elements("css selector", css)

    def click(self, css):
        """Click on the first that is there, as soon as it can be."""
        self.until(lambda: [self.all(css)[0].click()])

    def type(self, css, text):
        """Replace what is in a field."""
        from selenium.webdriver.common.keys import Keys

        self.click(css)
        self.all(css)[0].send_keys(Keys.CONTROL, "a")
        self.all(css)[0].send_keys(text, Keys.ENTER)

    def pictures(self, count):
        """Paths of the gallery's pictures, as soon as there are so many."""
        css = "#gallery .thumbnail-item img"
        self.until(lambda: len(self.all(css)) == count)
        return ["/" + image.get_attribute("src").split("file=/")[1] for image in self.all(css)]

    def seen(self, element):
        """What an element looks like: an array (H, W, 3)."""
        shot = Image.open(io.BytesIO(element.screenshot_as_png))
        return np.asarray(shot.convert("RGB")).astype(int)

    def logged(self):
        """(what the console calls errors, hosts that were asked for something)."""
        errors = [line for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]
        messages = [json.loads(line["message"]) for line in self.driver.get_log("performance")]
        sent = [line["message"] for line in messages]
        sent = [line["params"] for line in sent if line["method"] == "Network.requestWillBeSent"]
        urls = [urlsplit(request["request"]["url"]) for request in sent]
        return errors, {url.hostname for url in urls if url.scheme not in ("data", "blob")}


@pytest.fixture
def visit(monkeypatch):
    """A Visit, with no proxy between the test and the browser."""
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")
    pytest.importorskip("selenium", reason="selenium is not installed: pip install -e '.[test]'")
    if not CHROMIUM or not DRIVER:
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    visit = Visit()
    yield visit
    visit.driver.quit()


def test_a_visit(address, visit):
    """Choose, generate, see pictures; paint, inpaint, known pixels stay; a wrong value is answered.

    The console has no errors, and nothing is asked of any other machine.
    """
    from selenium.webdriver import ActionChains

    visit.until(lambda: [visit.driver.get(address)])
    visit.type("#class input", "7")
    visit.type("#count input", "2")
    visit.type("#temperature input", "-1")
    visit.click("#generate")
    visit.until(lambda: "temperature -1: expected" in visit.all(".toast-body")[0].text)
    visit.type("#temperature input", "1")
    visit.click("#generate")
    paths = visit.pictures(2)
    made = provenance.read(paths[0])
    assert (made["labels"], made["seed"], made["edited"]) == ([7, 7], 1, None)
    before = np.asarray(Image.open(paths[0]))
    shown = visit.until(lambda: visit.all("#drawn img")[0])
    assert before.std() > 20 and visit.seen(shown).std() > 20

    visit.click("#edit")
    canvas = visit.until(lambda: visit.all("#editor canvas")[0])
    visit.until(lambda: visit.seen(canvas).std() > 20)
    stroke = ActionChains(visit.driver, 20).move_to_element_with_offset(canvas, -90, -60)
    stroke.click_and_hold().move_by_offset(0, 120).release().perform()
    visit.until(lambda: np.ptp(visit.seen(canvas), axis=-1).max() > 100)  # the brush's colour
    visit.click("#inpaint")
    paths = visit.pictures(4)
    after = np.asarray(Image.open(paths[0]))
    assert provenance.read(paths[0])["edited"]
    assert np.array_equal(after[:, 4:], before[:, 4:]) and not np.array_equal(after, before)
    errors, hosts = visit.logged()
    assert not errors and hosts == {"127.0.0.1"}
