"""Files of JSON lines: log.jsonl and results.jsonl, which survive a run that is killed."""

import json
import math
from pathlib import Path

from util.files import expecting_room


def dumps(record):
    """A record as a line of JSON, which has no NaN and no infinity: they become null."""
    return json.dumps(_finite(record), allow_nan=False)


def _finite(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def read(path):
    """The records, dicts, of a file; [] if there is none.

    Lines that are no record are left out, such as one cut off when a run was killed.
    """
    path = Path(path)
    text = path.read_text("utf-8", errors="replace") if path.is_file() else ""
    found = (parse(line) for line in text.split("\n"))
    return [record for record in found if isinstance(record, dict)]


def parse(line):
    """The content of a line; None if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def append(path, record):
    """Add a record to a file, on a new line even if the last one was cut off.

    Raises ValueError if the disk is full.
    """
    path = Path(path)
    with expecting_room(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_off = not _ends_whole(path)
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" * cut_off + dumps(record) + "\n")


def _ends_whole(path):
    if not path.is_file() or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() == b"\n"
