"""docs/cluster.md as it stands. Run: python -m pytest tests/test_cluster.py -m slow

Slurm's commands are small scripts here; two machines are two network namespaces.
"""

import re
import subprocess
import sys
import threading
import time

import pytest
from cli import ROOT
from nodes import ADDRESSES, two_nodes
from test_launch import free_port, plain_environment

PAGE = (ROOT / "docs" / "cluster.md").read_text()
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
SHORT = "--epochs 2 --eval_freq 2 --device cpu"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="needs a shell"),
]


def block(start):
    """The only block of the page that begins so."""
    (found,) = [code for code in BLOCKS if code.startswith(start)]
    return found


class Reader:
    """The output of a process, read as it comes."""

    def __init__(self, process):
        self.process, self.text = process, ""
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self):
        while part := self.process.stdout.read(1):
            self.text += part

    def wait_for(self, text, seconds=300):
        until = time.monotonic() + seconds
        while text not in self.text and self.process.poll() is None:
            assert time.monotonic() < until, self.text
            time.sleep(0.2)
        assert text in self.text, self.text

    def end(self, seconds=300):
        """The exit status."""
        status = self.process.wait(seconds)
        self.thread.join()
        return status

    def last_words(self):
        """Lines of our processes about their end."""
        return re.findall(r"(?:stopped|error): .*", self.text)  # perhaps after a progress bar


# ---- two machines --------------------------------------------------------------------------------


def start_recipe(nodes, folder, more, without=""):
    """The two-machine recipe on both nodes, with more flags of ours, or without one."""
    recipe = block("torchrun --nnodes=2").replace(without, "").rstrip() + f" {more}"
    names = {"HEAD": ADDRESSES[0], "PER_NODE": "1", "OUT": str(folder)}
    return [
        Reader(nodes.start(node, ["sh", "-c", f"exec {recipe}"], NODE=str(node), **names))
        for node in (0, 1)
    ]


def test_the_two_machine_recipe(tmp_path):
    """Both train; one of the processes is killed, and all go on by themselves."""
    with two_nodes() as nodes:
        readers = start_recipe(nodes, tmp_path, f"{SHORT} --epochs 6")
        readers[0].wait_for("per epoch")
        time.sleep(3)
        found = subprocess.run(
            ["pgrep", "-P", str(readers[1].process.pid)], capture_output=True, text=True
        )
        for child in found.stdout.split():
            subprocess.run(["kill", "-9", child])
        statuses = [reader.end() for reader in readers]
    texts = [reader.text for reader in readers]
    assert statuses == [0, 0], texts
    assert texts[0].count("per epoch") == 2 and "done: " in texts[0], texts


def test_a_link_that_is_cut(tmp_path):
    """Both ends end, each with one line, soon after the timeout. With restarts, torchrun would wait
    for the other machine."""
    seconds = 18
    with two_nodes() as nodes:
        more = f"{SHORT} --epochs 500 --dist_timeout {seconds / 60}"
        readers = start_recipe(nodes, tmp_path, more, without="--max-restarts=3")
        readers[0].wait_for("per epoch")
        time.sleep(5)
        nodes.cut()
        since = time.monotonic()
        assert [reader.end() for reader in readers] == [1, 1]
        took = time.monotonic() - since
    for rank, reader in enumerate(readers):
        (line,) = reader.last_words()
        assert line.startswith(f"stopped: process {rank} of 2, on ")
        assert "lost another process (" in line
        assert 'main_mar.py", line' not in reader.text
    assert took < seconds + 20


# ---- Slurm ---------------------------------------------------------------------------------------

SRUN = """#!/bin/bash
# two tasks; signals are passed on to them; the highest status is ours
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_NODEID=0 SLURM_STEP_NODELIST=localhost
pids=""
for i in 0 1; do
  SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids="$pids $!"
done
trap 'kill -USR1 $pids' USR1
highest=0
for pid in $pids; do
  wait $pid; status=$?
  while kill -0 $pid 2>/dev/null; do wait $pid; status=$?; done
  [ $status -gt $highest ] && highest=$status
done
exit $highest
"""


@pytest.fixture
def slurm(tmp_path):
    """A function that starts the script in a job, as sbatch would."""
    tools, script = tmp_path / "bin", tmp_path / "mar.sh"
    tools.mkdir()
    script.write_text(block("#!/bin/bash"))
    for name, text in {
        "srun": SRUN,
        "scontrol": f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.txt\n',
        "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
    }.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environ = plain_environment(OUT=str(tmp_path / "out"), SLURM_JOB_ID="77", SLURM_NTASKS="2")
    environ["PATH"] = f"{tools}:{environ['PATH']}"
    environ["MASTER_PORT"] = str(free_port())

    def start(*flags):
        command = ["bash", str(script), *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return Reader(subprocess.Popen(command, cwd=ROOT, env=environ, **pipes))

    return start


def test_the_slurm_script(slurm, tmp_path):
    """Asked to stop, the job is put back into the queue; the next time it ends."""
    flags = ["--preset", "digits", *SHORT.split()]
    first = slurm(*flags, "--epochs", "300")
    first.wait_for("per epoch")
    time.sleep(2)
    (srun,) = subprocess.run(
        ["pgrep", "-P", str(first.process.pid)], capture_output=True, text=True
    ).stdout.split()
    subprocess.run(["kill", "-USR1", srun])  # as Slurm does to the step
    assert first.end() == 75, first.text
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 77\n"

    second = slurm(*flags)
    assert second.end() == 0, second.text
    assert "2 processes by Slurm, meeting at 127.0.0.1:" in second.text
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 77\n"


def test_the_slurm_script_and_an_error(slurm, tmp_path):
    """An error is no reason to try again."""
    job = slurm("--preset", "digits", "--device", "cpu", "--num_iter", "99")
    assert job.end() == 2
    assert not (tmp_path / "scontrol.txt").exists()
