"""The training of tokenizers."""

from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from models.changes import Trained
from models.codebook import code_learner
from models.discriminator import Pair, PatchDiscriminator, smallest_side
from models.objective import Objective
from models.perceptual import open_perceptual
from util import dist
from util.checkpoint import TrainState
from util.dist import print0
from util.ema import EMA
from util.evaluation import features
from util.evaluation.features import pick_extractors
from util.evaluation.fitted import Labelled
from util.evaluation.image_sets import RealImages
from util.evaluation.reconstruction import evaluate_tokenizer as evaluate_tokenizer
from util.evaluation.reconstruction import fit_patches as fit_patches
from util.evaluation.reconstruction import latent_scale as latent_scale
from util.evaluation.reports import few_images, report
from util.images import grid, save_image, to_uint8
from util.precision import autocast
from util.rng import EpochDraws
from util.run.loop import Work, run_epoch, unsynchronized

# without the adversarial loss, LDM's values for it cost 0.5 dB on the digits
BETAS = (0.9, 0.99)
ADVERSARIAL_BETAS = (0.5, 0.9)
MOST_CHANNELS = 16  # of latents in a picture

# ---- training -------------------------------------------------------------------------------


def new_state(network, recipe, losses, device, precision, batch_images, seed):
    """(TrainState, Objective) of an autoencoder: EMA, Adam and scaler by a util.recipe.Recipe.

    losses: a models.autoencoder_settings.Losses, by which there are, as `parts`, a discriminator
    with its optimizer, and what learns and restarts codes. batch_images: images in a batch of all
    processes. Raises ValueError if the network of the perceptual loss is unavailable.
    """
    perceptual = open_perceptual(losses.perceptual, losses.perceptual_weights)
    perceptual = perceptual and perceptual.to(device)
    parts = {}
    learner = code_learner(network, losses, torch.Generator(device).manual_seed(seed))
    if learner:
        parts["codes"] = learner
    betas = BETAS
    if losses.disc_weight:
        betas = ADVERSARIAL_BETAS
        channels = network.config["in_channels"]
        discriminator = PatchDiscriminator(channels, losses.disc_ch, losses.disc_layers).to(device)
        own = torch.optim.Adam(discriminator.parameters(), recipe.lr, betas=betas)
        parts |= {"discriminator": discriminator, "discriminator_optimizer": own}
    weights = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, recipe.lr, betas=betas)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    ema = EMA(network, recipe.ema_rate)
    state = TrainState(network, ema, optimizer, scaler, batch_images=batch_images, parts=parts)
    return state, Objective(losses, network, perceptual, parts.get("discriminator"))


def epoch_runner(network, changes, state, objective, recipe, *, device, precision, seed):
    """`train_one_epoch` with all arguments that are the same for every epoch.

    changes: a models.autoencoder_settings.Changes. recipe: a resolved util.recipe.Recipe.
    """
    discriminator = state.parts.get("discriminator")
    least_side = smallest_side(objective.settings.disc_layers) if discriminator else 1
    return partial(
        train_one_epoch,
        dist.wrap(Trained(network, changes, least_side), device),
        dist.wrap(Pair(discriminator), device) if discriminator else None,
        objective,
        state,
        learning_rate=recipe.rate,
        accum_iter=recipe.accum_iter,
        grad_clip=recipe.grad_clip,
        device=device,
        precision=precision,
        seed=seed,
    )


def train_one_epoch(
    model,
    pair,
    objective,
    state,
    loader,
    epoch,
    *,
    learning_rate,
    device,
    precision="fp32",
    accum_iter=1,
    grad_clip=0.0,
    seed=0,
    start=0,
    draws=None,
    **how,
):
    """Train an autoencoder on every batch of an epoch of `loader`; labels are ignored.

    model: a models.changes.Trained; pair: a models.discriminator.Pair, or None; both wrapped by
    `dist.wrap` if there are several processes. objective: a models.objective.Objective. state: see
    `new_state`. The other arguments, the random draws and what is raised are those of
    `engine_mar.train_one_epoch`.
    """
    model.train()
    source = EpochDraws(seed, epoch, device, start=0 if draws else start)
    work = _Images(model, pair, objective, state, device, precision, accum_iter, grad_clip)
    how |= {"learning_rate": learning_rate, "accum_iter": accum_iter}
    return run_epoch(work, loader, epoch, source, start=start, draws=draws, **how)


class _Images(Work):
    """The training of an autoencoder on images."""

    def __init__(self, model, pair, objective, state, device, precision, accum_iter, grad_clip):
        own = state.parts.get("discriminator_optimizer")
        super().__init__([state.optimizer] + [own] * bool(own), state.scaler, device)
        self.model, self.pair, self.objective, self.state = model, pair, objective, state
        self.done = steps_of(state.optimizer)  # also of runs with other numbers of processes
        self.precision, self.accum_iter, self.grad_clip = precision, accum_iter, grad_clip
        self.learner, self.latents = state.parts.get("codes"), []
        self.sums = Counter()  # of the terms of the loss since the last `metrics`
        self.counts = Counter()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def batch(self, batch, labels, source, first, last):
        with ExitStack() as context:
            if not last:
                for wrapped in filter(None, (self.model, self.pair)):
                    context.enter_context(unsynchronized(wrapped))
            with autocast(self.device, self.precision):
                target, output = self.model(batch, source.generator)
                scale = self.scaler.get_scale() / self.accum_iter
                loss, terms = self.objective.loss(target, output, self.done, scale)
            if first:
                dist.wait()  # for processes that read from a slow disk
            self._backward(loss)
            if self.objective.adversarial(self.done):
                with autocast(self.device, self.precision):
                    own, more = self.objective.discriminator_loss(self.pair, target, output[0])
                self._backward(own)
                terms |= more
        self._note(terms)
        if self.learner:
            self.latents.append([x.detach() for x in output[1:]])
        return loss, batch

    def _backward(self, loss):
        self.scaler.scale(loss / self.accum_iter).backward()

    def _note(self, terms):
        self.sums.update(terms)
        self.counts.update(dict.fromkeys(terms, 1))

    def step(self):
        self.scaler.unscale_(self.optimizers[0])
        limit = self.grad_clip or float("inf")
        norm = nn.utils.clip_grad_norm_(self.state.model.parameters(), limit)
        for optimizer in self.optimizers[: 1 + self.objective.adversarial(self.done)]:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        if self.learner:
            self.learner.step(*map(torch.cat, zip(*self.latents, strict=True)))
            self.latents.clear()
        self.state.ema.update(self.state.model)
        self.done += 1
        return norm

    def metrics(self):
        names = list(self.sums)
        means = torch.stack([self.sums[name] / self.counts[name] for name in names])
        means = (dist.all_reduce(means) / dist.world_size()).tolist()
        self.sums.clear()
        self.counts.clear()
        metrics = dict(zip(names, means, strict=True))
        return metrics | (self.learner.metrics() if self.learner else {})


def steps_of(optimizer):
    """Number of steps that an Adam has taken."""
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


# ---- pictures --------------------------------------------------------------------------------


@torch.no_grad()
def pictures(network, images, generator=None):
    """Name -> uint8 (H, W, 3): `reconstructions`, each below its image, and `latents`.

    images: (n, I, H, W). Latents are raw ones: a row for each image, a column for each of the first
    MOST_CHANNELS channels, black to white from 3 standard deviations below the mean to 3 above.
    """
    latents = network.latents(images, generator)
    decoded = network.reconstruct(latents).clamp(-1, 1)
    pairs = np.concatenate([to_uint8(x) for x in (images, decoded)])
    std, mean = torch.std_mean(latents, dim=(0, 2, 3), keepdim=True)
    shown = ((latents - mean) / (3 * std + 1e-12))[:, :MOST_CHANNELS]
    columns = shown.shape[1]
    return {
        "reconstructions": grid(pairs, len(images), min_side=64),
        "latents": grid(to_uint8(shown.reshape(-1, 1, *shown.shape[2:])), columns, min_side=32),
    }


def log_pictures(network, images, folder, epoch, logger, step, seed):
    """Log the pictures of a few images, and save them in a folder under the number of the epoch."""
    generator = torch.Generator(images.device).manual_seed(seed)
    for name, image in pictures(network, images, generator).items():
        logger.image(name, image, step)
        save_image(Path(folder) / f"epoch{epoch:04d}_{name}.png", image)


# ---- measuring -------------------------------------------------------------------------------


def open_extractors(settings, data_path, img_size, reading, device):
    """Name -> Extractor to measure a tokenizer by, of an Evaluation; {} for --extractor none.

    data_path: the data set; reading: how its pictures are read. Raises ValueError.
    """
    names = pick_extractors(settings, data_path)
    open_set = partial(RealImages, split="train", img_size=img_size, reading=reading)
    labelled = Labelled.of(None, data_path, open_set, settings.stats_dir)
    return features.open_extractors(names, settings, device, img_size, labelled)


def measure(tokenizer, images, extractors, *, settings, output_dir, logger=None, step=0, **how):
    """Evaluate a tokenizer on images, report, and write reconstructions.png; returns the metrics.

    extractors: name -> Extractor, the main one first; {} for no distances. settings: all that the
    metrics depend on, for the report. how: the other arguments of `evaluate_tokenizer`. Off rank 0
    there are no metrics.
    """
    extractor, *more = extractors.values() or (None,)
    metrics, pairs = evaluate_tokenizer(tokenizer, images, extractor, more=more, **how)
    if not dist.is_main():
        return {}
    lists = {name: value for name, value in metrics.items() if isinstance(value, list)}
    numbers = {name: value for name, value in metrics.items() if name not in lists}
    notes = [note for each in extractors.values() for note in few_images(len(images), each)]
    report(numbers, settings | lists, notes, None, output_dir, logger, step)
    path = Path(output_dir) / "reconstructions.png"
    save_image(path, grid(pairs, len(pairs) // 2, min_side=64))
    print0(f"in {output_dir}: results.jsonl, {path.name} (images above, decoded below)")
    return metrics
