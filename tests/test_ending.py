"""How scripts end that do not end well. Run: python -m pytest tests/test_ending.py"""

import errno
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from cli import ROOT
from torch.utils.data import DataLoader, Dataset

import main_cache
import main_mar
import sample
from util.files import HOST
from util.flags import run
from util.run import ending, last_words, stop
from util.run.ending import explain

GPU = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.18 GiB of "
    "which 5.04 GiB is free. Including non-PyTorch memory, this process has 74.13 GiB memory in use"
)
TRAINING = (
    "; what helps: a smaller --batch_size, --accum_iter, which makes up for it, "
    "--grad_checkpointing, --precision bf16, when sampling, a smaller --eval_bsz"
)


def line_of(error, script=None, flags=()):
    """The line of an error in a script whose flags were parsed."""
    ending.note_flags(())
    if script:
        script.get_parser().parse_args(list(flags))
    return explain(error).line


# ---- memory --------------------------------------------------------------------------------------


def test_gpu_memory():
    """Named with the flags of the script that help, and no others."""
    error = torch.OutOfMemoryError(GPU)
    what = "error: out of GPU memory of 79.18 GiB, for 20.00 GiB more"
    assert line_of(error, main_mar) == what + TRAINING
    of_sampling = f"{what}; what helps: a smaller --batch_size, --precision bf16"
    assert line_of(error, sample, ["--ckpt", "x"]) == of_sampling
    assert line_of(error) == what and explain(error).status == 2
    for text in ("CUDA error: out of memory\nmore", "CUBLAS_STATUS_ALLOC_FAILED when calling x"):
        assert line_of(RuntimeError(text)) == "error: out of GPU memory"


def test_main_memory():
    """torch's and numpy's own words, at sizes that no machine has."""
    for fail in (
        lambda: torch.empty(10**15),
        lambda: torch.empty(10**15).numpy(),
        lambda: __import__("numpy").empty(10**15),
    ):
        with pytest.raises((RuntimeError, MemoryError)) as got:
            fail()
        flags = ["--cached_path", "x"]
        line = line_of(got.value, main_cache, flags)
        assert re.fullmatch(
            r"error: out of memory, for [\d.]+ \w+ more; what helps: a smaller --num_workers, "
            "a smaller --batch_size",
            line,
        ), line
    assert line_of(MemoryError()) == "error: out of memory"


# ---- loaders -------------------------------------------------------------------------------------


class Dies(Dataset):
    """Its worker is killed, as by a system that is out of memory, or ends."""

    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL) if self.how == "killed" else os._exit(3)


@pytest.mark.skipif(os.name != "posix", reason="kills")
@pytest.mark.parametrize(("how", "said"), [
    ("killed", "is killed by signal: Killed"), ("exits", "exited unexpectedly with exit code 3"),
])  # fmt: skip
def test_a_dead_worker(how, said, capsys):
    """One line, and what may help; nothing of where it happened."""

    def main(argv):
        for _ in DataLoader(Dies(how), num_workers=1):
            pass

    with pytest.raises(SystemExit) as got:
        run(main)
    assert got.value.code == 1
    advice = "perhaps for want of memory; a smaller --num_workers needs less, and 0 starts none\n"
    assert capsys.readouterr().err == f"error: a loader's worker died: it {said}, {advice}"


def test_a_worker_without_shared_memory():
    """What torch says then, and what helps then."""
    text = (
        "DataLoader worker (pid 41) is killed by signal: Bus error. It is possible that "
        "dataloader's workers are out of shared memory. Please try to raise your shared memory"
    )
    assert line_of(RuntimeError(text)).endswith(
        "as /dev/shm is too small; --num_workers 0 needs none of it"
    )


class Refuses(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise ValueError("cat/7.jpg: not a readable image")


def test_what_a_worker_says(capsys):
    """An error in a worker is its last line."""

    def main(argv):
        list(DataLoader(Refuses(), num_workers=1))

    with pytest.raises(SystemExit) as got:
        run(main)
    assert got.value.code == 2
    assert capsys.readouterr().err == "error: cat/7.jpg: not a readable image\n"


# ---- other endings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        (ValueError("--lr -1: expected more"), "error: --lr -1: expected more", 2),
        (ValueError(), "error: ValueError", 2),
        (OSError(errno.EIO, "broken", "a.pth"), "error: [Errno 5] broken: 'a.pth'", 2),
        (FloatingPointError("loss is nan"), "stopped: loss is nan", 1),
        (stop.Stopped("SIGTERM; saved"), "stopped: SIGTERM; saved", 75),
        (KeyboardInterrupt(), "interrupted", 130),
    ],
)  # fmt: skip
def test_one_line_each(error, line, status, capsys):
    """With a status that says what kind it is."""

    def main(argv):
        raise error

    with pytest.raises(SystemExit) as got:
        run(main)
    assert (got.value.code, capsys.readouterr().err) == (status, f"{line}\n")


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("shapes"), AssertionError("us")])
def test_faults_of_ours_keep_their_traceback(error):
    """They are raised as they are."""

    def main(argv):
        raise error

    with pytest.raises(type(error)) as got:
        run(main)
    assert got.value is error


@pytest.mark.skipif(os.name != "posix", reason="pipes")
def test_a_reader_that_leaves():
    """As in `python script | head -1`: one line, no traceback, also not when Python ends."""
    code = """
        from util.flags import run
        def main(argv):
            for i in range(10 ** 6):
                print(i, flush=True)
        run(main)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    how = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **how) as process:
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    assert said == "stopped: nobody reads the output any more (broken pipe)\n"
    assert process.returncode == 1


# ---- several processes ---------------------------------------------------------------------------

SEVERAL = """
    import os, sys, time
    from util.flags import run
    from util.run import last_words
    rank, what = int(os.environ["RANK"]), sys.argv[2]
    def fault():
        raise KeyError("ours")
    def main(argv):
        last_words.set_folder(sys.argv[1], "test")
        if what == "refused":
            raise ValueError("--lr -1: expected more")
        if what == "refused alone" and rank == 1:
            raise ValueError("only here")
        if what == "fault":
            fault()
        if what == "crash" and rank == 1:
            import faulthandler
            faulthandler._sigsegv()
        if what == "killed" and rank == 1:
            os.kill(os.getpid(), 9)
    run(main)
"""


def several(folder, what, *, world=3, end_others=True, **environ):
    """Run processes as a launcher does, which ends the others when one fails.

    Returns (standard error of all, statuses, rank -> its last words).
    """
    code = textwrap.dedent(SEVERAL)
    processes = []
    for rank in range(world):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, **environ}
        env = {**os.environ, **{name: str(value) for name, value in names.items()}}
        command = [sys.executable, "-c", code, str(folder), what]
        how = {"cwd": ROOT, "env": env, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, **how))
    if end_others:
        while all(process.poll() in (None, 0) for process in processes):
            time.sleep(0.05)
        time.sleep(0.3)  # so that all are there
        for process in processes:
            process.terminate()
    said = "".join(process.communicate(timeout=300)[1] for process in processes)
    paths = sorted(folder.glob("last_words*"))
    words = {int(path.name.split("rank")[1][:5]): path.read_text() for path in paths}
    return said, [process.returncode for process in processes], words


STARTED = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d started, process %d of %d, \d+ on " + re.escape(HOST)


def test_what_all_say_is_said_once(tmp_path, monkeypatch):
    """The first of a machine says it; the launcher ends the others, which have written it down."""
    said, statuses, words = several(tmp_path, "refused", end_others=False)
    first, *others = said.splitlines()
    assert first == "error: --lr -1: expected more" and statuses == [2] * 3
    assert others == [f"{first} (process {rank} of 3)" for rank in (1, 2)]  # nobody ended them
    for rank, text in words.items():
        assert re.fullmatch(STARTED % (rank, 3) + r"\n.* error: --lr -1: expected more\n", text)
    assert sorted(words) == [0, 1, 2]


def test_a_launcher_ends_those_that_wait(capfd, monkeypatch):
    """A process that is not the first waits before it says what the first says, too; ended by the
    launcher meanwhile, it says nothing."""
    code = """
        import os, signal, sys, threading
        from util.run import ending
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        ending.fail("error: x")
    """
    env = {**os.environ, "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode == (2 if os.name == "posix" else done.returncode)


def test_what_one_says_alone(tmp_path):
    """It is not lost, and names the process; the files of those that ended well go."""
    said, statuses, words = several(tmp_path, "refused alone", end_others=False)
    assert said == "error: only here (process 1 of 3)\n" and statuses == [0, 2, 0]
    assert list(words) == [1] and words[1].endswith("error: only here\n")


def test_faults_of_several(tmp_path):
    """Each one's traceback is in its file, and one is shown at once."""
    said, statuses, words = several(tmp_path, "fault", end_others=False)
    assert statuses == [1] * 3 and said.count("KeyError: 'ours'") == 3
    assert said.startswith("Traceback")
    assert all("in fault" in text and "KeyError: 'ours'" in text for text in words.values())
    assert len(words) == 3


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_crashes_and_kills(tmp_path):
    """The stack of a crash in a library; of a killed process, that it started."""
    _, statuses, words = several(tmp_path, "crash", end_others=False)
    assert statuses == [0, -signal.SIGSEGV, 0] and list(words) == [1]
    assert "Segmentation fault" in words[1] and "in main" in words[1]
    _, statuses, words = several(tmp_path, "killed", end_others=False)
    assert statuses == [0, -9, 0]
    assert re.fullmatch(STARTED % (1, 3) + "\n", words[1])


@pytest.mark.slow
def test_files_of_earlier_runs(tmp_path):
    """They are replaced; attempts that torchrun restarts are added to one another."""
    (tmp_path / "last_words.test.rank00007.txt").write_text("of a larger run")
    (tmp_path / "last_words.other.rank00007.txt").write_text("of another script")
    several(tmp_path, "refused alone", end_others=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last_words.other.rank00007.txt", "last_words.test.rank00001.txt",
    ]  # fmt: skip
    again = {"TORCHELASTIC_RESTART_COUNT": 1}
    _, _, words = several(tmp_path, "refused alone", end_others=False, **again)
    assert words[1].count("started") == words[1].count("only here") == 2
    several(tmp_path, "nothing", end_others=False)
    assert [path.name for path in tmp_path.iterdir()] == ["last_words.other.rank00007.txt"]


def test_a_single_process_has_the_terminal(tmp_path, monkeypatch):
    """It writes no file; nor does a folder that cannot be written stop anything."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    last_words.set_folder(tmp_path, "test")
    last_words.write("x")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(last_words, "place", lambda: (0, 0, 2))
    last_words.set_folder(tmp_path / "none", "test")
    last_words.write("x")


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, (0, 0, 1)),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, (3, 1, 4)),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, (0, 0, 1)),
        (
            {
                "OMPI_COMM_WORLD_RANK": "5",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "8",
                "MASTER_ADDR": "a",
            },
            (5, 1, 8),
        ),
        ({"RANK": "x", "LOCAL_RANK": "", "WORLD_SIZE": "4"}, (0, 0, 1)),
    ],
)
def test_places(environ, place):
    """What launchers say; nonsense is for util.dist to refuse."""
    assert last_words.place(environ) == place
