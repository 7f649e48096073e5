"""How well a tokenizer reconstructs images, and the statistics of its latents."""

import math

import numpy as np
import torch
from torch.utils.data import Subset

from util import dist
from util.data.loader import plain_loader
from util.evaluation.accumulator import Accumulator, RunningStatistics
from util.evaluation.metrics import (
    AT,
    INCEPTION,
    SSIM_WINDOW,
    code_use,
    frechet_distance,
    psnr,
    ssim,
)
from util.images import to_uint8
from util.logger import Progress
from util.precision import float64_device
from util.rng import epoch_seed, image_generators

PAIRS = 8  # images returned with their reconstructions


@torch.no_grad()
def fit_patches(network, dataset, *, batch_size, num_workers, device, seed=0):
    """Fit a PatchPCA to a data set of images, in one pass. A collective call."""
    statistics = RunningStatistics(network.components[0].numel(), device)
    for _, images in _own_images(dataset, batch_size, num_workers, device):
        statistics.add(network.patches(images))
    statistics.reduce()
    found = statistics.result()
    network.fit(torch.from_numpy(found["mu"]), torch.from_numpy(found["sigma"]))


@torch.no_grad()
def latent_scale(network, dataset, *, batch_size, num_workers, device, seed=0, per_channel=False):
    """(scale, shift) that normalize an autoencoder's latents over a data set of images.

    By default the scale is one over the standard deviation of all elements, and the shift is 0.
    With per_channel both are lists of one float per channel, which give every channel mean 0 and
    standard deviation 1. Raises ValueError for latents that are constant.
    """
    statistics = _LatentStatistics(network.config["embed_dim"] if per_channel else 1, device)
    generator = torch.Generator(device).manual_seed(epoch_seed(seed, 0, 2))
    for _, images in _own_images(dataset, batch_size, num_workers, device):
        statistics.add(network.latents(images, generator))
    statistics.reduce()
    scale, shift = statistics.normalization()
    return (scale, shift) if per_channel else (scale[0], 0.0)


@torch.no_grad()
def evaluate_tokenizer(
    tokenizer,
    dataset,
    extractor,
    *,
    batch_size,
    num_workers,
    device,
    seed=0,
    per_channel=False,
    more=(),
):
    """Encode, sample and decode every image of a data set of (image in [−1, 1], label).

    extractor: an Extractor, or None for no distances. more: further ones.

    Returns (metrics, pairs) on rank 0, elsewhere ({}, None). Metrics: `rfid` (`rfd` for features
    other than Inception's), the Fréchet distance between decoded and original images, with `@` and
    the name of further extractors in theirs; `psnr` in dB and `ssim`, means over the images;
    `latent_mean` and `latent_std` over all elements of the raw latents, and `latent_scale`, one
    over that standard deviation. With per_channel also `scale_per_channel` and `shift_per_channel`,
    lists that normalize every channel. A discrete tokenizer instead has `codes_used`, the fraction
    of codes in use, and `code_perplexity`, exp of the entropy of their frequencies. pairs: uint8
    (2n, H, W, 3), each of a few images followed by its reconstruction. Random draws for image i
    depend on (seed, i) only.
    """
    extractors = [extractor, *more] if extractor else more
    quality = _Quality(extractors, len(dataset), device)
    channels = tokenizer.channels if per_channel else None
    latent = _CodeUse if tokenizer.num_codes else _LatentMetrics
    latent = latent(tokenizer.num_codes or channels, device)
    progress, pairs = Progress(math.ceil(len(dataset) / dist.world_size()), "tokenizing", "img"), []
    shown = {i * len(dataset) // PAIRS for i in range(PAIRS)}  # spread over all classes
    for indices, images in _own_images(dataset, batch_size, num_workers, device):
        generators = image_generators(seed, indices)
        latents = tokenizer.sample(tokenizer.encode(images), generators)
        decoded = tokenizer.decode(latents, generators).clamp(-1, 1)
        latent.add(latents if tokenizer.num_codes else tokenizer.to_raw(latents))
        both = quality.add(indices, images, decoded)
        pairs += [pair for i, *pair in zip(indices, *both, strict=True) if i in shown]
        progress.update(len(images))
    progress.close()
    metrics = quality.result() | latent.result()
    if not dist.is_main():
        return {}, None
    return metrics, np.concatenate(list(zip(*pairs, strict=True)))


def _own_images(dataset, batch_size, num_workers, device):
    """(indices, images on the device) of each batch of this process, in order."""
    mine, start = range(dist.rank(), len(dataset), dist.world_size()), 0
    for images, _ in plain_loader(Subset(dataset, mine), batch_size, num_workers):
        yield mine[start : start + len(images)], images.to(device)
        start += len(images)


class _Quality:
    """Metrics that compare decoded images with the originals."""

    def __init__(self, extractors, count, device):
        self.features = {  # name of a distance -> sums of the real and of the decoded images
            _distance_name(each, extractors): [Accumulator(each, count) for _ in range(2)]
            for each in extractors
        }
        self.place = float64_device(device)
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.place)  # of PSNR and SSIM
        self.count, self.has_ssim = count, False

    def add(self, indices, images, decoded):
        """Add a batch (n, I, H, W); returns both as uint8 (n, H, W, 3)."""
        images, decoded = images.to(self.place), decoded.to(self.place)
        self.sums[0] += psnr(images, decoded).sum()
        self.has_ssim = min(images.shape[-2:]) >= SSIM_WINDOW
        if self.has_ssim:
            self.sums[1] += ssim(images, decoded).sum()
        both = [to_uint8(x) for x in (images, decoded)]
        for pair in self.features.values():
            for accumulator, shown in zip(pair, both, strict=True):
                accumulator.add(indices, shown)
        return both

    def result(self):
        """Metrics of all processes: name -> number, {} except on rank 0."""
        dist.wait()
        dist.all_reduce(self.sums)
        pairs = [[each.summary().statistics for each in pair] for pair in self.features.values()]
        if not dist.is_main():
            return {}
        distances = [frechet_distance(decoded, real) for real, decoded in pairs]
        mean_psnr, mean_ssim = (self.sums / self.count).tolist()
        metrics = {**dict(zip(self.features, distances, strict=True)), "psnr": mean_psnr}
        return metrics | ({"ssim": mean_ssim} if self.has_ssim else {})


def _distance_name(extractor, extractors):
    name = "rfid" if extractor.name == INCEPTION else "rfd"
    return name if extractor is extractors[0] else f"{name}{AT}{extractor.name}"


class _LatentStatistics:
    """Mean and variance of raw latents (N, C, h, w): of each channel, or of all elements.

    channels: C, or 1 for all elements together.
    """

    def __init__(self, channels, device):
        self.channels, self.running = channels, RunningStatistics(channels, device)

    def add(self, latents):
        rows = latents if self.channels == 1 else latents.movedim(1, -1)
        self.running.add(rows.reshape(-1, self.channels))

    def reduce(self):
        """Add up the sums of all processes."""
        self.running.reduce()

    def result(self):
        """(means, variances), lists of one float per channel."""
        found = self.running.result()
        return found["mu"].tolist(), found["sigma"].diagonal().tolist()

    def normalization(self):
        """(scale, shift), lists. Raises ValueError if a channel is constant."""
        means, variances = self.result()
        if not min(variances) > 0:
            raise ValueError(
                f"the latents have a channel of variance {min(variances):.3g}, expected above 0"
            )
        return [variance**-0.5 for variance in variances], means


class _LatentMetrics:
    """Metrics of raw latents. channels: C to add per-channel scales and shifts, or None."""

    def __init__(self, channels, device):
        self.all = _LatentStatistics(1, device)
        self.each = _LatentStatistics(channels, device) if channels else None

    def add(self, latents):
        self.all.add(latents)
        if self.each:
            self.each.add(latents)

    def result(self):
        """Metrics of all processes: name -> number or list."""
        self.all.reduce()
        (mean,), (variance,) = self.all.result()
        std = variance**0.5
        metrics = {"latent_mean": mean, "latent_std": std, "latent_scale": 1 / std}
        if self.each:
            self.each.reduce()
            scale, shift = self.each.normalization()
            metrics |= {"scale_per_channel": scale, "shift_per_channel": shift}
        return metrics


class _CodeUse:
    """Metrics of the code indices of a discrete tokenizer."""

    def __init__(self, num_codes, device):
        place = float64_device(device)
        self.uses = torch.zeros(num_codes, dtype=torch.float64, device=place)

    def add(self, indices):
        indices = indices.to(self.uses.device).long().flatten()
        self.uses += torch.bincount(indices, minlength=len(self.uses))

    def result(self):
        """Metrics of all processes: name -> number."""
        dist.wait()  # process 0 may still compute distances
        dist.all_reduce(self.uses)
        return code_use(self.uses)
