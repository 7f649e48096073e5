"""Logs of a run: TensorBoard, the same metrics as lines of JSON, and trackers."""

import math
import os
import time
from itertools import count
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from util import jsonl
from util.dist import is_main, print0
from util.files import check_room, free_bytes, in_bytes, replacing
from util.progress import Progress as Progress
from util.progress import duration as duration
from util.run.tracker import warn

FILE = "log.jsonl"
WHEN = ("step", "epoch")  # entries of a record that are no metrics
ROOM = 1 << 20  # bytes; with fewer, nothing is logged


class Logger:
    """Writes to `folder` on rank 0 only. All that is logged is in the files at once.

    resumed: whether to append to log.jsonl; TensorBoard then shows earlier records too. step: if
    resumed, the number of optimizer steps done; records of later steps, which will be repeated, are
    removed. None keeps all, for a process that only adds to the records of a run. repeat: whether
    images and evaluations of this step, which follow an epoch, will be repeated as well. trackers:
    name -> Tracker, see util.run.tracker; one that fails is reported once, and then left out.
    """

    def __init__(self, folder, resumed=False, step=None, repeat=False, trackers=()):
        self.writer, self.path, self.trackers = None, Path(folder) / FILE, dict(trackers)
        self.full = False
        if not is_main():
            return
        check_room(self.path, ROOM)
        if not resumed:
            _keep_other(self.path)
        step = step if resumed else -1
        if step is None:
            self.writer = SummaryWriter(str(folder))
            return
        kept = _remove_after(step, self.path, repeat)
        self.writer = SummaryWriter(str(folder), purge_step=step if repeat else step + 1)
        for record in kept:
            if repeat and record["step"] == step:  # TensorBoard removes all of a step
                self._show({name: record[name] for name in record if name not in WHEN}, step)

    def scalars(self, values, step, **more):
        """Log name -> number at an optimizer step; `more` goes into the JSON line only."""
        if self._has_room():
            self._show(values, step)
            jsonl.append(self.path, {"step": step, **more, **values})
        if self.writer:
            self._track("scalars", values, step)

    def _show(self, values, step):
        for name, value in values.items():
            self.writer.add_scalar(name, math.nan if value is None else value, step)
        self.writer.flush()

    def image(self, name, image, step):
        """Log an image, uint8 (H, W, C)."""
        if self._has_room():
            self.writer.add_image(name, image, step, dataformats="HWC")
            self.writer.flush()
        if self.writer:
            self._track("image", name, image, step)

    def _has_room(self):
        """Whether to write. A full disk, said once, costs a run its logs and not its training."""
        free = free_bytes(self.path.parent) if self.writer else 0
        room = bool(self.writer) and (free is None or free > ROOM)
        if self.writer and not room and not self.full:
            left = in_bytes(free)
            print0(f"WARNING: {self.path.parent}: {left} free; the run goes on without logs")
        self.full = not room
        return room

    def _track(self, verb, *values):
        for name, tracker in list(self.trackers.items()):
            try:
                getattr(tracker, verb)(*values)
            except Exception as error:
                del self.trackers[name]
                warn(name, error)

    def close(self):
        if self.writer:
            self.writer.close()
            self._track("close")


def _keep_other(path):
    """Rename the log of another run."""
    if not path.is_file() or not path.stat().st_size:
        return
    names = (path.with_name(f"{path.stem}-before{n}{path.suffix}") for n in count(1))
    other = next(name for name in names if not name.exists())
    os.replace(path, other)
    print0(f"NOTE: {path} is of another run: it is now {other.name}")


def _remove_after(step, path, repeat):
    """Remove the records of later steps from log.jsonl, and what is no record; returns the rest."""
    kept = [record for record in jsonl.read(path) if _is_done(record, step, repeat)]
    with replacing(path) as beside:
        beside.write_text("".join(jsonl.dumps(record) + "\n" for record in kept), "utf-8")
    return kept


def _is_done(record, step, repeat):
    found = record.get("step")
    if not isinstance(found, int | float):
        return False
    # training's own records have an epoch
    return found < step or (found == step and ("epoch" in record or not repeat))


class Stopwatch:
    """Sums the seconds that an iterable takes to yield its items."""

    def __init__(self):
        self.seconds = 0.0

    def timed(self, iterable):
        """Yield the items of an iterable, timed."""
        items = iter(iterable)
        while True:
            start = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - start
            yield item
