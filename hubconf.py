"""Entry points of torch.hub: models, tokenizers and Diffusion Loss inside other projects.

    torch.hub.load("folder of this file", "mar_base", source="local")

Our packages are called `models`, `diffusion` and `util`, and another project may have its own of
these names. So they are imported under a prefix, as `mar_diffloss_….models`: their imports of one
another are compiled with it. Nothing is found by sys.path, and what the other project imports by
these names, before or after, is its own.
"""

import ast as _ast
import importlib as _importlib
import sys as _sys
import zlib as _zlib
from importlib import machinery as _machinery
from importlib import util as _util
from pathlib import Path as _Path

dependencies = ["torch", "numpy", "timm", "safetensors", "tqdm"]

_ROOT = _Path(__file__).resolve().parent
_OURS = ("models", "diffusion", "util", "engine_mar")


class _Prefixed(_ast.NodeTransformer):
    """Puts the prefix into statements that import our packages."""

    def __init__(self, prefix):
        self.prefix = prefix

    def _name(self, name):
        return f"{self.prefix}.{name}" if name and name.split(".")[0] in _OURS else name

    def visit_ImportFrom(self, node):
        node.module = node.module if node.level else self._name(node.module)
        return node

    def visit_Import(self, node):
        for alias in node.names:
            prefixed = self._name(alias.name)
            if prefixed != alias.name:  # `import a.b` binds a: with a prefix, there is no such a
                assert alias.asname or "." not in alias.name, f"import {alias.name}: use from"
                alias.name, alias.asname = prefixed, alias.asname or alias.name
        return node


class _Loader(_machinery.SourceFileLoader):
    """Loads a source file with prefixed imports; files and lines in tracebacks are its own."""

    def get_code(self, fullname):
        # without bytecode on the disk, which is that of the names without the prefix
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)

    def source_to_code(self, data, path, **options):
        tree = _ast.parse(data, path)
        prefixed = _Prefixed(self.name.split(".")[0]).visit(tree)
        return super().source_to_code(prefixed, path, **options)


class _Finder:
    """Finds the modules below the prefix, and no others."""

    def __init__(self, prefix):
        self.prefix = prefix

    def find_spec(self, fullname, path=None, target=None):
        if not fullname.startswith(f"{self.prefix}."):
            return None
        return _machinery.FileFinder(path[0], (_Loader, [".py"])).find_spec(fullname)


def _package():
    """Name of the package that holds ours: one for each copy of this folder."""
    name = f"mar_diffloss_{_zlib.crc32(str(_ROOT).encode()):08x}"
    if name not in _sys.modules:
        spec = _machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(_ROOT)]
        _sys.modules[name] = _util.module_from_spec(spec)
        _sys.meta_path.insert(0, _Finder(name))
    return name


def module(name):
    """One of our modules, such as "util.rng" or "models.diffloss", beside another project's own.

    Example: `rng = torch.hub.load(REPO, "module", "util.rng")`, then
    `rng.image_generators(0, range(4))`.
    """
    return _importlib.import_module(f"{_package()}.{name}")


def load(checkpoint, weights="ema", **tokenizer):
    """(model, tokenizer, configuration) from a checkpoint, ours or a published one.

    checkpoint: a file, a folder, or a name on Hugging Face. weights: "ema" or "raw". tokenizer:
    what replaces the checkpoint's vae_path, scale or shift. The model is in evaluation mode;
    `model.sample_tokens(4, labels=..., **config["sampling"])` gives latents, and
    `tokenizer.decode(latents)` images (N, C, H, W) in about [-1, 1]. Raises ValueError.
    """
    return module("models").load(checkpoint, weights, **tokenizer)


def tokenizer(name=None, vae_path=None, scale=None, shift=None, pretrained=False, **kwargs):
    """A tokenizer by name: kl16, kl8, vq16, vq16_latent, pixels, ….

    name: by default what the file says, if main_tokenizer.py wrote it, else kl16. vae_path: file of
    its weights. pretrained: download the published one, into torch.hub's folder.
    Latents are (raw - shift) * scale; by default the published values, or those in the file.
    `encode(images)` takes images (N, 3, H, W) in [-1, 1]. Raises ValueError.
    """
    if pretrained and vae_path is not None:
        raise ValueError(f"vae_path {vae_path}: expected none beside pretrained=True")
    said = module("models.tokenizer_file").read(vae_path) if vae_path else {}
    name = name or said.get("tokenizer", "kl16")
    if pretrained:
        vae_path = _fetch(module("util.published").file_of_tokenizer(name))
    models = module("models")
    if vae_path is None and models.arguments_of_tokenizer(name, vae_path=vae_path):
        raise ValueError(f"tokenizer {name}: expected vae_path, or pretrained=True")
    return models.build_tokenizer(name, vae_path, scale, shift, **kwargs)


def _fetch(name):
    import torch

    folder = _Path(torch.hub.get_dir()) / "checkpoints"
    return module("util.download").download(name, folder=folder)


def _model(name, pretrained, kwargs):
    if pretrained:
        return module("models").load_model(_fetch(name), **kwargs)[0]
    return module("models").build_model(name, **kwargs)


def mar_base(pretrained=False, **kwargs):
    """MAR-B: 208M parameters with the head of the paper's table 4.

    pretrained: the weights published for ImageNet 256×256, downloaded into torch.hub's folder; its
    tokenizer is `tokenizer("kl16", pretrained=True)`. kwargs: arguments of `models.mar.MAR`, such
    as img_size, vae_embed_dim, class_num, diffloss_d and diffloss_w. `model(latents, labels)` is
    the training loss, `model.sample_tokens(4, labels=labels)` samples latents. Raises ValueError.
    """
    return _model("mar_base", pretrained, kwargs)


def mar_large(pretrained=False, **kwargs):
    """MAR-L: 479M parameters; see `mar_base`."""
    return _model("mar_large", pretrained, kwargs)


def mar_huge(pretrained=False, **kwargs):
    """MAR-H: 943M parameters; see `mar_base`."""
    return _model("mar_huge", pretrained, kwargs)


def model(name, **kwargs):
    """A new model by name: mar_tiny to mar_huge, ar_tiny to ar_huge, dit_tiny to dit_xl.

    kwargs: arguments of its constructor, as for `mar_base`. Raises ValueError.
    """
    return _model(name, False, kwargs)


def diffusion_loss(target_channels, z_channels, depth=3, width=1024, **kwargs):
    """Diffusion Loss alone, for tokens (N, target_channels) given vectors z (N, z_channels).

    `head(target, z, mask)` is the loss, `head.sample(z, temperature, cfg)` draws tokens.
    kwargs: num_sampling_steps and what else `models.diffloss.DiffLoss` takes.
    """
    return module("models.diffloss").DiffLoss(target_channels, z_channels, depth, width, **kwargs)
