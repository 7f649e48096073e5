"""Settings of the training of autoencoders. Nothing here imports torch."""

from dataclasses import dataclass

from util.flags import checked, fraction, integer, nonnegative, nonnegative_int, positive_int
from util.settings import Settings, setting
from util.table import Table

# how codes are learned -> class with `of(network, losses, generator)`
CODEBOOKS = Table(
    "--codebook", {"gradient": "models.codebook:Reviver", "ema": "models.codebook:MovingAverages"}
)
# fields of util.recipe.Recipe that apply to these networks
RECIPE = ("accum_iter", "lr", "blr", "min_lr", "lr_schedule", "warmup_epochs", "grad_clip")
RECIPE += ("ema_rate",)


def widths(text):
    """A text such as "1,2,4" to (1, 2, 4). Raises ValueError."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise ValueError(f"{text!r}: expected integers, at least 1, such as 1,2,4")
    return tuple(int(part) for part in parts)


@dataclass(frozen=True)
class Training(Settings):
    """When a network is trained and measured."""

    epochs: int = setting(0, "train for this many epochs; 0: only evaluate", type=nonnegative_int)
    online_eval: bool = setting(False, "evaluate every --eval_freq epochs as well")


@dataclass(frozen=True)
class Network(Settings):
    """The size of a new network. Each kind of network takes the fields that it names."""

    ch: int = setting(32, "base width (LDM's networks: 128)", type=positive_int)
    ch_mult: str = setting(
        "1,2",
        "width of each level in base widths, full resolution first; each level but the first "
        "halves the image, so 1,2 has stride 2 and LDM's 1,1,2,2,4 stride 16",
        type=checked(widths),
        metavar="M,M,…",
    )
    res_blocks: int = setting(
        2, "residual blocks of a level of the encoder; the decoder has one more", type=positive_int
    )
    norm_groups: int = setting(
        32,
        "groups into which each level's channels are divided for GroupNorm, or as many fewer as "
        "divide its width",
        type=positive_int,
    )
    encoder_attention: bool = setting(False, "attention in the encoder's lowest level", both=True)
    decoder_attention: bool = setting(False, "attention in the decoder's lowest level", both=True)
    num_codes: int = setting(
        256, "number of codes of a vq network", type=integer(1, 2**24), metavar="K"
    )
    token_norm: bool = setting(
        False, "latents of one norm at each position, also in sampling (SphereAR); kl only"
    )
    stride: int = setting(
        8, "side in pixels of the patches of a pca network, which one pass fits", type=positive_int
    )


@dataclass(frozen=True)
class Losses(Settings):
    """The losses of an autoencoder, beside the absolute error, whose weight is 1."""

    kl_weight: float = setting(
        1e-6, "weight of the KL divergence, summed over an image like the error", type=nonnegative
    )
    perceptual: str = setting(
        "none",
        "perceptual loss: lpips (LPIPS with VGG), timm:NAME (features of any timm model), or none",
        metavar="NAME",
    )
    perceptual_weights: str = setting(
        None, "weights of its network", metavar="FILE", otherwise="fetched"
    )
    perceptual_weight: float = setting(
        1.0, "weight of the perceptual loss; LPIPS: 1, features of timm: try 0.1", type=nonnegative
    )
    disc_weight: float = setting(
        0.0,
        "weight of the adversarial loss, times the adaptive one; 0: no discriminator (LDM: 0.5 "
        "with kl, 0.75 with vq)",
        type=nonnegative,
    )
    disc_start: int = setting(
        0,
        "optimizer steps before the discriminator begins (LDM: 50001 with kl, 250001 with vq)",
        type=nonnegative_int,
    )
    disc_layers: int = setting(
        3,
        "levels of the discriminator, each of which halves the image (LDM: 3 with kl, 2 with vq)",
        type=integer(1, 8),
        metavar="N",
    )
    disc_ch: int = setting(64, "base width of the discriminator", type=positive_int)
    codebook: str = setting(
        "gradient",
        "how codes of a vq network are learned: by the codebook loss, or as moving averages of "
        "the latents nearest to them",
        choices=CODEBOOKS,
    )
    codebook_decay: float = setting(0.99, "decay rate of these averages", type=fraction)
    entropy_weight: float = setting(
        0.0,
        "weight of the entropy loss of a vq network, which spreads the use of codes",
        type=nonnegative,
    )


# flag -> its value with which others have no effect, and these others
NEEDED = {
    "disc_weight": (0, {"disc_start", "disc_layers", "disc_ch"}),
    "perceptual": ("none", {"perceptual_weight", "perceptual_weights"}),
    "codebook": ("gradient", {"codebook_decay"}),
}


def check_losses(args, given):
    """Raises ValueError for flags that were given and have no effect.

    args: parsed flags. given: names of those on the command line.
    """
    for flag, (off, others) in NEEDED.items():
        if getattr(args, flag) == off and (idle := sorted(given & others)):
            raise ValueError(
                f"--{idle[0]} {getattr(args, idle[0])}: has no effect with --{flag} {off}, "
                "expected another one"
            )


@dataclass(frozen=True)
class Changes(Settings):
    """How latents are changed in training before they are decoded. Off by default."""

    latent_noise: float = setting(
        0.0,
        "mix latents with noise of this standard deviation, in units of their own (l-DeTok: 3)",
        type=nonnegative,
    )
    latent_mask: float = setting(
        0.0, "hide at most this fraction of the latents of an image (l-DeTok: 0.7)", type=fraction
    )
    equivariance: float = setting(
        0.0,
        "fraction of batches in which latents and the images to reconstruct are scaled and rotated "
        "alike (EQ-VAE: 0.5)",
        type=fraction,
    )


# what can be trained -> its network, whose arguments are fields of Network
NETWORKS = Table(
    "network",
    {
        "kl": "models.vae:AutoencoderKL",
        "vq": "models.vq:VQModel",
        "vq_latent": "models.vq:VQModel",
        "pca": "models.pca:PatchPCA",
    },
)
# channels of their latents, unless --vae_embed_dim is given
CHANNELS = {"kl": 4, "vq": 4, "vq_latent": 4, "pca": 24}
