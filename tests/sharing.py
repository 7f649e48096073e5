"""Steps of training whose draws do not depend on how images are batched, for test_accumulation.py.

Run by torchrun it takes one such step with all processes and writes what the first one holds.
"""

import sys
from pathlib import Path

import torch

import engine_mar
from models.mar import mar_tiny
from models.tokenizer import PixelTokenizer
from util import dist, rng
from util.ema import EMA

IMAGES = 12
CPU = torch.device("cpu")


def share_draws():
    """Every image gets the same order, timesteps and noise, whatever it is batched with."""
    sizes = [IMAGES // parts for parts in (1, 2, 4)]

    def draw(function, shape, generator, device):
        of_one = [1 if side in sizes else side for side in shape]
        seed = sum(31**i * side for i, side in enumerate(of_one))
        return function(of_one, generator=torch.Generator().manual_seed(seed)).expand(shape)

    rng._draw = draw


class Batches:
    """A loader of so many batches of this process's share of the images."""

    def __init__(self, batches):
        draw = torch.Generator().manual_seed(7)
        images = torch.rand(IMAGES, 1, 8, 8, generator=draw) * 2 - 1
        labels = torch.arange(IMAGES) % 10
        mine = slice(dist.rank(), None, dist.world_size())
        self.parts = list(
            zip(images[mine].chunk(batches), labels[mine].chunk(batches), strict=True)
        )
        self.steps, self.images = batches, IMAGES

    def epoch(self, n):
        return self.parts


class Log:
    """Keeps the metrics of the last line."""

    def scalars(self, metrics, step, epoch):
        self.metrics = metrics


def step(batches):
    """(loss, gradient norm, name -> gradient) of one optimizer step on all images, in batches."""
    torch.manual_seed(0)
    dropout = {"attn_dropout": 0.0, "proj_dropout": 0.0, "label_drop_prob": 0.0}
    model = mar_tiny(img_size=8, vae_stride=1, patch_size=2, vae_embed_dim=1, class_num=10,
                     buffer_size=4, diffloss_d=1, diffloss_w=32, **dropout)  # fmt: skip
    for parameter in model.parameters():  # many start at 0, and so would their gradients
        torch.nn.init.normal_(parameter, std=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    log = Log()
    engine_mar.train_one_epoch(
        dist.wrap(model, CPU),
        PixelTokenizer(1),
        Batches(batches),
        torch.optim.SGD(model.parameters(), lr=1.0),  # whose step is the gradient itself
        torch.amp.GradScaler("cpu", enabled=False),
        EMA(model, 0.9),
        0,
        learning_rate=lambda epoch: 1.0,
        device=CPU,
        accum_iter=batches,
        grad_clip=0,
        logger=log,
    )
    gradient = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    return log.metrics["loss"], log.metrics["grad_norm"], gradient


def write(folder, batches):
    """A step of all processes, written by the first."""
    dist.init("cpu")
    result = step(batches)
    if dist.is_main():
        torch.save(result, folder / f"{batches}.pth")


if __name__ == "__main__":
    share_draws()
    for number in sys.argv[2:]:
        write(Path(sys.argv[1]), int(number))
    dist.cleanup()
