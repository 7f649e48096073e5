"""A training run around its loop: resuming, logs, page and end, shared by the training scripts."""

from functools import partial

from util.checkpoint import keep_others
from util.dist import print0
from util.logger import Logger, Progress
from util.run import lock, stop
from util.run.loop import run_epochs
from util.run.tracker import open_trackers


def restore(state, checkpoint, path, notes, accum_iter, steps):
    """Load a checkpoint into the TrainState of a run, and print where it resumes.

    notes: sentences on what differs from the run before. accum_iter: batches per optimizer step.
    steps: batches per epoch. Raises ValueError for a checkpoint that does not fit.
    """
    state.load(checkpoint, path)
    if "optimizer" not in checkpoint:
        print0(f"NOTE: {path} holds weights only: training begins with epoch {state.epoch}")
        return
    place = f"{state.epoch} epochs are done"
    if "place" in checkpoint:
        same = state.resume_within(checkpoint["place"], accum_iter, steps)
        place += f", and {state.batch} batches of the next one"
        place += "" if same else ", which goes on with other random draws"
    print0(f"resumed {path}: {place}")
    for note in notes:
        print0(f"NOTE: {note}")


def train_epochs(saver, run_epoch, follow, page, epochs, resumed):
    """Train to the last epoch, and log.

    run_epoch: `util.run.loop.run_epoch` with the arguments that are the same for every epoch.
    follow: function of (logger, optimizer steps done), called after each epoch. page: the
    util.run.page.Page. epochs: those of the run. resumed: path of the checkpoint, or None.
    """
    keep_others(saver.folder, resumed)
    lock.sign(saver.folder)
    logger = open_logger(saver)
    saver.after_save = page.write
    progress = Progress(epochs * saver.steps, "training", "step", done=saver.step)
    run_epoch = partial(run_epoch, logger=logger, progress=progress, after_step=saver.after_step)
    try:
        with page.following(), stop.deferred():
            run_epochs(saver, run_epoch, partial(follow, logger), epochs)
    except stop.Stopped:
        logger.close()  # trackers send what they still hold
        raise
    progress.close()
    logger.close()


def open_logger(saver):
    """The Logger of a run, which continues at the place of its Saver."""
    args, place = saver.args, saver.place_in_logs()
    folder = args["log_dir"] or args["output_dir"]
    trackers = open_trackers(args["tracker"], folder, args, resumed=place["resumed"])
    return Logger(folder, **place, trackers=trackers)
