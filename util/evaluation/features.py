"""Feature extractors: from images to the features in which sets of images are compared.

Any extractor of torch-fidelity by its name, any network of timm as `timm:NAME`, or a row of
EXTRACTORS, ours. An Extractor has the hash of its weights, so that metrics in different features
cannot be mixed.
"""

import copy
from functools import cache
from io import BytesIO
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from util.classifier import fit_classifier
from util.data import kind_of
from util.data.digits import digits
from util.evaluation.fitted import FittedClassifier
from util.evaluation.metrics import INCEPTION, SPATIAL, TIMM
from util.sizes import sides
from util.table import Table
from util.timm_models import open_timm
from util.weights import digest, never_unpickling, read_weights

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
# Smaller images are enlarged to it for timm's, made for 224 pixels. At 64 pixels
# tf_efficientnet_lite0 recognizes 25% of pictures of 64 pixels, at 96 42%, at 224, for five times
# the time, 48%.
SMALLEST = 96
# To this size networks without a classifier are set that are made for a larger one, as DINOv2's for
# 518 pixels: distances in its features are published at 224 pixels (Stein et al. 2023).
LARGEST = 224
NONE = "none"  # as an --extractor: no features at all


def pick_extractors(settings, *sources):
    """Names of the extractors by an Evaluation, the main one first; () if there are to be none.

    If it names none, the usual one for the data sets or references. Raises ValueError.
    """
    usual = [kind.extractor for kind in map(kind_of, sources) if kind and kind.extractor]
    names = settings.extractors or (next(iter(usual), INCEPTION),)
    if names == (NONE,):
        return ()
    if NONE in names or len(set(names)) < len(names):
        raise ValueError(f"--extractor {' '.join(names)}: expected different extractors, or none")
    return names


def open_extractors(names, settings, device="cpu", img_size=8, data=None, more=()):
    """Name -> Extractor, by an Evaluation. Raises ValueError.

    more: names of those in which further metrics are; for the other arguments see Extractor.
    """
    files = settings.files(names) if names else {}
    for name, file in files.items():
        if not _has_weights(name):
            raise ValueError(f"--extractor_weights {file}: the extractor {name} has none")
    for name in {INCEPTION, SPATIAL} - {*files}:
        files[name] = settings.inception_weights
    opened = dict.fromkeys([*names, *more])
    return {name: Extractor(name, files.get(name), device, img_size, data) for name in opened}


def described(extractors):
    """Entries of reports on the extractors that were used, name -> Extractor."""
    if not extractors:
        return {"extractor": NONE}
    (name, sha256), *more = [(each.name, each.sha256) for each in extractors.values()]
    found = {"extractor": name, "extractor_sha256": sha256}
    return found | ({"more_extractors": dict(more)} if more else {})


def _has_weights(name):
    return name not in EXTRACTORS or "weights" in _needs(EXTRACTORS[name])


def _needs(row):
    """What a row of EXTRACTORS is opened with: names of arguments."""
    return getattr(row, "needs", ())


class Extractor:
    """Images uint8 (N, H, W, 3) to features (N, D) and, where the network has them, logits (N, K).

    name: in EXTRACTORS or in torch-fidelity's registry, or `timm:` and a name of timm. weights: a
    file of a published network's; without it, they are downloaded. img_size: side of the images, or
    (height, width), which determines the number of features of grey-pixels. data: the
    `fitted.Labelled` images that `classifier` is fitted on, if there are any. Raises ValueError for
    an unknown name, or unavailable weights.

    Attributes: `width` is D, `classes` K or None, `names` those of the classes, if known, `sha256`
    the hash of the weights, `stored` the names of its statistics in files that hold those of
    several. Features and logits are on `device`.
    """

    def __init__(self, name=INCEPTION, weights=None, device="cpu", img_size=8, data=None):
        self.name, self.device = name, device
        given = {"weights": weights, "data": data, "device": device}
        if name in EXTRACTORS:
            row = EXTRACTORS[name]
            network = row(**{key: given[key] for key in _needs(row)})
        else:
            network = (_classifier if name.startswith(TIMM) else _published)(name, weights)
        self.stored, self.names = (getattr(network, key, None) for key in ("stored", "names"))
        self.network = network.to(device)
        self.sha256 = digest(self.network.state_dict())
        features, logits = self(torch.zeros(1, *sides(img_size), 3, dtype=torch.uint8))
        self.width, self.classes = features.shape[1], None if logits is None else logits.shape[1]

    @torch.no_grad()
    def __call__(self, images):
        images = torch.as_tensor(images).to(self.device).permute(0, 3, 1, 2)
        outputs = self.network(images)
        return outputs[0], outputs[1] if len(outputs) > 1 else None


def _published(name, weights, layers=None):
    """torch-fidelity's network, with the layers that it uses for the FID and the IS, or others."""
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
    from torch_fidelity.utils import create_feature_extractor

    if name not in FEATURE_EXTRACTORS_REGISTRY:
        known = ", ".join(sorted({*EXTRACTORS, *FEATURE_EXTRACTORS_REGISTRY}))
        raise ValueError(f"extractor {name!r}: expected one of {known}, timm:NAME")
    file = weights and _reread(weights)
    layer_for = FEATURE_EXTRACTORS_REGISTRY[name].get_default_feature_layer_for_metric
    layers = layers or list(dict.fromkeys([layer_for("fid"), layer_for("isc")]))
    try:
        with never_unpickling():
            return create_feature_extractor(
                name,
                layers,
                False,
                feature_extractor_weights_path=file or _fetched_script(name),
                verbose=False,
            )
    except Exception as error:  # a hub without a network can raise anything
        raise ValueError(_unavailable(name, weights, error)) from error


def _reread(path):
    """The weights of a file as a file in memory: what torch-fidelity is given is ours."""
    state = read_weights(path, entries=(), missing=f"Inception's weights are at {INCEPTION_URL}")
    file = BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def _fetched_script(name):
    """The path of a CLIP network, fetched if need be; None for other extractors.

    It is TorchScript, of which torch.load makes no weights; torch-fidelity reads a path otherwise.
    """
    from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS

    if name not in MODEL_URLS:
        return None
    sha256 = MODEL_METADATA[name]["hash"]
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{name}-{sha256}.pt"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(MODEL_URLS[name], str(path), sha256, progress=False)
    return str(path)


def _unavailable(name, weights, error):
    """A line on why the weights are unavailable, and how to get them."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    if weights is not None:
        return f"{weights}: not the weights of {name} ({reason})"
    advice = (
        f"download {INCEPTION_URL} elsewhere and pass it as --inception_weights FILE, "
        "or choose an --extractor that needs none: classifier, fitted on labelled data, or "
        "grey-pixels; for the training of a tokenizer alone, none"
    )
    if name != INCEPTION:
        advice = "torch-fidelity fetches them where there is a network"
    return f"the weights of {name} could not be fetched ({reason}); {advice}"


def _classifier(name, weights):
    return Classifier(open_timm(name.removeprefix(TIMM), weights, "--extractor")).eval()


class Classifier(nn.Module):
    """A model of timm: the features that its classifier is given, and the logits, if it has one.

    Of those without one, what timm has a classifier given: of DINOv2 the class token, of DINOv3 the
    mean of the patches.
    """

    def __init__(self, model):
        super().__init__()
        self.model, own = model, model.pretrained_cfg
        self.side = own["input_size"][1:] if own.get("fixed_input_size") else None
        if self.side and min(self.side) > LARGEST and not model.num_classes:
            self.side = LARGEST, LARGEST
            model.set_input_size(self.side)  # interpolates position embeddings
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(own[name]).view(-1, 1, 1))

    def forward(self, images):
        """Images uint8 (N, 3, H, W) to features (N, D) and logits (N, K)."""
        images = (self.enlarged(images.float()).clamp(0, 255) / 255 - self.mean) / self.std
        features = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
        if not self.model.num_classes:
            return (features,)
        return features, self.model.get_classifier()(features)

    def enlarged(self, images):
        """Images of the size that the model takes; others are enlarged to SMALLEST, if smaller."""
        height, width = images.shape[-2:]
        factor = max(1, SMALLEST / min(height, width))
        size = self.side or (round(height * factor), round(width * factor))
        if tuple(size) == (height, width):
            return images
        return F.interpolate(images, size=size, mode="bicubic", antialias=True)


class Spatial(nn.Module):
    """What the sFID compares (Nash et al. 2021): Inception's features at 17×17 places.

    The first 7 channels of the layer that is called mixed_6/conv in the graph of ADM's evaluator,
    and in its order: rows, columns, channels.
    """

    needs, stored = ("weights",), ("mu_s", "sigma_s")

    def __init__(self, weights):
        super().__init__()
        self.network = _published(INCEPTION, weights, ["768"])  # of the last layer of this width

    def forward(self, images):
        """Images uint8 (N, 3, H, W) to features (N, 2023)."""
        found = []
        layer = self.network.Mixed_6d.branch1x1
        hook = layer.register_forward_hook(lambda *call: found.append(call[-1]))
        try:
            self.network(images)
        finally:
            hook.remove()
        return (found[0][:, :7].permute(0, 2, 3, 1).flatten(1).float(),)


class GreyPixels(nn.Module):
    """Pixels in [−1, 1], averaged over the color channels."""

    def forward(self, images):
        """Images uint8 (N, 3, H, W) to features (N, H·W)."""
        return (images.float().mean(1).flatten(1) / 127.5 - 1,)


class CoarsePixels(nn.Module):
    """Colors in [−1, 1], averaged over 8×8 parts of the image: few features, for few images."""

    def forward(self, images):
        """Images uint8 (N, 3, H, W) to features (N, 192)."""
        return (F.adaptive_avg_pool2d(images.float() / 127.5 - 1, 8).flatten(1),)


class DigitsClassifier(nn.Module):
    """A small network trained on the real training digits, once per process, deterministically.

    For a data set that no published network covers: 64 features and 10 logits.
    """

    def __init__(self):
        super().__init__()
        self.classifier = copy.deepcopy(_digits_classifier())

    def forward(self, images):
        """Images uint8 (N, 3, 8, 8) to features (N, 64) and logits (N, 10)."""
        if images.shape[-2:] != (8, 8):
            raise ValueError(
                f"images of {images.shape[-2]}×{images.shape[-1]} pixels: the digits-classifier "
                "expects 8×8, pass another --extractor"
            )
        features = self.classifier.features(images[:, :1].float() / 127.5 - 1)
        return features, self.classifier.head(features)


@cache
def _digits_classifier():
    return fit_classifier(*digits("train").tensors, classes=10)


# name -> module from images uint8 (N, 3, H, W) to (features (N, D),) or (features, logits (N, K)).
# Its attribute `needs`, if it has one: which of weights, data and device it is opened with.
EXTRACTORS = Table(
    "extractor",
    {
        "grey-pixels": GreyPixels,
        "coarse-pixels": CoarsePixels,
        "digits-classifier": DigitsClassifier,
        "classifier": FittedClassifier,
        SPATIAL: Spatial,
    },
)
