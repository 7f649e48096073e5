"""Principal components of patches of pixels: a linear network for a tokenizer, fitted in seconds.

It is not the paper's. A convolutional tokenizer needs hours on a CPU before it is as good, so this
one lets a small model of small images learn at once. One scale per channel makes its latents
white: raw pixels are so correlated that their mean colour is still visible in the noise of late
timesteps.
"""

import torch
from torch import nn
from torch.nn import functional as F

from models.vae import check_images
from util.weights import load_strictly, read_weights


class PatchPCA(nn.Module):
    """The coordinates of each patch of p×p pixels along its first C principal components.

    embed_dim: C, at most I·p². stride: p. in_channels: I. A new network has random components until
    `fit`. Raises ValueError for a C that there is not.

    Attributes: `config`, these arguments; `stride`.
    """

    num_codes = None
    fixed_scale, own_losses, fitted = None, (), True  # see models.vae.Autoencoder

    def __init__(self, embed_dim=24, stride=8, in_channels=3):
        super().__init__()
        self.config = {"embed_dim": embed_dim, "stride": stride, "in_channels": in_channels}
        self.stride, numbers = stride, in_channels * stride**2
        if embed_dim > numbers:
            raise ValueError(
                f"embed_dim {embed_dim}: patches of {stride}×{stride} pixels have {numbers} numbers"
            )
        self.register_buffer("mean", torch.zeros(in_channels, 1, 1))
        rows = nn.init.orthogonal_(torch.empty(embed_dim, numbers))
        self.register_buffer("components", rows.view(embed_dim, in_channels, stride, stride))

    @classmethod
    def from_file(cls, path):
        """The network in the file at `path`. Raises ValueError for another."""
        state = read_weights(path)
        shape = state["components"].shape if "components" in state else ()
        if len(shape) != 4 or shape[2] != shape[3]:
            raise ValueError(f"{path}: not the components of patches, expected a file of pca")
        network = cls(shape[0], shape[2], shape[1])
        load_strictly(network, state, path)
        return network

    @torch.no_grad()
    def fit(self, mean, covariance):
        """Take the components from the statistics of patches: (I·p²,) and (I·p², I·p²), float64."""
        own = mean.view(len(self.mean), -1)
        center = own.mean(1, keepdim=True)  # the same for all pixels of a channel
        rest = (own - center).flatten()
        _, vectors = torch.linalg.eigh(covariance + torch.outer(rest, rest))
        rows = vectors.T.flip(0)[: len(self.components)]  # the largest come last
        signs = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()  # the same everywhere
        self.components.copy_((rows * signs).view_as(self.components))
        self.mean.copy_(center.view_as(self.mean))

    def patches(self, images):
        """The patches of images (N, I, H, W), as rows (N·h·w, I·p²)."""
        rows = F.unfold(images, self.stride, stride=self.stride)  # (N, I·p², h·w)
        return rows.transpose(1, 2).flatten(0, 1)

    def encode(self, images):
        """Images (N, I, H, W) in [-1, 1] to latents (N, C, H/p, W/p). Raises ValueError."""
        check_images(images, len(self.mean), self.stride)
        return F.conv2d(images - self.mean, self.components, stride=self.stride)

    def decode(self, latents):
        """Latents (N, C, h, w) to images (N, I, h·p, w·p)."""
        return F.conv_transpose2d(latents, self.components, stride=self.stride) + self.mean

    def latents(self, images, generator=None):
        """Latents of images, for statistics; nothing is random."""
        return self.encode(images)
