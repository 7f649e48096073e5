"""What the texts say can be done. Run: python -m pytest tests/test_docs.py"""

import importlib
import re
import runpy
import shlex
import subprocess
import sys

import pytest
from cli import ROOT

from util.flags import Parser

TEXTS = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PYTHON = {"python", "python3", ".venv/bin/python", "torchrun"}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}


def blocks(path, kinds):
    """The code of a text that is of one of these kinds; "" is code that says no kind."""
    return [code for kind, code in BLOCK.findall(path.read_text()) if kind in kinds]


def commands():
    """(text, script or module, its flags) of each command that a text shows."""
    for path in TEXTS:
        for block in blocks(path, ("", "bash", "sh", "shell", "console")):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                while words and ("=" in words[0] or words[0] in ("time", "nohup")):
                    words.pop(0)  # OMP_NUM_THREADS=1
                if words and words[0] in PYTHON and (called := script_of(words)):
                    yield path.name, *called


def script_of(words):
    """(script or module of ours, its flags) of a command; None for another."""
    for i, word in enumerate(words):
        module = words[i + 1] if word == "-m" else word.removesuffix(".py")
        ours = module in SCRIPTS if word.endswith(".py") else word == "-m" and "." in module
        if ours:
            return module, words[i + (2 if word == "-m" else 1) :]
    return None


COMMANDS = list(commands())


class Parsed(Exception):
    """Raised when flags were parsed, before anything is done with them."""


@pytest.fixture
def parse_only(monkeypatch):
    """Every script stops when its flags are parsed."""
    parse = Parser.parse_args

    def parse_args(parser, *args):
        parse(parser, *args)
        raise Parsed

    monkeypatch.setattr(Parser, "parse_args", parse_args)


@pytest.mark.parametrize(
    ("text", "module", "flags"),
    [pytest.param(*c, id=f"{c[0]}-{c[1]}-{i}") for i, c in enumerate(COMMANDS)],
)
def test_commands_parse(text, module, flags, parse_only, monkeypatch):
    """A command that a text shows has no flag that its script does not know, and no wrong value."""
    flags = [re.sub(r"\$\{?\w+\}?", "1", flag) for flag in flags]
    name = module if importlib.util.find_spec(module).submodule_search_locations is None else (
        f"{module}.__main__"
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", [name, *flags])
    with pytest.raises(Parsed):
        main = getattr(importlib.import_module(name), "main", None)
        main(flags) if main else runpy.run_module(name, run_name="__main__")


def test_there_are_commands():
    """Of every script, in the README and elsewhere."""
    assert {"README.md"} < {text for text, _, _ in COMMANDS}
    scripts = {"main_mar", "main_cache", "main_tokenizer", "sample", "edit", "neon", "reproduce"}
    assert scripts <= {module for _, module, _ in COMMANDS}


@pytest.mark.parametrize("path", TEXTS, ids=[path.name for path in TEXTS])
def test_python_compiles_and_its_imports_exist(path):
    """Of the blocks of Python."""
    for code in blocks(path, ("python",)):
        compile(code, path.name, "exec")
        for line in code.splitlines():
            if found := re.match(r"from (\S+) import ([\w, ]+)(?: as \w+)?$", line):
                module = importlib.import_module(found[1])
                names = [name.split(" as ")[0].strip() for name in found[2].split(",")]
                for name in names:
                    submodule = f"{found[1]}.{name}"
                    assert hasattr(module, name) or importlib.util.find_spec(submodule), line


@pytest.mark.parametrize("path", TEXTS, ids=[path.name for path in TEXTS])
def test_files_that_are_named_exist(path):
    """Links to other files, and files of ours in code font."""
    text = path.read_text()
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)}
    for link in {link for link in links if link and "://" not in link}:
        assert (path.parent / link).exists(), link
    packages = "models|diffusion|util|tests|demo|benchmarks|docs"
    for name in set(re.findall(rf"`((?:(?:{packages})/)[\w/.-]+\.\w+)`", text)):
        assert (ROOT / name).exists() or path.name == "CHANGELOG.md", name


def headings(path):
    """The headings of a text as GitHub's anchors, in their order."""
    lines = re.findall(r"^#+ (.*)", BLOCK.sub("", path.read_text()), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines]


@pytest.mark.parametrize("path", TEXTS, ids=[path.name for path in TEXTS])
def test_links_to_sections_lead_there(path):
    """The anchor of each link is a heading, and no page has a heading twice, as after a merge of
    moved sections."""
    for link, anchor in re.findall(r"\]\(([^)\s#:]*)#([^)\s]+)\)", path.read_text()):
        assert anchor in headings(path.parent / link if link else path), f"{link}#{anchor}"
    found = headings(path)
    assert len(found) == len({*found}) or path.name == "CHANGELOG.md"


def tracked():
    """Paths of all files under version control."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not under version control")
    return done.stdout.splitlines()


def test_the_table_of_files_names_all():
    """Every file at the top and every module is in the README or in docs/."""
    named = {name for path in TEXTS for name in re.findall(r"`([\w/.-]+)`", path.read_text())}
    named |= {link for path in TEXTS for link in re.findall(r"\]\(([\w/.-]+)\)", path.read_text())}
    named = {name.removeprefix("../") for name in named}
    files = [f for f in tracked() if f.endswith(".py") and not f.startswith("tests/")]
    top = [f for f in tracked() if "/" not in f and not f.startswith(".") and f != "README.md"]
    assert not sorted({*files, *top} - named)
