"""Imports run one way: scripts → engine → models → diffusion, util. Run: pytest this file"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ("main_mar", "main_cache", "main_tokenizer", "sample", "edit", "neon", "reproduce")
ALLOWED = {
    "util": {"util"},
    "diffusion": {"diffusion", "util"},
    "models": {"models", "diffusion", "util"},
    "engine_mar": {"models", "diffusion", "util"},
    "engine_tokenizer": {"models", "diffusion", "util"},
}
ENGINES = ("engine_mar", "engine_tokenizer")
COMMANDS = ("util.export",)  # above all layers, wherever the file is: a command is what people type
OURS = {*SCRIPTS, *ALLOWED, "demo", "benchmarks"}
# modules that flags are made of: they must be there before what takes seconds to load
LIGHT = (
    "util.data",
    "util.evaluation.settings",
    "util.files",
    "util.flags",
    "util.lr_sched",
    "diffusion.solvers",
    "models",
    "models.autoencoder_settings",
    "models.settings",
    "models.presets",
    "util.jsonl",
    "util.recipe",
    "util.run.launch",
    "util.run.stop",
    "util.run.tracker",
    "util.settings",
    "util.table",
)
HEAVY = {"torch", "numpy", "torchvision", "timm", "torch_fidelity", "matplotlib", "PIL"}


def imported(path):
    """First parts of the names that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("layer", ALLOWED)
def test_layers_import_only_what_is_below(layer):
    """No layer knows one above it."""
    files = files_of(layer)
    assert files
    for path in files:
        above = set(imported(path)) & OURS - ALLOWED[layer]
        known = ".".join(path.relative_to(ROOT).with_suffix("").parts) in COMMANDS
        assert known or not above, f"{path.relative_to(ROOT)} imports {above}"


def files_of(layer):
    """The files of a module or of a package with its subpackages."""
    return [ROOT / f"{layer}.py"] if layer in ENGINES else sorted((ROOT / layer).rglob("*.py"))


@pytest.mark.parametrize("module", [*LIGHT, *SCRIPTS])
def test_flags_need_no_torch(module):
    """What the flags are made of is imported without torch, numpy and the like; so is a script."""
    code = f"import sys, {module}; print(sorted({HEAVY} & set(sys.modules)))"
    run = [sys.executable, "-c", code]
    assert subprocess.run(run, cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_nothing_below_a_script_names_a_device():
    """Device and dtype follow the data: device.py picks it, dist.py its backend, flags.py explains,
    precision.py knows what it has, and graphs.py records what only such a device can replay."""
    paths = [path for layer in ALLOWED for path in files_of(layer)]
    assert {p.name for p in paths if "cuda" in p.read_text()} == {
        "device.py",
        "dist.py",
        "flags.py",
        "graphs.py",
        "precision.py",
    }


def graph():
    """Module of ours -> the modules of ours that it imports, inside of functions too."""
    paths = [p for p in ROOT.glob("*.py")]
    for folder in ("models", "diffusion", "util", "demo", "benchmarks"):
        paths += (ROOT / folder).rglob("*.py")
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in paths}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    edges = {}
    for name, path in names.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {n if n in names else node.module for n in whole}
        edges[name] = (found & set(names)) - {name}
    return edges


def test_nothing_imports_a_command():
    """So that those which stand above their package's layer pull nothing up."""
    assert not set().union(*graph().values()) & set(COMMANDS)


def test_no_circle_of_imports():
    """Every module can be read after those that it imports."""
    edges = graph()
    assert len(edges) > 60
    while free := {name for name, found in edges.items() if not found & set(edges)}:
        edges = {name: found for name, found in edges.items() if name not in free}
    assert not edges, f"a circle among {sorted(edges)}"


def test_no_file_is_long():
    """500 lines are enough for one room."""
    paths = [path for path in ROOT.glob("*.py")]
    for folder in ("models", "diffusion", "util", "demo", "benchmarks", "tests"):
        paths += (ROOT / folder).rglob("*.py")
    long = {path.name: n for path in paths if (n := len(path.read_text().splitlines())) > 500}
    assert not long
