"""The metrics as functions, and METRICS, the table from which everything else follows.

A new metric is one function and one row. Reports, sweeps and their plots, TensorBoard,
results.jsonl and the metrics of real images all follow from the rows. Metrics are computed by
torch-fidelity where it has them.

Flags choose from METRICS before torch is loaded, so functions import what they need themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from util.table import Table

INCEPTION = "inception-v3-compat"  # the extractor with which a Fréchet distance is the FID
SPATIAL = "inception-v3-spatial"  # and that with which it is the sFID
TIMM = "timm:"  # begins the name of an extractor that is a network of timm
AT = "@"  # between the name of a number and the extractor, if that is not the main one
NEIGHBORS = 3  # Kynkäänniemi et al. 2019
KID_SUBSETS, KID_IMAGES = 100, 1000  # Bińkowski et al. 2018, and images in each subset
COMPARED = 512  # images whose distances to all others are computed at once
SSIM_WINDOW = 11  # pixels; Wang et al. 2004
SPLITS = ("torch-fidelity", "adm")  # of the Inception Score, see RunningInceptionScore
NEEDS = {
    "reference": "a reference",
    "features": "features of each generated image, which are then stored",
    "reference features": "a reference with images, not statistics alone",
    "logits": "an extractor with classes",
    "labels": "an extractor whose classes are the labels; left out if these are unknown",
    "training features": "training images (--data_path), and a reference of other images",
}
# of a metric of which real training images say nothing: that of the reference's is shown instead
OF_UNSEEN = {"labels", "training features"}


# ---- numbers --------------------------------------------------------------------------------


def frechet_distance(statistics1, statistics2):
    """The Fréchet distance between two Gaussians, each {"mu": (D,), "sigma": (D, D)}.

    With Inception's features it is the FID (Heusel et al. 2017). Raises ValueError if the widths
    differ or a value is not finite.
    """
    import numpy as np
    from torch_fidelity.metric_fid import fid_statistics_to_metric

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


def code_use(counts):
    """Metrics of how often each code was the nearest, (K,): name -> number.

    `codes_used`: fraction of codes in use. `code_perplexity`: exp of the entropy of their
    frequencies.
    """
    import torch

    from util.precision import float64_device

    counts = counts.to(float64_device(counts.device)).double()
    frequency = counts / counts.sum().clamp_min(1)
    entropy = -torch.special.xlogy(frequency, frequency).sum()
    used = (counts > 0).double().mean()
    return {"codes_used": used.item(), "code_perplexity": entropy.exp().item()}


def precision_recall(*, generated, real, neighbors=NEIGHBORS):
    """(precision, recall) of features (N, D) and (M, D) (Kynkäänniemi et al. 2019).

    Precision is the fraction of generated images within the manifold of real ones, recall the
    fraction of real ones within that of generated ones; the arguments are keyword-only, as swapping
    them would swap the two. Raises ValueError for too few images.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    for name, features in (("generated", generated), ("real", real)):
        if len(features) <= neighbors:
            raise ValueError(
                f"{len(features)} {name} images: expected more than {neighbors}, the neighbors"
            )
    found = prc_features_to_metric(
        generated.float(),
        real.float(),
        prc_neighborhood=neighbors,
        save_cpu_ram=max(len(generated), len(real)) ** 2 > 10**8,
        verbose=False,
    )
    return found["precision"], found["recall"]


def kernel_distance(generated, real):
    """The squared maximum mean discrepancy of features (N, D) and (M, D) in a cubic kernel.

    With Inception's features it is the KID (Bińkowski et al. 2018): the unbiased estimate, averaged
    over 100 subsets of 1,000 images, or of as many as there are, drawn with a fixed seed. Raises
    ValueError for too few images.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(KID_IMAGES, len(generated), len(real))
    if size < 2:
        raise ValueError(f"{size} images: expected at least 2, for a kernel distance")
    same = size == len(generated) == len(real)  # then so are all subsets
    found = kid_features_to_metric(
        generated.cpu().double(),
        real.cpu().double(),
        kid_subsets=1 if same else KID_SUBSETS,
        kid_subset_size=size,
        verbose=False,
    )
    return found["kernel_inception_distance_mean"]


def memorization(generated, held_out, training):
    """How often a sample is nearer to the training images than a held-out image is: in [0, 1].

    The fraction of pairs of a sample and a held-out image in which the sample has the smaller
    distance to its nearest training image; equal distances count half. 0.5 is that of held-out
    images themselves, 1 that of copies; less than 0.5 have samples unlike any image. It is the
    Mann-Whitney statistic of Meehan et al. 2020 (section 2), over the whole space instead of cells.
    Features are (N, D), (H, D) and (T, D).
    """
    import torch

    ours, theirs = (nearest(each, training) for each in (generated, held_out))
    theirs = theirs.sort().values
    least, most = (torch.searchsorted(theirs, ours, right=right) for right in (False, True))
    beyond = 1 - (least + most).cpu().double() / (2 * len(theirs))  # fraction, for each sample
    return beyond.mean().item()


def nearest(features, others):
    """The distance of each of the features (N, D) to the nearest of others (M, D): (N,)."""
    import torch

    half = others.square().sum(1) / 2
    found = [(half - some @ others.T).argmin(1) for some in features.split(COMPARED)]
    # from the difference: products do not give 0 for a copy
    return (features - others[torch.cat(found)]).norm(dim=1)


def psnr(images1, images2):
    """Peak signal-to-noise ratio in dB of images (N, C, H, W) in [−1, 1]: (N,)."""
    error = (images1.double() - images2.double()).square().flatten(1).mean(1)
    return 10 * (4 / error).log10()


def ssim(images1, images2):
    """Structural similarity of images (N, C, H, W) in [−1, 1]: (N,) (Wang et al. 2004).

    A Gaussian window of standard deviation 1.5, valid positions only, averaged over the channels.
    Raises ValueError for images smaller than the window.
    """
    from torchvision.transforms.functional import gaussian_blur

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


# ---- rows -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """A row of METRICS."""

    label: str | dict  # in plots; for several numbers name -> label, None if not plotted
    compute: Callable  # (generated: Summary, reference: Reference) -> number, or tuple of numbers
    needs: tuple = ()  # names in NEEDS
    extractor: str | None = None  # whose features it uses; None: those of --extractor
    fits: Callable = lambda extractor: True  # whether it fits one of --extractor
    least: int = 2  # images
    distance: bool = False  # whether it is one number, and lower is better
    usual: bool = True  # whether it is computed without --metrics
    new: bool = False  # whether a sweep keeps earlier results that lack it

    def __post_init__(self):
        assert set(self.needs) <= set(NEEDS), f"needs {self.needs}, expected some of {[*NEEDS]}"

    def labels(self, name):
        """Name -> label of the numbers that this row, called `name`, produces."""
        return {name: self.label} if isinstance(self.label, str) else self.label

    def within(self, name, extractor):
        """The row of the same metric, called `name`, in the features of a further extractor."""
        labels = {
            f"{key}{AT}{extractor}": label and f"{label}, {extractor}"
            for key, label in self.labels(name).items()
        }
        return replace(self, label=labels, extractor=extractor)

    def numbers(self, name, generated, reference):
        """Name -> number, without those that are unavailable for these images."""
        found = self.compute(generated, reference)
        values = found if isinstance(found, tuple) else (found,)
        named = zip(self.labels(name), values, strict=True)
        return {key: value for key, value in named if value is not None}


def _distance(generated, reference):
    return frechet_distance(generated.statistics, reference.statistics)


def _inception_score(generated, reference):
    return generated.inception_score


def _accuracy(generated, reference):
    return generated.accuracy


def _precision_recall(generated, reference):
    return precision_recall(generated=generated.features, real=reference.features)


def _kid(generated, reference):
    return kernel_distance(generated.features, reference.features)


def _kernel_distance(generated, reference):
    """In features of mean square 1, as their scale decides what a cubic kernel sees."""
    size = reference.features.square().mean().sqrt()
    return kernel_distance(generated.features / size, reference.features / size)


def _memorization(generated, reference):
    return memorization(generated.features, reference.features, reference.training)


def _is_inception(extractor):
    return extractor == INCEPTION


def _is_other(extractor):
    return extractor != INCEPTION


def _knows_labels(extractor):
    """Whether its classes are those of the data; Inception's 1,008 and timm's are ImageNet's."""
    return extractor != INCEPTION and not extractor.startswith(TIMM)


_BOTH = ("features", "reference features")
METRICS = Table(
    "metric",
    {
        "fid": Metric("FID", _distance, ("reference",), fits=_is_inception, distance=True),
        "frechet_distance": Metric(
            "Fréchet distance", _distance, ("reference",), fits=_is_other, distance=True
        ),
        "pixel_distance": Metric(
            "Fréchet distance, pixels",
            _distance,
            ("reference",),
            extractor="grey-pixels",
            distance=True,
        ),
        "sfid": Metric("sFID", _distance, ("reference",), extractor=SPATIAL, distance=True),
        "inception_score": Metric(
            {"inception_score": "IS", "inception_score_std": None}, _inception_score, ("logits",)
        ),
        "accuracy": Metric("accuracy", _accuracy, ("labels",), fits=_knows_labels),
        "precision_recall": Metric(
            {"precision": "precision", "recall": "recall"},
            _precision_recall,
            _BOTH,
            least=NEIGHBORS + 1,
        ),
        "kid": Metric("KID", _kid, _BOTH, fits=_is_inception, distance=True, new=True),
        "kernel_distance": Metric(
            "kernel distance", _kernel_distance, _BOTH, fits=_is_other, distance=True, new=True
        ),
        "memorization": Metric(
            "memorization",
            _memorization,
            (*_BOTH, "training features"),
            usual=False,
        ),
    },
)


def labels(names=None):
    """Name -> label of the numbers shown in plots and tables of sweeps, in the order of rows.

    names: those of a record, in whatever features; None for all, in those of the main extractor.
    """
    found = _all_labels()
    if names is not None:
        found = {name: _label(found, name) for name in numbers_in(names)}
    return {name: label for name, label in found.items() if label}


def ranking(found):
    """For each distance, a line with its values for several weights, the best first.

    found: name of the weights -> metrics, name -> number.
    """
    for metric, row in METRICS.rows():
        values = {name: each[metric] for name, each in found.items() if metric in each}
        if row.distance and len(values) > 1:
            best, *others = (f"{n} {values[n]:.4f}" for n in sorted(values, key=values.get))
            yield f"{metric}: best is {best}, then {', '.join(others)}"


def numbers_in(names):
    """Those of the names that are of numbers, in whatever features, in the order of rows."""
    names = [*dict.fromkeys(names)]
    return [name for key in _all_labels() for name in names if _is_of(name, key)]


def _all_labels():
    return {key: label for name, row in METRICS.rows() for key, label in row.labels(name).items()}


def _is_of(name, key):
    """Whether a name is `key`, or that in further features."""
    return name == key or name.startswith(key + AT)


def _label(labels, name):
    key, _, extractor = name.partition(AT)
    return labels[key] and ", ".join([labels[key], *filter(None, [extractor])])


def pick_metrics(names, extractor, *others):
    """Name -> Metric for these names; for None, the usual metrics in the features of the extractor.

    extractor: name of the main extractor. others: names of further ones: their rows, of the metrics
    that fit them, are called NAME@EXTRACTOR. Raises ValueError for a name that is not a metric, or
    that fits none of them.
    """
    usual = [name for name, row in METRICS.rows() if row.usual and not row.extractor]
    rows = {name: METRICS[name] for name in (usual if names is None else names)}
    chosen = {name: row for name, row in rows.items() if row.extractor or row.fits(extractor)}
    for other in others:
        fitting = {n: row for n, row in rows.items() if not row.extractor and row.fits(other)}
        chosen |= {f"{n}{AT}{other}": row.within(n, other) for n, row in fitting.items()}
    for name in names or ():
        if not any(_is_of(key, name) for key in chosen):
            fitting = [n for n, row in METRICS.rows() if row.extractor or row.fits(extractor)]
            raise ValueError(
                f"metric {name!r}: is not for the extractor {extractor}, expected some of "
                f"{', '.join(fitting)}"
            )
    return chosen
