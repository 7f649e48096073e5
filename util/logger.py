"""Logs of a run: TensorBoard, the same metrics as lines of JSON, and progress bars."""

import json
import sys
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from util.dist import is_main, print0

SECONDS_BETWEEN_LINES = 20


class Logger:
    """Writes to `folder` on rank 0 only. resumed: whether to append to log.jsonl."""

    def __init__(self, folder, resumed=False):
        self.writer = self.lines = None
        if is_main():
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.writer = SummaryWriter(str(folder))
            self.lines = (Path(folder) / "log.jsonl").open("a" if resumed else "w", buffering=1)

    def scalars(self, values, step, **more):
        """Log name -> number at an optimizer step; `more` goes into the JSON line only."""
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
            self.lines.write(json.dumps({"step": step, **more, **values}) + "\n")

    def image(self, name, image, step):
        """Log an image, uint8 (H, W, C)."""
        if self.writer:
            self.writer.add_image(name, image, step, dataformats="HWC")

    def close(self):
        if self.writer:
            self.writer.close()
            self.lines.close()


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


class Progress:
    """A progress bar on a terminal; otherwise occasional lines, and one at the end. On rank 0.

    label: name of the progress bar; None shows nothing.
    """

    def __init__(self, total, label, unit="it", done=0):
        self.total, self.label, self.done = total, label, done
        self.shown, self.note = time.monotonic(), ""
        self.bar = None
        if label and is_main() and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, desc=label, unit=unit, dynamic_ncols=True)

    def update(self, count=1, note=""):
        """Add `count` to the progress; `note` is the text to show beside it from now on."""
        self.done += count
        self.note = note or self.note
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(count)
        elif self.label and self._is_due():
            print0(f"{self.label}: {self.done}/{self.total} {self.note}".rstrip())
            self.shown = time.monotonic()

    def _is_due(self):
        late = time.monotonic() - self.shown > SECONDS_BETWEEN_LINES
        return late or self.done >= self.total

    def close(self):
        if self.bar is not None:
            self.bar.close()
