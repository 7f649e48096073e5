"""Inside other projects, by torch.hub: python -m pytest tests/test_hub.py

What runs in another project, which has `models` and `util`, is a process of its own. All are
forked from one that has loaded torch and timm, but nothing of ours or of that project.
"""

import ast
import importlib.util
import json
import py_compile
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
import io, json, multiprocessing, signal, sys
import timm, torch

def hub(name, *args, **kwargs):
    return torch.hub.load(ROOT, name, *args, source="local", **kwargs)

def state():
    ours = {name: module for name, module in sys.modules.items()
            if name.split(".")[0] in ("models", "util", "diffusion", "engine_mar")}
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    return ours, list(sys.path), handlers, sys.excepthook, torch.get_num_threads()

def in_a_fork(code):
    process = multiprocessing.get_context("fork").Process(target=exec, args=(code, globals()))
    process.start()
    process.join()
    if process.exitcode:
        print(json.dumps(None))

for code in CODES:
    in_a_fork(code)
"""
BEFORE = """
import models, util.rng
before = state()
model, tokenizer, config = hub("load", FIXTURES + "/checkpoint.pth")
labels = torch.arange(3)
generator = torch.Generator().manual_seed(0)
sampling = {**config["sampling"], "num_iter": 2}
latents = model.sample_tokens(3, labels=labels, generator=generator, **sampling)
images = tokenizer.decode(latents)
ddim = {**sampling, "solver": "ddim", "cfg_schedule": "constant"}
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


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Name -> what its code printed last in a process of the other project, None if it failed."""
    folder = tmp_path_factory.mktemp("project")
    for name, code in PROJECT.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(code + "\n")
    codes = {"before": BEFORE, "after": AFTER}
    known = f"ROOT, FIXTURES = {str(ROOT)!r}, {str(FIXTURES)!r}\nCODES = {list(codes.values())!r}"
    (folder / "script.py").write_text(f"{known}\n{DRIVER}")
    run = [sys.executable, "script.py"]
    done = subprocess.run(run, cwd=folder, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    results = [json.loads(line) for line in done.stdout.splitlines() if line[0] in "[n"]
    return dict(zip(codes, results, strict=True))


def test_beside_a_project_with_our_names(project):
    """Its modules, imported before and after, stay its own, and so do sys.path and all handlers.

    Checkpoint, tokenizers, other solvers, heads and backbones give what they give without it.
    """
    assert project["before"]
    images, said, file, module = project["before"]
    model, tokenizer, config = models.load(FIXTURES / "checkpoint.pth")
    sampling = {**config["sampling"], "num_iter": 2}
    generator = torch.Generator().manual_seed(0)
    latents = model.sample_tokens(3, labels=torch.arange(3), generator=generator, **sampling)
    # the number of threads may be another
    torch.testing.assert_close(torch.tensor(images), tokenizer.decode(latents), rtol=0, atol=1e-3)
    assert said.startswith("model 'mar_none': expected one of mar_tiny, ")
    assert file == str(ROOT / "util" / "weights.py") and module.endswith(".models.mar")


def test_before_a_project_with_our_names(project):
    """A project that imports its own only afterwards gets them."""
    assert project["after"] == [[6, 4], [1, 16, 1, 1], "theirs 7", 3, "theirs 7", 2, 4]


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
        ours = {name for name in before if name.split(".")[0] in hubconf._OURS}
        assert after == [f"prefix.{name}" if name in ours else name for name in before], path


def files(name):
    return sorted((ROOT / name).rglob("*.py"))


def imports(tree):
    """Names of the modules that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_bytecode_on_the_disk(hubconf, tmp_path):
    """That of the names without a prefix is neither used nor replaced."""
    source = tmp_path / "late.py"
    source.write_text("from util import rng")
    kept = Path(py_compile.compile(str(source)))
    before = kept.read_bytes()
    code = hubconf._Loader("prefix.late", str(source)).get_code("prefix.late")
    assert code.co_names[0] == "prefix.util" and kept.read_bytes() == before


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
    assert hubconf.tokenizer(vae_path=FIXTURES / "kl.ckpt").channels == 4  # by what it says
    with pytest.raises(ValueError, match="vae_path own.ckpt: expected none beside pretrained"):
        hubconf.tokenizer("kl16", "own.ckpt", pretrained=True)
    with pytest.raises(ValueError, match="tokenizer kl16: expected vae_path, or pretrained=True"):
        hubconf.tokenizer()
    assert not asked
    model = hubconf.mar_base(pretrained=True, num_sampling_steps="2")
    assert not model.training and model.seq_len == 16
    with pytest.raises(ValueError, match=r"kl\.ckpt"):  # which is no KL-16
        hubconf.tokenizer("kl16", pretrained=True)
    with pytest.raises(ValueError, match="tokenizer pixels: no file is published"):
        hubconf.tokenizer("pixels", pretrained=True)
    assert asked == [("mar_base", tmp_path / "checkpoints"), ("kl16", tmp_path / "checkpoints")]
