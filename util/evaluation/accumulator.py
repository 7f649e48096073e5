"""Statistics of a set of images, summed over batches and processes in float64.

Images need not be in memory at once: an Accumulator reduces their features to a Summary, which
suffices for every metric.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import Subset

from util import dist
from util.data.loader import plain_loader
from util.evaluation.metrics import SPLITS
from util.logger import Progress
from util.precision import float64_device

WORKERS = 4  # loader processes


class RunningStatistics:
    """Mean and covariance of features (N, width), from sums that processes can add up."""

    def __init__(self, width, device="cpu"):
        device = float64_device(device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.products = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, features):
        """Add features (n, width) of more images."""
        features = features.to(self.total.device).double()
        self.count += len(features)
        self.total += features.sum(0)
        self.products += features.T @ features

    def reduce(self):
        """Add up the sums of all processes, which may take unequally long to come to this."""
        dist.wait()
        for value in (self.count, self.total, self.products):
            dist.all_reduce(value)

    def result(self):
        """{"mu": (width,), "sigma": (width, width), "count"}. Raises ValueError below 2 images."""
        count = int(self.count)
        if count < 2:
            raise ValueError(f"{count} images: expected at least 2, for a covariance")
        mu = self.total / count
        sigma = (self.products - count * torch.outer(mu, mu)) / (count - 1)
        return {"mu": mu.cpu().numpy(), "sigma": sigma.cpu().numpy(), "count": count}


class RunningInceptionScore:
    """The Inception Score of num_images images, from sums over each of its splits.

    splits: "torch-fidelity", ten of equal size after its shuffle; or "adm", consecutive 5,000
    images. Raises ValueError for too few images or an unknown name.
    """

    def __init__(self, num_images, classes, device="cpu", splits="torch-fidelity"):
        device = float64_device(device)
        self.split_of, count = _splits(num_images, splits)
        self.split_of = self.split_of.to(device)
        self.entropy = torch.zeros(count, dtype=torch.float64, device=device)
        self.probability = torch.zeros(count, classes, dtype=torch.float64, device=device)
        self.counts = torch.zeros(count, dtype=torch.float64, device=device)

    def add(self, indices, logits):
        """Add logits (n, classes) of the images with these indices."""
        split = self.split_of[torch.as_tensor(indices, device=self.split_of.device)]
        logits = logits.to(self.entropy.device).double()
        probability = logits.softmax(1)
        self.entropy.index_add_(0, split, (probability * logits.log_softmax(1)).sum(1))
        self.probability.index_add_(0, split, probability)
        self.counts.index_add_(0, split, torch.ones_like(split, dtype=torch.float64))

    def reduce(self):
        """Add up the sums of all processes."""
        for value in (self.entropy, self.probability, self.counts):
            dist.all_reduce(value)

    def result(self):
        """(mean over the splits, standard deviation)."""
        mean = self.probability / self.counts.unsqueeze(1)
        # classes of probability 0 contribute nothing
        scores = (self.entropy / self.counts - torch.special.xlogy(mean, mean).sum(1)).exp()
        return scores.mean().item(), scores.std(correction=0).item()


def _splits(num_images, splits):
    """(the split of each image, (num_images,) int64; the number of splits)."""
    if splits not in SPLITS:
        raise ValueError(f"splits {splits!r}: expected one of {', '.join(SPLITS)}")
    if splits == "adm":
        return torch.arange(num_images) // 5000, max(1, -(-num_images // 5000))
    count = 10
    if num_images < count:
        raise ValueError(
            f"{num_images} images: expected at least {count}, for an Inception Score with that "
            "many splits"
        )
    bounds = torch.arange(1, count) * num_images // count
    place = np.argsort(np.random.RandomState(2020).permutation(num_images))
    return torch.bucketize(torch.from_numpy(place), bounds, right=True), count


@dataclass
class Summary:
    """Statistics of a set of images: sufficient for every metric, far smaller than the images."""

    num_images: int
    statistics: dict  # mu, sigma, count
    inception_score: tuple | None = None  # mean, standard deviation over the splits
    accuracy: float | None = None  # of the extractor's classes, if labels are known
    features: torch.Tensor | None = field(default=None, repr=False)  # (num_images, D), if stored


class Accumulator:
    """Computes the Summary of a set in the features of one extractor, from all processes' batches.

    keep_features: whether to store features, for metrics that compare single images. splits: splits
    of the Inception Score; None for no such score.
    """

    def __init__(self, extractor, num_images, keep_features=False, splits=None):
        self.extractor, self.keep_features = extractor, keep_features
        device = extractor.device
        self.statistics = RunningStatistics(extractor.width, device)
        self.score = None
        if splits and extractor.classes:
            self.score = RunningInceptionScore(num_images, extractor.classes, device, splits)
        self.features = []
        self.correct = torch.zeros(2, dtype=torch.float64, device=float64_device(device))

    def add(self, indices, images, labels=None):
        """Images uint8 (n, H, W, 3) with their indices and, where known, labels."""
        if not len(images):
            return
        features, logits = self.extractor(images)
        self.statistics.add(features)
        if self.score:
            self.score.add(indices, logits)
        if logits is not None and labels is not None:
            labels = torch.as_tensor(labels, device=logits.device)
            right = (logits.argmax(1) == labels).sum().to(self.correct.device)
            self.correct += torch.stack([right, torch.tensor(len(labels), device=right.device)])
        if self.keep_features:
            self.features.append(features.float().cpu())

    def summary(self):
        """The Summary of the images of all processes; features on rank 0 only."""
        dist.wait()  # where other processes had fewer images, or sooner
        self.statistics.reduce()
        right, seen = dist.all_reduce(self.correct).tolist()
        if self.score:
            self.score.reduce()
        return Summary(
            int(self.statistics.count),
            self.statistics.result(),
            self.score.result() if self.score else None,
            right / seen if seen else None,
            self._gathered() if self.keep_features else None,
        )

    def _gathered(self):
        none = torch.empty(0, self.extractor.width)
        parts = dist.gather(torch.cat([none, *self.features]))
        return torch.cat(parts) if parts else None


class Measurement:
    """One Accumulator per extractor, all given the same images."""

    def __init__(self, accumulators):
        self.accumulators = accumulators

    def add(self, indices, images, labels=None):
        """Images uint8 (n, H, W, 3) with their indices and, where known, labels."""
        for accumulator in self.accumulators.values():
            accumulator.add(indices, images, labels)

    def summary(self):
        """Name of the extractor -> Summary of the images of all processes."""
        return {name: each.summary() for name, each in self.accumulators.items()}


def summarize(dataset, accumulator, label, batch_size=64, workers=WORKERS):
    """The summary of a data set of (uint8 image, label) by an Accumulator or a Measurement.

    Processes divide the images among themselves. label: name of the progress bar; None for none.
    workers: loader processes, of which a data set may allow fewer by an attribute of this name.
    """
    mine = range(dist.rank(), len(dataset), dist.world_size())
    workers = min(workers, getattr(dataset, "workers", workers))
    loader = plain_loader(Subset(dataset, mine), batch_size, workers)
    progress = Progress(len(mine), label, "img")
    start = 0
    for images, labels in loader:
        indices = mine[start : start + len(images)]
        accumulator.add(indices, images, None if labels[0] < 0 else labels)
        progress.update(len(images))
        start += len(images)
    progress.close()
    return accumulator.summary()
