"""The loops of MAR: training, generation, evaluation.

Scripts handle flags and files; functions here take named values.
"""

import hashlib
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn

from models.tokenizer import decode
from util import dist, hub
from util.checkpoint import TrainState
from util.data.caching import cache_latents as cache_latents  # a published name
from util.dist import print0, unwrap
from util.ema import EMA
from util.images import grid
from util.logger import Progress, Stopwatch
from util.optimizers import parameter_groups as parameter_groups  # a published name
from util.outputs import Outputs, in_order, open_outputs
from util.precision import autocast
from util.recipe import OPTIMIZERS
from util.rng import EpochDraws, image_generators
from util.run import stop
from util.run.loop import Work, run_epoch, unsynchronized
from util.weights import digest

UNKNOWN_RANGE = 10.0  # latents have a std of about 1; used if training recorded no range


# ---- training ------------------------------------------------------------------------------------


def new_state(model, recipe, device, precision, batch_images):
    """The TrainState of a model: its EMAs, optimizer and scaler by a util.recipe.Recipe.

    batch_images: images in a batch of all processes.
    """
    rates = recipe.ema_rates(batch_images * recipe.accum_iter)
    emas = {name: EMA(model, rate) for name, rate in rates.items()}
    if recipe.fsdp:
        from util.run import fsdp  # which takes time to load

        fsdp.shard(model, *(ema.module for ema in emas.values()))
    optimizer = OPTIMIZERS[recipe.optimizer](model, recipe)
    if dist.is_sharded(model):
        fsdp.accept_whole(optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    ema = emas.pop("ema")
    return TrainState(model, ema, optimizer, scaler, batch_images=batch_images, emas=emas)


def train_one_epoch(
    model,
    tokenizer,
    loader,
    optimizer,
    scaler,
    ema,
    epoch,
    *,
    learning_rate,
    device,
    precision="fp32",
    cached=False,
    accum_iter=1,
    grad_clip=3.0,
    seed=0,
    logger=None,
    progress=None,
    log_every=20,
    shared_mask_ratio=True,
    start=0,
    draws=None,
    after_step=None,
):
    """Train on every batch of an epoch of `loader`; returns the largest |latent| seen, a float.

    loader: as util.data.loader.Loader, its batches (x, labels). ema: a util.ema.EMA, or several as
    EMAs. learning_rate: function of a fractional epoch. cached: x are moments, not images.
    accum_iter: batches per optimizer step.
    shared_mask_ratio: all processes mask the same number of tokens per step, so that none waits for
    another. All random draws depend on (seed, epoch, rank) only, so a run resumed at an epoch makes
    the same draws as an uninterrupted one. To resume within the epoch: start, the number of batches
    done, and draws, the state of their EpochDraws. after_step(batches, draws, largest): called
    after each optimizer step with the batches of the epoch done, the EpochDraws, and the largest
    |latent| so far, a tensor; what it raises is raised after the metrics so far were logged.
    Raises FloatingPointError, on every process, for a loss that is not finite.
    """
    model.train()
    optimizer.zero_grad(set_to_none=True)
    source = EpochDraws(seed, epoch, device, shared_mask_ratio, 0 if draws else start)
    work = _Latents(
        model,
        tokenizer,
        optimizer,
        scaler,
        ema,
        device,
        precision=precision,
        cached=cached,
        accum_iter=accum_iter,
        grad_clip=grad_clip,
    )
    return run_epoch(
        work,
        loader,
        epoch,
        source,
        learning_rate=learning_rate,
        accum_iter=accum_iter,
        logger=logger,
        progress=progress,
        log_every=log_every,
        start=start,
        draws=draws,
        after_step=after_step,
    )


class _Latents(Work):
    """The training of a model of latents. Further arguments are those of `train_one_epoch`."""

    def __init__(
        self,
        model,
        tokenizer,
        optimizer,
        scaler,
        ema,
        device,
        *,
        precision,
        cached,
        accum_iter,
        grad_clip,
    ):
        super().__init__([optimizer], scaler, device)
        self.model, self.tokenizer, self.ema = model, tokenizer, ema
        self.precision, self.cached = precision, cached
        self.accum_iter, self.grad_clip = accum_iter, grad_clip

    def batch(self, batch, labels, source, first, last):
        latents = to_latents(self.tokenizer, batch, self.cached, source.generator)
        self.largest = torch.maximum(self.largest, latents.abs().max())
        with nullcontext() if last else unsynchronized(self.model):
            with autocast(self.device, self.precision):
                loss = self.model(latents, labels, source.generator, source.step_generator)
            if first:
                self.tokenizer.check_first(latents)
                dist.wait()  # for processes that compile, or read from a slow disk
            self.scaler.scale(loss / self.accum_iter).backward()
        return loss, latents

    def step(self):
        norm = optimizer_step(self.model, self.optimizers[0], self.scaler, self.grad_clip)
        self.ema.update(unwrap(self.model))
        return norm

    def metrics(self):
        return unwrap(self.model).statistics(dist.all_reduce)


@torch.no_grad()
def to_latents(tokenizer, batch, cached, generator):
    """Latents (N, C, h, w) drawn from a batch of images, or of moments if it is cached."""
    moments = batch.float() if cached else tokenizer.encode(batch)  # shards are float16
    return tokenizer.sample(moments, generator)


def optimizer_step(model, optimizer, scaler, grad_clip):
    """Clip the gradient, step, and clear it; returns its norm before clipping."""
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or float("inf"))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return dist.whole(norm)


# ---- generation ----------------------------------------------------------------------------------


def generate_images(
    model,
    tokenizer,
    labels,
    sampling,
    *,
    seed,
    batch_size,
    device,
    precision="fp32",
    latent_range=None,
    progress=None,
    known=None,
    first=0,
    fit=True,
    guide=None,
):
    """Sample an image per label, yielding batches (indices, images uint8 (n, H, W, 3)).

    labels: a sequence of class indices, or of None for no class, the same on every process; each
    process generates every world_size-th batch, possibly empty ones at the end. sampling: a
    models.settings.Sampling. Image i depends on (seed, first + i) alone. latent_range: the largest
    |latent| of the data; samples far outside this range are counted and reported. progress: name of
    the progress bar. known: function of the indices of a batch that returns its images if they were
    sampled before, else None. fit: see `fitting_batch`; False leaves the batches as they are, for
    the same rounding with any number of processes. guide: see `Autoregressive.sample_steps`.
    Raises ValueError for a tokenizer that does not fit the model, and Stopped between batches.
    """
    if tokenizer.channels != model.vae_embed_dim:
        raise ValueError(
            f"the tokenizer has {tokenizer.channels} channels, the model {model.vae_embed_dim}"
        )
    batch_size = fitting_batch(labels, batch_size) if fit else batch_size
    extremes = []
    rounds = math.ceil(len(labels) / (batch_size * dist.world_size()))
    bar = Progress(rounds, progress, "batch")
    for i in range(rounds):
        # all processes take part in every round, the last possibly empty, so they stay in step
        start = (i * dist.world_size() + dist.rank()) * batch_size
        indices = range(start, min(start + batch_size, len(labels)))
        images = np.empty((0, 0, 0, 3), np.uint8)
        if indices:
            images = known(indices) if known else None
        if images is None:
            chosen = [labels[i] for i in indices]
            generators = image_generators(seed, [first + i for i in indices])
            how = generators, device, precision, guide
            latents = sample_latents(model, chosen, sampling, *how)
            images = decode(tokenizer, latents, generators)
            extremes.append(latents.abs().flatten(1).amax(1))
        bar.update()
        yield indices, images
        if stop.deferring():
            stop.check()
    bar.close()
    limit = 2 * (latent_range or UNKNOWN_RANGE)
    warn_if_diverged(extremes, limit, model.advice(sampling))


def fitting_batch(labels, batch_size):
    """Images per batch: no more than leaves work for every process."""
    return min(batch_size, math.ceil(len(labels) / dist.world_size()))


@torch.no_grad()
def sample_latents(model, labels, sampling, generators, device, precision, guide=None):
    """Latents (n, C, h, w) for n labels, drawn with one generator each. guide: see
    `Autoregressive.sample_steps`."""
    with autocast(device, precision):
        return model.sample_tokens(
            len(labels),
            labels=None if labels[0] is None else torch.tensor(labels, device=device),
            generator=generators,
            guide=guide,
            **sampling.asdict(),
        )


def warn_if_diverged(extremes, limit, advice):
    """Report the number of images, sampled by all processes, with latents above the limit.

    extremes: the largest |latent| of each image, tensors (n,).
    """
    found = torch.nan_to_num(torch.cat([torch.zeros(1), *(x.cpu() for x in extremes)]), torch.inf)
    bad, worst = int((found > limit).sum()), found.max().item()
    bad, worst = sum(dist.all_gather(bad)), max(dist.all_gather(worst))
    count = sum(dist.all_gather(len(found) - 1))
    if bad:
        print0(
            f"WARNING: {bad} of {count} images have latents outside the range of the data "
            f"(up to {worst:.3g}, expected below {limit:.3g}): sampling diverged. {advice}"
        )


def sample_grid(model, tokenizer, classes, sampling, columns=8, **kwargs):
    """A grid with one image for each entry of `classes`: uint8 (H, W, 3) on rank 0, else None.

    kwargs: arguments of `generate_images`.
    """
    images = []
    for batch in generate_images(model, tokenizer, classes, sampling, **kwargs):
        images += [images for _, images in in_order(*batch)]
    return grid(np.concatenate(images), columns, min_side=64) if images else None


# ---- evaluation ----------------------------------------------------------------------------------


def evaluate(
    model,
    tokenizer,
    labels,
    sampling,
    evaluator,
    *,
    settings,
    outputs=None,
    output_dir=None,
    logger=None,
    step=0,
    **kwargs,
):
    """Sample an image per label, evaluate and report; returns the metrics, {} off rank 0.

    evaluator: see util.evaluation. settings: further entries of the report. outputs: util.outputs'
    Outputs, which save the images and hold those sampled before. kwargs: arguments of
    `generate_images`.
    """
    measurement, clock, outputs = evaluator.start(len(labels)), Stopwatch(), outputs or Outputs()
    batches = generate_images(model, tokenizer, labels, sampling, known=outputs.read, **kwargs)
    for indices, images in clock.timed(batches):
        outputs.keep(indices, images)
        shown = None if labels[0] is None else [labels[i] for i in indices]
        measurement.add(indices, images, shown)
    settings = {
        **seconds_per_image(clock, outputs, len(labels), kwargs["device"]),
        **identify(model, tokenizer, labels, kwargs["batch_size"], kwargs.get("guide")),
        **sampling.asdict(),
        **settings,
    }
    found = evaluator.report(measurement.summary(), settings, output_dir, logger, step)
    dist.wait()  # for rank 0
    return found


def seconds_per_image(clock, outputs, count, device):
    """The entry of a report on the time of sampling; {} if all images were sampled before."""
    seconds = torch.tensor(clock.seconds - outputs.seconds, device=device)
    slowest = dist.all_reduce(seconds, "max").item()
    sampled = count - sum(dist.all_gather(outputs.found))
    return {"seconds_per_image": slowest / sampled} if sampled else {}


def identify(model, tokenizer, labels, batch_size, guide=None):
    """All that samples and their speed depend on besides the Sampling: name -> value."""
    return {
        "weights_sha256": digest(model.state_dict()),
        "tokenizer": type(tokenizer).__name__,
        "tokenizer_sha256": digest(tokenizer.state_dict()),
        "tokenizer_scale": tokenizer.scale,
        "labels_sha256": hashlib.sha256(repr(list(labels)).encode()).hexdigest(),
        "batch_size": batch_size,
        "processes": dist.world_size(),
        **({"guide_sha256": digest(guide.state_dict())} if guide else {}),
    }


def open_images(
    paths,
    model,
    tokenizer,
    labels,
    sampling,
    *,
    weights,
    columns=None,
    only=None,
    source=None,
    **kwargs,
):
    """The util.outputs.Outputs at `paths` of the images that `generate_images` samples.

    weights: name of the weights, "ema" or "raw". columns: columns of a grid. only: index of the one
    image to write, in place of a grid. source: see `source_of`; PNGs then say what they were made
    by. kwargs: arguments of `generate_images`.
    """
    scale = model.patch_size * tokenizer.stride
    size = model.seq_h * scale, model.seq_w * scale

    def settings():
        return {"weights": weights, **origin(model, tokenizer, labels, sampling, **kwargs)}

    if source:
        source = {**source, "sampling": sampling.asdict(), "first": kwargs.get("first", 0)}
    return open_outputs(paths, labels, size, settings, kwargs["device"], columns, only, source)


def source_of(ckpt, arguments, tokenizer):
    """The entries `ckpt` and `tokenizer` of util.provenance.describe.

    ckpt: a file, or a name of the hub. arguments: those of models.build_tokenizer that `tokenizer`
    was built by; a file that lies beside the checkpoint is stored as such.
    """
    used = {"scale": tokenizer.scale, "shift": tokenizer.shift}
    path = Path(arguments.get("vae_path") or "")
    if path.name and (path.parent == Path(ckpt).parent or hub.is_name(ckpt)):
        used["vae_path"] = hub.HERE + path.name
    return {"ckpt": str(ckpt), "tokenizer": {**arguments, **used}}


def origin(
    model,
    tokenizer,
    labels,
    sampling,
    *,
    seed,
    batch_size,
    precision="fp32",
    first=0,
    fit=True,
    guide=None,
    **rest,
):
    """All that images of `generate_images` with these arguments depend on: name -> value."""
    identity = identify(model, tokenizer, labels, batch_size, guide)
    del identity["processes"]  # each samples whole batches
    identity |= {"first": first} if first else {}
    return {
        "images": len(labels),
        "seed": seed,
        "precision": precision,
        **identity,
        "tokenizer_shift": tokenizer.shift,
        "batch_size": fitting_batch(labels, batch_size) if fit else batch_size,
        **sampling.asdict(),
    }
