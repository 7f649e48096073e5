"""benchmarks.gpu ends whatever its parts do. Run: python -m pytest tests/test_gpu.py"""

import signal
import sys
import time
from threading import Thread, main_thread

import pytest
import torch

from benchmarks import gpu, gpu_checks
from models.fast.graphs import Graphs

CPU = torch.device("cpu")


@pytest.fixture
def parts(monkeypatch):
    """Two checks and two measurements, of which one each fails, and a third check that hangs."""
    codes = {"right": "print('ok: found it')", "wrong": "assert False, 'is wrong'"}
    codes["hangs"] = "import time; time.sleep(60)"
    commands = {name: [sys.executable, "-c", code] for name, code in codes.items()}
    table = "print('## Speed')\nprint('| batch 1 | 2.0 |')"
    measured = {"fast": [sys.executable, "-c", table], "broken": [sys.executable, "-c", "1/0"]}
    monkeypatch.setattr(gpu, "LEAST", 0.5)
    monkeypatch.setattr(gpu, "check_commands", lambda args: commands)
    monkeypatch.setattr(gpu, "measurement_commands", lambda args: measured)


def test_what_fails_costs_nothing_else(parts, tmp_path, capsys):
    """One line per check, with what was wrong; tables of what was measured; all in the log."""
    out = tmp_path / "gpu.md"
    gpu.main(["--device", "cpu", "--out", str(out), "--limit", "1.5", "--jobs", "3"])
    text, log = out.read_text(), out.with_suffix(".log").read_text()
    assert "| right | found it |" in text
    assert "| wrong | **FAILED** (exit status 1): AssertionError: is wrong |" in text
    assert "| hangs | **FAILED** (stopped after" in text
    assert "#### Speed" in text and "| batch 1 | 2.0 |" in text
    assert "ZeroDivisionError" in log and "Traceback" in log
    said = capsys.readouterr().out
    assert "failed, stopped or left out: wrong, hangs, broken" in said


def test_only_what_is_new_is_shown(tmp_path, monkeypatch, capsys):
    """Of two measurements with the same differences, once; no warnings, and FILE for --out."""
    code = "print('a line\\n## Same\\n| x | 1 |'); import warnings; warnings.warn('odd');"
    commands = {n: [sys.executable, "-c", f"{code}print('## {n}\\n| y | 2 |')"] for n in "ab"}
    monkeypatch.setattr(gpu, "check_commands", lambda args: {})
    monkeypatch.setattr(gpu, "measurement_commands", lambda args: commands)
    argv = ["--device", "cpu", "--out", str(tmp_path / "gpu.md")]
    monkeypatch.setattr(sys, "argv", ["gpu", *argv])
    gpu.main(argv)
    text = (tmp_path / "gpu.md").read_text()
    assert text.count("#### Same") == 1 and text.count("\na line") == 2
    assert "#### a" in text and "#### b" in text
    assert "UserWarning: odd" in (tmp_path / "gpu.log").read_text()
    assert "--out FILE" in text and "UserWarning" not in text


def test_no_time_left(parts, tmp_path, capsys):
    """Everything is left out, and the file is there."""
    out = tmp_path / "gpu.md"
    gpu.main(["--device", "cpu", "--out", str(out), "--budget", "0.1"])
    assert out.read_text().count("left out, no time") == 5


def test_an_interrupt_ends_all(tmp_path, monkeypatch):
    """Ctrl-C ends the check under way, with its process, and begins no other."""
    files = {name: tmp_path / name for name in ("first", "second")}
    codes = {n: f"import time; open({str(f)!r}, 'w'); time.sleep(60)" for n, f in files.items()}
    commands = {name: [sys.executable, "-c", code] for name, code in codes.items()}
    monkeypatch.setattr(gpu, "check_commands", lambda args: commands)
    begun, before = time.monotonic(), signal.signal(signal.SIGINT, signal.default_int_handler)
    Thread(target=interrupt_after, args=(files["first"], main_thread().ident)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            gpu.main(["--device", "cpu", "--out", str(tmp_path / "gpu.md"), "--jobs", "1"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begun < 30 and not files["second"].exists()


def interrupt_after(file, thread):
    """Ctrl-C once a file is there, after at most 20 seconds."""
    until = time.monotonic() + 20
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.02)
    signal.pthread_kill(thread, signal.SIGINT)


def test_every_check_exists():
    """The table names functions, and the flags that choose among them."""
    args = gpu.get_parser().parse_args(["--only", "linear", "loader", "--device", "cpu"])
    assert list(gpu.check_commands(args)) == ["linear"]
    assert list(gpu.measurement_commands(args)) == ["loader"]
    assert all(callable(function) for _, function in gpu.CHECKS.rows())


def test_graphs_that_replay_something_else_are_seen(monkeypatch):
    """The check of graphs against the plain loop passes here, and fails if they differ."""
    assert gpu_checks.graphs_head(CPU, quick=True).startswith("fp32 within 0")
    assert "no recording" in gpu_checks.graphs_fall_back(CPU, quick=True)
    calls = iter(range(10**6))
    monkeypatch.setattr(
        Graphs, "__call__", lambda self, key, f, *x: f(*x) * (1 + 1e-3 * (next(calls) % 2))
    )
    with pytest.raises(AssertionError, match="expected at most"):
        gpu_checks.graphs_head(CPU, quick=True)
