"""What a run will cost, tried before it: --dry_run."""

import sys
import time
from functools import partial

import torch

from util import dist
from util.data.loader import FirstBatches
from util.dist import print0
from util.files import in_bytes
from util.logger import duration

STEPS = 2  # the first is not counted: it also allocates, and compiles


def dry_run(saver, run_epoch, loader, draw, steps_left, device):
    """Take a few steps, save, sample an image, and report what each costs. A collective call.

    saver: the run's Saver. run_epoch: engine_mar.train_one_epoch with all but `loader`, `epoch` and
    `after_step`. loader: of the run. draw: function that samples an image. steps_left: optimizer
    steps until the run's end.
    """
    state, trial = saver.state, Trial(device)
    first = FirstBatches(loader, STEPS * saver.accum_iter)
    run_epoch(loader=first, epoch=state.epoch, after_step=trial.after_step)
    size = trial.time("save", partial(_save, saver))
    trial.time("sample", draw)
    parameters = sum(p.numel() for p in state.ema.module.parameters())
    trial.report(parameters, steps_left, size, saver.folder)


def _save(saver):
    """Save under a name of its own, and delete the file; returns its size."""
    path = saver.folder / "dry_run.pth"
    try:
        saver.state.save(path, saver.config, saver.args)
        return dist.broadcast(path.stat().st_size if dist.is_main() else 0)
    finally:
        if dist.is_main():
            path.unlink(missing_ok=True)


class Trial:
    """Times the parts of a dry run. All methods are collective calls."""

    def __init__(self, device):
        self.device, self.seconds, self.marks = device, {}, [time.perf_counter()]

    def after_step(self, *place):
        """For `train_one_epoch`: take the time when a step's work is done."""
        self._finish()
        self.marks.append(time.perf_counter())

    def time(self, name, function):
        """Call a function, timed; returns its result."""
        start = time.perf_counter()
        result = function()
        self._finish()
        self.seconds[name] = time.perf_counter() - start
        return result

    def _finish(self):
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()

    @property
    def per_step(self):
        """Seconds of a step, of the slowest process."""
        last = self.marks[-1] - self.marks[-2]
        return max(dist.all_gather(last))

    def report(self, parameters, steps_left, checkpoint_bytes, folder):
        """Print what was found. steps_left: optimizer steps until the run's end."""
        seconds, memory = self.per_step * steps_left, max(dist.all_gather(memory_used(self.device)))
        end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + seconds))
        saving, sampling = (max(dist.all_gather(self.seconds[n])) for n in ("save", "sample"))
        rows = {
            "parameters": f"{parameters / 1e6:.1f}M",
            "memory": f"{in_bytes(memory)} at most, per process" if memory else "unknown",
            "a step": f"{self.per_step:.3g} s",
            "steps left": f"{steps_left}: {duration(seconds)} without evaluations, until {end}",
            "a checkpoint": f"{in_bytes(checkpoint_bytes)} in {saving:.3g} s",
            "one image": f"{sampling:.3g} s",
        }
        width = max(map(len, rows))
        table = [f"  {name.ljust(width)}  {value}" for name, value in rows.items()]
        print0("\n".join([f"dry run, nothing is left of it in {folder}:", *table]))


def memory_used(device):
    """The most bytes that this process had allocated on a device; 0 if the system cannot say."""
    if peak := getattr(torch.get_device_module(device), "max_memory_allocated", None):
        return peak(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
