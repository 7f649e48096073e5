"""Exponential moving average of a model's weights."""

import copy

import torch


class EMA:
    """A frozen copy of a model that holds an exponential moving average of its weights.

    rate: decay rate of the average per update (paper: 0.9999). `module` is the copy, in evaluation
    mode, to be used like any model; weights are never swapped.
    """

    def __init__(self, model, rate):
        if not 0 <= rate < 1:
            raise ValueError(f"ema_rate {rate}: expected at least 0 and below 1")
        self.rate = rate
        # autocast caches casts only of weights that require a gradient, so these keep requiring it
        self.module = copy.deepcopy(model).eval()

    @torch.no_grad()
    def update(self, model):
        """Move the average one step towards the weights of `model`."""
        averages, weights = list(self.module.parameters()), list(model.parameters())
        torch._foreach_lerp_(averages, weights, 1 - self.rate)

    def state_dict(self):
        return self.module.state_dict()
