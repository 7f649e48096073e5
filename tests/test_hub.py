"""Inside other projects, by torch.hub: python -m pytest tests/test_hub.py

Each test is one process, whose working folder is another project with packages `models` and `util`.
"""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli import ROOT

import models

FIXTURES = ROOT / "tests" / "fixtures"
# a project with our names, down to those of submodules
PROJECT = {
    "models/__init__.py": "from models.mar import NAME",
    "models/mar.py": "from util.rng import SEED\nNAME = f'theirs {SEED}'",
    "models/sampling.py": "raise RuntimeError('of the other project')",
    "models/tokenizer.py": "raise RuntimeError('of the other project')",
    "util/__init__.py": "",
    "util/rng.py": "SEED = 7",
    "util/late.py": "from models.mar import NAME\nimport util.rng",
    "diffusion.py": "STEPS = 3",
}
DRIVER = """
import io, json, signal, sys
import torch

def hub(name, *args, **kwargs):
    return torch.hub.load(ROOT, name, *args, source="local", **kwargs)

def state():
    ours = {name: module for name, module in sys.modules.items()
            if name.split(".")[0] in ("models", "util", "diffusion", "engine_mar")}
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    return ours, list(sys.path), handlers, sys.excepthook, torch.get_num_threads()

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)
"""


@pytest.fixture
def project(tmp_path):
    """Runs code in a process of the other project; returns what it prints last, from JSON."""
    for name, code in PROJECT.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(code + "\n")

    def run(code, *args):
        script = tmp_path / "script.py"
        script.write_text(f"ROOT = {str(ROOT)!r}\n{DRIVER}\n{code}")
        done = subprocess.run(
            [sys.executable, str(script), *map(str, args)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


BESIDE = """
import models, util.rng
before = state()
model, tokenizer, config = hub("load", FIXTURES + "/checkpoint.pth")
labels = torch.arange(3)
latents = model.sample_tokens(3, labels=labels, generator=seeded(), **config["sampling"])
images = tokenizer.decode(latents)
ddim = {**config["sampling"], "solver": "ddim", "num_iter": 2, "cfg_schedule": "constant"}
model.sample_tokens(3, labels=labels, **ddim)  # of parts that nothing needed so far
kl = hub("tokenizer", "kl", FIXTURES + "/kl.ckpt", scale=1.0)
assert kl.decode(kl.sample(kl.encode(torch.zeros(1, 3, 16, 16)))).shape == (1, 3, 16, 16)
size = {"img_size": 4, "vae_stride": 1, "patch_size": 1, "class_num": 3}
codes = hub("model", "ar_tiny", head="ce", num_codes=5, vae_embed_dim=1, **size)
codes(torch.ones(2, 1, 4, 4), torch.tensor([0, 1])).backward()
file = io.BytesIO()
torch.save(model.state_dict(), file)
file.seek(0)
model.load_state_dict(torch.load(file))
try:
    hub("model", "mar_none")
except ValueError as error:
    said = str(error)
assert state() == before
import util.late
assert util.late.NAME == "theirs 7" and models.mar.NAME == "theirs 7"
try:
    hub("load", ROOT + "/LICENSE")
except ValueError as error:
    deepest = error.__traceback__
    while deepest.tb_next:
        deepest = deepest.tb_next
code = deepest.tb_frame.f_code
print(json.dumps([images.tolist(), said, code.co_filename, type(model).__module__]))
"""


def test_beside_a_project_with_our_names(project):
    """Its modules, imported before and after, stay its own, and so do sys.path and all handlers.

    Checkpoint, tokenizers, other solvers, heads and backbones give what they give without it.
    """
    found = project(f"FIXTURES = {str(FIXTURES)!r}\n{BESIDE}")
    images, said, file, module = found
    model, tokenizer, config = models.load(FIXTURES / "checkpoint.pth")
    generator = torch.Generator().manual_seed(0)
    latents = model.sample_tokens(
        3, labels=torch.arange(3), generator=generator, **config["sampling"]
    )
    # the number of threads may be another
    torch.testing.assert_close(torch.tensor(images), tokenizer.decode(latents), rtol=0, atol=1e-3)
    assert said.startswith("model 'mar_none': expected one of mar_tiny, ")
    assert file == str(ROOT / "util" / "weights.py") and module.endswith(".models.mar")


AFTER = """
before = state()
head = hub("diffusion_loss", 4, 8, depth=1, width=16, num_sampling_steps="3")
z = torch.randn(6, 8)
loss = head(torch.randn(6, 4), z)
loss.backward()
rng = hub("module", "util.rng")
tokens = head.sample(z)
mar = hub("mar_base", img_size=16, encoder_depth=1, decoder_depth=1, encoder_embed_dim=32,
          decoder_embed_dim=32, encoder_num_heads=2, decoder_num_heads=2, diffloss_d=1,
          diffloss_w=16, num_sampling_steps="2")
first = mar.sample_tokens(1, num_iter=1, labels=torch.tensor([3]))
assert state() == before
import util.late, models, diffusion
pixels = hub("tokenizer", "pixels", channels=1)
again = mar.sample_tokens(1, num_iter=1, cfg=2.0, solver="ddim", labels=torch.tensor([3]))
print(json.dumps([list(tokens.shape), list(first.shape), util.late.NAME, diffusion.STEPS,
                  models.NAME, len(rng.image_generators(0, range(2))), pixels.patch_size]))
"""


def test_before_a_project_with_our_names(project):
    """A project that imports its own only afterwards gets them."""
    found = project(AFTER)
    assert found == [[6, 4], [1, 16, 1, 1], "theirs 7", 3, "theirs 7", 2, 4]


@pytest.fixture
def hubconf():
    """The module as torch.hub imports it."""
    return torch.hub._import_module("hubconf", str(ROOT / "hubconf.py"))


def test_the_list_of_entry_points(hubconf):
    """What torch.hub.list shows is meant to be called, and torch.hub.help says how."""
    entries = {
        name: entry
        for name, entry in vars(hubconf).items()
        if callable(entry) and not name.startswith("_")
    }
    models_, others = ["mar_base", "mar_large", "mar_huge"], ["diffusion_loss", "load", "model"]
    assert sorted(entries) == sorted([*models_, *others, "module", "tokenizer"])
    assert all(entry.__doc__ for entry in entries.values())
    assert all(importlib.util.find_spec(name) for name in hubconf.dependencies)


def test_all_our_imports_get_the_prefix(hubconf):
    """In every file of our packages, those in functions too; no other import does."""
    for path in [p for name in hubconf._OURS for p in [*ROOT.glob(f"{name}.py"), *files(name)]]:
        tree = ast.parse(path.read_text())
        before = list(imports(tree))
        after = list(imports(hubconf._Prefixed("prefix").visit(tree)))
        ours = [name.split(".")[0] in hubconf._OURS for name in before]
        expected = [f"prefix.{name}" if own else name for name, own in zip(before, ours, strict=True)]
        assert after == expected, path


def files(name):
    return sorted((ROOT / name).rglob("*.py"))


def imports(tree):
    """Names of the modules that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_published_weights(hubconf, monkeypatch, tmp_path):
    """They are downloaded into the folder of torch.hub, by the names of util.published."""
    asked = []

    class Stub:
        @staticmethod
        def download(name, folder):
            asked.append((name, Path(folder)))
            return str(FIXTURES / ("checkpoint.pth" if name == "mar_base" else "kl.ckpt"))

    module = hubconf.module
    stubbed = {"util.download": Stub}
    monkeypatch.setattr(hubconf, "module", lambda name: stubbed.get(name) or module(name))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    hubconf.tokenizer("kl", FIXTURES / "kl.ckpt", scale=1.0)
    assert not asked
    model = hubconf.mar_base(pretrained=True, num_sampling_steps="2")
    assert not model.training and model.seq_len == 16
    with pytest.raises(ValueError, match=r"kl\.ckpt"):  # which is no KL-16
        hubconf.tokenizer("kl16", pretrained=True)
    with pytest.raises(ValueError, match="tokenizer pixels: no file is published"):
        hubconf.tokenizer("pixels", pretrained=True)
    assert asked == [("mar_base", tmp_path / "checkpoints"), ("kl16", tmp_path / "checkpoints")]
