"""Feature extractors: images to the features in which sets of images are compared.

All are torch-fidelity's, by their names in its registry; two for small images are added here. An
Extractor knows the hash of its weights, so that figures of different networks cannot be mixed.
"""

import copy
from functools import cache

import torch
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from util.classifier import fit_classifier
from util.data import DIGITS, digits
from util.weights import digest, read_weights

INCEPTION = "inception-v3-compat"
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)


def pick_extractor(name, *sources):
    """The extractor of this name; without one, that which fits the data sets or references."""
    return name or ("digits-classifier" if DIGITS in sources else INCEPTION)


class Extractor:
    """Images uint8 (N, H, W, 3) to features (N, D) and, where the network has them, logits (N, K).

    name: in torch-fidelity's registry. weights: a file for Inception; without it, torch-fidelity's
    own download. img_size: of the images, which tells how many features pixels are. Raises
    ValueError for an unknown name, and where the weights cannot be had.

    Attributes: `width` is D, `classes` K or None, `sha256` the hash of the weights. Features and
    logits are on `device`.
    """

    def __init__(self, name=INCEPTION, weights=None, device="cpu", img_size=8):
        if name not in FEATURE_EXTRACTORS_REGISTRY:
            known = ", ".join(sorted(FEATURE_EXTRACTORS_REGISTRY))
            raise ValueError(f"extractor {name!r}: expected one of {known}")
        network = FEATURE_EXTRACTORS_REGISTRY[name]
        layers = [network.get_default_feature_layer_for_metric(m) for m in ("fid", "isc")]
        self.name, self.device = name, device
        self.layers = list(dict.fromkeys(layers))
        self.network = _create(name, self.layers, weights).to(device)
        self.sha256 = digest(self.network.state_dict())
        features, logits = self(torch.zeros(1, img_size, img_size, 3, dtype=torch.uint8))
        self.width, self.classes = features.shape[1], None if logits is None else logits.shape[1]

    @torch.no_grad()
    def __call__(self, images):
        images = torch.as_tensor(images).to(self.device).permute(0, 3, 1, 2)
        outputs = self.network(images)
        return outputs[0], outputs[1] if len(outputs) > 1 else None


def _create(name, layers, weights):
    if weights is not None:
        # read it once without executing anything in it: torch-fidelity's own reading would
        read_weights(weights, entries=(), missing=f"Inception's weights are at {INCEPTION_URL}")
    try:
        return create_feature_extractor(
            name, layers, False, feature_extractor_weights_path=weights, verbose=False
        )
    except Exception as error:  # what a hub raises without a network is anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if weights is not None:
            raise ValueError(f"{weights}: not the weights of {name} ({reason})") from error
        advice = f"download {INCEPTION_URL} elsewhere and pass it as --inception_weights FILE"
        if name != INCEPTION:
            advice = "torch-fidelity fetches them where there is a network"
        raise ValueError(
            f"the weights of {name} could not be fetched ({reason}); {advice}"
        ) from error


class GreyPixels(FeatureExtractorBase):
    """The pixels themselves, averaged over the colours, in [−1, 1]."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list():
        return ("pixels",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "pixels"

    def forward(self, images):
        return (images.float().mean(1).flatten(1) / 127.5 - 1,)


class DigitsClassifier(FeatureExtractorBase):
    """A small network fitted on the real training digits, once a process and always the same.

    For a data set that no published network knows: 64 features and 10 logits.
    """

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)
        self.classifier = copy.deepcopy(_digits_classifier())

    @staticmethod
    def get_provided_features_list():
        return ("64", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "64"

    def forward(self, images):
        if images.shape[-2:] != (8, 8):
            raise ValueError(
                f"images of {images.shape[-1]}×{images.shape[-2]} pixels: the digits-classifier "
                "expects 8×8, pass another --extractor"
            )
        features = self.classifier.features(images[:, :1].float() / 127.5 - 1)
        outputs = {"64": features, "logits": self.classifier.head(features)}
        return tuple(outputs[name] for name in self.features_list)


@cache
def _digits_classifier():
    return fit_classifier(*digits("train").tensors, classes=10)


register_feature_extractor("grey-pixels", GreyPixels)
register_feature_extractor("digits-classifier", DigitsClassifier)
