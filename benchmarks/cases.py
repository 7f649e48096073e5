"""The models of the benchmarks: what they are built with, and the usual settings of each."""

from dataclasses import dataclass
from types import SimpleNamespace

from diffusion.solvers import BELOW_SINGULARITY
from models.presets import PRESETS
from models.settings import Model, Sampling
from util.data import kind_or_folder
from util.settings import said_flags


@dataclass(frozen=True)
class Case:
    """A model of the benchmarks.

    model: arguments of `build_model`. sampling: settings of a Sampling, name -> value. train_batch:
    images of a training step on a CPU. large: whether whole images take minutes on a CPU.
    """

    model: dict
    sampling: dict
    train_batch: int = 2
    large: bool = False


def of_paper(name, depth, width, large=True):
    """A model at 256×256 pixels with a head of this size, as those of table 4."""
    model = {"name": f"mar_{name}", "diffloss_d": depth, "diffloss_w": width}
    return Case(model, {"num_iter": 64, "cfg": 3.0}, large=large)


def of_demo():
    """The model of `--preset digits`."""
    flags = SimpleNamespace(**kind_or_folder("digits").defaults | PRESETS["digits"])
    pixels = {"vae_stride": 1, "vae_embed_dim": 1}  # of the tokenizer and the images
    model = said_flags(Model, flags) | pixels
    return Case(model, said_flags(Sampling, flags), flags.batch_size)


def of_small_data():
    """The largest model that `--preset small` chooses, on pictures of 32×32 pixels."""
    model = {"name": "mar_small", "img_size": 32, "vae_stride": 1, "patch_size": 4}
    model |= {"vae_embed_dim": 3, "class_num": 10, "buffer_size": 16, "diffusion_batch_mul": 4}
    sampling = {"num_iter": 64, "cfg": 3.0, "max_timestep": BELOW_SINGULARITY}
    return Case(model, sampling, train_batch=32)


CASES = {
    "tiny": of_paper("tiny", 2, 64, large=False),
    "digits": of_demo(),
    "small": of_small_data(),
    "base": of_paper("base", 6, 1024),
    "large": of_paper("large", 8, 1280),
    "huge": of_paper("huge", 12, 1536),
}
