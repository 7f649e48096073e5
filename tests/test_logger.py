"""Logs of runs that are killed and resumed. Run: python -m pytest tests/test_logger.py"""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cli import DIGITS, ROOT, read_lines
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_mar
import util.progress
from demo.digits import write_loss
from util import jsonl
from util.evaluation.reports import report
from util.evaluation.sweep import find_result
from util.logger import Logger, Progress, duration
from util.run import stop

ALL = {"scalars": 0, "images": 0}  # show every record
IMAGE = np.zeros((4, 4, 3), np.uint8)
DRAW_GRID = main_mar.draw_grid
FLAGS = [  # a tiny run with epochs of 44 steps, logged at their 20th and 40th
    *(*DIGITS, "--batch_size", "32", "--warmup_epochs", "1", "--num_workers", "0"),
    *("--diffloss_d", "1", "--diffloss_w", "32", "--diffusion_batch_mul", "1"),
    *("--num_sampling_steps", "2", "--num_iter", "1", "--save_last_freq", "1"),
]


def log(logger, steps):
    """What a run logs at these steps, the last of which has an image."""
    for step in steps:
        logger.scalars({"loss": 1 / step, "lr": 1.0}, step, epoch=step / 10)
    logger.image("samples/ema", IMAGE, steps[-1])


def shown(folder):
    """What TensorBoard shows of a folder: tag -> steps, in the order of the files."""
    events = EventAccumulator(str(folder), ALL).Reload()
    tags = events.Tags()
    found = {tag: [event.step for event in events.Scalars(tag)] for tag in tags["scalars"]}
    return found | {tag: [event.step for event in events.Images(tag)] for tag in tags["images"]}


def killed(folder, steps, resumed=False, step=None):
    """A process that logs these steps and is killed, without closing anything."""
    code = (
        f"import os, signal, sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from test_logger import Logger, log\n"
        f"log(Logger({str(folder)!r}, {resumed}, {step}), {list(steps)})\n"
        "os.kill(os.getpid(), signal.SIGTERM if os.name == 'nt' else signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)


# ---- lines of JSON -------------------------------------------------------------------------------


def test_numbers_that_json_lacks_are_null(tmp_path):
    """NaN and infinities, at any depth; all else is unchanged."""
    record = {"a": float("nan"), "b": [1.5, float("-inf")], "c": {"d": (float("inf"), "e")}, "f": 2}
    jsonl.append(tmp_path / "a.jsonl", record)
    text = (tmp_path / "a.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": None,
        "b": [1.5, None],
        "c": {"d": [None, "e"]},
        "f": 2,
    }


def test_logs_and_results_are_valid_json(tmp_path, capsys):
    """Whatever is not finite: a metric, a setting or a metric of real images."""
    report({"psnr": float("inf")}, {"images": 1, "scale": float("nan")}, (),
           ({"psnr": float("inf")}, 1), tmp_path)  # fmt: skip
    logger = Logger(tmp_path)
    logger.scalars({"loss": float("nan")}, 1)
    logger.close()
    lines = [capsys.readouterr().out.splitlines()[-1]]
    lines += [(tmp_path / name).read_text() for name in ("results.jsonl", "log.jsonl")]
    record, same, logged = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert record == same
    assert record["psnr"] is record["scale"] is record["real"]["psnr"] is None
    assert logged == {"step": 1, "loss": None}


DAMAGED = ['{"step": 9, "lo', "\0" * 8, "7", "[" * 10**5, '{"step": ' + "9" * 5000 + "}", "\ud800"]


@pytest.mark.parametrize("damaged", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_costs_no_other(damaged, tmp_path):
    """Half a line or anything else, at the end and, once more is appended, in the middle."""
    path = tmp_path / "results.jsonl"
    jsonl.append(path, {"cfg": 1})
    with path.open("ab") as file:
        file.write(damaged.encode(errors="surrogatepass"))
    assert jsonl.read(path) == [{"cfg": 1}]
    jsonl.append(path, {"cfg": 2})
    assert jsonl.read(path) == [{"cfg": 1}, {"cfg": 2}]
    assert find_result(path, {"cfg": 2}) == {"cfg": 2}
    assert jsonl.read(tmp_path / "none.jsonl") == []


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    """That names the file."""

    def full(path, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(ValueError, match=r"log\.jsonl.*No space left"):
        jsonl.append(tmp_path / "log.jsonl", {"step": 1})


def test_the_plot_of_the_demo_takes_any_log(tmp_path):
    """With half a line, and lines of an evaluation, which have no loss."""
    text = '{"step": 1, "loss": 2.0}\n{"step": 1, "eval_ema/fid": 1.0}\n{"step": 2, "loss": null}\n'
    (tmp_path / "log.jsonl").write_text(text + '{"step": 3, "lo')
    write_loss(tmp_path / "loss.png", tmp_path / "log.jsonl")
    assert (tmp_path / "loss.png").is_file()


# ---- logs of a resumed run -----------------------------------------------------------------------


@pytest.mark.slow
def test_no_step_twice_and_none_missing_after_kills(tmp_path):
    """Killed twice, beyond the step that it resumes at: scalars, images and lines."""
    killed(tmp_path, [10, 20, 30, 40])
    assert shown(tmp_path)["loss"] == [10, 20, 30, 40]  # nothing waits in a buffer
    time.sleep(1.1)  # event files are ordered by the second of their creation
    killed(tmp_path, [30, 40, 50], True, 20)
    assert shown(tmp_path)["samples/ema"] == [50]
    time.sleep(1.1)
    logger = Logger(tmp_path, resumed=True, step=50)
    log(logger, [60])
    logger.close()
    assert shown(tmp_path) == {
        "loss": [10, 20, 30, 40, 50, 60],
        "lr": [10, 20, 30, 40, 50, 60],
        "samples/ema": [50, 60],
    }
    assert len(list(tmp_path.glob("events*"))) == 3
    records = read_lines(tmp_path / "log.jsonl")
    assert [record["step"] for record in records] == [10, 20, 30, 40, 50, 60]
    assert records[2] == {"step": 30, "epoch": 3.0, "loss": 1 / 30, "lr": 1.0}


def test_what_follows_an_epoch_is_repeated_if_it_was_stopped_there(tmp_path):
    """Images and evaluations of the step of the checkpoint, but not training's own metrics."""

    def follow(logger):
        logger.scalars({"eval_ema/fid": 1.0}, 20)
        logger.image("samples/ema", IMAGE, 20)

    logger = Logger(tmp_path)
    log(logger, [10])
    logger.scalars({"loss": float("nan")}, 20, epoch=1)
    follow(logger)
    time.sleep(1.1)
    logger = Logger(tmp_path, resumed=True, step=20, repeat=True)
    follow(logger)
    found = shown(tmp_path)
    assert found.pop("samples/ema") == [10, 20] and found.pop("lr") == [10]
    assert found == {"loss": [10, 20], "eval_ema/fid": [20]}
    records = read_lines(tmp_path / "log.jsonl")[1:]
    assert records == [{"step": 20, "epoch": 1, "loss": None}, {"step": 20, "eval_ema/fid": 1.0}]


def test_all_that_is_logged_is_in_the_files_at_once(tmp_path):
    """Nothing waits for more, or for the end."""
    logger = Logger(tmp_path)
    logger.scalars({"loss": 1.0}, 1)
    assert shown(tmp_path) == {"loss": [1]}
    assert read_lines(tmp_path / "log.jsonl") == [{"step": 1, "loss": 1.0}]
    logger.image("samples/ema", IMAGE, 2)
    assert shown(tmp_path)["samples/ema"] == [2]


def test_half_a_record_is_removed(tmp_path):
    """Of log.jsonl; TensorBoard reads over that of an event file."""
    log(Logger(tmp_path), [10, 20])
    (events,) = tmp_path.glob("events*")
    events.write_bytes(events.read_bytes()[:-9])  # of the image
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')
    time.sleep(1.1)
    log(Logger(tmp_path, resumed=True, step=20), [30])
    assert [record["step"] for record in read_lines(tmp_path / "log.jsonl")] == [10, 20, 30]
    found = shown(tmp_path)
    assert found["loss"] == [10, 20, 30] and found["samples/ema"] == [30]


def test_a_new_run_replaces_the_logs_of_another(tmp_path):
    """In the same folder, not resumed: neither file shows both."""
    log(Logger(tmp_path), [10, 20, 30])
    time.sleep(1.1)
    log(Logger(tmp_path), [10, 20])
    assert [record["step"] for record in read_lines(tmp_path / "log.jsonl")] == [10, 20]
    assert shown(tmp_path)["loss"] == [10, 20]


def test_an_evaluation_of_an_earlier_step_removes_nothing(tmp_path):
    """It adds to the logs of a run, which may not have ended."""
    run = Logger(tmp_path)
    log(run, [10, 20, 30])
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"half')
    time.sleep(1.1)
    other = Logger(tmp_path, resumed=True)
    other.scalars({"eval_ema/fid": 1.0}, 20)
    log(run, [40])
    assert [r["step"] for r in jsonl.read(tmp_path / "log.jsonl")] == [10, 20, 30, 20, 40]
    found = shown(tmp_path)
    assert found["loss"] == [10, 20, 30, 40] and found["eval_ema/fid"] == [20]


# ---- progress ------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(util.progress, "time", clock)
    return clock


def updates(progress, clock, seconds, *counts, **more):
    """Take so many seconds for each update."""
    for count in counts:
        clock.now += seconds
        progress.update(count, **more)


def test_plain_lines_have_speed_and_time_left(clock, capsys):
    """The rate is that of this session, from its first update on; at the end, the time taken."""
    progress = Progress(1000, "caching", "img", done=400)
    updates(progress, clock, 300, 100)  # a slow start: workers, compilation
    assert capsys.readouterr().out == "caching: 500/1000 img\n"
    updates(progress, clock, 15, 100, 100)
    assert capsys.readouterr().out == "caching: 700/1000 img, 6.7 img/s, 45 s left\n"
    updates(progress, clock, 15, 100)
    assert capsys.readouterr().out == ""  # a line every 20 seconds
    updates(progress, clock, 5, 200)
    assert capsys.readouterr().out == "caching: 1000/1000 img, 10 img/s, took 6 min\n"


def test_a_note_takes_the_place_of_the_speed(clock, capsys):
    """Training's has its own, in images per second."""
    progress = Progress(400, "training", "step", done=100)
    updates(progress, clock, 1, 1, 1, note="epoch 3 loss 0.3121 lr 8.0e-4 2310 img/s")
    updates(progress, clock, 40, 1)
    line = "training: 103/400 epoch 3 loss 0.3121 lr 8.0e-4 2310 img/s, 1 h 41 min left\n"
    assert capsys.readouterr().out == line


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [
        (9, 3, "sampling: 6/9 batch, 10.0 s/batch, 30 s left"),
        (100, 50, "sampling: 100/100 batch, 1.7 batch/s, took 1 min"),
        (4 * 10**9, 3 * 10**8, "sampling: 600M/4.00G batch, 10000000 batch/s, 6 min left"),
    ],
)
def test_speed_is_readable(total, count, expected, clock, capsys):
    """Seconds for each where they are slow; bytes to three digits."""
    progress = Progress(total, "sampling", "batch")
    updates(progress, clock, 30, count, count)
    assert capsys.readouterr().out.splitlines()[-1] == expected


def test_a_single_update_has_no_speed(clock, capsys):
    """Nor has one that takes no time at all."""
    progress = Progress(2, "sampling", "batch")
    updates(progress, clock, 0, 1, 1)
    assert capsys.readouterr().out == "sampling: 2/2 batch, took 0 s\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (90, "2 min"), (3599, "1 h 0 min"), (11520, "3 h 12 min"),
     (47 * 3600, "47 h 0 min"), (51 * 3600, "2 d 3 h")],
)  # fmt: skip
def test_durations(seconds, text):
    """Two units at most."""
    assert duration(seconds) == text


# ---- a real run ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_stopped_while_it_samples_logs_each_step_once(tmp_path, monkeypatch):
    """Resumed, it repeats the grids of that epoch, which show once."""
    for folder in ("whole", "stopped"):
        monkeypatch.setattr(main_mar, "draw_grid", stopping_at(2 if folder == "stopped" else 0))
        flags = [*FLAGS, "--eval_freq", "1", "--epochs", "2", "--output_dir", tmp_path / folder]
        if folder == "stopped":
            with pytest.raises(stop.Stopped):
                main_mar.main(list(map(str, flags)))
            time.sleep(1.1)
        main_mar.main([*map(str, flags), "--resume", str(tmp_path / folder)])
    found, expected = (shown(tmp_path / folder) for folder in ("stopped", "whole"))
    assert found == expected and found["samples/ema"] == found["samples/raw"] == [44, 88]
    lines = [read_lines(tmp_path / folder / "log.jsonl") for folder in ("stopped", "whole")]
    assert [r["step"] for r in lines[0]] == [r["step"] for r in lines[1]]


def stopping_at(number):
    """A draw_grid that is asked to stop at a call."""
    draw, calls = DRAW_GRID, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == number:
            raise stop.Stopped("SIGTERM")
        draw(*args)

    return stopping


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_killed_run_logs_what_an_uninterrupted_one_does(tmp_path):
    """main_mar.py killed twice between checkpoints: the same steps and losses, each once."""
    train(tmp_path / "whole")
    folder = tmp_path / "killed"
    for step in (108, 196):  # the first records of the third and fifth epoch
        process = start(folder)
        wait_for(folder / "log.jsonl", step, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    train(folder)
    expected, found = (read_lines(f / "log.jsonl") for f in (tmp_path / "whole", folder))
    assert [r["step"] for r in found] == [r["step"] for r in expected]
    assert [r["loss"] for r in found] == [r["loss"] for r in expected]
    assert len(list(folder.glob("events*"))) == 3
    assert shown(folder) == shown(tmp_path / "whole")
    assert shown(folder)["samples/ema"]


def start(folder):
    """A tiny training run of six epochs."""
    flags = [*FLAGS, "--eval_freq", "3", "--epochs", "6", "--output_dir", folder]
    command = [sys.executable, "main_mar.py", *flags, "--resume", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.DEVNULL
    return subprocess.Popen([str(c) for c in command], cwd=ROOT, env=environment, stdout=out)


def train(folder):
    """Run it to its end."""
    assert start(folder).wait(300) == 0


def wait_for(log, step, process):
    """Wait until a run has logged a step."""
    while process.poll() is None and all(r["step"] < step for r in jsonl.read(log)):
        time.sleep(0.02)
    assert process.poll() is None, "it ended before it was killed"
