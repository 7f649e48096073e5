"""What a run leaves to look at: TensorBoard, and the same figures as lines of JSON."""

import json
import sys
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from util.dist import is_main, print0

SECONDS_BETWEEN_LINES = 20


class Logger:
    """Writes under `folder` on rank 0; on other ranks, and without a folder, does nothing."""

    def __init__(self, folder):
        self.writer = self.lines = None
        if folder and is_main():
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.writer = SummaryWriter(str(folder))
            self.lines = (Path(folder) / "log.jsonl").open("a", buffering=1)

    def scalars(self, values, step, **more):
        """Name -> number at a step (of the optimiser); `more` goes into the JSON line only."""
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
            self.lines.write(json.dumps({"step": step, **more, **values}) + "\n")

    def image(self, name, image, step):
        """An image, uint8 (H, W, C)."""
        if self.writer:
            self.writer.add_image(name, image, step, dataformats="HWC")

    def close(self):
        if self.writer:
            self.writer.close()
            self.lines.close()


class Progress:
    """A bar on a terminal; otherwise a plain line now and then, and one at the end. On rank 0."""

    def __init__(self, total, label, unit="it", done=0):
        self.total, self.label, self.done = total, label, done
        self.shown = time.monotonic()
        self.bar = None
        if is_main() and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, desc=label, unit=unit, dynamic_ncols=True)

    def update(self, count=1, note=""):
        """`count` more are done; `note` is what to show beside that."""
        self.done += count
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        elif time.monotonic() - self.shown > SECONDS_BETWEEN_LINES or self.done >= self.total:
            print0(f"{self.label}: {self.done}/{self.total} {note}".rstrip())
            self.shown = time.monotonic()

    def close(self):
        if self.bar is not None:
            self.bar.close()
