"""`--preset small` and `fast`: settings that fit themselves to a small data set.

From some hundred to some hundred thousand pictures of 8 to 128 pixels. Nothing here imports torch.
docs/training.md ("Small data") says what the rules were measured with.
"""

import math
from dataclasses import dataclass, replace

from diffusion.solvers import BELOW_SINGULARITY
from util.sizes import sides

# what does not depend on the data
SMALL = {
    "lr_schedule": "cosine",
    "diffusion_batch_mul": 4,
    "max_timestep": BELOW_SINGULARITY,  # from 999 every sample of so small a model diverges
    # tokens of so small a model fit together better with much guidance, from the first one on
    "cfg": 3.0,
    "cfg_schedule": "constant",
    "temperature": 0.95,
    "num_workers": 2,
}
# Beside that for `fast`: what won over AdamW and the whole loss in equal time (benchmarks/LOG.md)
FAST = {**SMALL, "optimizer": "muon", "vlb": False, "loss_weight": "min-snr"}
SIDE = 32  # pixels, of pictures that are not smaller
MULTIPLE = 4  # the side of smaller ones is rounded down to one of it


@dataclass(frozen=True)
class Facts:
    """What is known of a run before its model is built."""

    images: int  # in the data
    length: int  # tokens of an image
    channels: int  # numbers of a token
    processes: int = 1
    has_classes: bool = True  # without, there is no guidance
    batch_size: int | None = None  # per process; None, as all below, to choose it
    accum_iter: int = 1
    epochs: int | None = None
    model: str | None = None

    @property
    def numbers(self):
        """Numbers of which an image consists."""
        return self.length * self.channels


def small(facts):
    """The flags that fit, name -> value."""
    batch = facts.batch_size or batch_size(facts)
    an_epoch = max(1, facts.images // (batch * facts.processes * facts.accum_iter))
    epochs = facts.epochs or max(1, round(steps_for(facts.images) / an_epoch))
    steps = epochs * an_epoch
    model = facts.model or model_for(facts)
    shown = max(1, epochs // 12)  # epochs between grids, and between checkpoints
    unguided = {} if facts.has_classes else {"cfg": 1.0}
    return unguided | {
        "model": model,
        "diffloss_w": None if facts.model else head_width(facts),
        "buffer_size": min(64, max(1, facts.length // 4)),  # 64 are for 256 tokens
        "mask_ratio_min": mask_ratio(facts.length),
        "attn_dropout": dropout(epochs),
        "proj_dropout": dropout(epochs),
        "batch_size": batch,
        "epochs": epochs,
        "lr": RATES.get(model.rpartition("_")[2], 4e-4),
        "warmup_epochs": round(min(max(steps / 50, 200), steps / 10) / an_epoch, 3),
        "ema_rate": round(1 - 1 / max(1, steps / 20), 5),  # remembers a twentieth of the run
        "eval_freq": shown,
        "save_last_freq": shown,
    }


def fast(facts):
    """The flags that fit Muon, name -> value: batches and rates are twice as large as in `small`,
    and epochs as many, so that the steps are half as many. The checkpoint of each quarter of
    the run is kept for good: the first can guide the last (`sample.py --guide`)."""
    own = small(facts)
    batch = facts.batch_size or 2 * own["batch_size"]
    own = small(replace(facts, batch_size=batch, epochs=own["epochs"]))
    return {**own, "lr": 2 * own["lr"], "keep_every": max(1, round(own["epochs"] / 4))}


RATES = {"tiny": 2e-3, "mini": 2e-3, "small": 8e-4}  # larger models, smaller steps


def model_for(facts):
    """The size of a model, by what there is to learn and what it costs."""
    if facts.numbers < 256:  # 8×8 pixels
        return "mar_tiny"
    return "mar_mini" if facts.images <= 20_000 else "mar_small"


def head_width(facts):
    """The width of the denoising MLP: above the numbers of a token, all of which it passes on."""
    narrow = {"mar_tiny": 64, "mar_mini": 128, "mar_small": 256}[model_for(facts)]
    return max(narrow, min(1024, 64 * math.ceil(facts.channels / 48)))


def mask_ratio(length):
    """The smallest fraction masked in training. With one token per step, all but one are known at
    the end, and few tokens must be trained for that: 0.1 for 16 tokens, the paper's 0.7 for 256."""
    return round(min(0.7, 0.1 + 0.15 * max(0.0, math.log2(length / 16))), 2)


def dropout(epochs):
    """The dropout rate; a picture that is seen but a few dozen times is not learned by heart."""
    return 0.1 if epochs > 100 else 0.0


def batch_size(facts):
    """Images per process and step. Small ones give more steps, and steps are what is short."""
    return max(1, min(32, facts.images // 8) // facts.processes)


def steps_for(images):
    """Steps of a run: 8,000 for 1,000 images, 25,000 for 10,000."""
    return 250 * math.sqrt(images)


# ---- before the data are opened ------------------------------------------------------------------


def side_for(smallest):
    """The image size for pictures whose smaller side is at least `smallest`."""
    return min(SIDE, max(MULTIPLE, smallest // MULTIPLE * MULTIPLE))


def patch_for(latents, channels):
    """P, of the P×P latents of a token, for latents of these sides: 4 tokens along a side, or
    more where a token would have above 192 numbers. Raises ValueError for fewer than 4 latents."""
    fits = [p for p in range(1, min(latents) // 4 + 1) if not any(side % p for side in latents)]
    if not fits:
        raise ValueError(f"--preset: {min(latents)} latents along a side, expected 4 or more")
    return max(p for p in fits if p == 1 or channels * p * p <= 192)


# ---- a tokenizer ---------------------------------------------------------------------------------


def components_for(numbers):
    """How many principal components stand for a patch of so many numbers: an eighth, 25 dB for
    photographs at 32 pixels, or more of a small patch."""
    return min(numbers, max(16, numbers // 8))


def small_tokenizer(images, channels, img_size, tokenizer="pca", batch_size=None, epochs=None):
    """The flags of main_tokenizer.py that fit images of a size: name -> value."""
    measured = {"num_images": min(images, 1500)}
    if min(sides(img_size)) <= SIDE:  # Inception takes an hour on a CPU, and a network
        measured["extractor"] = "grey-pixels"
    if tokenizer == "pca":
        patch = patch_for(sides(img_size), channels)
        code = components_for(channels * patch**2)
        own = {"tokenizer": tokenizer, "epochs": 1, "stride": patch, "vae_embed_dim": code}
        return own | measured
    return convolutional(images, min(sides(img_size)), batch_size, epochs) | measured


def convolutional(images, side, batch_size=None, epochs=None):
    """The flags that fit a convolutional network."""
    batch = batch_size or max(1, min(16, images // 8))
    halvings = 1 if side < 16 else 2 if side < 64 else 3  # 4 to 16 latents along a side
    steps = 100 * math.sqrt(images)  # 3,000 for 1,000 images, 10,000 for 10,000
    return {
        "ch": 16,
        "ch_mult": ",".join(["1", "2", "4", "4"][: halvings + 1]),
        "vae_embed_dim": 4 if halvings == 1 else 8,
        "batch_size": batch,
        "epochs": epochs or max(1, round(steps * batch / images)),
        "lr": 1e-3,
    }
