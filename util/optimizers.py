"""The optimizers of a model: the rows of util.recipe.OPTIMIZERS are functions (model, recipe).

A function gives the optimizer of a util.recipe.Recipe whose peak learning rate is a number; the
training loop sets the `lr` of all its groups alike. Before a state is loaded, its entries are
checked: those of AdamW, or those that the group names as `holds`, such as "momentum_buffer".
"""

from inspect import signature

import torch
from torch import nn

BETAS = (0.9, 0.95)


def parameter_groups(model, weight_decay):
    """AdamW's groups: no weight decay on biases, 1-D parameters and the head; then the rest.

    In the published order, so that published optimizer states load.
    """
    none, some = [], []
    head = f"{model.head_name}."
    for name, parameter in model.named_parameters():
        plain = parameter.ndim == 1 or name.endswith(".bias") or name.startswith(head)
        (none if plain else some).append(parameter)
    return [{"params": none, "weight_decay": 0.0}, {"params": some, "weight_decay": weight_decay}]


def adamw(model, recipe):
    """AdamW (Loshchilov and Hutter 2019), as published."""
    groups = parameter_groups(model, recipe.weight_decay)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=BETAS, fused=True)


def muon(model, recipe):
    """Muon (Jordan et al. 2024) for the matrices of hidden layers, AdamW for the rest: timm's.

    The step of a matrix (m, n) is 0.2·√max(m, n) times the learning rate, so that the mean square
    of its entries is about AdamW's and one rate serves both (Liu et al. 2025, section 2.2).
    Raises ValueError for --fsdp, whose steps would be other ones, and if timm is too old.
    """
    import timm.optim

    if recipe.fsdp:
        raise ValueError("--fsdp: expected no --optimizer muon, whose steps need whole matrices")
    if "fallback_lr_scale" not in signature(timm.optim.Muon).parameters:
        raise ValueError(
            f"--optimizer muon: timm {timm.__version__} keeps AdamW's learning rate constant, "
            "expected 1.0.27 or newer"
        )
    groups = split(parameter_groups(model, recipe.weight_decay), hidden_matrices(model))
    return timm.optim.Muon(groups, lr=recipe.lr, betas=BETAS, adjust_lr_fn="match_rms_adamw")


def hidden_matrices(model):
    """The 2-D weights of layers that are repeated, so neither the first nor the last, a list.

    These are the blocks of the backbone and of the denoising MLP. Embeddings, tables of positions
    and output layers are no hidden layers.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [p for each in lists for p in each.parameters() if p.ndim == 2]


def split(groups, matrices):
    """The groups without the matrices, then the matrices of each, as timm's Muon expects them."""
    chosen = {id(p) for p in matrices}
    kinds = {"use_muon": False}, {"use_muon": True, "holds": "momentum_buffer"}
    return [
        {**group, **kind, "params": [p for p in group["params"] if (id(p) in chosen) == own]}
        for own, kind in enumerate(kinds)
        for group in groups
    ]
