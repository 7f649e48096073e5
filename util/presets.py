"""Flags that belong together. A preset goes between the defaults and what the command line says."""

# What a data set brings with it, whoever trains on it.
DATA = {
    "digits": {
        "img_size": 8,
        "class_num": 10,
        "tokenizer": "pixels",
        "vae_embed_dim": 1,
        "patch_size": 2,
    },
}

PRESETS = {
    # The demo: 1,437 images, minutes on a CPU. Where it leaves the paper's recipe, and why:
    "digits": {
        "data_path": "digits",
        "model": "mar_tiny",
        "buffer_size": 4,  # 16 tokens need no 64 class tokens
        "diffloss_d": 3,
        "diffloss_w": 64,
        "diffusion_batch_mul": 4,
        "batch_size": 64,
        "lr": 2e-3,  # a small model takes larger steps
        "lr_schedule": "cosine",
        "warmup_epochs": 5,  # 100 epochs would be the whole run
        "epochs": 200,
        # one token a step means up to 15 of 16 known: at the paper's 0.7 no more than 4 ever are
        # in training, and the pixel Fréchet distance doubles
        "mask_ratio_min": 0.1,
        "ema_rate": 0.995,  # 0.9999 would still hold the initial weights at the end
        "attn_dropout": 0.0,
        "proj_dropout": 0.0,
        "num_iter": 16,  # one token a step
        "max_timestep": 950,  # from 999 every sample of so small a model diverges
        "cfg": 1.5,
        "num_workers": 0,  # the images are in memory already
        "eval_freq": 25,
        "save_last_freq": 25,
    },
}


def apply(parser, argv):
    """Parse argv with the defaults that its --preset and --data_path bring."""
    first, given = parser.parse_given(argv)
    preset = PRESETS[first.preset] if first.preset else {}
    data = first.data_path if "data_path" in given else preset.get("data_path", first.data_path)
    parser.set_defaults(**{**DATA.get(data, {}), **preset})
    return parser.parse_given(argv)
