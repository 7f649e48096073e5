"""The loops: train a model, train a tokenizer, generate, cache. Scripts own flags and files."""

import hashlib
import math
import time
from contextlib import ExitStack, nullcontext
from multiprocessing.pool import ThreadPool

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset

from models.diffloss import Diffused
from util import dist, shards
from util.data import batch_loader, plain_loader, read_moments, write_moments
from util.dist import print0
from util.evaluation import Accumulator
from util.features import INCEPTION
from util.images import grid, to_uint8
from util.logger import Progress, Stopwatch
from util.metrics import SSIM_WINDOW, RunningStatistics, frechet_distance, psnr, ssim
from util.precision import autocast
from util.rng import image_generators
from util.weights import digest

UNKNOWN_RANGE = 10.0  # latents have about unit deviation; used where training left no range
DECODED_AT_ONCE = 32  # images
PAIRS = 8  # images shown with their decodings


def unwrap(model):
    """The model itself, where it is wrapped for several processes."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def parameter_groups(model, weight_decay):
    """AdamW's groups: no weight decay on biases, 1-D parameters and the head; then the rest.

    The order is the published one, so that its optimiser states load.
    """
    none, some = [], []
    head = f"{model.head_name}."
    for name, parameter in model.named_parameters():
        plain = parameter.ndim == 1 or name.endswith(".bias") or name.startswith(head)
        (none if plain else some).append(parameter)
    return [{"params": none, "weight_decay": 0.0}, {"params": some, "weight_decay": weight_decay}]


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
):
    """Train on every batch of `loader` once; returns the largest |latent| seen, a float.

    learning_rate: of a fractional epoch. cached: the loader gives moments, not images. accum_iter:
    batches a step of the optimiser. shared_mask_ratio: all processes mask as many tokens at a step,
    so that none waits for another; else each its own. All that is drawn follows from (seed, epoch,
    rank), so a run that is resumed at an epoch draws what the uninterrupted one would have.
    Raises FloatingPointError, on every process, for a loss that is not finite.
    """
    model.train()
    loader.sampler.set_epoch(epoch)
    torch.manual_seed(_epoch_seed(seed, epoch, 0))  # dropout, and the loader's workers
    generator = torch.Generator(device).manual_seed(_epoch_seed(seed, epoch, 1))
    rank = 0 if shared_mask_ratio else dist.rank()
    step_generator = torch.Generator().manual_seed(_epoch_seed(seed, epoch, 3, rank))
    window = Window(device, accum_iter)
    steps = len(loader) // accum_iter
    largest = torch.zeros((), device=device)

    optimizer.zero_grad(set_to_none=True)
    for i, (batch, labels) in enumerate(window.waiting.timed(loader)):
        if i == steps * accum_iter:  # not enough left for a whole step
            break
        if i % accum_iter == 0:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch + i / len(loader))

        batch = batch.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        with torch.no_grad():
            moments = batch.float() if cached else tokenizer.encode(batch)  # shards are float16
            latents = tokenizer.sample(moments, generator)
            largest = torch.maximum(largest, latents.abs().max())

        last = (i + 1) % accum_iter == 0
        hold = nullcontext() if last or model is unwrap(model) else model.no_sync()
        with hold:
            with autocast(device, precision):
                loss = model(latents, labels, generator, step_generator)
            scaler.scale(loss / accum_iter).backward()
        window.add(loss, len(latents))
        if not last:
            continue

        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if not scaler.is_enabled():  # which skips such steps itself
            window.note_gradient(norm)
        ema.update(unwrap(model))
        step = (i + 1) // accum_iter
        if step % min(log_every, steps) == 0:
            window.check(epoch)
            figures = window.pop(epoch, norm, optimizer.param_groups[0]["lr"])
            figures |= unwrap(model).head.pop_statistics(dist.all_reduce)
            if logger:
                logger.scalars(figures, epoch * steps + step, epoch=epoch + (i + 1) / len(loader))
        if progress:
            progress.update(1, window.note)
    window.check(epoch)
    return dist.all_reduce(largest, "max").item()


class Window:
    """What is summed between two lines of the log: on the device, without waiting for it."""

    def __init__(self, device, accum_iter):
        self.accum_iter = accum_iter
        self.never = torch.iinfo(torch.int64).max
        self.bad_loss = torch.tensor(self.never, device=device)  # its batch·processes + rank
        self.bad_gradient = torch.tensor(self.never, device=device)  # its batch
        self.loss = torch.zeros((), device=device)
        self.batches, self.note, self.waiting = 0, "", Stopwatch()
        self._restart()

    def add(self, loss, images):
        loss = loss.detach()
        place = self.batches * dist.world_size() + dist.rank()
        self.bad_loss = self._first(self.bad_loss, loss, place)
        self.loss += loss
        self.batches += 1
        self.count += 1
        self.images += images

    def note_gradient(self, norm):
        """Remember when the norm of a gradient, the same everywhere, was first not finite."""
        self.bad_gradient = self._first(self.bad_gradient, norm, self.batches - 1)

    def _first(self, place, value, here):
        return torch.minimum(place, torch.where(value.isfinite(), self.never, here))

    def check(self, epoch):
        """Stop every process if a loss or a gradient of any of them was not finite."""
        places = torch.stack([self.bad_loss, self.bad_gradient])
        loss, gradient = dist.all_reduce(places, "min").tolist()
        batch, rank = divmod(loss, dist.world_size())
        if min(loss, gradient) == self.never:
            return
        what, where = f"loss is not finite at epoch {epoch}", f", rank {rank}"
        if gradient < batch:  # a loss that is not finite spoils the gradient of the same step
            what, where, batch = what.replace("loss", "gradient"), "", gradient
        raise FloatingPointError(
            f"the {what}, step {batch // self.accum_iter}{where}; the last checkpoint is from "
            "before. Try --precision bf16 or fp32, or a lower --lr"
        )

    def pop(self, epoch, norm, lr):
        """Figures since the last time, of all processes: name -> float."""
        seconds = time.perf_counter() - self.start
        sums = torch.stack([self.loss / self.count, self.loss.new_tensor(self.waiting.seconds)])
        loss, waited = (dist.all_reduce(sums) / dist.world_size()).tolist()
        figures = {
            "loss": loss,
            "grad_norm": norm.item(),
            "lr": lr,
            "images_per_s": self.images * dist.world_size() / seconds,
            "data_wait": waited / seconds,
        }
        speed = figures["images_per_s"]
        self.note = f"epoch {epoch} loss {loss:.4f} lr {lr:.1e} {speed:.0f} img/s"
        self._restart()
        return figures

    def _restart(self):
        self.loss.zero_()
        self.count = self.images = 0
        self.start, self.waiting.seconds = time.perf_counter(), 0.0


def train_tokenizer(
    model,
    loader,
    reviver=None,
    *,
    epochs,
    lr,
    device,
    precision="fp32",
    seed=0,
    logger=None,
    log_every=20,
):
    """Train an AutoencoderKL or a VQModel on images (the labels are not used).

    model: in DistributedDataParallel where there are several processes. reviver: of a VQModel's
    codes, see models/vq.py. Adam, its rate falling from lr to 0 by half a cosine. What is drawn
    follows from (seed, epoch, rank).
    Raises FloatingPointError, on every process, for a loss that is not finite.
    """
    network = unwrap(model).train()
    # LDM's (0.5, 0.9) are for its adversarial loss: without one they cost 0.5 dB on the digits
    optimizer = torch.optim.Adam(network.parameters(), lr, betas=(0.9, 0.99))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    steps = len(loader)
    progress = Progress(epochs * steps, "training", "step")
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        torch.manual_seed(_epoch_seed(seed, epoch, 0))  # the loader's workers
        generator = torch.Generator(device).manual_seed(_epoch_seed(seed, epoch, 1))
        window, parts = Window(device, 1), 0
        for i, (images, _) in enumerate(window.waiting.timed(loader)):
            done = (epoch + i / steps) / epochs
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * done)) / 2
            images = images.to(device, non_blocking=True)
            with autocast(device, precision):
                output = model(images, generator)
            losses = network.losses(images, output)
            loss = sum(losses.values())

            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(network.parameters(), float("inf"))
            scaler.step(optimizer)
            scaler.update()
            if reviver:
                reviver.step(*output[1:])

            window.add(loss, len(images))
            parts += torch.stack(list(losses.values())).detach()
            if (i + 1) % min(log_every, steps) == 0:
                window.check(epoch)
                means = (dist.all_reduce(parts / window.count) / dist.world_size()).tolist()
                figures = dict(zip(losses, means, strict=True))
                figures |= window.pop(epoch, norm, optimizer.param_groups[0]["lr"])
                if reviver:
                    figures["codes_revived"] = reviver.revived.item()
                if logger:
                    logger.scalars(figures, epoch * steps + i + 1, epoch=epoch + (i + 1) / steps)
                parts = 0
            progress.update(1, window.note)
        window.check(epoch)
    progress.close()
    network.eval()


@torch.no_grad()
def latent_scale(network, dataset, *, batch_size, num_workers, device, seed=0):
    """One over the deviation of an autoencoder's latents, over all elements of all images."""
    elements = RunningStatistics(1, device)
    mine = range(dist.rank(), len(dataset), dist.world_size())
    generator = torch.Generator(device).manual_seed(_epoch_seed(seed, 0, 2))
    for images, _ in plain_loader(Subset(dataset, mine), batch_size, num_workers):
        elements.add(network.latents(images.to(device), generator).reshape(-1, 1))
    elements.reduce()
    return float(elements.result()["sigma"].item() ** -0.5)


def _epoch_seed(seed, epoch, stream, rank=None):
    """A seed for one epoch of one process (this one), and one of its streams of randomness."""
    keys = [seed, epoch, dist.rank() if rank is None else rank, stream]
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0])


def generate_images(
    model,
    tokenizer,
    labels,
    *,
    seed,
    batch_size,
    device,
    precision="fp32",
    latent_range=None,
    progress=None,
    **sampling,
):
    """Sample an image for each label, yielding (indices, images uint8 (n, H, W, 3)) by the batch.

    labels: a sequence of class numbers, or of None for no class, the same on every process; each
    process makes every world_size-th batch, some of them perhaps empty. Image i depends on
    (seed, i) alone. sampling: arguments of `sample_tokens`. latent_range: the largest |latent| of
    the data; samples far outside of it are counted and said. progress: the name of the bar shown.
    """
    if tokenizer.channels != model.vae_embed_dim:
        raise ValueError(
            f"the tokenizer has {tokenizer.channels} channels, the model {model.vae_embed_dim}"
        )
    batch_size = min(batch_size, math.ceil(len(labels) / dist.world_size()))
    limit = 2 * (latent_range or UNKNOWN_RANGE)
    bad, worst = 0, 0.0
    rounds = math.ceil(len(labels) / (batch_size * dist.world_size()))
    bar = Progress(rounds, progress, "batch")
    for i in range(rounds):
        # all processes make as many rounds, the last ones perhaps of nothing: they stay in step
        start = (i * dist.world_size() + dist.rank()) * batch_size
        indices = range(start, min(start + batch_size, len(labels)))
        chosen = [labels[i] for i in indices]
        if chosen:
            latents, images = _generate(
                model, tokenizer, chosen, indices, seed, device, precision, sampling
            )
            extremes = torch.nan_to_num(latents.abs().flatten(1).amax(1), nan=float("inf"))
            bad += int((extremes > limit).sum())
            worst = max(worst, extremes.max().item())
        bar.update()
        yield indices, images if chosen else np.empty((0, 0, 0, 3), np.uint8)
    bar.close()
    advice = "Train the model for longer"
    if isinstance(model.head, Diffused):
        clipped = sampling.get("anneal") or sampling.get("solver", "ddpm") != "ddpm"
        starts = (sampling.get("max_timestep"), model.head.max_timestep, 950 if clipped else 999)
        if next(start for start in starts if start is not None) > 950:
            advice = f"Start the reverse process lower with --max_timestep 950. {advice}"
    _say_diverged(bad, worst, limit, len(labels), advice)


@torch.no_grad()
def _generate(model, tokenizer, labels, indices, seed, device, precision, sampling):
    """Latents and images of one batch."""
    generators = image_generators(seed, indices)
    with autocast(device, precision):
        latents = model.sample_tokens(
            len(indices),
            labels=None if labels[0] is None else torch.tensor(labels, device=device),
            generator=generators,
            **sampling,
        )
    # a decoder needs 0.2 GB an image at 256 pixels
    parts = [slice(i, i + DECODED_AT_ONCE) for i in range(0, len(indices), DECODED_AT_ONCE)]
    images = [to_uint8(tokenizer.decode(latents[p], generators[p])) for p in parts]
    return latents, np.concatenate(images)


def _say_diverged(bad, worst, limit, count, advice):
    bad, worst = sum(dist.all_gather(bad)), max(dist.all_gather(worst))
    if bad:
        print0(
            f"WARNING: {bad} of {count} images have latents outside the range of the data "
            f"(up to {worst:.3g}, expected below {limit:.3g}): sampling diverged. {advice}"
        )


def gathered(batches):
    """The batches of `generate_images` of all processes, in order, on rank 0; nothing elsewhere."""
    for batch in batches:
        for indices, images in dist.gather(batch) or []:
            if len(indices):
                yield indices, images


def sample_grid(model, tokenizer, classes, columns=8, **kwargs):
    """An image for each of some classes, fixed seeds, as a grid: uint8 (H, W, 3), on rank 0."""
    images = [
        images for _, images in gathered(generate_images(model, tokenizer, classes, **kwargs))
    ]
    return grid(np.concatenate(images), columns, min_side=64) if images else None


def cache_latents(tokenizer, dataset, folder, *, batch_size, num_workers, device):
    """Write the moments of each image of an ImageFolder, and of its mirror image, below `folder`.

    One `class/name.ext.npz` each with float32 `moments` and `moments_flip` (2C, h, w). Images whose
    file is there and whole are skipped. Returns (written, skipped), of all processes.
    """
    side = dataset.img_size // tokenizer.stride
    shape = (tokenizer.moment_channels, side, side)

    def is_whole(index):
        path = folder / f"{dataset.name(index)}.npz"
        try:
            found = [m.shape for m in read_moments(path).values()] if path.is_file() else []
        except ValueError:
            return False
        if found and found != [shape, shape]:
            raise ValueError(
                f"{path}: holds latents of shape {found[0]}, these are {shape}; pass another "
                "--cached_path"
            )
        return bool(found)

    mine = range(dist.rank(), len(dataset), dist.world_size())
    with ThreadPool(max(1, num_workers)) as pool:
        todo = [
            i for i, whole in zip(mine, pool.imap(is_whole, mine, 64), strict=True) if not whole
        ]
    loader = plain_loader(Subset(dataset, todo), batch_size, num_workers)
    progress = Progress(max(1, len(todo)), "caching", "img")
    for start, (images, _) in zip(range(0, len(todo), batch_size), loader, strict=True):
        moments = moments_and_flips(tokenizer, images.to(device))
        for index, one, other in zip(todo[start:], *moments, strict=False):
            write_moments(folder / f"{dataset.name(index)}.npz", one, other)
        progress.update(len(images))
    progress.close()
    written = sum(dist.all_gather(len(todo)))
    return written, len(dataset) - written


def cache_shards(tokenizer, dataset, folder, facts, *, batch_size, num_workers, device):
    """The same as `cache_latents` in a few large files, for which see util/shards.py.

    facts: what made the latents, for the manifest.
    """
    side = dataset.img_size // tokenizer.stride
    facts = {
        **facts,
        "shape": [tokenizer.moment_channels, side, side],
        "dtype": "int32" if tokenizer.num_codes else "float16",  # 16,384 codes are too many for it
        "classes": dataset.classes,
    }

    def read(batches):
        for images, _ in batch_loader(dataset, batches, num_workers):
            yield moments_and_flips(tokenizer, images.to(device))

    names = [dataset.name(i) for i in range(len(dataset))]
    return shards.write(folder, facts, names, dataset.targets, read, batch_size)


@torch.no_grad()
def moments_and_flips(tokenizer, images):
    """Moments of images (N, I, H, W) and of their mirror images, arrays (N, 2C, h, w), float32."""
    return [tokenizer.encode(x).float().cpu().numpy() for x in (images, images.flip(-1))]


def deliver(batches, writers):
    """Give batches to writers: folders take each process's own, files all, in order, on rank 0."""
    folders = [writer for writer in writers if writer.per_process]
    files = [writer for writer in writers if not writer.per_process]

    def to_folders():
        for indices, images in batches:
            for writer in folders:
                writer.add(indices, images)
            yield indices, images

    with ExitStack() as stack:
        for writer in files if dist.is_main() else ():
            stack.enter_context(writer)
        for indices, images in gathered(to_folders()) if files else to_folders():
            for writer in files:
                writer.add(indices, images)
    dist.barrier()


def evaluate(
    model,
    tokenizer,
    labels,
    judge,
    *,
    settings,
    writers=(),
    output_dir=None,
    logger=None,
    step=0,
    **kwargs,
):
    """Sample an image for each label, measure them, report; returns the figures, {} off rank 0.

    judge: see util.evaluation. settings: what else the report states. writers: what keeps the
    images as well (`deliver`). kwargs: of `generate_images`.
    """
    accumulator = Accumulator(judge.extractor, len(labels), judge.keep_features, judge.splits)
    clock = Stopwatch()

    def measured():
        for indices, images in clock.timed(generate_images(model, tokenizer, labels, **kwargs)):
            known = None if labels[0] is None else [labels[i] for i in indices]
            accumulator.add(indices, images, known)
            yield indices, images

    deliver(measured(), writers)
    summary = accumulator.summary()
    slowest = dist.all_reduce(torch.tensor(clock.seconds, device=kwargs["device"]), "max").item()
    measurement = {"seconds_per_image": slowest / len(labels)}
    measurement |= identify(model, tokenizer, labels, kwargs["batch_size"])
    return judge.report(summary, {**measurement, **settings}, output_dir, logger, step)


def identify(model, tokenizer, labels, batch_size):
    """What samples and their speed depend on besides the settings of sampling, for a report."""
    return {
        "weights_sha256": digest(model.state_dict()),
        "tokenizer": type(tokenizer).__name__,
        "tokenizer_sha256": digest(tokenizer.state_dict()),
        "tokenizer_scale": tokenizer.scale,
        "labels_sha256": hashlib.sha256(repr(list(labels)).encode()).hexdigest(),
        "batch_size": batch_size,
        "processes": dist.world_size(),
    }


@torch.no_grad()
def evaluate_tokenizer(tokenizer, dataset, extractor, *, batch_size, num_workers, device, seed=0):
    """Encode, draw and decode each image of a data set of (image in [−1, 1], label).

    Returns (figures, pairs) on rank 0, else ({}, None). Figures: `rfid` (or `rfd`, in features
    other than Inception's), the Fréchet distance of decoded images to the same images; `psnr` in
    dB and `ssim`, averaged over images; `latent_mean`, `latent_std`, over all elements before
    scaling; `latent_scale`, one over that deviation. Of a discrete tokenizer instead of these
    `codes_used`, the share of the codes that occur, and `code_perplexity`, exp of the entropy of
    their frequencies. pairs: bytes (2n, H, W, 3), the first images, then their decodings. What is
    drawn for image i depends on (seed, i) alone.
    """
    real, decoded = (Accumulator(extractor, len(dataset)) for _ in range(2))
    elements = RunningStatistics(1, device)  # of the latents, before scaling
    uses = torch.zeros(tokenizer.num_codes or 0, dtype=torch.float64, device=device)
    quality = torch.zeros(2, dtype=torch.float64, device=device)  # sums of PSNR and SSIM
    mine = range(dist.rank(), len(dataset), dist.world_size())
    loader = plain_loader(Subset(dataset, mine), batch_size, num_workers)
    progress, pairs, start = Progress(len(mine), "tokenizing", "img"), [], 0
    shown = {i * len(dataset) // PAIRS for i in range(PAIRS)}  # of all classes
    for images, _ in loader:
        indices, images = mine[start : start + len(images)], images.to(device)
        start += len(images)
        generators = image_generators(seed, indices)
        latents = tokenizer.sample(tokenizer.encode(images), generators)
        again = tokenizer.decode(latents, generators).clamp(-1, 1)
        if tokenizer.num_codes:
            uses += torch.bincount(latents.long().flatten(), minlength=len(uses))
        else:
            elements.add((latents / tokenizer.scale).reshape(-1, 1))
        quality[0] += psnr(images, again).sum()
        if min(images.shape[-2:]) >= SSIM_WINDOW:
            quality[1] += ssim(images, again).sum()
        bytes_of = [to_uint8(x) for x in (images, again)]
        for accumulator, batch in zip((real, decoded), bytes_of, strict=True):
            accumulator.add(indices, batch)
        pairs += [pair for i, *pair in zip(indices, *bytes_of, strict=True) if i in shown]
        progress.update(len(images))
    progress.close()
    elements.reduce()
    dist.all_reduce(quality)
    dist.all_reduce(uses)
    real, decoded = real.summary(), decoded.summary()
    if not dist.is_main():
        return {}, None
    name = "rfid" if extractor.name == INCEPTION else "rfd"
    figures = {name: frechet_distance(decoded.statistics, real.statistics)}
    figures["psnr"], figures["ssim"] = (quality / len(dataset)).tolist()
    if min(dataset[0][0].shape[-2:]) < SSIM_WINDOW:
        del figures["ssim"]
    figures |= _code_figures(uses) if tokenizer.num_codes else _latent_figures(elements.result())
    return figures, np.concatenate(list(zip(*pairs, strict=True)))


def _latent_figures(statistics):
    mean, std = statistics["mu"].item(), statistics["sigma"].item() ** 0.5
    return {"latent_mean": mean, "latent_std": std, "latent_scale": 1 / std}


def _code_figures(uses):
    share = uses / uses.sum()
    entropy = -torch.special.xlogy(share, share).sum()
    used = (uses > 0).double().mean()
    return {"codes_used": used.item(), "code_perplexity": entropy.exp().item()}
