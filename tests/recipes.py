"""What test_extend.py does to a copy of the source: the recipes of CONTRIBUTING.md, to the letter.

Each adds something that is not there, by its own code, one row, and one field per option. COST is
what that takes, in edits to files that are there already (own code in them: one edit per place).
"""

import re
from difflib import SequenceMatcher
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("models", "diffusion", "util")


class Source:
    """A copy of the source, and the edits that the recipes allow."""

    def __init__(self, root):
        self.root = root
        files = [*ROOT.glob("*.py"), *(f for name in PACKAGES for f in (ROOT / name).rglob("*.py"))]
        for file in files:
            self.write(file.relative_to(ROOT), file.read_text())

    def read(self):
        """Path -> lines of every file."""
        files = self.root.rglob("*.py")
        return {str(f.relative_to(self.root)): f.read_text().splitlines() for f in files}

    def write(self, path, code):
        """A new file."""
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(code)

    def edit(self, path, old, new):
        """Put `new` in the place of `old`, which is there once."""
        text = (self.root / path).read_text()
        assert text.count(old) == 1, f"{path} has {text.count(old)} of {old!r}"
        (self.root / path).write_text(text.replace(old, new))

    def add_row(self, path, table, row):
        """A row at the top of a table."""
        text = (self.root / path).read_text()
        (head,) = re.findall(rf'^{table} = Table\(\n    "[a-z_ ]+",\n    {{\n', text, re.MULTILINE)
        self.edit(path, head, f"{head}        {row}\n")

    def add_field(self, path, cls, field):
        """A field at the end of a class of settings."""
        text = (self.root / path).read_text()
        (body,) = re.findall(rf"^class {cls}\(Settings\):\n.*?\n(?=\n\n)", text, re.M | re.S)
        self.edit(path, body, f"{body}    {field}\n")

    def append(self, path, code):
        """A function at the end of a file."""
        (self.root / path).write_text((self.root / path).read_text() + code)

    def add_function(self, path, table, code):
        """A function in front of the table whose row names it."""
        self.edit(path, f"\n{table} = Table(", f"{code}\n\n{table} = Table(")


def places(before, after):
    """({existing file: places that differ}, [new files])."""
    changed = {}
    for path, lines in before.items():
        if lines == after[path]:  # what is equal takes the longest to compare
            continue
        matcher = SequenceMatcher(None, lines, after[path], autojunk=False)
        if count := sum(tag != "equal" for tag, *_ in matcher.get_opcodes()):
            changed[path] = count
    return changed, sorted({*after} - {*before})


# ---- the recipes ---------------------------------------------------------------------------------

SETTINGS, LAYERS = "models/settings.py", "models/layers.py"


def head(source):
    """A Gaussian of fixed variance around a mean that is linear in z, with an option."""
    source.write(
        "models/gauss.py",
        """
from models.heads import LinearHead, masked_mean
from util.rng import randn


class Gauss(LinearHead):
    def __init__(self, out_channels, z_channels, gauss_std=0.5):
        super().__init__(out_channels, z_channels)
        if not gauss_std > 0:
            raise ValueError(f"gauss_std {gauss_std}: expected a number above 0")
        self.std = gauss_std

    def forward(self, target, z, mask=None, generator=None):
        errors = (target - self.linear(z).float()) / self.std
        return masked_mean(errors.square().mean(-1) / 2, mask)

    def pick(self, mean, temperature, generator):
        return mean + temperature * self.std * randn(mean.shape, generator, mean.device)
""",
    )
    source.add_row(SETTINGS, "HEADS", '"gauss": "models.gauss:Gauss",')
    field = 'setting(0.5, "standard deviation of a token", type=nonnegative, fixed=True)'
    source.add_field(SETTINGS, "Model", f"gauss_std: float = {field}")


def block(source):
    """A learned scale of the scores of each head."""
    old = "proj_dropout=0.0, qk_norm=False):"
    source.edit(LAYERS, old, f"{old[:-2]}, head_scale=False):")
    old = "        self.proj_drop = Dropout(proj_dropout)\n"
    scale = "nn.Parameter(torch.ones(heads, 1, 1)) if head_scale else None"
    source.edit(LAYERS, old, f"{old}        self.head_scale = {scale}\n")
    old = "        q, k, v = self.project(x, rows)\n"
    use = (
        "        if self.head_scale is not None:\n            q = q * self.head_scale.to(q.dtype)\n"
    )
    source.edit(LAYERS, old, old + use)
    field = 'setting(False, "learn a scale of the scores of each head", fixed=True)'
    source.add_field(SETTINGS, "Model", f"head_scale: bool = {field}")


def tokenizer(source):
    """Haar wavelets of 2×2 pixels, of as many channels as the data have: lossless."""
    source.write(
        "models/haar.py",
        """
import torch
from torch.nn import functional as F

from models.tokenizer import Tokenizer


class Haar(Tokenizer):
    def __init__(self, channels=3, scale=1.0, shift=0.0, patch_size=1):
        super().__init__(4 * channels, 2, patch_size, scale, shift)
        signs = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
        self.register_buffer("matrix", torch.tensor(signs) / 2)  # its own inverse

    def encode(self, images):
        return self.transform(F.pixel_unshuffle(images, 2))

    def decode(self, latents, generator=None):
        return F.pixel_shuffle(self.transform(self.to_raw(latents)), 2)

    def transform(self, x):
        x = torch.einsum("jk,nckhw->ncjhw", self.matrix, x.unflatten(1, (-1, 4)))
        return x.flatten(1, 2)
""",
    )
    source.add_row(SETTINGS, "TOKENIZERS", '"haar": "models.haar:Haar",')


def metric(source):
    """How far the mean brightness is off: in features of its own, whatever --extractor is."""
    path = "util/evaluation/metrics.py"
    code = '''
def _brightness(generated, reference):
    """The difference of mean brightness, of images in [−1, 1]."""
    return abs(generated.statistics["mu"].mean() - reference.statistics["mu"].mean())

'''
    row = 'Metric("brightness", _brightness, ("reference",), extractor="grey-pixels")'
    source.add_function(path, "METRICS", code)
    source.add_row(path, "METRICS", f'"brightness": {row},')


def metric_of_features(source):
    """How far the nearest real image is: of --extractor's features of each image."""
    path = "util/evaluation/metrics.py"
    code = '''
def _nearest(generated, reference):
    """The mean distance to the nearest real image."""
    import torch

    return torch.cdist(generated.features, reference.features).amin(1).mean().item()

'''
    row = 'Metric("nearest real image", _nearest, ("features", "reference features"))'
    source.add_function(path, "METRICS", code)
    source.add_row(path, "METRICS", f'"nearest": {row},')


def solver(source):
    """The ancestral steps without their noise: those of ddpm at temperature 0."""
    path = "diffusion/solvers.py"
    code = '''
def posterior_mean(diffusion, i, first):
    """The mean of the ancestral step from x_i to x_{i−1}."""
    from_x, from_noise = diffusion.mean_from_x[i].item(), diffusion.mean_from_noise[i].item()
    return ReverseStep(int(diffusion.timesteps[i]), i, from_x, from_noise)

'''
    source.add_function(path, "SOLVERS", code)
    source.add_row(path, "SOLVERS", '"mean": Solver(posterior_mean, start=None),')


def order(source):
    """Column by column from the top left; the same order for each image."""
    source.write(
        "models/columns.py",
        """
import math

import torch

from models.order import RandomOrder


class ColumnOrder(RandomOrder):
    varies = False

    def start(self, bsz, grid, generator=None, device=None):
        columns = torch.arange(math.prod(grid), device=device).view(grid).T
        return columns.flatten().flip(0).expand(bsz, -1)
""",
    )
    source.add_row(SETTINGS, "ORDERS", '"columns": "models.columns:ColumnOrder",')


def token_schedule(source):
    """More tokens at the first steps than at the last."""
    code = '''

def quadratic(length, k, num_iter):
    """L·(1 − k/K)² tokens stay unknown after step k of K."""
    return math.ceil(length * (1 - k / num_iter) ** 2)
'''
    source.append("models/order.py", code)
    source.add_row(SETTINGS, "TOKEN_SCHEDULES", '"quadratic": "models.order:quadratic",')


def optimizer(source):
    """Gradient descent with momentum, which is all that its state holds."""
    source.write(
        "util/descent.py",
        """
import torch

from util.optimizers import parameter_groups


def descent(model, recipe):
    groups = parameter_groups(model, recipe.weight_decay)
    groups = [{**group, "holds": "momentum_buffer"} for group in groups]
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9)
""",
    )
    source.add_row("util/recipe.py", "OPTIMIZERS", '"descent": "util.descent:descent",')


STRIPES = """
import torch
from torch.utils.data import TensorDataset

CLASSES = ["rows", "columns", "diagonals"]


def open_stripes(path, split, img_size, reading):
    if img_size not in (None, 8):
        raise ValueError(f"img_size {img_size}: the stripes are 8×8, expected 8")
    draw = torch.Generator().manual_seed(("train", "test").index(split))
    return described(TensorDataset(*stripes(300, draw)), split)


def stripes(count, draw):
    labels, y, x = torch.arange(count) % 3, torch.arange(8)[:, None], torch.arange(8)
    along = torch.stack([y + 0 * x, x + 0 * y, y + x])[labels]
    phase = torch.rand(count, 1, 1, generator=draw)
    images = torch.sin(along * torch.pi / 2 + phase).unsqueeze(1).expand(-1, 3, -1, -1)
    return images, labels


def described(dataset, split):
    dataset.classes, dataset.channels, dataset.img_size = CLASSES, 3, 8
    dataset.description = f"stripes {split}"
    return dataset
"""
STREAM = """
import itertools
import torch
from util.data.stripes import described, stripes


class Stream:
    def training_loader(self, batch_size, num_workers, seed, pin_memory):
        return StreamLoader(batch_size, seed)


class StreamLoader:
    def __init__(self, batch_size, seed):
        self.batch_size, self.seed = batch_size, seed
        self.steps, self.images = 2, 2 * batch_size

    def epoch(self, n, start=0):
        draw = torch.Generator().manual_seed(self.seed + n)
        batches = (stripes(self.batch_size, draw) for _ in range(self.steps))
        return itertools.islice(batches, start, None)


def open_stream(path, split, img_size, reading):
    return described(Stream(), split)
"""
DATA = "util/data/__init__.py"
STRIPED = """Kind(
            open="{open}",
            claims=lambda path: str(path) == "{path}",
            path="{path}",
            defaults={{"img_size": 8, "class_num": 3, "tokenizer": "pixels", "patch_size": 2}},
            held_out={held_out},
            extractor="grey-pixels",
        ),"""


def data_set(source):
    """Stripes, drawn at random: 3 classes and 3 channels, 8×8."""
    source.write("util/data/stripes.py", STRIPES)
    row = STRIPED.format(open="util.data.stripes:open_stripes", path="stripes", held_out='"test"')
    source.add_row(DATA, "DATASETS", f'"stripes": {row}')


def stream(source):
    """The same without an end: images to train on, none to compare with."""
    source.write("util/data/stream.py", STREAM)
    row = STRIPED.format(open="util.data.stream:open_stream", path="striped-stream", held_out=None)
    source.add_row(DATA, "DATASETS", f'"striped-stream": {row}')


# recipe -> ({existing file: edits}, new files)
COST = {
    head: ({SETTINGS: 2}, ["models/gauss.py"]),
    block: ({SETTINGS: 1, LAYERS: 3}, []),
    tokenizer: ({SETTINGS: 1}, ["models/haar.py"]),
    metric: ({"util/evaluation/metrics.py": 2}, []),
    metric_of_features: ({"util/evaluation/metrics.py": 2}, []),
    solver: ({"diffusion/solvers.py": 2}, []),
    order: ({SETTINGS: 1}, ["models/columns.py"]),
    token_schedule: ({SETTINGS: 1, "models/order.py": 1}, []),
    optimizer: ({"util/recipe.py": 1}, ["util/descent.py"]),
    data_set: ({DATA: 1}, ["util/data/stripes.py"]),
    stream: ({DATA: 1}, ["util/data/stream.py"]),
}
