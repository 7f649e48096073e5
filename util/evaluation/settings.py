"""Settings of the evaluation of images, from which scripts create their flags."""

from dataclasses import dataclass

from util.data import describe_paths
from util.evaluation.metrics import METRICS, SPLITS
from util.flags import OneOrMore, nonnegative_int, positive_int
from util.labels import LABELS
from util.settings import Settings, setting


@dataclass(frozen=True)
class Evaluation(Settings):
    """The reference, the feature extractor and the metrics of an evaluation."""

    reference: str | None = setting(
        "auto",
        "a folder of images, an .npz (mu and sigma, or images in arr_0) or a data set "
        f"({describe_paths()}), of which held-out images are used if it has any; auto: "
        "fid_stats/adm_in<img_size>_stats.npz if it exists and the data are ImageNet, else "
        "--data_path; none: only metrics without a reference",
        metavar="PATH",
        otherwise="no reference",
    )
    metrics: tuple | None = setting(
        None,
        f"metrics to compute: {', '.join(METRICS)}",
        nargs="+",
        choices=METRICS,
        metavar="NAME",
        otherwise="the usual ones, in the features of --extractor",
    )
    extractor: str | tuple | None = setting(
        None,
        "networks whose features are compared, the main one first: torch-fidelity's "
        "inception-v3-compat, dinov2-vit-l-14, …; timm:NAME, any network of timm; classifier, "
        "fitted on the data's labels; digits-classifier, grey-pixels or coarse-pixels. none: no "
        "distances",
        nargs="+",
        action=OneOrMore,
        metavar="NAME",
        otherwise="that of the data set, such as digits-classifier, else inception-v3-compat",
    )
    extractor_weights: str | tuple | None = setting(
        None,
        "weights of --extractor; of further ones NAME=FILE",
        nargs="+",
        action=OneOrMore,
        metavar="FILE",
        otherwise="downloaded",
    )
    inception_weights: str | None = setting(
        None, "Inception's weights", metavar="FILE", otherwise="torch-fidelity downloads them"
    )
    isc_splits: str = setting(
        "torch-fidelity",
        "splits of the Inception Score: ten parts after a shuffle, or consecutive 5,000 images",
        choices=SPLITS,
    )
    stats_dir: str = setting(
        "fid_stats",
        "folder of cached statistics of data sets, named by all that they depend on",
        metavar="DIR",
    )

    @property
    def extractors(self):
        """Names of the extractors, the main one first; () if the data decide."""
        return _listed(self.extractor)

    def files(self, names):
        """Name -> file of its weights, of those of these extractors that have one; names[0] is the
        main one. Raises ValueError for two files of one extractor."""
        found = {}
        for text in _listed(self.extractor_weights):
            name, _, file = text.partition("=")
            if not file or name not in names:
                name, file = names[0], text
            if name in found:
                raise ValueError(
                    f"--extractor_weights {found[name]} {file}: two files of {name}, expected "
                    "NAME=FILE for those of other extractors"
                )
            found[name] = file
        return found


def _listed(value):
    """A text, or several of them, or None, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value or ())


# the fields that choose the networks alone
NETWORK = ("extractor", "extractor_weights", "inception_weights")


@dataclass(frozen=True)
class Occasions(Settings):
    """When a training script evaluates, and what it samples for that."""

    evaluate: bool = setting(False, "evaluate EMA samples instead of training")
    online_eval: bool = setting(
        False, "evaluate every --eval_freq epochs, with EMA and raw weights"
    )
    out: tuple = setting(
        (),
        "with --evaluate, save the images: .png for a grid, .npz for one file, else a folder "
        "(default: none)",
        nargs="*",
        metavar="PATH",
    )
    num_images: int = setting(
        50000,
        "images to sample, over all classes; 0 with --evaluate: none, for the held-out loss alone",
        type=nonnegative_int,
    )
    labels: str = setting(
        "balanced",
        "classes of the images: equally many of each, or drawn at random, each as often as in the "
        "training data",
        choices=LABELS,
    )
    eval_bsz: int = setting(64, "images per batch", type=positive_int)


@dataclass(frozen=True)
class Images(Settings):
    """The images that a tokenizer reconstructs."""

    split: str = setting(
        "train", "split to evaluate: train, or another one of the data set, such as val or test"
    )
    num_images: int = setting(
        None,
        "evaluate N images, spread evenly over the data set",
        type=positive_int,
        metavar="N",
        otherwise="all",
    )
    batch_size: int = setting(64, "images per batch and process", type=positive_int)
