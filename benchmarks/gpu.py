"""What only a GPU can tell, in one call: python -m benchmarks.gpu --out gpu.md

First the checks, functions of `benchmarks.gpu_checks` and `benchmarks.gpu_scripts`, several at
once, as they only have to be right; then the measurements, one after the other, as they have to be
undisturbed: `benchmarks.speed`, ours and plain in turns. Each is a process of its own, so that what
fails or hangs, or breaks the device for its process, costs nothing else. --out is rewritten after
each. On a CPU all of it runs with tiny sizes.
"""

import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from util import processor
from util.files import replacing
from util.flags import Parser, add_device_flag, positive, positive_int, run
from util.table import Table

FUNCTIONS = """compiled train_fp16 train_bf16 tests graphs_head graphs_sampling graphs_fall_back
nccl sampled precision fused_fp16 memory dry_run caches torchrun page_locked features linear
train_tf32 train_compiled"""  # long and important ones first
OF_SCRIPTS = "train_bf16 train_fp16 train_tf32 train_compiled torchrun dry_run sampled caches tests"


def _place(name):
    part = "scripts" if name in OF_SCRIPTS.split() else "checks"
    return f"benchmarks.gpu_{part}:{name}"


CHECKS = Table("check", {name: _place(name) for name in FUNCTIONS.split()})
LEAST = 5.0  # seconds; with fewer, nothing is begun
ROOT = Path(__file__).parent.parent
SPEED = "--anyway --tolerance 1e-4 --cfg 2.9 --peak_tflops 989 --peak_tbs 3.35"  # of an H100
# name -> flags of benchmarks.speed, the most important first
MEASUREMENTS = {
    "base-sampling": "--model base --sections head sampling --rounds 3",
    "base-training": "--model base --sections training step optimizer profile --train_batch 64 "
    "--rounds 16",
    "base-compiled": "--model base --sections step profile --train_batch 64 --compile --rounds 15",
    "large-sampling": "--model large --sections sampling --rounds 2",
    "large-training": "--model large --sections training step --train_batch 64 --rounds 8",
    "base-images": "--model base --sections images --rounds 1 --batch_sizes 1 16",
    "base-sampling-tf32": "--model base --precision tf32 --sections sampling --rounds 2",
    "base-training-128": "--model base --sections step --train_batch 128",
    "large-images": "--model large --sections images --rounds 1 --batch_sizes 1 16",
    "base-sampling-fp32": "--model base --precision fp32 --sections sampling --rounds 2 "
    "--batch_sizes 1 16",
    "loader": "--model tiny --sections loader",
    "large-compiled": "--model large --sections step profile --train_batch 64 --compile",
}
TINY = "--model tiny --num_iter 4 --num_sampling_steps 4 --rounds 1 --timed_steps 1 "
TINY += "--train_batch 2 --batch_sizes 2"
WARNED = re.compile(r"\S+:\d+: \w*Warning: |(USDT|ERROR|WARNING|INFO):\d{4}-")  # Python's, Kineto's
FAILED = re.compile(r"^(\w+Error|\w+Exception|error)\b.*|.*: (\w+Error)\b.*")


def get_parser():
    """The parser of all flags."""
    parser = Parser(description=__doc__.splitlines()[0])
    names = [*CHECKS, *MEASUREMENTS]
    parser.add_argument("--out", default="gpu.md", metavar="FILE", help="the result, in Markdown")
    parser.add_argument(
        "--log", metavar="FILE", help="all that is printed (default: --out with .log)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*names, "checks", "measurements"],
        help="what to do (default: all)",
    )
    parser.add_argument(
        "--skip", nargs="+", default=[], choices=names, help="what not to do (default: nothing)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, as on a CPU")
    parser.add_argument(
        "--budget",
        type=positive,
        default=3600.0,
        metavar="SECONDS",
        help="in all; what does not fit is stopped or left out",
    )
    parser.add_argument(
        "--limit", type=positive, default=150.0, metavar="SECONDS", help="of a check"
    )
    parser.add_argument(
        "--jobs", type=positive_int, metavar="N", help="checks at once (default: half the cores)"
    )
    parser.add_argument(
        "--one", choices=CHECKS, metavar="CHECK", help="only this check, here in this process"
    )
    add_device_flag(parser)
    return parser


def main(argv=None):
    """Run the script."""
    started = time.monotonic()
    args = get_parser().parse_args(argv)
    if args.one:
        check_here(args)
        return
    described, gpu = describe(args.device)
    args.quick = args.quick or not gpu
    report = Report(args, described, started)
    with ThreadPoolExecutor(args.jobs or half_the_cores()) as pool:
        commands = check_commands(args).items()
        running = [pool.submit(report.attempt, *item) for item in commands]
        try:
            for future in running:
                future.result()
        except BaseException:
            report.end()  # else the pool does all that is left
            raise
    for name, command in measurement_commands(args).items():
        report.measure(name, command)
    report.summarize()


def check_here(args):
    """Do one check in this process; what it finds is the last line."""
    from util.run.device import pick

    print("ok: " + CHECKS[args.one](pick(args.device, 0, 1), args.quick))


def half_the_cores():
    """Checks at once: each also computes on the host."""
    return max(1, (os.cpu_count() or 1) // 2)


def describe(name):
    """(device, driver, torch and date in a line, whether the device is a GPU)."""
    import torch

    from util.run.device import pick

    device = pick(name, 0, 1)
    what, gpu = processor.name(), device.type == "cuda"
    if gpu:
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm", "--format=csv,noheader"]
        try:
            said = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
        except (OSError, subprocess.TimeoutExpired):
            said = "unknown"
        free = torch.cuda.mem_get_info(device)
        what = f"{torch.cuda.get_device_name(device)}, {free[1] / 2**30:.0f} GiB, "
        what += f"driver and clock now {said.strip()}"
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python "
    versions += platform.python_version()
    return f"{what}; {versions}; {time.strftime('%Y-%m-%d %H:%M')}", gpu


def wanted(args, names, group):
    """Those of the names that the flags ask for. group: the word for all of them."""
    some = args.only or [group]
    chosen = names if group in some or not args.only else [n for n in names if n in some]
    return [name for name in chosen if name not in args.skip]


def check_commands(args):
    """name -> command of each check."""
    more = ["--device", args.device, *["--quick"] * args.quick]
    this = [sys.executable, "-m", "benchmarks.gpu", *more, "--one"]
    return {name: [*this, name] for name in wanted(args, CHECKS, "checks")}


def measurement_commands(args):
    """name -> command of each measurement."""
    commands = {}
    for name in wanted(args, MEASUREMENTS, "measurements"):
        flags = f"{SPEED} {MEASUREMENTS[name]} {TINY if args.quick else ''}".split()
        if args.quick and "--compile" in flags:
            continue
        commands[name] = [sys.executable, "-m", "benchmarks.speed", "--device", args.device, *flags]
    return commands


class Report:
    """The log and the Markdown of a call, both complete at any time."""

    def __init__(self, args, described, started):
        self.args, self.described, self.started = args, described, started
        self.checks, self.parts, self.shown = {}, [], set()
        self.processes, self.writing = set(), Lock()
        self.log = Path(args.log or Path(args.out).with_suffix(".log"))
        self.log.write_text(f"{described}\n")
        print(described, flush=True)

    @property
    def left(self):
        """Seconds that are left."""
        return self.args.budget - (time.monotonic() - self.started)

    def run(self, name, command, limit):
        """(status or what stopped it, output, seconds) of a command; its output is logged."""
        start = time.monotonic()
        limit = min(limit, self.left)
        if limit < LEAST:
            return "left out, no time", "", 0.0
        with tempfile.TemporaryFile("w+") as file:
            both = {"stdout": file, "stderr": subprocess.STDOUT, "cwd": ROOT}
            process = subprocess.Popen(command, start_new_session=True, **both)
            self.processes.add(process)
            try:
                status = process.wait(limit)
                status = "ok" if status == 0 else f"exit status {status}"
            except subprocess.TimeoutExpired:
                status = f"stopped after {limit:.0f} s"
            finally:
                self.processes.discard(process)
                kill(process)
            file.seek(0)
            output = file.read()
        seconds = time.monotonic() - start
        with self.log.open("a") as log:
            log.write(f"\n=== {name}: {status}, {seconds:.1f} s\n{' '.join(command)}\n{output}")
        return status, output, seconds

    def attempt(self, name, command):
        """Run a check and print its line."""
        status, output, seconds = self.run(name, command, self.args.limit)
        lines = output.strip().splitlines()
        if status == "ok":
            said = lines[-1].removeprefix("ok: ")
        else:
            said = f"**FAILED** ({status}): {first_complaint(lines)}"
        print(f"{name}: {said} [{seconds:.0f} s, at {self.spent:.0f} s]", flush=True)
        with self.writing:  # one thread at a time
            self.checks[name] = [name, said.replace("|", "/"), f"{seconds:.0f}"]
            self.write()

    def end(self):
        """Kill what is under way, and begin nothing more."""
        self.args.budget = 0
        for process in list(self.processes):
            kill(process)

    @property
    def spent(self):
        """Seconds since the start."""
        return time.monotonic() - self.started

    def measure(self, name, command):
        """Run a measurement, whose output is Markdown."""
        status, output, seconds = self.run(name, command, self.left)
        lines = output.strip().splitlines()
        shown = [] if status.startswith("left out") else self.new_sections(without_warnings(lines))
        self.parts.append((name, status, command, shown, seconds))
        print(f"\n{name}: {status} [{seconds:.0f} s, at {self.spent:.0f} s]", flush=True)
        if status != "ok":
            print("\n".join(lines[-12:]), flush=True)
        for line in shown:
            if re.match(r"\| (batch|forward|whole|AdamW|a pass|\d+ tokens)", line):
                print(line, flush=True)
        self.write()

    def new_sections(self, lines):
        """Lines of `benchmarks.speed` for a page where their headings are of the fourth level.

        Sections, as that of differences, that were the same in a measurement before are left out.
        """
        sections = re.split("^(?=## )", "\n".join(lines) + "\n", flags=re.MULTILINE)
        new = [text for text in sections if text not in self.shown or text[:3] != "## "]
        self.shown.update(sections)
        return "".join(f"##{text}" if text.startswith("## ") else text for text in new).splitlines()

    def write(self):
        """Write the Markdown with all that there is so far."""
        with replacing(self.args.out) as path:
            Path(path).write_text("\n".join(self.lines()) + "\n")

    def lines(self):
        """The lines of the Markdown."""
        yield "## On a GPU"
        flags = " ".join("FILE" if x == self.args.out else x for x in sys.argv[1:])
        yield f"\n```\npython -m benchmarks.gpu {flags}\n```\n"
        yield f"{self.described}.\n"
        if self.checks:
            yield "### Checks\n\n| check | result | s |\n| --- | --- | --- |"
            yield from (f"| {' | '.join(row)} |" for row in sorted(self.checks.values()))
        for name, status, command, shown, seconds in self.parts:
            yield f"\n### {name}\n\n```\npython {' '.join(command[1:])}\n```\n"
            yield from shown
            if status != "ok":
                yield f"\n**{status}**"
            yield f"\n{seconds:.0f} s."

    def summarize(self):
        """Print what failed."""
        failed = [name for name, (_, said, _) in self.checks.items() if "FAILED" in said]
        failed += [name for name, status, *_ in self.parts if status != "ok"]
        print(f"\nfailed, stopped or left out: {', '.join(failed) or 'nothing'}")
        print(f"{self.spent:.0f} s; {self.args.out}, {self.log}")


def kill(process):
    """Kill a process, unless it has ended, with what it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def first_complaint(lines):
    """The line of an output that says what went wrong."""
    found = [line for line in lines if FAILED.match(line)]
    return (found or lines or ["no output"])[-1][:300]


def without_warnings(lines):
    """Lines of an output without warnings; Python's quote a line of code, which is indented."""
    kept, warned = [], False
    for line in lines:
        warned = bool(WARNED.match(line)) or (warned and line.startswith("  "))
        kept += [] if warned else [line]
    return kept


if __name__ == "__main__":
    run(main)
