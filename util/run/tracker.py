"""Services that show a run beside TensorBoard: `--tracker`. A new one is a class and a row.

Imports neither torch nor the services' packages, until one is opened.
"""

import json
import os
import uuid
from importlib.util import find_spec
from pathlib import Path

from util.files import first_line, replacing
from util.flags import checked
from util.table import Table

PROJECT = "mar-diffloss"  # of runs, unless the service's own variable names another
FILE = "tracker.json"  # in the folder of the logs; holds the id of the run


class Tracker:
    """A run at a service. A subclass says its `package` and how each thing is sent.

    folder: of the run's logs. run_id: the same whenever the run is resumed. config: all flags,
    name -> value, as JSON has them. A method that raises is not called again (see Logger).
    """

    package = None

    def __init__(self, folder, run_id, config):
        raise NotImplementedError

    def scalars(self, values, step):
        """Send name -> number at an optimizer step."""
        raise NotImplementedError

    def image(self, name, image, step):
        """Send an image, uint8 (H, W, C)."""
        raise NotImplementedError

    def close(self):
        """Send what has not been sent, and end the run."""
        raise NotImplementedError


class Wandb(Tracker):
    """Weights & Biases. WANDB_PROJECT, WANDB_NAME, WANDB_MODE=offline and so on apply."""

    package = "wandb"

    def __init__(self, folder, run_id, config):
        import wandb

        self.Image = wandb.Image
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", Path(folder).resolve().name),
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=config,
        )

    def scalars(self, values, step):
        if step >= self.run.step:  # it has the earlier ones, which a resumed run repeats
            self.run.log(values, step=step)

    def image(self, name, image, step):
        self.scalars({name: self.Image(image)}, step)

    def close(self):
        self.run.finish()


class Trackio(Tracker):
    """Trackio, on this machine. TRACKIO_DIR, TRACKIO_SPACE_ID and so on apply."""

    package = "trackio"

    def __init__(self, folder, run_id, config):
        import trackio

        self.Image = trackio.Image
        name = f"{Path(folder).resolve().name}-{run_id}"  # Trackio resumes by name
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self.run = trackio.init(project, name, resume="allow", config=config, embed=False)
        self.last = getattr(self.run, "_next_step", 0) - 1  # the last step that it has

    def scalars(self, values, step):
        if step >= self.last:  # of the last one, some may be missing
            self.run.log(dict(values), step=step)

    def image(self, name, image, step):
        self.scalars({name: self.Image(image)}, step)

    def close(self):
        self.run.finish()


TRACKERS = Table("tracker", {"wandb": Wandb, "trackio": Trackio})


def add_tracker_flag(group):
    """Add --tracker, which is refused if the package is not there."""
    group.add_argument(
        "--tracker",
        nargs="*",
        choices=TRACKERS,
        type=checked(_check_installed),
        default=[],
        help="show the run at these services too; needs the extra of that name, such as "
        f"pip install 'mar-diffloss[{next(iter(TRACKERS))}]' (default: none)",
    )


def _check_installed(name):
    """Raises ValueError if the package of a tracker is not there."""
    package = TRACKERS[name].package if name in TRACKERS else None
    spec = find_spec(package) if package else None
    if package and (spec is None or spec.origin is None):  # None: a folder of that name
        raise ValueError(
            f"{name}: the package {package} is not installed: pip install 'mar-diffloss[{name}]'"
        )


def open_trackers(names, folder, config, resumed=False):
    """The trackers of a run, name -> Tracker, on rank 0; {} elsewhere.

    folder: of the run's logs. config: all flags, name -> value. resumed: whether to continue the
    run whose id the folder holds. One that cannot be opened (no network, not logged in) is left
    out with a warning. Raises ValueError if a package is not there.
    """
    from util.dist import is_main

    for name in names:
        _check_installed(name)
    if not names or not is_main():
        return {}
    config = json.loads(json.dumps(config, default=str))
    run_id = _run_id(Path(folder) / FILE, resumed)
    opened = {name: _open(name, folder, run_id, config) for name in dict.fromkeys(names)}
    return {name: tracker for name, tracker in opened.items() if tracker}


def _open(name, folder, run_id, config):
    try:
        return TRACKERS[name](folder, run_id, config)
    except Exception as error:
        warn(name, error)
        return None


def warn(name, error):
    """Say in one line that the run goes on without a tracker."""
    from util.dist import print0

    print0(f"WARNING: --tracker {name}: {first_line(error)}; the run goes on without it")


def _run_id(path, resumed):
    """The id that a file holds if the run is resumed; else a new one, which the file then holds."""
    known = _read_id(path) if resumed else None
    if known:
        return known
    new = uuid.uuid4().hex[:8]
    with replacing(path) as beside:
        beside.write_text(json.dumps({"id": new}))
    return new


def _read_id(path):
    try:
        found = json.loads(path.read_text())["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None
