"""Processes that torchrun restarts. Run: python -m pytest tests/test_restarts.py -m slow"""

import subprocess
import sys

import pytest
from cli import ROOT
from test_launch import free_port, plain_environment

RENDEZVOUS = {
    "static": "--master_port {port}",
    "c10d": "--rdzv-backend c10d --rdzv-endpoint localhost:{port}",
}


def torchrun(rendezvous, *more, processes=2):
    """A command, and its environment."""
    flags = RENDEZVOUS[rendezvous].format(port=free_port()).split()
    flags += [f"--nproc_per_node={processes}", "--max-restarts=3"]
    return [sys.executable, "-m", "torch.distributed.run", *flags, *more]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rendezvous", RENDEZVOUS)
def test_killed_processes_are_replaced(tmp_path, rendezvous, seed):
    """Twice, whenever it was; the new ones meet at once and end. What remains is a line each."""
    command = torchrun(rendezvous, "tests/restarting.py", str(seed), str(tmp_path))
    done = subprocess.run(
        command, cwd=ROOT, env=plain_environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    killed = [float((tmp_path / f"killed{i}").read_text()) for i in (0, 1)]
    again = float((tmp_path / "joined2").read_text())
    assert 0 < again - killed[1] < 60  # 4 s on an idle machine; torchrun kills after 30 s
    assert {"done0", "done1"} <= {path.name for path in tmp_path.iterdir()}
    assert "Traceback" not in done.stderr
