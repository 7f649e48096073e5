"""Checks that both sides compute the same, without which comparing speed is meaningless."""

import torch

from benchmarks.sides import Updates
from benchmarks.steps import pick_steps
from benchmarks.timing import table
from diffusion.solvers import BELOW_SINGULARITY
from util.precision import full_precision

ROWS = 8  # tokens of the head
SUMMARY_STEPS = 2  # autoregressive steps of a summary


def check(sides, timed_steps, tolerance):
    """Print how much the sides differ; whether they compute the same up to the tolerance."""
    found = in_float32(sides, timed_steps)
    print("\n## Largest relative differences for the same noise, float32\n")
    _print(found, "what")
    if not all(value <= tolerance for value in found.values()):  # nor where one is nan
        print(f"\nabove {tolerance:.0e}: these are not the same computation")
        return False
    if sides.precision == "fp32":
        return True
    found = in_precision(sides)
    print(f"\nThe head in {sides.precision}, from plain in float32:\n")
    _print(found, "side")
    if not found["ours"] <= 2 * found["plain"]:
        print("\nours is further off than twice plain")
        return False
    return True


def _print(found, title):
    table([title, "difference"], [[name, f"{value:.1e}"] for name, value in found.items()])


def in_float32(sides, timed_steps):
    """Relative differences: name -> largest |a − b| / largest |b|."""
    with full_precision(sides.device.type), sides.computing_in("fp32"):
        return {
            **of_head(sides),
            **of_steps(sides, timed_steps),
            **of_training(sides),
            **of_updates(sides),
        }


def summary(sides):
    """`in_float32` with the largest of the head and of autoregressive steps alone."""
    with full_precision(sides.device.type), sides.computing_in("fp32"):
        return {
            "the head's tokens": _largest(of_head(sides)),
            "tokens after an autoregressive step": _largest(of_steps(sides, SUMMARY_STEPS)),
            **of_training(sides),
            **of_updates(sides),
        }


def _largest(found):
    """The largest value, or nan if one is."""
    return torch.tensor(list(found.values())).max().item()


def of_head(sides):
    """Tokens of the head.

    From 999, samples of random weights grow so large that half of the computation hardly matters;
    from 950 all of it does.
    """
    found, noise = {}, _head_noise(sides)
    for start in (None, BELOW_SINGULARITY):
        with sides.starting_at(start):
            ours, plain = sides.head(ROWS, noise)
            found[f"head, {ROWS} tokens, from {start or 999}"] = relative(ours(), plain()[:ROWS])
    return found


def of_steps(sides, timed_steps):
    """Tokens after autoregressive steps."""
    with sides.starting_at(BELOW_SINGULARITY):
        return {
            f"autoregressive step {step.number}, batch {step.bsz}, from {BELOW_SINGULARITY}": (
                relative(step.ours(), step.plain())
            )
            for step in pick_steps(sides, timed_steps, bsz=2, noise=True)
        }


def of_training(sides):
    """The loss and its gradient as one vector; gradients of key biases are mere rounding."""
    losses = [side() for side in sides.training(2, same=True)]
    return of_losses(losses, [gradient(model) for model in (sides.model, sides.plain)])


def of_losses(losses, gradients):
    """How far the first of two losses and gradients is from the second."""
    norm = ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()
    return {"training loss": relative(*losses), "gradients, their norm": norm}


def gradient(model):
    """The gradient of all parameters as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@torch.no_grad()
def of_updates(sides, count=3):
    """The weights and their averages after some updates, which are then undone."""
    before = [p.clone() for p in sides.model.parameters()]
    updates = Updates(sides)
    for _ in range(count):
        updates.ours()
        updates.plain()
    found = {
        f"weights after {count} updates": max(relative(*pair) for pair in updates.weights()),
        "averaged weights": max(relative(*pair) for pair in updates.averaged()),
    }
    for model in (sides.model, sides.plain):
        torch._foreach_copy_(list(model.parameters()), before)
    return found


def in_precision(sides):
    """Difference of each side's head from plain in float32: name -> difference.

    Ours runs twice, with other rows first, to reveal a graph that replays stale inputs.
    """
    noise = _head_noise(sides)
    with sides.starting_at(BELOW_SINGULARITY):
        with full_precision(sides.device.type):
            exact = sides.head(ROWS, noise)[1]()[:ROWS]
        with sides.autocast():
            sides.head(ROWS, noise.flip(1))[0]()
            ours, plain = sides.head(ROWS, noise)
            return {"ours": relative(ours(), exact), "plain": relative(plain()[:ROWS], exact)}


def of_bf16(sides):
    """Relative differences of bf16 from float32, of ours and, for the head, of plain too."""
    losses, gradients = [], []
    for precision in ("bf16", "fp32"):
        with sides.computing_in(precision):
            losses.append(sides.training(2, same=True)[0]())
            gradients.append(gradient(sides.model))
    with sides.computing_in("bf16"):
        found = in_precision(sides)
    head = {f"the head's tokens, {name}": value for name, value in found.items()}
    return {**head, **of_losses(losses, gradients)}


def _head_noise(sides):
    return sides.randn(sides.diffusion_steps + 1, ROWS, sides.model.token_embed_dim)


def relative(ours, plain):
    """The largest difference over the largest value."""
    return ((ours - plain).abs().max() / plain.abs().max()).item()
