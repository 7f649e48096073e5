"""Figures of sets of images in three pure steps: features, statistics, numbers. All in float64.

Statistics are running sums, so they can be gathered batch by batch and over processes, and nobody
needs all the images. Numbers are torch-fidelity's where it has them.
"""

import numpy as np
import torch
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchvision.transforms.functional import gaussian_blur

from util.dist import all_reduce

NEIGHBOURS = 3  # Kynkäänniemi et al. 2019
SSIM_WINDOW = 11  # pixels; Wang et al. 2004


class RunningStatistics:
    """Mean and covariance of features (N, width), from sums that processes can add up."""

    def __init__(self, width, device="cpu"):
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.products = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, features):
        """Features (n, width) of some more images."""
        features = features.double()
        self.count += len(features)
        self.total += features.sum(0)
        self.products += features.T @ features

    def reduce(self):
        """Add up the sums of all processes."""
        for value in (self.count, self.total, self.products):
            all_reduce(value)

    def result(self):
        """{"mu": (width,), "sigma": (width, width), "count"}. Raises ValueError for one image."""
        count = int(self.count)
        if count < 2:
            raise ValueError(f"{count} images: expected at least 2, for a covariance")
        mu = self.total / count
        sigma = (self.products - count * torch.outer(mu, mu)) / (count - 1)
        return {"mu": mu.cpu().numpy(), "sigma": sigma.cpu().numpy(), "count": count}


def frechet_distance(statistics1, statistics2):
    """Fréchet distance of two Gaussians, each {"mu", "sigma"} (Heusel et al. 2017).

    With Inception's features it is the FID. Raises ValueError where the widths differ or a value
    is not finite.
    """
    pair = [
        {k: np.asarray(s[k], dtype=np.float64) for k in ("mu", "sigma")}
        for s in (statistics1, statistics2)
    ]
    widths = [len(s["mu"]) for s in pair]
    if widths[0] != widths[1]:
        raise ValueError(f"statistics of {widths[0]} and {widths[1]} features: expected the same")
    if not all(np.isfinite(value).all() for s in pair for value in s.values()):
        raise ValueError("statistics that are not finite have no Fréchet distance")
    return float(next(iter(fid_statistics_to_metric(*pair, verbose=False).values())))


SPLITS = ("torch-fidelity", "adm")


class RunningInceptionScore:
    """Inception Score of num_images images, from sums over each of its splits.

    splits: "torch-fidelity", ten of equal size after its own shuffle; or "adm", consecutive 5,000
    images, as they come. Raises ValueError for too few images or an unknown name.
    """

    def __init__(self, num_images, classes, device="cpu", splits="torch-fidelity"):
        if splits not in SPLITS:
            raise ValueError(f"splits {splits!r}: expected one of {', '.join(SPLITS)}")
        if splits == "adm":
            self.split_of = torch.arange(num_images, device=device) // 5000
            count = max(1, -(-num_images // 5000))
        else:
            count = 10
            if num_images < count:
                raise ValueError(f"{num_images} images: expected at least {count}, for its splits")
            bounds = torch.arange(1, count) * num_images // count
            place = np.argsort(np.random.RandomState(2020).permutation(num_images))
            self.split_of = torch.bucketize(torch.from_numpy(place), bounds, right=True).to(device)
        self.entropy = torch.zeros(count, dtype=torch.float64, device=device)
        self.probability = torch.zeros(count, classes, dtype=torch.float64, device=device)
        self.counts = torch.zeros(count, dtype=torch.float64, device=device)

    def add(self, indices, logits):
        """Logits (n, classes) of the images with these indices."""
        split = self.split_of[torch.as_tensor(indices, device=self.split_of.device)]
        logits = logits.double()
        probability = logits.softmax(1)
        self.entropy.index_add_(0, split, (probability * logits.log_softmax(1)).sum(1))
        self.probability.index_add_(0, split, probability)
        self.counts.index_add_(0, split, torch.ones_like(split, dtype=torch.float64))

    def reduce(self):
        """Add up the sums of all processes."""
        for value in (self.entropy, self.probability, self.counts):
            all_reduce(value)

    def result(self):
        """(mean over the splits, standard deviation)."""
        mean = self.probability / self.counts.unsqueeze(1)
        # classes of probability 0 add nothing
        scores = (self.entropy / self.counts - torch.special.xlogy(mean, mean).sum(1)).exp()
        return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(*, generated, real, neighbours=NEIGHBOURS):
    """(precision, recall) of features (N, D) and (M, D) (Kynkäänniemi et al. 2019).

    Precision is the share of generated images within the real ones' manifold, recall the share of
    real ones within the generated ones': exchanged, they would be each other, so both are named.
    Raises ValueError for too few images.
    """
    for name, features in (("generated", generated), ("real", real)):
        if len(features) <= neighbours:
            raise ValueError(
                f"{len(features)} {name} images: expected more than {neighbours}, the neighbours"
            )
    figures = prc_features_to_metric(
        generated.float(),
        real.float(),
        prc_neighborhood=neighbours,
        save_cpu_ram=max(len(generated), len(real)) ** 2 > 10**8,
        verbose=False,
    )
    return figures["precision"], figures["recall"]


def psnr(images1, images2):
    """Peak signal-to-noise ratio in dB of images (N, C, H, W) in [−1, 1]: (N,)."""
    error = (images1.double() - images2.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error)


def ssim(images1, images2):
    """Structural similarity of images (N, C, H, W) in [−1, 1]: (N,) (Wang et al. 2004).

    Gaussian window of deviation 1.5, valid positions only; the colours averaged.
    Raises ValueError for images smaller than the window.
    """
    if min(images1.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"images of {tuple(images1.shape[-2:])} pixels: expected at least 11×11")
    edge = SSIM_WINDOW // 2

    def blur(x):
        return gaussian_blur(x, SSIM_WINDOW, 1.5)[..., edge:-edge, edge:-edge]

    x, y = (images1.double() + 1) / 2, (images2.double() + 1) / 2
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return score.flatten(1).mean(1)
