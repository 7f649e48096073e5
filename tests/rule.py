"""Weights and inputs made by a rule, so that golden/ needs to hold only the results.

The numbers under tests/golden/ are what the published model computes, in float32 on a CPU, for
the weights and inputs that these two functions make.
"""

import math
import zlib
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"


def normal(name, shape):
    """Standard normal numbers that depend on `name` alone, float64."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return generator.standard_normal(size=tuple(shape))


def rule_input(name, shape):
    """The input called `name`: a float32 tensor."""
    return torch.from_numpy(normal(name, shape).astype(np.float32))


def rule_state(module):
    """A state dict for `module` whose every value follows from its name."""
    return {name: _value(name, value.shape) for name, value in module.state_dict().items()}


def by_rule(module):
    """`module` itself, with its weights replaced by the rule's, in evaluation mode."""
    module.load_state_dict(rule_state(module))
    return module.eval()


def _value(name, shape):
    n = normal(name, shape)
    if name.endswith(".bias"):
        n = 0.02 * n
    elif name.endswith(".weight"):
        n = 1 + 0.02 * n if len(shape) == 1 else n / math.sqrt(math.prod(shape[1:]))
    else:
        n = 0.1 * n
    return torch.from_numpy(np.asarray(n, dtype=np.float32))
