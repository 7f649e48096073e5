"""Presets: named sets of flags. They override the defaults; the command line overrides them."""

from diffusion.solvers import BELOW_SINGULARITY
from models import fitting
from util.data import kind_or_folder

PRESETS = {
    # your own data: what depends on them is chosen by FITTED, once they are known
    "small": fitting.SMALL,
    "fast": fitting.FAST,
    # The demo: 1,437 images, minutes on a CPU. Departures from the paper's recipe, and why:
    "digits": {
        "data_path": "digits",
        "model": "mar_tiny",
        "buffer_size": 4,  # 64 class tokens are too many for 16 tokens
        "diffloss_d": 3,
        "diffloss_w": 64,
        "diffusion_batch_mul": 4,
        "batch_size": 64,
        "lr": 2e-3,  # a small model takes larger steps
        "lr_schedule": "cosine",
        "warmup_epochs": 5,  # 100 epochs would be the whole run
        "epochs": 200,
        # with one token per step, up to 15 of 16 are known; at the paper's 0.7, training never
        # has more than 4 known, and the pixel Fréchet distance doubles
        "mask_ratio_min": 0.1,
        "ema_rate": 0.995,  # 0.9999 would still hold the initial weights at the end
        "attn_dropout": 0.0,
        "proj_dropout": 0.0,
        "num_iter": 16,  # one token per step
        "max_timestep": BELOW_SINGULARITY,  # from 999 every sample of so small a model diverges
        "cfg": 1.5,
        "num_workers": 0,  # the images are in memory already
        "eval_freq": 25,
        "save_last_freq": 25,
    },
}

# ---- tokenizers ----------------------------------------------------------------------------------
# For main_tokenizer.py: LDM's recipes, from its published configurations. Their learning rate is
# 4.5e-6 per image of a step. They do not state the number of epochs; the 40 here is ours.

LDM = {
    "img_size": 256,
    "ch": 128,
    "encoder_attention": True,
    "decoder_attention": True,
    "perceptual": "lpips",
    "batch_size": 12,
    "accum_iter": 2,
    "lr": None,
    "blr": 256 * 4.5e-6,
    "lr_schedule": "constant",
    "epochs": 40,
    "eval_freq": 1,
    "save_last_freq": 1,
}
LDM_KL = {**LDM, "tokenizer": "kl", "disc_weight": 0.5, "disc_start": 50_001}
LDM_KL16 = {**LDM_KL, "ch_mult": "1,1,2,2,4", "vae_embed_dim": 16}
NETWORK_PRESETS = {
    "small": {},
    "ldm-kl16": LDM_KL16,
    "ldm-kl8": {
        **LDM_KL,
        "ch_mult": "1,2,4,4",
        "vae_embed_dim": 4,
        "encoder_attention": False,
        "decoder_attention": False,
    },
    "ldm-vq16": {
        **LDM,
        "tokenizer": "vq",
        "ch_mult": "1,1,2,2,4",
        "vae_embed_dim": 8,
        "num_codes": 16_384,
        "disc_weight": 0.75,
        "disc_start": 250_001,
        "disc_layers": 2,
        "batch_size": 14,
    },
    # l-DeTok's noise (arXiv 2507.15856) in LDM's network; theirs is a ViT
    "denoising-kl16": {**LDM_KL16, "latent_noise": 3.0, "ema_rate": 0.999},
}


# preset -> what it chooses for `fitting.Facts`
FITTED = {"small": fitting.small, "fast": fitting.fast}


# ---- the rows of the paper's tables ---------------------------------------------------------
# A batch of 64 on each of 32 processes makes 2,048 in total. Where the paper gives no value, as for
# the guidance of the ablations, none is set.

RECIPE = {
    "img_size": 256,
    "epochs": 400,
    "warmup_epochs": 100,
    "batch_size": 64,
    "blr": 1e-4,
    "diffusion_batch_mul": 4,
    "diffloss_d": 3,
    "diffloss_w": 1024,
    "num_sampling_steps": "100",
}
VAE = "pretrained_models/vae"
KL16 = {"tokenizer": "kl16", "vae_path": f"{VAE}/ldm_kl16.ckpt"}  # LDM's, trained on OpenImages
KL16_RETRAINED = {"tokenizer": "kl16", "vae_path": f"{VAE}/kl16.ckpt"}  # on ImageNet
VQ16 = {"tokenizer": "vq16", "vae_path": f"{VAE}/ldm_vq16.ckpt"}
CE = {**RECIPE, **VQ16, "head": "ce", "lr_schedule": "cosine"}
DIFF = {**RECIPE, **KL16, "head": "diffloss"}

RASTER = {"model": "ar_large", "order": "raster"}
RANDOM = {"model": "ar_large", "order": "random"}
ONE = {"model": "mar_large", "num_iter": 256}  # one token per step
MAR = {"model": "mar_large", "num_iter": 64}

SYSTEM = {**RECIPE, **KL16_RETRAINED, "epochs": 800, "num_iter": 256, "cfg_schedule": "linear"}
BASE = {"model": "mar_base", "diffloss_d": 6, "diffloss_w": 1024, "cfg": 2.9}
LARGE = {"model": "mar_large", "diffloss_d": 8, "diffloss_w": 1280, "cfg": 3.0}
HUGE = {"model": "mar_huge", "diffloss_d": 12, "diffloss_w": 1536, "cfg": 3.2}

# name -> (flags, the paper's FID/IS without guidance → with guidance)
PAPER = {
    "table1-ar-raster-ce": ({**CE, **RASTER}, "19.58/60.8 → 4.92/227.3"),
    "table1-ar-raster-diff": ({**DIFF, **RASTER}, "19.23/62.3 → 4.69/244.6"),
    "table1-ar-random-ce": ({**CE, **RANDOM}, "16.22/81.3 → 4.36/222.7"),
    "table1-ar-random-diff": ({**DIFF, **RANDOM}, "13.07/91.4 → 4.07/232.4"),
    "table1-mar-one-ce": ({**CE, **ONE}, "8.75/149.6 → 3.50/280.9"),
    "table1-mar-one-diff": ({**DIFF, **ONE}, "3.43/203.1 → 1.84/292.7"),
    "table1-mar-ce": ({**CE, **MAR}, "8.79/146.1 → 3.69/278.4"),
    "table1-mar-diff": ({**DIFF, **MAR}, "3.50/201.4 → 1.98/290.3"),
    "table1-mar-l2": ({**DIFF, **MAR, "head": "l2"}, "above 100"),
    # latents before quantization; their scale is not published: measure it (main_tokenizer.py)
    "table2-vq16": ({**DIFF, **MAR, **VQ16, "tokenizer": "vq16_latent"}, "7.82/151.7 → 3.64/258.5"),
    "table2-kl16": ({**DIFF, **MAR}, "3.50/201.4 → 1.98/290.3"),
    "table2-kl8": (
        {**DIFF, **MAR, "tokenizer": "kl8", "vae_path": f"{VAE}/kl8.safetensors", "patch_size": 2},
        "4.33/180.0 → 2.05/283.9",
    ),
    "table2-consistency": (
        {**DIFF, **MAR, "tokenizer": "consistency", "vae_path": f"{VAE}/consistency"}
        | {"patch_size": 2},
        "5.76/170.6 → 3.23/271.0",
    ),
    "table2-kl16-retrained": ({**DIFF, **MAR, **KL16_RETRAINED}, "2.85/214.0 → 1.97/291.2"),
    "table3-w256": (
        {**DIFF, **MAR, **KL16_RETRAINED, "diffloss_w": 256},
        "3.47/195.3 → 2.45/274.0",
    ),
    "table3-w512": (
        {**DIFF, **MAR, **KL16_RETRAINED, "diffloss_w": 512},
        "3.24/199.1 → 2.11/281.0",
    ),
    "table3-w1024": ({**DIFF, **MAR, **KL16_RETRAINED}, "2.85/214.0 → 1.97/291.2"),
    "table3-w1536": (
        {**DIFF, **MAR, **KL16_RETRAINED, "diffloss_w": 1536},
        "2.93/207.6 → 1.91/289.3",
    ),
    "table4-base": ({**SYSTEM, **BASE}, "3.48/192.4 → 2.31/281.7"),
    "table4-large": ({**SYSTEM, **LARGE}, "2.60/221.4 → 1.78/296.0"),
    "table4-huge": ({**SYSTEM, **HUGE}, "2.35/227.8 → 1.55/303.7"),
    "table6-512": ({**SYSTEM, **LARGE, "img_size": 512, "cfg": 4.0}, "2.74/205.2 → 1.73/279.9"),
    "table5-confidence-ce": ({**CE, **MAR, "order": "confidence"}, "8.72/145.6"),
    "table5-random-ce": ({**CE, **MAR, "order": "random"}, "8.79/146.1"),
    "table5-random-diff": ({**DIFF, **MAR, "order": "random"}, "3.50/201.4"),
}
PRESETS |= {name: flags for name, (flags, _) in PAPER.items()}


def listing():
    """A listing of every preset with its flags and the paper's FID and IS."""
    lines = ["FID/IS without guidance → with guidance, as in the paper, on ImageNet."]
    for name, flags in PRESETS.items():
        results = f"  ({PAPER[name][1]})" if name in PAPER else ""
        lines.append(f"{name}{results}")
        lines.append("    " + " ".join(as_flag(*each) for each in flags.items()))
    return "\n".join(lines)


def as_flag(name, value):
    """A setting as it is written on the command line."""
    return f"--no_{name}" if value is False else f"--{name} {value}"


def overridden(args, given, flags):
    """Sentence on what a --preset sets and a resumed checkpoint overrides; None if nothing.

    given: names of the flags that the user set. flags: those of the checkpoint, name -> value.
    """
    own = {k: v for k, v in PRESETS.get(args.preset, {}).items() if k in flags and k not in given}
    other = [f"--{k} {flags[k]} (not {v})" for k, v in own.items() if flags[k] != v]
    return f"the checkpoint, not --preset {args.preset}, sets {', '.join(other)}" if other else None


def apply(parser, argv):
    """Parse argv with the defaults set by its --preset and --data_path."""
    first, given = parser.parse_given(argv)
    preset = PRESETS[first.preset] if first.preset else {}
    data = first.data_path if "data_path" in given else preset.get("data_path", first.data_path)
    defaults = {**kind_or_folder(data).defaults, **preset}
    if "tokenizer" in given and first.tokenizer != defaults.get("tokenizer"):
        defaults.pop("patch_size", None)  # it belongs to the preset's tokenizer
    parser.set_defaults(**defaults)
    return parser.parse_given(argv)


def apply_to_network(parser, argv):
    """Parse the argv of main_tokenizer.py with the defaults set by its --preset."""
    first, _ = parser.parse_given(argv)
    parser.set_defaults(**NETWORK_PRESETS.get(first.preset, {}))
    args, given = parser.parse_given(argv)
    if "blr" in given and "lr" not in given:
        args.lr = None  # which would win
    return args, given


def fit(args, given, facts, before):
    """Set the flags that --preset derives from `fitting.Facts`; returns a sentence on them.

    before: flags of the run that is resumed, name -> value, or {}: with the same preset, its values
    are kept. Otherwise as `choose`.
    """
    chosen = FITTED[args.preset](facts)
    if before.get("preset") == args.preset:
        chosen |= {name: before[name] for name in chosen if name in before}
    return choose(args, given, chosen)


def choose(args, given, chosen):
    """Set the chosen flags, name -> value, but for those that the user gave; a sentence on them."""
    own = {name: value for name, value in chosen.items() if name not in given}
    for name, value in own.items():
        setattr(args, name, value)
    shown = " ".join(f"--{name} {value}" for name, value in own.items() if value is not None)
    return f"--preset {args.preset}: {shown}"
