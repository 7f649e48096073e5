"""The rows of benchmarks.experiments: what is trained, as flags of main_mar.py."""

from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.experiment_tables import Claim
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
# the tokenizers' training: two networks of one shape, 16 tokens of a 16-pixel image
NETWORK = {"ch": 16, "ch_mult": "1,2,4", "res_blocks": 1, "batch_size": 32, "lr": 4e-3}
NETWORK |= {"lr_schedule": "cosine", "warmup_epochs": 0.1, "norm_groups": 2}
NETWORKS = {
    "kl": {**NETWORK, "tokenizer": "kl", "vae_embed_dim": 16},
    "vq": {**NETWORK, "tokenizer": "vq", "vae_embed_dim": 8},
}
MAR = {"model": "mar", "buffer_size": 4, "mask_ratio_min": 0.1}


def fixed(epochs, steps):
    """Flags of runs that are the beginnings of longer ones: nothing depends on the length."""
    return {"warmup_epochs": 0.25, "ema_rate": 0.997, "attn_dropout": 0.0, "proj_dropout": 0.0}


def in_proportion(epochs, steps):
    """The paper's recipe in proportion: a quarter of the run is warm-up, and the EMA remembers 1/25
    of it (10,000 of 250,000 steps)."""
    remembered = max(1.0, epochs * steps / 25)
    return {"warmup_epochs": epochs / 4, "ema_rate": round(1 - 1 / remembered, 5)}


@dataclass(frozen=True)
class Sample:
    """How a model is sampled: steps as a fraction of its tokens, and further flags of sample.py.

    guide: the fraction of the run after which its checkpoint guides (autoguidance); 0: none. With
    "cfg" among the flags, this is the only scale.
    """

    steps: float = 1.0
    flags: dict = field(default_factory=dict)
    guide: float = 0.0


@dataclass(frozen=True)
class Row:
    """A training run, and what is sampled from its model.

    tokenizer: name in models.settings.TOKENIZERS. flags: those of main_mar.py beside the set's.
    samples: name, added to the row's -> Sample. timed: whether its steps cost something else than
    those of the set's `like`, so that they are timed.
    """

    tokenizer: str
    flags: dict
    samples: dict = field(default_factory=lambda: {"": Sample()})
    timed: bool = True


@dataclass(frozen=True)
class Set:
    """Rows to compare. like: name of the row whose steps or time the others have.

    equal: what is compared: "steps", "time". recipe: function (epochs, steps of an epoch) -> flags
    of all rows, beside RECIPE. claims: orderings to judge.
    """

    rows: dict
    like: str
    equal: tuple = ("time",)
    recipe: Callable = in_proportion
    claims: tuple = ()


# ---- tables 1 and 2 of the paper ----------------------------------------------------------------

KL, VQ, LATENT = "kl", "vq", "vq_latent"
DIFF, CE, L2 = {"head": "diffloss"}, {"head": "ce"}, {"head": "l2"}
RASTER, RANDOM = {"model": "ar", "order": "raster"}, {"model": "ar", "order": "random"}
# a quarter as many steps as tokens, as the paper's 64 of 256, or one token at a time
ONE = ", one at a time"
BOTH = {"": Sample(0.25), ONE: Sample()}
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

CLAIMS = (
    # table 1: Diffusion Loss against cross-entropy
    Claim("AR, raster, Diff", "AR, raster, CE", "19.23 < 19.58"),
    Claim("AR, random, Diff", "AR, random, CE", "13.07 < 16.22"),
    Claim(f"MAR, Diff{ONE}", f"MAR, CE{ONE}", "3.43 < 8.75"),
    Claim("MAR, Diff", "MAR, CE", "3.50 < 8.79"),
    # random against raster order, bidirectional against causal attention
    Claim("AR, random, CE", "AR, raster, CE", "16.22 < 19.58"),
    Claim("AR, random, Diff", "AR, raster, Diff", "13.07 < 19.23"),
    Claim(f"MAR, CE{ONE}", "AR, random, CE", "8.75 < 16.22"),
    Claim(f"MAR, Diff{ONE}", "AR, random, Diff", "3.43 < 13.07"),
    # one token at a time against several
    Claim(f"MAR, CE{ONE}", "MAR, CE", "8.75 < 8.79"),
    Claim(f"MAR, Diff{ONE}", "MAR, Diff", "3.43 < 3.50"),
    Claim("MAR, Diff", "MAR, L2", "3.50 < 100"),
    # table 2: the same tokenizer, and the better one
    Claim("MAR, Diff on VQ's latents", "MAR, CE", "7.82 < 8.79"),
    Claim("MAR, Diff", "MAR, Diff on VQ's latents", "3.50 < 7.82"),
)
# figures 4 to 6: the same runs, and the paper's baseline of figure 6
FIGURES = {name: PAPER[name] for name in ("MAR, Diff", "AR, raster, Diff", "AR, random, Diff")}
LACKING = ("attn_dropout", "proj_dropout", "diffusion_batch_mul")  # arguments that DiT has not
FIGURES["DiT"] = Row(KL, {"model": "dit", **dict.fromkeys(LACKING)})


# ---- one change at a time -----------------------------------------------------------------------


def changed(**flags):
    """The baseline with these flags of main_mar.py, which change what a step costs."""
    return Row(KL, {**MAR, **DIFF, **flags})


def as_cheap(**flags):
    """The baseline with these flags, which do not change what a step costs."""
    return Row(KL, {**MAR, **DIFF, **flags}, timed=False)


def sampled(flags, **samples):
    """The baseline with these flags of training, sampled with several flags of sample.py."""
    samples = {f", {name}": Sample(flags=own) for name, own in samples.items()}
    return Row(KL, {**MAR, **DIFF, **flags}, samples)


LOG = {
    "baseline": changed(),
    # l-DeTok's training of MARs (Yang et al. 2025), at once and one by one
    "no warm-up, decay, clipping, MLP dropout": as_cheap(
        warmup_epochs=0, weight_decay=0.0, grad_clip=0.0, mlp_dropout=0.0
    ),
    "no warm-up": as_cheap(warmup_epochs=0),
    "no dropout": changed(attn_dropout=0.0, proj_dropout=0.0),
    "cosine": as_cheap(lr_schedule="cosine"),
    "rate doubled": as_cheap(lr=2e-3),
    "half the batch": changed(batch_size=32),
    "averages by half-life in images": sampled(
        {"ema_images": [3_000, 10_000, 30_000], "ema_rate": None},
        **{"3,000": {}, "raw": {"weights": "raw"}},
        **{f"{n:,}": {"weights": f"ema_{n}"} for n in (10_000, 30_000)},
    ),
    "logit-normal timesteps": as_cheap(timesteps="logit-normal"),
    "timesteps even in log SNR": as_cheap(timesteps="log-snr"),
    "no variational term": changed(no_vlb=True),
    "min-SNR weights, no variational term": changed(no_vlb=True, loss_weight="min-snr"),
    "noise on known tokens": as_cheap(known_noise=0.2),
    "QK-norm": changed(qk_norm=True),
    "RoPE": changed(rope=True),
    "SwiGLU": changed(swiglu=True),
    "Muon": changed(optimizer="muon"),
    "head twice as wide": changed(diffloss_w=128),
    "head twice as deep": changed(diffloss_d=6),
    "1 timestep per token": changed(diffusion_batch_mul=1),
    "8 timesteps per token": changed(diffusion_batch_mul=8),
    "flow": sampled({"head": "flow"}, Euler={"solver": "euler"}, Heun={"solver": "heun"}),
    "energy score": changed(head="energy"),
}

# what won above, several at once: candidates of --preset fast
PLAIN = {"attn_dropout": 0.0, "proj_dropout": 0.0}
SNR = {"no_vlb": True, "loss_weight": "min-snr"}
MUON = {**PLAIN, **SNR, "optimizer": "muon"}
FAST = {
    "baseline": LOG["baseline"],
    "no dropout, rate 2e-3": changed(**PLAIN, lr=2e-3),
    "no dropout, rate 4e-3": changed(**PLAIN, lr=4e-3),
    "no dropout, rate 2e-3, half the batch": changed(**PLAIN, lr=2e-3, batch_size=32),
    "no dropout, rate 2e-3, min-SNR": changed(**PLAIN, **SNR, lr=2e-3),
    "no dropout, rate 2e-3, min-SNR, RoPE": changed(**PLAIN, **SNR, lr=2e-3, rope=True),
    "no dropout, rate 2e-3, min-SNR, Muon": changed(**MUON, lr=2e-3),
    "no dropout, rate 4e-3, min-SNR, Muon": changed(**MUON, lr=4e-3),
    "no dropout, rate 8e-3, min-SNR, Muon": changed(**MUON, lr=8e-3),
    "no dropout, rate 4e-3, min-SNR, Muon, little warm-up": changed(
        **MUON, lr=4e-3, warmup_epochs=0.5
    ),
    "no dropout, rate 4e-3, min-SNR, Muon, cosine, little warm-up": changed(
        **MUON, lr=4e-3, warmup_epochs=0.5, lr_schedule="cosine"
    ),
    "no dropout, rate 4e-3, min-SNR, Muon, RoPE": changed(**MUON, lr=4e-3, rope=True),
    "no dropout, rate 4e-3, min-SNR, Muon, RoPE, wide head": sampled(
        {**MUON, "lr": 4e-3, "rope": True, "diffloss_w": 128},
        EMA={},
        raw={"weights": "raw"},
    ),
}

# the paper's recipe in proportion, and presets, which choose all but size and batch; all are
# sampled alike, and guided by what they were after a quarter of the run
GIVEN = {"model": "mar", "batch_size": RECIPE["batch_size"], "num_sampling_steps": "25"}
ALIKE = {"cfg_schedule": "linear", "temperature": 1.0}
GUIDED = {
    "": Sample(flags=ALIKE),
    **{f", autoguided by {w}": Sample(flags={**ALIKE, "cfg": w}, guide=0.25) for w in (2, 4)},
}


def preset(name, **flags):
    """A preset with these flags of main_mar.py."""
    return Row(KL, {**GIVEN, "preset": name, **flags}, GUIDED)


PRESETS = {
    "baseline": Row(KL, {**MAR, **DIFF}, GUIDED),
    "preset small": preset("small"),
    "preset fast": preset("fast"),
    "preset fast, flow": preset("fast", head="flow"),  # no part of it
}

SETS = {
    "presets": Set(PRESETS, "baseline"),
    "fast": Set(FAST, "baseline"),
    "tables": Set(PAPER, "MAR, Diff", ("steps", "time"), fixed, CLAIMS),
    "figures": Set(FIGURES, "MAR, Diff", ("steps",), fixed),
    "log": Set(LOG, "baseline"),
}
