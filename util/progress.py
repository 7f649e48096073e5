"""Progress of a loop: a bar on a terminal, otherwise occasional lines."""

import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 20
EXACT = 10**8  # larger numbers are shown to three digits


class Progress:
    """A progress bar on a terminal; otherwise occasional lines, and one at the end. On rank 0.

    total, done: numbers of units, all and those done before. label: name of the progress bar; None
    shows nothing.
    """

    def __init__(self, total, label, unit="it", done=0):
        self.total, self.unit, self.done = total, unit, done
        self.start = self.shown = time.monotonic()
        self.first, self.note = None, ""  # first: (time, done) after the first update
        self.bar = None
        self.label = label if label and _is_main() else None
        if self.label and sys.stderr.isatty():
            shown = {"unit": unit, "unit_scale": total >= EXACT, "dynamic_ncols": True}
            self.bar = tqdm(total=total, initial=done, desc=label, **shown)

    def update(self, count=1, note=""):
        """Add `count` to the progress; `note` is the text to show beside it from now on."""
        self.done += count
        self.note = note or self.note
        self.first = self.first or (time.monotonic(), self.done)
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(count)
        elif self.label and self._is_due():
            print(self._line(time.monotonic()), flush=True)
            self.shown = time.monotonic()

    def _is_due(self):
        late = time.monotonic() - self.shown > SECONDS_BETWEEN_LINES
        return late or self.done >= self.total

    def _line(self, now):
        """The progress at a time: with the note, or else the rate; and the time left, or taken."""
        start, before = self.first  # what came before is start-up: workers, compilation
        rate = (self.done - before) / (now - start) if now > start else 0
        parts = [self.note or self.unit]
        if rate and not self.note:
            parts.append(_rate(rate, self.unit))
        if self.done >= self.total:
            parts.append(f"took {duration(now - self.start)}")
        elif rate:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        return f"{self.label}: {_short(self.done)}/{_short(self.total)} {', '.join(parts)}"

    def close(self):
        if self.bar is not None:
            self.bar.close()


def _is_main():
    """Whether this is rank 0. Before torch is loaded, which takes seconds, there are no ranks."""
    if "torch" not in sys.modules:
        return True
    from util.dist import is_main

    return is_main()


def duration(seconds):
    """Seconds as text, such as "40 s", "12 min", "3 h 12 min" or "2 d 3 h"."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def _rate(per_second, unit):
    if per_second < 1:
        return f"{1 / per_second:.1f} s/{unit}"
    return f"{per_second:.1f} {unit}/s" if per_second < 10 else f"{_short(per_second)} {unit}/s"


def _short(number):
    return f"{number:.0f}" if number < EXACT else tqdm.format_sizeof(number)
