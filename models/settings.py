"""Settings of models and of sampling, and the tables that they choose from.

Nothing here imports torch, so that flags can be parsed without it. A row "module:attribute" is
imported when it is looked up.
"""

from dataclasses import dataclass

from diffusion.flow import FLOW_SOLVERS
from diffusion.schedule import TRAIN_STEPS, annealing, spaced_timesteps
from diffusion.solvers import BELOW_SINGULARITY, SOLVERS
from util.flags import checked, finite, fraction, integer, nonnegative, positive, positive_int
from util.settings import Settings, setting
from util.table import Table

MODELS = Table(
    "model",
    {
        name: f"models.{name.split('_')[0]}:{name}"
        for name in (
            *("mar_tiny", "mar_mini", "mar_small", "mar_base", "mar_large", "mar_huge"),
            *("ar_tiny", "ar_mini", "ar_small", "ar_base", "ar_large", "ar_huge"),
            *("dit_tiny", "dit_mini", "dit_small", "dit_xl"),
        )
    },
)
HEADS = Table(
    "head",
    {
        "diffloss": "models.diffloss:DiffLoss",
        "ce": "models.heads:CrossEntropy",
        "l2": "models.heads:L2",
        "flow": "models.flow:Flow",
        "energy": "models.energy:Energy",
    },
)
TOKENIZERS = Table(
    "tokenizer",
    {
        "kl16": "models.tokenizer:kl16",
        "kl8": "models.tokenizer:kl8",
        "pixels": "models.tokenizer:PixelTokenizer",
        "vq16": "models.tokenizer:vq16",
        "vq16_latent": "models.tokenizer:vq16_latent",
        "consistency": "models.tokenizer:ConsistencyTokenizer",
        "pca": "models.tokenizer:PCATokenizer",
        # the last three take any network of their kind, such as those of main_tokenizer.py
        "kl": "models.tokenizer:KLTokenizer",
        "vq": "models.tokenizer:VQTokenizer",
        "vq_latent": "models.tokenizer:VQLatentTokenizer",
    },
)
ORDERS = Table(
    "order",
    {
        "random": "models.order:RandomOrder",
        "raster": "models.order:RasterOrder",
        "spread": "models.order:SpreadOrder",
        "confidence": "models.order:ConfidenceOrder",
    },
)
TOKEN_SCHEDULES = Table(
    "token_schedule",
    {
        "cosine": "models.order:cosine",
        "uniform": "models.order:uniform",
        "square": "models.order:square",
        "exponential": "models.order:exponential",
        "root": "models.order:root",
    },
)
CFG_SCHEDULES = Table(
    "cfg_schedule", {"linear": "models.sampling:linear", "constant": "models.sampling:constant"}
)
TIMESTEPS = Table(
    "timesteps",
    {
        "uniform": "diffusion.training:uniform",
        "logit-normal": "diffusion.training:logit_normal",
        "log-snr": "diffusion.training:log_snr",
    },
)
LOSS_WEIGHTS = Table(
    "loss_weight",
    {"none": "diffusion.training:unweighted", "min-snr": "diffusion.training:min_snr"},
)
# field of Sampling -> its value where none is given, unless the head has others: Diffusion Loss's
USUAL = {"solver": "ddpm", "num_sampling_steps": "100"}

FILL_ORDERS = Table(
    "fill", {"random": "models.editing:given_order", "border": "models.editing:border_first"}
)


@dataclass(frozen=True)
class Model(Settings):
    """Name and constructor arguments of a model. Each part of it takes those that it names.

    Fields marked `fixed` are fixed by the weights; each run chooses the others. Those without a
    flag are derived from the tokenizer and from the Sampling.
    """

    name: str = setting("mar_large", "backbone and size", "model", choices=MODELS, fixed=True)
    img_size: int | tuple = setting(  # (height, width) unless square
        256, "side of the images in pixels, or height and width", type=positive_int, fixed=True
    )
    vae_stride: int = setting(
        None,
        "pixels per latent, along each side",
        type=positive_int,
        metavar="S",
        otherwise="the tokenizer's",
        fixed=True,
    )
    patch_size: int = setting(
        None,
        "P×P latents are one token",
        type=positive_int,
        metavar="P",
        otherwise="the tokenizer's usual one",
        fixed=True,
    )
    vae_embed_dim: int = setting(
        None,
        "channels of a latent",
        type=positive_int,
        metavar="C",
        otherwise="the tokenizer's",
        fixed=True,
    )
    num_codes: int = setting(None, "number of codes of a discrete tokenizer", "", fixed=True)
    token_norm: bool = setting(
        False,
        "whether the latents of the tokenizer have one norm, and so have sampled ones",
        "",
        fixed=True,
    )
    class_num: int = setting(
        1000, "number of classes; if not given, the data's", type=positive_int, fixed=True
    )
    buffer_size: int = setting(
        64, "class tokens in front of MAR's encoder", type=positive_int, fixed=True
    )
    head: str = setting(
        None,
        "model of a token: Diffusion Loss, cross-entropy over codes, L2, a rectified flow, or an "
        "energy score",
        choices=HEADS,
        otherwise="the one that fits the tokenizer, diffloss or ce",
        fixed=True,
    )
    diffloss_d: int = setting(3, "blocks of the denoising MLP", type=positive_int, fixed=True)
    diffloss_w: int = setting(
        None,
        "width of the denoising MLP",
        type=positive_int,
        otherwise="in proportion to the model: tiny 64, mini 128, small 256, else 1024",
        fixed=True,
    )
    order: str = setting(None, "order that a causal model learns", "", fixed=True)
    attn_dropout: float = setting(0.1, "dropout rate of the attention weights", type=fraction)
    proj_dropout: float = setting(0.1, "dropout rate of projections and MLPs", type=fraction)
    mlp_dropout: float = setting(
        None, "dropout rate of MLPs", type=fraction, otherwise="--proj_dropout"
    )
    qk_norm: bool = setting(False, "normalize queries and keys in attention", fixed=True)
    rope: bool = setting(
        False, "rotary positions in attention, beside the learned ones", fixed=True
    )
    swiglu: bool = setting(False, "gated MLPs (SwiGLU), of about as many parameters", fixed=True)
    known_noise: float = setting(
        0.0,
        "noise on the known tokens in training: they are mixed with up to this fraction of "
        "Gaussian noise",
        type=fraction,
    )
    mask_ratio_min: float = setting(
        0.7, "smallest fraction of tokens masked in training", type=fraction
    )
    label_drop_prob: float = setting(
        0.1, "fraction of labels dropped in training, for guidance", type=fraction
    )
    diffusion_batch_mul: int = setting(
        1,
        "timesteps drawn per token (the paper's models: 4); with --head energy samples, at least 2",
        type=positive_int,
    )
    timesteps: str = setting(
        None,
        "distribution of the timesteps drawn in training; log-snr: evenly in the log "
        "signal-to-noise ratio",
        choices=TIMESTEPS,
        otherwise="uniform; with --head flow logit-normal",
    )
    loss_weight: str = setting(
        "none",
        "weights of the loss by timestep; min-snr: min(SNR, 5) / SNR, less where noise is little",
        choices=LOSS_WEIGHTS,
    )
    energy_beta: float = setting(
        1.0, "power of distances in the energy score, below 2", type=positive
    )
    vlb: bool = setting(True, "omit the variational term from the loss", "no_vlb")
    grad_checkpointing: bool = setting(
        False, "recompute activations in the backward pass, to save memory"
    )
    num_sampling_steps: str = setting(None, "diffusion steps per token", "")
    max_timestep: int = setting(None, "first timestep of the reverse process", "")


@dataclass(frozen=True)
class Sampling(Settings):
    """How a model is sampled. Fields marked `approximates` trade accuracy for speed."""

    num_iter: int = setting(
        64,
        "autoregressive steps, 1 to the number of tokens",
        type=positive_int,
        metavar="K",
    )
    num_sampling_steps: str = setting(
        None,
        "diffusion steps per token: a count, counts of sections (10,10,20) or ddimN",
        type=checked(spaced_timesteps),
        metavar="S",
        otherwise="100; with --head flow 25",
    )
    cfg: float = setting(1.0, "guidance scale; 1 is no guidance", type=finite, metavar="W")
    cfg_schedule: str = setting(
        "linear",
        "guidance over the steps: from 1 to --cfg as tokens become known, or --cfg throughout",
        choices=CFG_SCHEDULES,
    )
    token_schedule: str = setting(
        "cosine",
        "tokens per step: few at first and many at the end (cosine, square, exponential), equally "
        "many (uniform) or many at first (root); in each stage of --order spread",
        choices=TOKEN_SCHEDULES,
    )
    order: str = setting(
        None,
        "order in which tokens are generated, and in which a causal model is trained; spread: half "
        "of the tokens, no two of them neighbours, in most of the steps, then the rest; confidence "
        "needs cross-entropy",
        choices=ORDERS,
        otherwise="the model's: random, but raster for a new causal one",
    )
    temperature: float = setting(
        1.0, "temperature of the diffusion noise, or of the logits", type=nonnegative, metavar="T"
    )
    max_timestep: int = setting(
        None,
        f"start the reverse process at this timestep instead of {TRAIN_STEPS - 1}; "
        f"{BELOW_SINGULARITY} keeps small or briefly trained models from diverging",
        type=integer(0, TRAIN_STEPS - 1),
        metavar="T",
        otherwise=f"the model's, else {TRAIN_STEPS - 1}",
    )
    solver: str = setting(
        None,
        f"solver of the reverse process: ddim and dpm++ draw no noise, need fewer "
        f"--num_sampling_steps, and start at {BELOW_SINGULARITY}; of --head flow: euler, or heun, "
        "of second order with two evaluations a step",
        choices=[*SOLVERS, *FLOW_SOLVERS],
        otherwise="ddpm; with --head flow euler",
        approximates=True,
    )
    anneal: str = setting(
        "none",
        "reduce the diffusion steps as tokens become known: linear, cosine or two-stage, from 50 "
        f"to 5, or as in linear:100:10; starts at {BELOW_SINGULARITY}",
        type=checked(annealing),
        metavar="KIND",
        approximates=True,
    )
    cfg_interval: tuple = setting(
        (0.0, 1.0),
        "guidance only while the fraction of steps done is between A and B",
        type=fraction,
        nargs=2,
        metavar=("A", "B"),
        approximates=True,
    )
    refresh_every: int = setting(
        1,
        "compute all features every P steps and in between only those that changed most; "
        "bidirectional models only",
        type=positive_int,
        metavar="P",
        approximates=True,
    )


@dataclass(frozen=True)
class Editing(Settings):
    """What is filled in of an image, and how."""

    strength: float = setting(
        1.0,
        "fraction of the tokens to fill in that are drawn anew, chosen at random; the others keep "
        "what is there",
        type=fraction,
        otherwise="1, all of them",
    )
    order: str = setting(
        "random",
        "order in which tokens are filled in: random: as in sampling, --order; border: from the "
        "known tokens inwards",
        "fill",
        choices=FILL_ORDERS,
    )
    blend: bool = setting(
        True,
        "return pixels as they are decoded; else known ones are put back as they were, and those "
        "next to them corrected",
        "no_blend",
    )
    seam: float = setting(
        0.5, "width of this correction, in tokens; it fades out", type=nonnegative
    )
    overlap: float = setting(
        0.5, "fraction of a window of outpainting that is known already", type=fraction
    )
