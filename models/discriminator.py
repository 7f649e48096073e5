"""The discriminator of an autoencoder's adversarial loss, and its own loss.

PatchGAN (Isola et al. 2017, arXiv 1611.07004) as VQGAN and latent diffusion use it: every logit
judges a patch, 70×70 pixels for three layers. Modules are numbered as in the authors' code.
"""

import torch.nn as nn
import torch.nn.functional as F

MAX_WIDTH = 8  # of a layer, in base widths


class PatchDiscriminator(nn.Module):
    """Images (N,in_channels,H,W) -> logits (N,1,h,w), one for each patch; high for real images.

    ch: base width. layers: number of convolutions that halve the image, so h = H // 2**layers - 2.
    Raises ValueError for images with a side below `smallest_side(layers)`.
    """

    def __init__(self, in_channels=3, ch=64, layers=3):
        super().__init__()
        self.layers = layers
        widths = [ch * min(2**i, MAX_WIDTH) for i in range(layers + 1)]
        main = [nn.Conv2d(in_channels, ch, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(layers):
            main += _layer(widths[i], widths[i + 1], stride=2 if i < layers - 1 else 1)
        self.main = nn.Sequential(*main, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.apply(_initialize)

    def forward(self, images):
        check_sides(self.layers, images.shape[2:])
        return self.main(images)


class Pair(nn.Module):
    """A discriminator of real and decoded images: two calls in the one forward that DDP allows."""

    def __init__(self, discriminator):
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real, fake):
        """Images (N,C,H,W) twice -> their logits. Each has its own batch statistics."""
        return self.discriminator(real), self.discriminator(fake)


def hinge(real, fake):
    """The hinge loss of a discriminator's logits for real and decoded images, a scalar."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def smallest_side(layers):
    """The smallest side in pixels of images for a discriminator: it leaves one logit."""
    return 3 * 2**layers


def check_sides(layers, sides):
    """Raises ValueError for images, sides (height, width), too small for this many layers."""
    if min(sides) >= smallest_side(layers):
        return
    fitting = [n for n in range(1, layers) if min(sides) >= smallest_side(n)]
    advice = f"--disc_layers {fitting[-1]} fits" if fitting else "no number of layers fits"
    raise ValueError(
        f"--disc_layers {layers}: images of {'×'.join(map(str, sides))} pixels, expected sides of "
        f"at least {smallest_side(layers)}; {advice}"
    )


def _layer(c_in, c_out, stride):
    conv = nn.Conv2d(c_in, c_out, 4, stride, padding=1, bias=False)  # the norm has a bias
    return conv, nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2)


def _initialize(module):
    """pix2pix's initial weights; biases of convolutions keep torch's, as in the authors' code."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)
