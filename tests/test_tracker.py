"""Trackers beside TensorBoard. Run: python -m pytest tests/test_tracker.py

Most tests use a stand-in for the services; two use the real packages where they are installed,
without a network.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli import ROOT, complain

import main_tokenizer
from util import dist
from util.logger import Logger
from util.run.tracker import TRACKERS, Tracker, open_trackers

IMAGE = np.zeros((4, 4, 3), np.uint8)
STAND_IN = """
opened = []

class Image:
    def __init__(self, array):
        self.shape = array.shape

class Run:
    step = _next_step = 0

    def __init__(self, how):
        self.how, self.logged, self.finished = how, [], False
        opened.append(self)

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True

def init(*args, **how):
    return Run(how | {"args": args})
"""


@pytest.fixture(params=list(TRACKERS))
def service(request, tmp_path, monkeypatch):
    """(name, module) of a service that only takes notes."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / f"{request.param}.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, request.param, raising=False)
    yield request.param, importlib.import_module(request.param)
    sys.modules.pop(request.param)


class Broken(Tracker):
    """One whose network is down, from a call on."""

    package = "json"
    calls = 0

    def __init__(self, folder, run_id, config):
        self.call()

    def call(self, *args):
        Broken.calls += 1
        if Broken.calls >= Broken.fails:
            raise ConnectionError("no network\nat all")

    scalars = image = close = call


def log(logger, *steps):
    for step in steps:
        logger.scalars({"loss": 1 / step}, step, epoch=1)
        logger.image("samples/ema", IMAGE, step)
    logger.close()


def test_scalars_images_and_flags_arrive(service, tmp_path):
    """Each at its step; the run is ended with the log."""
    name, module = service
    config = {"lr": 0.1, "cfg_interval": (0, 1), "vae_path": Path("a"), "blr": None}
    log(Logger(tmp_path, trackers=open_trackers([name, name], tmp_path, config)), 1, 2)
    (run,) = module.opened
    assert run.how["config"] == {"lr": 0.1, "cfg_interval": [0, 1], "vae_path": "a", "blr": None}
    assert [step for step, _ in run.logged] == [1, 1, 2, 2]
    assert run.logged[0][1] == {"loss": 1.0}
    assert run.logged[1][1]["samples/ema"].shape == IMAGE.shape
    assert run.finished


def test_a_resumed_run_has_the_same_id(service, tmp_path):
    """One that is not resumed has another; so has one in another folder."""
    name, module = service
    folders = [(tmp_path, False), (tmp_path, True), (tmp_path, False), (tmp_path / "b", True)]
    for folder, resumed in folders:
        open_trackers([name], folder, {}, resumed)
    ids = [run.how.get("id") or run.how["args"][1] for run in module.opened]
    assert ids[0] == ids[1] and len(set(ids)) == 3
    assert all(run.how["resume"] == "allow" for run in module.opened)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"id": 3}', "\xff"])
def test_a_damaged_id_is_replaced(service, content, tmp_path):
    """By a new run."""
    name, _ = service
    (tmp_path / "tracker.json").write_text(content, "latin-1")
    open_trackers([name], tmp_path, {}, resumed=True)
    assert len(json.loads((tmp_path / "tracker.json").read_text())["id"]) == 8


def test_what_a_service_has_is_not_sent_again(service, tmp_path):
    """A resumed run repeats steps of before it was killed."""
    name, module = service
    module.Run.step, module.Run._next_step = 30, 31
    log(Logger(tmp_path, trackers=open_trackers([name], tmp_path, {}, True)), 20, 30, 40)
    assert [step for step, _ in module.opened[0].logged] == [30, 30, 40, 40]


@pytest.mark.parametrize("fails", range(1, 7))
def test_a_run_goes_on_without_a_tracker_that_fails(service, fails, tmp_path, monkeypatch, capsys):
    """Whichever call raises: one warning, no further call, and the others get everything."""
    name, module = service
    monkeypatch.setitem(TRACKERS, "broken", Broken)
    monkeypatch.setattr(Broken, "calls", 0)
    monkeypatch.setattr(Broken, "fails", fails, raising=False)
    log(Logger(tmp_path, trackers=open_trackers(["broken", name], tmp_path, {})), 1, 2)
    warning = "WARNING: --tracker broken: no network; the run goes on without it\n"
    assert capsys.readouterr().out == warning
    assert Broken.calls == fails
    assert len(module.opened[0].logged) == 4 and module.opened[0].finished
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_only_rank_0_has_trackers(service, tmp_path, monkeypatch):
    """Elsewhere there are none, and no file is written."""
    name, module = service
    monkeypatch.setattr(dist, "rank", lambda: 1)
    assert open_trackers([name], tmp_path / "logs", {}) == {} and not module.opened
    assert not (tmp_path / "logs").exists()


def test_a_missing_package_is_said_at_once(tmp_path, monkeypatch, capsys):
    """With the command that installs it; a folder of that name, as a service leaves, is none."""
    absent = type("Absent", (Tracker,), {"package": "no_such_package"})
    monkeypatch.setitem(TRACKERS, "absent", absent)
    expected = (
        "absent: the package no_such_package is not installed: pip install 'mar-diffloss[absent]'"
    )
    said = complain(capsys, main_tokenizer.main, "--tracker", "absent")
    assert said == f"error: argument --tracker: {expected}; see --help"
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError) as error:
        open_trackers(["absent"], tmp_path, {})
    assert str(error.value) == expected


def test_training_a_tokenizer_is_shown(service, tmp_path):
    """With all of its flags."""
    name, module = service
    flags = ["--data_path", "digits", "--tokenizer", "kl", "--epochs", "1", "--device", "cpu"]
    flags += ["--ch_mult", "1", "--num_images", "20", "--num_workers", "0"]
    main_tokenizer.main([*flags, "--output_dir", str(tmp_path), "--tracker", name])
    (run,) = module.opened
    assert run.how["config"]["epochs"] == 1 and run.how["config"]["data_path"] == "digits"
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    logged = [step for step, values in run.logged if "loss" in values]  # the others are pictures
    assert records and logged == [r["step"] for r in records]
    assert run.logged[0][1]["loss"] == records[0]["loss"]


# ---- the packages themselves ---------------------------------------------------------------------

# a run that is not closed, and the same run resumed; only this machine may be reached
REAL = """
import os, socket, sys
import numpy as np
from util.logger import Logger
from util.run.tracker import open_trackers

connect = socket.socket.connect
def local(self, address):
    assert self.family != socket.AF_INET or address[0] in ("127.0.0.1", "localhost"), address
    return connect(self, address)
socket.socket.connect = local

name, folder, resumed = sys.argv[1], sys.argv[2], sys.argv[3] == "resumed"
config = {"lr": 0.1, "cfg_interval": (0.0, 1.0), "blr": None}
trackers = open_trackers([name], folder, config, resumed)
assert trackers
logger = Logger(folder, resumed, 10, trackers)
for step in (20, 30) if resumed else (10, 20):
    logger.scalars({"loss": 1 / step, "grad_norm": float("nan")}, step)
    logger.image("samples/ema", np.zeros((8, 8, 3), np.uint8), step)
assert logger.trackers
if resumed:
    logger.close()
"""


def real(name, folder):
    """Run a service's own package twice; returns what was printed."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"{name} is not installed")
    environment = {**os.environ, "HOME": str(folder), "WANDB_MODE": "offline"}
    environment |= {"WANDB_ERROR_REPORTING": "false", "HF_HUB_OFFLINE": "1"}
    environment |= {"TRACKIO_DIR": str(folder / "trackio")}
    command = [sys.executable, "-c", REAL, name, str(folder / "run")]
    out = ""
    for kind in ("new", "resumed"):
        how = {"cwd": ROOT, "env": environment, "text": True, "timeout": 300}
        done = subprocess.run([*command, kind], capture_output=True, **how)
        assert done.returncode == 0, done.stderr
        out += done.stdout + done.stderr
    return out


def test_wandb_takes_a_run_and_the_same_resumed(tmp_path):
    """Offline: two folders of one id, with flags, metrics and images."""
    assert "WARNING: --tracker" not in real("wandb", tmp_path)
    run_id = json.loads((tmp_path / "run/tracker.json").read_text())["id"]
    folders = sorted((tmp_path / "run/wandb").glob(f"offline-run-*-{run_id}"))
    assert len(folders) == 2
    for folder in folders:
        content = (folder / f"run-{run_id}.wandb").read_bytes()
        assert all(word in content for word in (b"cfg_interval", b"loss", b"samples/ema"))
        assert len(list(folder.glob("files/media/images/samples/ema_*.png"))) == 2


def test_trackio_takes_a_run_and_the_same_resumed(tmp_path):
    """Locally: one run with its flags; of the steps that are repeated, only the last is
    sent again, as some of it may be missing."""
    assert "WARNING: --tracker" not in real("trackio", tmp_path)
    run_id = json.loads((tmp_path / "run/tracker.json").read_text())["id"]
    run = ask_trackio(tmp_path, "run", run_id)
    assert run["config"]["cfg_interval"] == [0, 1] and run["last_step"] == 30
    assert {"loss", "grad_norm", "samples/ema"} <= set(run["metrics"])
    values = ask_trackio(tmp_path, "metric", run_id, "--metric", "loss")["values"]
    assert [value["step"] for value in values] == [10, 20, 20, 30]
    assert len(list((tmp_path / "trackio").rglob("*.png"))) == 4


def ask_trackio(folder, what, run_id, *more):
    """What its command line says of a run."""
    command = [sys.executable, "-m", "trackio.cli", "get", what, "--json", *more]
    command += ["--project", "mar-diffloss", "--run", f"run-{run_id}"]
    environment = {**os.environ, "TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return json.loads(done.stdout)
