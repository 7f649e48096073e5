"""Runs that are stopped resume as if they had not been. Run: python -m pytest tests/test_stop.py"""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cli import ROOT, complain, read_lines
from conftest import write_images
from test_fixtures import FIXTURES, TINY

import engine_mar
import main_mar
from models.diffloss import DiffLoss
from util.checkpoint import LAST, find_checkpoint, keep_others, load_checkpoint
from util.data.cached import CachedFolder
from util.data.loader import Loader
from util.flags import run
from util.recipe import Output
from util.run import stop
from util.run.dry import Trial
from util.run.saver import Saver

BOTH = f"{TINY} --ema_rate 0.9 --attn_dropout 0.1 --epochs 2 --eval_freq 99"
KL = f"--tokenizer kl --vae_path {FIXTURES}/kl.ckpt --img_size 16 --class_num 2 --batch_size 1"
CACHED = f"{BOTH} {KL} --use_cached --cached_path {FIXTURES}/cache"
WAYS = {
    "digits": f"{BOTH} --preset digits --batch_size 250 --model mar_tiny --epochs 2",
    "accumulation": f"{BOTH} --preset digits --batch_size 125 --accum_iter 2 --model mar_tiny",
    "images": f"{BOTH} {KL} --data_path {{images}} --num_workers 2",
    "cached images": f"{CACHED}-images --num_workers 2",
    "shards": f"{CACHED}-shards",
    "shards, workers": f"{CACHED}-shards --num_workers 2",
    "accumulated shards": f"{CACHED}-shards --accum_iter 2 --mask_ratio_per_rank",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), ("a", "b"))


def signalled(step, number=signal.SIGTERM):
    """`Saver.after_step` that receives a signal at an optimizer step of the run."""
    after_step = Saver.after_step

    def wrapped(saver, batch, *rest):
        saver.state.batch = batch
        if saver.step == step:
            os.kill(os.getpid(), number)
        after_step(saver, batch, *rest)

    return wrapped


def train(flags, folder):
    run(main_mar.main, [*shlex.split(flags), "--output_dir", str(folder)])
    return load_checkpoint(folder / LAST)


def assert_same(one, other):
    """Weights, averages and all that the optimizer holds, bit by bit."""
    for part in ("model", "model_ema"):
        assert all(torch.equal(one[part][name], value) for name, value in other[part].items())
    for number, state in other["optimizer"]["state"].items():
        assert all(torch.equal(one["optimizer"]["state"][number][k], v) for k, v in state.items())


@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_run_resumes_within_the_epoch(way, images, tmp_path, monkeypatch, capsys):
    """With its status; resumed it is the uninterrupted run, in weights and in the log."""
    flags = WAYS[way].format(images=images)
    whole = train(flags, tmp_path / "whole")
    steps = {int(state["step"]) for state in whole["optimizer"]["state"].values()}.pop()
    place = steps // 2 + 2 if steps > 4 else steps // 2 + 1  # in the second epoch
    monkeypatch.setattr(Saver, "after_step", signalled(place))
    folder = tmp_path / "stopped"
    with pytest.raises(SystemExit) as ended:
        train(flags, folder)
    assert ended.value.code == stop.STATUS == 75
    assert f"call again with --resume {folder}" in capsys.readouterr().err
    monkeypatch.undo()
    stopped = load_checkpoint(folder / LAST)
    assert stopped["epoch"] == 0 and stopped["place"]["batch"] > 0
    assert_same(train(f"{flags} --resume {folder}", folder), whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_loader_processes_outlive_a_signal_to_all(tmp_path):
    """What a scheduler sends to every process is for the run to answer; a second SIGTERM is not."""
    code = (
        "import os, time\nfrom util.run import stop\nstop.listen()\n"
        "if os.fork() == 0:\n    print(os.getpid(), flush=True)\n    time.sleep(600)\n"
        "else:\n    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)\n"
    )
    how = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **how) as parent:
        child = int(parent.stdout.readline())
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            os.kill(child, number)
            time.sleep(0.2)
            assert parent.poll() is None
        os.kill(child, signal.SIGTERM)
        assert parent.stdout.read() == f"{stop.STATUS}\n"


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="POSIX")
@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_run(tmp_path):
    """torchrun and schedulers signal the loader's processes too: they go on until the run stops."""
    flags = f"{CACHED}-shards --num_workers 2 --epochs 999".replace(str(FIXTURES), "tests/fixtures")
    command = [sys.executable, "main_mar.py", *shlex.split(flags), "--output_dir", str(tmp_path)]
    how = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, **how) as process:
        wait_for(lambda: steps_in(tmp_path) > 3)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(120) == stop.STATUS, process.stderr.read()
    assert load_checkpoint(tmp_path / LAST)


def test_a_stopped_run_closes_its_logs(tmp_path, monkeypatch):
    """Trackers may hold what they have not sent."""
    closed = []
    monkeypatch.setattr("util.logger.Logger.close", lambda logger: closed.append(logger))
    monkeypatch.setattr(Saver, "after_step", signalled(3))
    with pytest.raises(SystemExit):
        train(WAYS["digits"], tmp_path)
    assert len(closed) == 1


# ---- when is saved, and what is kept ---------------------------------------------------------


def saved_at(monkeypatch):
    """A list to which every save adds its step."""
    steps, save = [], Saver.save
    monkeypatch.setattr(Saver, "save", lambda saver: steps.append(saver.step) or save(saver))
    return steps


def names(folder):
    return sorted(path.name for path in folder.glob("*.pth"))


def test_steps_between_saves(images, tmp_path, monkeypatch):
    """Beside the epochs'; the last two are there, each under its name, and each resumes."""
    steps = saved_at(monkeypatch)
    flags = f"{WAYS['digits']} --save_steps 2"  # 5 steps per epoch
    whole = train(flags, tmp_path)
    assert steps == [2, 4, 6, 8, 10, 10]
    assert names(tmp_path) == [LAST, "checkpoint-step00000008.pth"]
    earlier = load_checkpoint(tmp_path / "checkpoint-step00000008.pth")
    assert (earlier["epoch"], earlier["place"]["batch"]) == (0, 3)
    other = tmp_path / "other"
    resumed = train(f"{flags} --resume {tmp_path}/checkpoint-step00000008.pth", other)
    assert_same(resumed, whole)


def test_minutes_between_saves(tmp_path, monkeypatch):
    """By the clock of the first process: here each step takes one."""
    clock = iter(range(0, 10**6, 60))
    monkeypatch.setattr("util.run.saver.time", SimpleNamespace(monotonic=lambda: next(clock)))
    steps = saved_at(monkeypatch)
    train(f"{WAYS['digits']} --save_minutes 2.5", tmp_path)
    assert steps == [3, 6, 9, 10]


def test_the_time_to_save_comes_with_the_last_step(tmp_path, monkeypatch):
    """What the first process said then is known at the end of the epoch, and not lost."""
    settings = Output(output_dir=str(tmp_path), save_last_freq=9)
    saver = Saver(SimpleNamespace(epoch=0, batch=5), settings, {}, {}, steps=5, accum_iter=1)
    steps = saved_at(monkeypatch)
    saver.state.save = lambda *rest, **how: None
    for late in (True, False):
        saver.agreement = SimpleNamespace(close=lambda late=late: [False, late])
        saver.end_epoch(epochs=9)
    assert steps == [5]


def test_a_request_that_interrupts_a_print(monkeypatch, capfd):
    """In which Python allows no second one."""
    monkeypatch.setattr("builtins.print", lambda *_, **how: 1 / 0)
    with stop.deferred():
        stop._requests.receive(signal.SIGTERM, None)
        assert stop.reason() == "SIGTERM"
    assert capfd.readouterr().out == "SIGTERM: stopping at the next step, to resume there\n"


def test_what_is_kept(tmp_path):
    """So many of the last ones, one every so many epochs for good, and nothing of a resumed run."""
    flags = WAYS["digits"].replace("--epochs 2", "--epochs 5") + " --save_last_freq 1"
    train(f"{flags} --keep 3 --keep_every 2", tmp_path)
    milestones = ["checkpoint-epoch0002.pth", "checkpoint-epoch0004.pth"]
    assert names(tmp_path) == [
        *milestones,
        LAST,
        "checkpoint-step00000015.pth",
        "checkpoint-step00000020.pth",
    ]
    assert load_checkpoint(tmp_path / milestones[0])["epoch"] == 1
    train(f"{flags} --keep 1 --epochs 6 --resume {tmp_path}", tmp_path)
    assert names(tmp_path) == [*milestones, LAST]


def test_a_crash_between_two_names_leaves_a_checkpoint(tmp_path, monkeypatch):
    """Where there are no hard links, the earlier one is a copy; without a last one it is found."""
    monkeypatch.setattr("os.link", lambda *names: (_ for _ in ()).throw(OSError("no links")))
    train(f"{WAYS['digits']} --save_last_freq 1", tmp_path)
    assert names(tmp_path) == [LAST, "checkpoint-step00000005.pth"]
    (tmp_path / LAST).unlink()
    assert find_checkpoint(tmp_path).name == "checkpoint-step00000005.pth"


def test_checkpoints_of_another_run_are_not_taken_for_its_own(tmp_path):
    """Neither overwritten, nor found by a restart before the first save."""

    def write(name, at):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (at, at))

    every = [f"checkpoint-{name}.pth" for name in ("epoch0002", "step00000005", "step00000010")]
    for age, name in enumerate([*every, LAST], 1):
        write(name, age)
    keep_others(tmp_path, tmp_path / every[1])  # resumed at an earlier one: the newer ones go
    assert names(tmp_path) == sorted(
        [*every[:2], "checkpoint-step00000010-before1.pth", "checkpoint-last-before1.pth"]
    )
    write(LAST, 9)
    keep_others(tmp_path, tmp_path / LAST)
    assert find_checkpoint(tmp_path).name == LAST
    keep_others(tmp_path, None)  # a new run
    assert find_checkpoint(tmp_path) is None
    kept = {path.name: path.read_text() for path in tmp_path.glob("*-before2.pth")}
    assert kept == {name.replace(".", "-before2."): name for name in [*every[:2], LAST]}


# ---- values that are not finite --------------------------------------------------------------


def spoiled(part):
    """`Saver.save` of a state with one value that is not finite."""
    save = Saver.save

    def wrapped(saver):
        state = saver.state
        if part == "optimizer":
            next(iter(state.optimizer.state.values()))["exp_avg_sq"].view(-1)[0] = torch.inf
        else:
            module = state.ema.module if part == "model_ema" else state.model
            module.mask_token.data[0] = torch.nan
        save(saver)

    return wrapped


@pytest.mark.parametrize("part", ["model", "model_ema", "optimizer"])
def test_what_is_not_finite_is_never_saved(part, tmp_path, monkeypatch, capsys):
    """Nor resumed; the last good checkpoint stays, and the message names the value."""
    train(f"{WAYS['digits']} --epochs 1", tmp_path)
    before = (tmp_path / LAST).read_bytes()
    monkeypatch.setattr(Saver, "save", spoiled(part))
    with pytest.raises(SystemExit) as ended:
        train(f"{WAYS['digits']} --resume {tmp_path}", tmp_path)
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("stopped: not saved, as values are not finite: ")
    name = "optimizer's exp_avg_sq of " if part == "optimizer" else f"{part} mask_token"
    assert name in said and "Traceback" not in said
    assert (tmp_path / LAST).read_bytes() == before


def test_an_optimizer_that_is_not_finite_is_refused(tmp_path, capsys):
    """By the name of the parameter; weights are in test_checkpoint.py."""
    train(f"{WAYS['digits']} --epochs 1", tmp_path)
    content = torch.load(tmp_path / LAST, weights_only=True)
    content["optimizer"]["state"][0]["exp_avg"].view(-1)[0] = torch.nan
    torch.save(content, tmp_path / LAST)
    line = complain(
        capsys, main_mar.main, *shlex.split(f"{WAYS['digits']} --resume {tmp_path}"),
        "--output_dir", tmp_path,
    )  # fmt: skip
    assert "optimizer's exp_avg of z_proj.bias" in line and "not finite" in line


@pytest.mark.parametrize(("bad", "more"), [(True, ""), (False, ""), (True, " --save_steps 1")])
def test_the_images_of_a_bad_loss_are_named(bad, more, tmp_path, monkeypatch, capsys):
    """Those whose latents are not finite, by index and path, or else all of the batch; also if a
    save is due before the next line of the log."""
    to_latents, calls = engine_mar.to_latents, []

    def spoil(tokenizer, batch, *rest):
        calls.append(1)
        latents = to_latents(tokenizer, batch, *rest)
        latents[1] *= torch.nan if bad and len(calls) == 2 else 1  # the second batch
        return latents

    monkeypatch.setattr(engine_mar, "to_latents", spoil)
    if not bad:
        broken = lambda head, target, z, **how: z.sum() * torch.nan  # noqa: E731
        monkeypatch.setattr(DiffLoss, "forward", broken)
    flags = CACHED.replace("--batch_size 1", "--batch_size 2") + "-images" + more
    with pytest.raises(SystemExit):
        train(flags, tmp_path)
    said = capsys.readouterr().err
    loader = Loader(CachedFolder(FIXTURES / "cache-images"), 2, 0, 1)
    indices = loader.indices(0, 1 if bad else 0)
    of_batch = [f"{i} {loader.dataset.name(i)}" for i in indices]
    step, images = (1, f": the latents are not finite of {of_batch[1]};") if bad else (
        0, f", images {', '.join(of_batch)};")  # fmt: skip
    assert said.startswith(
        f"stopped: the loss is not finite at epoch 0, step {step}, rank 0{images}"
    )


# ---- a trial -----------------------------------------------------------------------------------


@pytest.mark.parametrize("resumed", [False, True])
def test_a_dry_run_leaves_nothing(resumed, tmp_path, capsys):
    """It says what a run costs; the folder, with another's checkpoint or not, is as before."""
    if resumed:
        train(f"{WAYS['digits']} --epochs 1", tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    flags = f"{WAYS['digits']} --dry_run" + (f" --resume {tmp_path}" if resumed else "")
    run(main_mar.main, [*shlex.split(flags), "--output_dir", str(tmp_path)])
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for found in (before, after):
        found.pop(tmp_path / "run.lock", None)
    assert after == before
    said = capsys.readouterr().out
    assert f"steps left    {5 if resumed else 10}: " in said
    assert all(part in said for part in ("parameters ", "memory ", "a step ", "a checkpoint "))


def test_a_trial_of_a_single_step():
    """Where an epoch has no more."""
    trial = Trial(torch.device("cpu"))
    trial.after_step()
    assert trial.per_step > 0


# ---- several processes -----------------------------------------------------------------------


def start(flags, folder, *torchrun, processes=2, attempts=0):
    """torchrun with main_mar.py, in a process group of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += [f"--max-restarts={attempts}", *torchrun, "main_mar.py", *shlex.split(flags)]
    with open(folder / "output.txt", "ab") as output:
        return subprocess.Popen(
            [*command, "--output_dir", str(folder)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def workers_of(torchrun):
    """Process ids of the ranks, in order."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == torchrun.pid:
                variables = (path / "environ").read_bytes().split(b"\0")
                rank = next(v for v in variables if v.startswith(b"RANK="))
                found[int(rank[5:])] = int(path.name)
    return [found[rank] for rank in sorted(found)]


def wait_for(what, seconds=240):
    """Wait until `what()` is true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def steps_in(folder):
    """The last step in log.jsonl."""
    path = folder / "log.jsonl"
    return ([0] + [line["step"] for line in read_lines(path)])[-1] if path.exists() else 0


LONG = f"{TINY} --preset digits --model mar_tiny --batch_size 25 --ema_rate 0.9 --eval_freq 99"
LONG += " --save_last_freq 99 --epochs 6 --mask_ratio_per_rank"  # 33 steps an epoch of 2 processes


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """The checkpoint of two processes that nobody stopped."""
    folder = tmp_path_factory.mktemp("long")
    assert start(LONG, folder).wait() == 0, (folder / "output.txt").read_text()
    return load_checkpoint(folder / LAST)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchrun", "a rank", "all"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_two_processes_stop_and_resume(to, number, long_run, tmp_path):
    """Whoever is signalled: nothing is left running, both saved at one step, and go on as one."""
    run = start(LONG, tmp_path)
    wait_for(lambda: steps_in(tmp_path) >= 40)
    ranks = workers_of(run)
    if to == "all":
        os.killpg(run.pid, number)
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, number)
    else:
        os.kill(run.pid if to == "torchrun" else ranks[1], number)
    run.wait(120)
    wait_for(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks), 60)
    output = (tmp_path / "output.txt").read_text()
    stopped = load_checkpoint(tmp_path / LAST)
    assert stopped["place"]["batch"] > 0 and len(stopped["place"]["draws"]) == 2, output
    assert f"call again with --resume {tmp_path}" in output
    run = start(f"{LONG} --resume {tmp_path}", tmp_path)
    assert run.wait(300) == 0, (tmp_path / "output.txt").read_text()
    assert_same(load_checkpoint(tmp_path / LAST), long_run)


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_restarted(rendezvous, rank, long_run, tmp_path):
    """torchrun's next attempt resumes what the last one saved, though no flag says so."""
    how = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"] if rendezvous == "c10d" else []
    (tmp_path / LAST).write_bytes((FIXTURES / "checkpoint.pth").read_bytes())  # another run's
    run = start(f"{LONG} --save_steps 7", tmp_path, *how, attempts=3)
    wait_for(lambda: steps_in(tmp_path) >= 40)
    os.kill(workers_of(run)[rank], signal.SIGKILL)
    assert run.wait(300) == 0, (tmp_path / "output.txt").read_text()
    assert_same(load_checkpoint(tmp_path / LAST), long_run)
    assert "resumed " in (tmp_path / "output.txt").read_text()
    other = tmp_path / "checkpoint-last-before1.pth"
    assert other.read_bytes() == (FIXTURES / "checkpoint.pth").read_bytes()
