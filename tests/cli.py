"""What tests of the scripts share: flags, and a script's complaint."""

import json
from pathlib import Path

import pytest

from util.flags import run

ROOT = Path(__file__).parent.parent
DIGITS = ("--preset", "digits", "--device", "cpu")


def complain(capsys, main, *argv):
    """The one line that a script prints to standard error before it exits with status 2."""
    with pytest.raises(SystemExit) as stop:
        run(main, [str(a) for a in argv])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def read_lines(path):
    """What is on each line of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]
