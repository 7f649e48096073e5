"""Exponential moving averages of a model's weights."""

import copy

import torch

from util.weights import load_strictly


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

    def load_state_dict(self, state):
        """Raises ValueError for weights that do not fit or are not finite."""
        load_strictly(self.module, state, "the average")


class EMAs(dict):
    """Several averages of one model: name -> EMA, the main one first. See util/averages.py."""

    def update(self, model):
        """Move each average one step towards the weights of `model`."""
        for ema in self.values():
            ema.update(model)
