"""Imports run one way: scripts → engine → models → diffusion, util. Run: pytest this file"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {"main_mar", "main_cache", "main_tokenizer", "sample", "reproduce", "demo", "benchmarks"}
ALLOWED = {
    "util": {"util"},
    "diffusion": {"diffusion"},
    "models": {"models", "diffusion", "util"},
    "engine_mar": {"models", "diffusion", "util"},
}
OURS = {*SCRIPTS, *ALLOWED}


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
    files = [ROOT / f"{layer}.py"] if layer == "engine_mar" else sorted((ROOT / layer).glob("*.py"))
    assert files
    for path in files:
        above = set(imported(path)) & OURS - ALLOWED[layer]
        assert not above, f"{path.name} imports {above}"


def test_nothing_below_a_script_names_a_device():
    """Device and dtype follow the data: dist.py picks the device, flags.py explains, precision.py
    knows what it has, and graphs.py records what only such a device can replay."""
    paths = [ROOT / "engine_mar.py"]
    paths += [p for layer in ("models", "diffusion", "util") for p in (ROOT / layer).glob("*.py")]
    assert {p.name for p in paths if "cuda" in p.read_text()} == {
        "dist.py",
        "flags.py",
        "graphs.py",
        "precision.py",
    }
