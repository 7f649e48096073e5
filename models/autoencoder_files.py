"""Reads files of KL and VQ autoencoders: the weights under LDM's names, and their variant."""

import itertools
import re

from models.autoencoder_blocks import GROUPS
from models.diffusers_files import weights_file
from util.published import source_of
from util.weights import A_MODEL, A_TOKENIZER, read_weights

_CODEBOOK = "quantize.embedding.weight"  # only VQ autoencoders have it


def load_first_stage(path):
    """The weights of an autoencoder: a state dict under LDM's names, on the CPU.

    Reads the published KL-16 and our own files (weights under `model`), LDM's training checkpoints
    (`state_dict`, without the losses and the EMA), whole latent diffusion checkpoints (only
    `first_stage_model.` is read) and files with the diffusers library's names, written as
    `.safetensors` or by `torch.save`. path: of a file, or of a folder of diffusers.

    Raises:
        ValueError: the file is missing, damaged, or holds pickled objects that are refused, or the
            weights of a model.
    """
    state = _first_stage(read_weights(weights_file(path), missing=source_of(path)))
    if A_MODEL in state and A_TOKENIZER not in state:
        raise ValueError(
            f"{path}: a checkpoint of a model, expected the network of a tokenizer; --ckpt and "
            "--resume take this file"
        )
    if any(re.match(_DIFFUSERS, name) for name in state):
        state = _from_diffusers(state)
    return state


def kl_variant(state):
    """Keyword arguments of the `AutoencoderKL` that fits `state` (LDM's names).

    Raises:
        ValueError: these are not the weights of a KL autoencoder.
    """
    variant = _shared_variant(state, "KL")
    if _CODEBOOK in state:
        raise ValueError(f"not the weights of a KL autoencoder: with {_CODEBOOK} it is a VQ one")
    variant["token_norm"] = "token_norm.norm" in state
    return variant | {name: f"{name}.weight" in state for name in ("quant_conv", "post_quant_conv")}


def vq_variant(state):
    """Keyword arguments of the `VQModel` that fits `state` (LDM's names).

    Raises:
        ValueError: these are not the weights of a VQ autoencoder.
    """
    variant = _shared_variant(state, "VQ")
    if _CODEBOOK not in state:
        raise ValueError(f"not the weights of a VQ autoencoder: there is no {_CODEBOOK}")
    return {**variant, "num_codes": state[_CODEBOOK].shape[0]}


def _shared_variant(state, kind):
    """The keyword arguments that both kinds share. kind: "KL" or "VQ", for the ValueError."""
    for name in (A_TOKENIZER, "encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"):
        if name not in state:
            raise ValueError(f"not the weights of a {kind} autoencoder: there is no {name}")
    ch, in_channels = state[A_TOKENIZER].shape[:2]
    first = (
        "post_quant_conv.weight" if "post_quant_conv.weight" in state else "decoder.conv_in.weight"
    )
    return {
        "embed_dim": state[first].shape[1],
        "ch_mult": tuple(width // ch for width in _level_widths(state)),
        "ch": ch,
        "encoder_attention": _lowest_level_attends(state, "encoder.down"),
        "decoder_attention": _lowest_level_attends(state, "decoder.up"),
        "in_channels": in_channels,
        "res_blocks": _count(state, "encoder.down.0.block"),
        "norm_groups": int(state.get("norm_groups", GROUPS)),
    }


def _level_widths(state):
    """Width of each level of the encoder, full resolution first."""
    widths = []
    while (name := f"encoder.down.{len(widths)}.block.0.conv1.weight") in state:
        widths.append(state[name].shape[0])
    return widths


def _count(state, blocks):
    """Number of the residual blocks whose names begin like this."""
    numbers = itertools.count()
    return next(i for i in numbers if f"{blocks}.{i}.conv1.weight" not in state)


def _lowest_level_attends(state, levels):
    return f"{levels}.{len(_level_widths(state)) - 1}.attn.0.norm.weight" in state


def _first_stage(state):
    """The entries of the autoencoder alone, without those of its training losses and EMA."""
    prefix = "first_stage_model."
    if any(name.startswith(prefix) for name in state):
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    training = ("loss.", "discriminator.", "model_ema.")
    return {name: value for name, value in state.items() if not name.startswith(training)}


_DIFFUSERS = r"(encoder\.down_blocks|encoder\.mid_block|decoder\.up_blocks|decoder\.mid_block)\."

# diffusers' names -> LDM's, applied in this order. The decoder's levels are also renumbered.
_RENAMINGS = [
    (r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block."),
    (r"down_blocks\.(\d+)\.attentions\.", r"down.\1.attn."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"up_blocks\.(\d+)\.resnets\.", r"up.\1.block."),
    (r"up_blocks\.(\d+)\.attentions\.", r"up.\1.attn."),
    (r"up_blocks\.(\d+)\.upsamplers\.0\.", r"up.\1.upsample."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.group_norm\.", ".norm."),
    (r"\.(to_q|query)\.", ".q."),
    (r"\.(to_k|key)\.", ".k."),
    (r"\.(to_v|value)\.", ".v."),
    (r"\.(to_out\.0|proj_attn)\.", ".proj_out."),
]


def _from_diffusers(state):
    """Autoencoder weights of diffusers under LDM's names and in LDM's shapes."""
    ups = [re.match(r"decoder\.up_blocks\.(\d+)\.", name) for name in state]
    last = max((int(up[1]) for up in ups if up), default=0)
    return {_ldm_name(name, last): _as_convolution(name, v) for name, v in state.items()}


def _ldm_name(name, last):
    """The LDM name of a weight of diffusers.

    last: index of the decoder's last level; diffusers numbers levels in the order of execution.
    """
    name = re.sub(r"up_blocks\.(\d+)", lambda up: f"up_blocks.{last - int(up[1])}", name)
    for pattern, replacement in _RENAMINGS:
        name = re.sub(pattern, replacement, name)
    return name


def _as_convolution(name, value):
    """(C,C) -> (C,C,1,1) for the linear layers of attention, 1×1 convolutions in LDM."""
    return value[:, :, None, None] if value.ndim == 2 and ".attentions." in name else value
