"""The notebooks of demo/. Run: python -m pytest tests/test_notebooks.py"""

import io
import os
import re
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from cli import ROOT
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image, ImageSequence

from util.images import animation

NOTEBOOKS = sorted((ROOT / "demo").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
HEAVY = 400_000  # bytes
MACHINE = re.compile(r"/(home|root|tmp|work|Users|mnt|var)/|[A-Z]:\\\\")

# runs scripts in the kernel itself, with few steps: an interpreter that loads torch takes seconds
IN_PROCESS = """
import importlib, shlex

def run_script(command):
    script, *flags = shlex.split(command.format(**globals()))[1:]
    flags += {"main_mar.py": MAR_FLAGS, "sample.py": SAMPLE_FLAGS}.get(script, [])
    importlib.import_module(script.removesuffix(".py")).main(flags)

MAR_FLAGS = ["--num_sampling_steps", "2", "--num_iter", "2"]
SAMPLE_FLAGS = ["--per_class", "1"]
get_ipython().system = run_script
"""


def read(path):
    """A notebook of the current format. Raises an error if it is none."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(path):
    """The cells of code of a notebook."""
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def with_parameters(path, source):
    """The cells of code of a notebook, with a cell of this source after the parameters."""
    cells = code_cells(path)
    (place,) = [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", ())]
    return [*cells[: place + 1], new_code_cell(source), *cells[place + 1 :]]


def execute(cells, timeout):
    """Execute cells in a new kernel that starts in demo/; an error in one is raised here."""
    here = {"metadata": {"path": str(ROOT / "demo")}}
    NotebookClient(new_notebook(cells=cells), timeout=timeout, resources=here).execute()


def test_every_cell_runs(ckpt, tmp_path):
    """Of all notebooks, one after the other in one kernel, with a hardly trained model and few
    steps; the first starts in demo/, the others at the root."""
    digits = f"DIGITS = {str(ckpt.parent)!r}"
    tiny = {
        "diffusion_loss": "STEPS, BATCH, POINTS = 2, 8, 4",
        "editing": digits,
        "own_data": f"FOLDER, IMAGES, EPOCHS = {str(tmp_path)!r}, 60, 1\n{IN_PROCESS}",
        "run_mar": digits,
    }
    assert sorted(tiny) == NAMES
    cells = []
    for path in NOTEBOOKS:
        cells += [*with_parameters(path, tiny[path.stem]), new_code_cell("%reset -f")]
    execute(cells, timeout=120)
    assert (tmp_path / "some.png").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_it_runs_as_committed(path, tmp_path):
    """From beginning to end, a model of the digits trained by it where it needs one."""
    execute(with_parameters(path, f"DIGITS = FOLDER = {str(tmp_path)!r}"), timeout=1800)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_committed_as_executed(path):
    """All cells in order, with pictures and without errors; it is light and names no folder of the
    machine that it ran on."""
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert path.stat().st_size <= HEAVY
    texts = [output.get("text", "") + str(output.get("data", "")) for output in outputs]
    assert not [found for text in texts if (found := MACHINE.search(text))]


def test_one_address():
    """Notebooks and the README's badges name the repository as pyproject.toml does, and begin
    alike."""
    project = (ROOT / "pyproject.toml").read_text()
    address = re.search(r'^Repository = "(.+)"$', project, re.MULTILINE)[1]
    first = {code_cells(path)[0].source for path in NOTEBOOKS}
    assert len(first) == 1 and f'REPOSITORY = "{address}"' in first.pop()
    readme = (ROOT / "README.md").read_text()
    colab = address.replace("https://github.com/", "https://colab.research.google.com/github/")
    for path in NOTEBOOKS:
        assert f"]({colab}/blob/main/demo/{path.name})" in readme
    badges = re.findall(r"\]\((https://colab\.\S+\.ipynb)\)", readme)
    assert len(badges) == len(NOTEBOOKS)


@pytest.mark.parametrize("there", [False, True], ids=["new", "cloned before"])
def test_first_cell_fetches_the_repository(there, tmp_path, monkeypatch):
    """Outside of it: cloned unless that is done, installed, and made the working directory."""
    commands, target = [], tmp_path / "mar-diffloss"

    def record(command, check):
        commands.append([str(word) for word in command])
        target.mkdir(exist_ok=True)

    if there:
        target.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", record)
    monkeypatch.setattr(sys, "path", list(sys.path))
    exec(code_cells(NOTEBOOKS[0])[0].source, {})
    assert os.getcwd() == sys.path[0] == str(target)
    *clone, install = commands
    assert [command[:2] for command in clone] == ([] if there else [["git", "clone"]])
    assert install[1:] == ["-m", "pip", "install", "--quiet", "-e", str(target)]


@pytest.mark.parametrize("count", [1, 3])
def test_an_animation_holds_its_frames(count):
    """All of them, in order and unchanged, in a PNG."""
    frames = np.random.default_rng(0).integers(0, 256, (count, 6, 4, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(animation(frames))) as image:
        found = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
        assert image.format == "PNG" and np.array_equal(found, frames)
