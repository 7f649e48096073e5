"""The rows of benchmarks.experiments: what is trained, as flags of main_mar.py."""

from collections.abc import Callable
from dataclasses import dataclass, field

from diffusion.solvers import BELOW_SINGULARITY

# Of all rows. What 16 tokens need in place of the paper's values for 256 is as in --preset small.
RECIPE = {
    "diffusion_batch_mul": 4,
    "max_timestep": BELOW_SINGULARITY,
    "batch_size": 64,
    "lr": 1e-3,
    "lr_schedule": "constant",
    "grad_clip": 3.0,
    "weight_decay": 0.02,
    "num_sampling_steps": "25",
}
MAR = {"model": "mar", "buffer_size": 4, "mask_ratio_min": 0.1}


def fixed(epochs, steps):
    """Flags of runs that are the beginnings of longer ones: nothing depends on the length."""
    return {"warmup_epochs": 0.25, "ema_rate": 0.997, "attn_dropout": 0.0, "proj_dropout": 0.0}


def in_proportion(epochs, steps):
    """The paper's recipe in proportion: a quarter of the run is warm-up, and the EMA remembers 1/25
    of it (10,000 of 250,000 steps)."""
    return {"warmup_epochs": epochs / 4, "ema_rate": round(1 - 25 / (epochs * steps), 5)}


@dataclass(frozen=True)
class Sample:
    """How a model is sampled: steps as a fraction of its tokens, and further flags of sample.py."""

    steps: float = 1.0
    flags: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A training run, and what is sampled from its model.

    tokenizer: name in models.settings.TOKENIZERS. flags: those of main_mar.py beside the set's.
    samples: name, added to the row's -> Sample.
    """

    tokenizer: str
    flags: dict
    samples: dict = field(default_factory=lambda: {"": Sample()})


@dataclass(frozen=True)
class Set:
    """Rows to compare. like: name of the row whose steps or time the others have.

    equal: what is compared: "steps", "time". recipe: function (epochs, steps of an epoch) -> flags
    of all rows, beside RECIPE.
    """

    rows: dict
    like: str
    equal: tuple = ("time",)
    recipe: Callable = in_proportion


# ---- tables 1 and 2 of the paper ----------------------------------------------------------------

KL, VQ, LATENT = "kl", "vq", "vq_latent"
DIFF, CE, L2 = {"head": "diffloss"}, {"head": "ce"}, {"head": "l2"}
RASTER, RANDOM = {"model": "ar", "order": "raster"}, {"model": "ar", "order": "random"}
# a quarter as many steps as tokens, as the paper's 64 of 256, or one token at a time
BOTH = {"": Sample(0.25), ", one at a time": Sample()}
PAPER = {
    "AR, raster, CE": Row(VQ, {**RASTER, **CE}),
    "AR, raster, Diff": Row(KL, {**RASTER, **DIFF}),
    "AR, random, CE": Row(VQ, {**RANDOM, **CE}),
    "AR, random, Diff": Row(KL, {**RANDOM, **DIFF}),
    "MAR, CE": Row(VQ, {**MAR, **CE}, BOTH),
    "MAR, Diff": Row(KL, {**MAR, **DIFF}, BOTH),
    "MAR, Diff on VQ's latents": Row(LATENT, {**MAR, **DIFF}, BOTH),
    "MAR, L2": Row(KL, {**MAR, **L2}, BOTH),
}

SETS = {"tables": Set(PAPER, "MAR, Diff", ("steps", "time"), fixed)}
