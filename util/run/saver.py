"""When and where a run is saved, and how it stops."""

import os
import shutil
import time
from pathlib import Path

from util import dist
from util.checkpoint import LAST, earlier_checkpoints
from util.files import replacing
from util.run import stop


class Saver:
    """Saves a TrainState when due, and when a process was asked to stop.

    output: a util.recipe.Output. config, args: as in TrainState.save; `latent_range` of config is
    kept up to date. steps: optimizer steps per epoch, of accum_iter batches each. resumed: the
    checkpoint that the run resumed, or None. Attribute `after_save`: a function to call after each
    save. All methods are collective calls.
    """

    after_save = staticmethod(lambda: None)

    def __init__(self, state, output, config, args, *, steps, accum_iter, resumed=None):
        self.state, self.folder, self.output = state, Path(output.output_dir), output
        self.config, self.args, self.steps, self.accum_iter = config, args, steps, accum_iter
        self.last = self.folder / LAST
        resumed = resumed and Path(resumed).resolve()
        own = resumed and resumed.parent == self.folder.resolve()
        self.earlier = earlier_checkpoints(self.folder) if own else []
        self.saved = self.step if resumed == self.last.resolve() else None  # step of `last`
        self.agreement, self.told, self.time = dist.Agreement(), False, time.monotonic()

    @property
    def step(self):
        """Number of optimizer steps done."""
        return self.state.epoch * self.steps + self.state.batch // self.accum_iter

    def place_in_logs(self):
        """Arguments of a Logger: how much of the logs is this run's."""
        again = self.state.batch == self.steps * self.accum_iter  # see stop_within
        return {"resumed": self.step > 0, "step": self.step, "repeat": again}

    def after_step(self, batch, draws, largest):
        """Save if due. Raises Stopped, after saving, if any process was asked to stop.

        batch: batches of the epoch done. draws: its EpochDraws. largest: largest |latent| so far.
        """
        self.state.batch = batch
        stopping, late = self.agreement(stop.reason() is not None, self._is_late())
        due = self.output.save_steps and self.step % self.output.save_steps == 0
        if stopping or late or due:
            self.state.draws = draws.state_dict()
            self.note_range(dist.all_reduce(largest.clone(), "max").item())
            self.save()
        if stopping:
            self._stop(dist.all_gather(stop.reason()))

    def end_epoch(self, epochs):
        """The epoch is done: save if due. Raises Stopped like `after_step`.

        epochs: their number in the run.
        """
        _, late = self.agreement.close() or (False, False)  # of the last step
        reasons = dist.all_gather(stop.reason())
        if any(reasons):  # before what follows an epoch: it is done after resuming
            self.save()
            self._stop(reasons)
        state = self.state
        state.epoch, state.batch, state.draws = state.epoch + 1, 0, None
        milestone = self.output.keep_every and state.epoch % self.output.keep_every == 0
        regular = state.epoch % self.output.save_last_freq == 0 or state.epoch == epochs
        due = self.output.save_steps and self.step % self.output.save_steps == 0
        if milestone or regular or due or late:
            self.save()
        if milestone and dist.is_main():
            _link(self.last, self.folder / f"checkpoint-epoch{state.epoch:04d}.pth")

    def stop_within(self, request):
        """Save as before the end of the epoch, since a Stopped came up in what follows it."""
        state = self.state
        state.epoch, state.batch = state.epoch - 1, self.steps * self.accum_iter
        self.save()
        self._stop([str(request)])

    def note_range(self, largest):
        """Take the largest |latent| into the configuration."""
        self.config["latent_range"] = max(self.config["latent_range"], largest)

    def save(self):
        """Save now; the file before it is kept under the name of its step, with keep > 1."""
        self.state.save(self.last, self.config, self.args, before=self._keep_last)
        self.saved, self.told, self.time = self.step, False, time.monotonic()
        self.after_save()

    def _keep_last(self):
        """Give the last file its own name, and delete those that are not to be kept. On rank 0."""
        if self.saved not in (None, self.step) and self.output.keep > 1 and self.last.is_file():
            name = self.folder / f"checkpoint-step{self.saved:08d}.pth"
            _link(self.last, name)
            self.earlier = [path for path in self.earlier if path != name] + [name]
        while len(self.earlier) >= self.output.keep:
            self.earlier.pop(0).unlink(missing_ok=True)

    def _is_late(self):
        """Whether rank 0 finds that it is time to save, once per save."""
        minutes = self.output.save_minutes
        late = minutes and time.monotonic() - self.time > 60 * minutes and dist.is_main()
        late, self.told = bool(late and not self.told), bool(late or self.told)
        return late

    def _stop(self, reasons):
        reason = next(reason for reason in reasons if reason)
        place = f"epoch {self.state.epoch}, step {self.step}"
        raise stop.Stopped(
            f"{reason}; saved {self.last} at {place}; call again with --resume {self.folder}"
        )


def _link(path, name):
    """The same file under a second name: a hard link, where there are such, or else a copy."""
    name.unlink(missing_ok=True)
    try:
        os.link(path, name)
    except OSError:
        with replacing(name, path.stat().st_size) as beside:
            shutil.copyfile(path, beside)
