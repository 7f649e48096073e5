"""Perceptual losses: distances between images in the features of a frozen network.

`lpips` is LPIPS with VGG-16 (Zhang et al. 2018, arXiv 1801.03924): the weighting of its features
comes with the package, VGG's weights are fetched or a file. `timm:NAME` is the same without a
weighting, in the features of any convolutional network of timm, fetched or a file.
"""

import math
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from util.files import first_line
from util.table import Table
from util.timm_models import open_timm
from util.weights import load_strictly, read_weights

SMALLEST = 32  # smaller images are enlarged: at stride 16 this leaves 2×2 positions
MAX_STRIDE = 16  # of the levels compared, VGG's deepest; at stride 32 CIFAR would be one position


def open_perceptual(name, weights=None):
    """The module of a perceptual loss by the name that `--perceptual` has; None for "none".

    weights: file of its network's weights; without it they are fetched. The module takes images
    (N,C,H,W) in [-1,1] and decoded ones, C 1 or 3, and returns their distances, (N,) float32.
    Raises ValueError for an unknown name and for weights that cannot be had or do not fit.
    """
    kind, colon, network = name.partition(":")
    module = PERCEPTUAL[f"{kind}:NAME" if colon else kind](network, weights)
    return module and module.eval().requires_grad_(False)


class Perceptual(nn.Module):
    """Base class: squared differences of features, averaged over positions and summed over levels.

    The features of each position have norm 1. A subclass has `features`, of RGB images (N,3,H,W) in
    [-1,1] a list of (N,D,h,w), one for each level, and `weigh(level, squares)`.
    """

    def forward(self, images, decoded):
        """Images (N,C,H,W) in [-1,1], C 1 or 3, and decoded ones -> distances (N,), float32.

        Grey images become RGB. Those with a side below SMALLEST are enlarged by an integer factor.
        Computed without autocast: close images differ by less than half precision resolves.
        """
        with torch.autocast(images.device.type, enabled=False):
            levels = zip(self._units(images), self._units(decoded), strict=True)
            squares = [(a - b).square() for a, b in levels]
            return sum(self.weigh(i, x).mean((1, 2, 3)) for i, x in enumerate(squares))

    def _units(self, images):
        # not the package's normalization, whose gradient is NaN where all features are 0
        return [F.normalize(level, dim=1) for level in self.features(_prepared(images))]


def _prepared(images):
    """RGB images in float32, large enough."""
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images of {images.shape[1]} channels: a perceptual loss expects 1 or 3")
    images = images.float().expand(-1, 3, -1, -1)
    factor = math.ceil(SMALLEST / min(images.shape[2:]))
    return F.interpolate(images, scale_factor=factor, mode="bilinear") if factor > 1 else images


# ---- LPIPS ----------------------------------------------------------------------------------


class Lpips(Perceptual):
    """LPIPS with VGG-16, by the package.

    state: state dict of torchvision's vgg16, of which only `features` is used. source: file or URL
    that it is from, for messages.
    """

    def __init__(self, state, source):
        super().__init__()
        import lpips

        with torch.device("meta"), warnings.catch_warnings():  # 138M random weights take seconds
            warnings.simplefilter("ignore")  # of torchvision, about the package's arguments
            network = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
        network = network.to_empty(device="cpu")
        network.scaling_layer = lpips.ScalingLayer()
        path = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
        linear = {name.removeprefix("lin"): value for name, value in read_weights(path).items()}
        load_strictly(network.lins, linear, path)
        # `slice2.5.weight` here is `features.5.weight` there
        theirs = {name: "features." + name.split(".", 1)[1] for name in network.net.state_dict()}
        found = {name: state[old] for name, old in theirs.items() if old in state}
        load_strictly(network.net, found, source, f"Expected torchvision's vgg16: {vgg_url()}")
        self.network = network

    def features(self, images):
        return self.network.net(self.network.scaling_layer(images))

    def weigh(self, level, squares):
        return self.network.lins[level](squares)


def vgg_url():
    """Where torchvision's VGG-16 is."""
    return _vgg_weights().url


def _vgg_weights():
    from torchvision.models import VGG16_Weights

    return VGG16_Weights.IMAGENET1K_V1


def _open_lpips(_, weights):
    if weights:
        return Lpips(read_weights(weights, missing=f"torchvision's vgg16 is {vgg_url()}"), weights)
    try:
        state = _vgg_weights().get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # without a network, a proxy's or the disk's can be anything
        raise ValueError(
            f"--perceptual lpips: VGG-16 could not be fetched ({first_line(error)}); download "
            f"{vgg_url()} elsewhere and pass it as --perceptual_weights FILE, or use "
            "--perceptual timm:NAME with a file of that network"
        ) from error
    return Lpips(state, vgg_url())


# ---- timm -----------------------------------------------------------------------------------


class Features(Perceptual):
    """LPIPS without its weighting, in the features of a model of timm.

    The levels are those that timm names, of stride 16 at most, like VGG's.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.levels = [
            i for i, level in enumerate(model.feature_info) if level["reduction"] <= MAX_STRIDE
        ]
        for name in ("mean", "std"):
            value = torch.tensor(model.pretrained_cfg[name]).view(-1, 1, 1)
            self.register_buffer(name, value)

    def features(self, images):
        images = ((images + 1) / 2 - self.mean) / self.std
        return self.model.forward_intermediates(
            images, indices=self.levels, stop_early=True, intermediates_only=True
        )

    def weigh(self, level, squares):
        return squares.sum(1, keepdim=True)


def _open_timm(name, weights):
    return _checked(open_timm(name, weights, "--perceptual"), name)


@torch.no_grad()
def _checked(model, name):
    """The Features of a model. Raises ValueError if images of SMALLEST pixels have none."""
    try:
        features = Features(model.eval())
        if not features.levels:
            raise ValueError(f"no level has a stride of {MAX_STRIDE} or less")
        features(*torch.zeros(2, 1, 3, SMALLEST, SMALLEST))
    except Exception as error:  # some take images of one size only, some have no levels
        raise ValueError(
            f"--perceptual timm:{name}: no features of {SMALLEST}×{SMALLEST} pixels "
            f"({first_line(error)}); expected a convolutional network"
        ) from error
    return features


def _open_none(_, weights):
    if weights:
        raise ValueError(f"--perceptual_weights {weights}: expected a --perceptual with it")


# kind -> function of (name of the network, file or None) that opens a Perceptual
PERCEPTUAL = Table(
    "--perceptual", {"none": _open_none, "lpips": _open_lpips, "timm:NAME": _open_timm}
)
