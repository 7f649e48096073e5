"""Scale and shift that normalize an autoencoder's latents: given, or known from somewhere.

latents = (raw − shift) · scale. Networks of one layout are published with several scales, and most
files of weights do not say which is theirs.
"""

import math

from models.diffusers_files import weights_file
from util.weights import entry_of, read_file

DIFFUSERS_SCALE = 0.18215  # what diffusers takes where a configuration has none

_KL8 = {"embed_dim": 4, "ch_mult": (1, 2, 4, 4), "quant_conv": True, "post_quant_conv": True}
_PLAIN = {"embed_dim": 16, "ch_mult": (1, 2, 4, 4), "quant_conv": False, "post_quant_conv": False}

# name -> (arguments of AutoencoderKL, scale, shift, how names in a whole checkpoint begin, or None)
PUBLISHED = {
    "Stable Diffusion 1 and 2": (_KL8, 0.18215, 0.0, None),
    "SDXL": (_KL8, 0.13025, 0.0, "conditioner.embedders."),
    "Stable Diffusion 3": (_PLAIN, 1.5305, 0.0609, "model.diffusion_model.joint_blocks."),
    "FLUX.1": (_PLAIN, 0.3611, 0.1159, None),
}


def scale_and_shift(path, network, described, scale=None, shift=None, default=(None, 0.0)):
    """(scale, shift) of the latents of an autoencoder at `path`: each as given, else as known.

    Known is what main_tokenizer.py wrote into the file, else what `described`, diffusers'
    configuration or None, says, else what the kind of a whole checkpoint implies, else the default.
    network: arguments of the autoencoder. Raises ValueError if there is no scale.
    """
    if scale is not None and shift is not None:
        return scale, shift
    held = read_file(weights_file(path))
    known = _written(held) or _said(described, network, path) or _implied(held, network) or default
    scale, shift = known[0] if scale is None else scale, known[1] if shift is None else shift
    if scale is None:
        raise ValueError(
            f"{path}: holds no scale for its latents, and none is published; measure it with "
            "main_tokenizer.py --vae_scale 1 (latent_scale), then pass it as --vae_scale"
            f"{_published_ones(network)}"
        )
    return scale, shift


def _written(held):
    return (held["scale"], held.get("shift", 0.0)) if "scale" in held else None


def _said(config, network, path):
    """As pipelines of diffusers normalize latents: by channel if both statistics are there."""
    if not config:
        return None
    scale, shift = config.get("scaling_factor", DIFFUSERS_SCALE), config.get("shift_factor") or 0.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return scale, shift
    channels, at = network["embed_dim"], f"{path}: config.json's"
    scale = check_numbers(f"{at} scaling_factor", scale, channels, positive=True)
    std = check_numbers(f"{at} latents_std", std, channels, positive=True)
    if not isinstance(std, list) or isinstance(scale, list) or shift:
        raise ValueError(
            f"{at} latents_std: expected one per channel, one scaling_factor and no shift_factor"
        )
    return [scale / each for each in std], mean


def _implied(held, network):
    """Of the published networks like this one, that of the checkpoint that holds it, or None."""
    names = [name for name in entry_of(held) if isinstance(name, str)]
    for own, scale, shift, start in PUBLISHED.values():
        if start and _is_like(network, own) and any(name.startswith(start) for name in names):
            return scale, shift
    return None


def _is_like(network, published):
    return published.items() <= network.items()


def _published_ones(network):
    """Scales of published networks of this layout, in words."""
    found = [
        f"of {name}, --vae_scale {scale}" + f" --vae_shift {shift}" * bool(shift)
        for name, (own, scale, shift, _) in PUBLISHED.items()
        if _is_like(network, own)
    ]
    return f"; if it is that {', or '.join(found)}" if found else ""


def check_fixed(path, fixed, scale, shift):
    """Raises ValueError for a scale or shift that was given, but that the network at `path` sets
    itself: `fixed`, and 0. Each is None if not given."""
    for name, value, expected in (("scale", scale, fixed), ("shift", shift, 0.0)):
        if value not in (None, expected):
            shown = value if type(value) in (int, float) else ",".join(map(str, value))
            raise ValueError(
                f"{name} {shown!s:.40}: the latents of {path} have one norm (token_norm), "
                f"expected {expected:g}; leave it out"
            )


def check_numbers(name, value, channels, positive=False):
    """The value as a float, a list of one float per channel, or None. Raises ValueError."""
    if value is None:
        return None
    several = isinstance(value, list | tuple)
    numbers, bound = value if several else [value], " above 0" if positive else ""
    for number in numbers:
        if type(number) not in (float, int) or not math.isfinite(number):
            raise ValueError(f"{name} {number!s:.40}: expected a finite number{bound}")
        if positive and not number > 0:
            raise ValueError(f"{name} {number}: expected a number above 0")
    if several and len(numbers) != channels:
        shown = ",".join(map(str, numbers))
        shown = shown if len(shown) < 40 else f"{shown[:30]}…"
        raise ValueError(
            f"{name} {shown}: expected one number, or {channels}, one per "
            f"channel of the latents; got {len(numbers)}: is it another tokenizer's?"
        )
    return [float(number) for number in numbers] if several else float(value)
