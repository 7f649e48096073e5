"""The VQ autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752): VQ-16.

    images (N,3,H,W) -> encode -> latents (N,C,H/s,W/s) -> quantize -> code indices (N,H/s,W/s)
    images           <- decode <- codes (N,C,H/s,W/s)   <- lookup   <-

The latents before quantization are continuous and can serve as tokens instead; decoding then starts
by quantizing them. Modules are named as in the authors' code, see models/vae.py. The defaults are
LDM's vq-f16: stride 16, 16,384 codes of 8 dimensions, attention in the lowest level of the encoder
and of the decoder.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.autoencoder_files import vq_variant
from models.vae import Autoencoder, Decoder, Encoder
from util import dist
from util.precision import full_precision

MAX_DISTANCES = 2**24  # held at once by `nearest`: 64 MiB, however many latents there are
COMMITMENT = 0.25  # weight of the commitment loss; the codebook loss has weight 1
PATIENCE = 20  # latents per code; a code that is the nearest to none of them is revived


def nearest(points, codes):
    """Index of the code nearest to each point by Euclidean distance; the first among equals.

    points (M, C), codes (K, C) -> (M,) int64. Computed in float32 and in chunks (MAX_DISTANCES).
    """
    with full_precision(points.device.type):
        points, codes = points.float(), codes.float()
        square = codes.square().sum(1)
        # |p - c|² = |p|² + |c|² - 2 p·c, of which |p|² is the same for every code
        chunks = points.split(max(1, MAX_DISTANCES // len(codes)))
        return torch.cat([(square - 2 * chunk @ codes.T).argmin(1) for chunk in chunks])


class Codebook(nn.Module):
    """K codes of C dimensions, `embedding.weight` (K, C), initially uniform in [-1/K, 1/K]."""

    def __init__(self, num_codes, dim):
        super().__init__()
        self.embedding = nn.Embedding(num_codes, dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)

    def forward(self, latents):
        """Latents (N, C, h, w) -> indices of their nearest codes, (N, h, w) int64."""
        n, c, h, w = latents.shape
        points = latents.permute(0, 2, 3, 1).reshape(-1, c)
        return nearest(points, self.embedding.weight).view(n, h, w)


class VQModel(Autoencoder):
    """Images to latents, latents to code indices, and back.

    Args:
        embed_dim: channels C of the latents, i.e. dimensions of a code.
        num_codes: number of codes, K.
        ch_mult: width of each level in units of `ch`, full resolution first.
        ch: base width.
        encoder_attention, decoder_attention: whether the lowest level has attention.
        in_channels: channels I of the images.

    Attributes: `config`, these arguments.
    """

    diffusers = "VQModel"
    summed = False

    def __init__(
        self,
        embed_dim=8,
        num_codes=16384,
        ch_mult=(1, 1, 2, 2, 4),
        ch=128,
        encoder_attention=True,
        decoder_attention=True,
        in_channels=3,
    ):
        super().__init__()
        self.config = {
            "embed_dim": embed_dim,
            "num_codes": num_codes,
            "ch_mult": tuple(ch_mult),
            "ch": ch,
            "encoder_attention": encoder_attention,
            "decoder_attention": decoder_attention,
            "in_channels": in_channels,
        }
        self.encoder = Encoder(embed_dim, ch, ch_mult, encoder_attention, in_channels)
        self.decoder = Decoder(embed_dim, ch, ch_mult, decoder_attention, in_channels)
        self.quantize = Codebook(num_codes, embed_dim)
        self.quant_conv = nn.Conv2d(embed_dim, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, embed_dim, 1)

    @staticmethod
    def variant(state):
        return vq_variant(state)

    def as_diffusers(self):
        return super().as_diffusers() | {"num_vq_embeddings": self.num_codes}

    def as_diffusers_hidden(self):
        return super().as_diffusers_hidden() | {"norm_type": "group"}

    @property
    def num_codes(self):
        """Number of codes, K."""
        return self.config["num_codes"]

    def encode(self, images):
        """images (N,I,H,W) in [-1,1] -> latents (N,C,H/stride,W/stride), before quantization.

        `quantize(latents)` is the Codebook: (N,C,h,w) -> code indices (N,h,w).

        Raises:
            ValueError: as AutoencoderKL.encode.
        """
        self._check_images(images)
        return self.quant_conv(self.encoder(images))

    def lookup(self, indices):
        """Code indices (N,h,w), integers -> codes (N,C,h,w).

        Raises:
            ValueError: indices that are not integers from 0 to num_codes - 1.
        """
        if indices.is_floating_point():
            raise ValueError(f"code indices must be integers, got {indices.dtype}")
        low, high = indices.min().item(), indices.max().item()
        if low < 0 or high >= self.num_codes:
            raise ValueError(
                f"code indices from {low} to {high}: expected 0 to {self.num_codes - 1}"
            )
        return self._codes(indices)

    def decode(self, latents):
        """codes (N,C,h,w) -> images (N,I,h*stride,w*stride), unclipped.

        Does not quantize: for latents call `decode(lookup(quantize(latents)))`, which is what the
        decoder was trained on.

        Raises:
            ValueError: wrong shape.
        """
        self._check_latents(latents)
        return self.decoder(self.post_quant_conv(latents))

    def forward(self, images, generator=None):
        """Training: images (N,I,H,W) -> (decoded images, latents (N,C,h,w), indices (N,h,w)).

        The decoder is given the codes; its gradient is copied to the latents, the straight-through
        estimator (Bengio et al. 2013, van den Oord et al. 2017). Deterministic.
        """
        latents = self.encode(images).float()
        indices = self.quantize(latents)
        codes = latents + (self._codes(indices) - latents).detach()
        return self.decode(codes), latents, indices

    def losses(self, images, output):
        """Name -> scalar; their sum is the training loss of `output = model(images)`.

        The mean absolute error, and the codebook and commitment losses of van den Oord et al. 2017,
        eq. 3. LDM's perceptual and adversarial losses are left out.
        """
        decoded, latents, indices = output
        codes = self._codes(indices)
        return {
            "l1": F.l1_loss(decoded.float(), images),
            "codebook": F.mse_loss(codes, latents.detach()),
            "commitment": COMMITMENT * F.mse_loss(latents, codes.detach()),
        }

    def regularizers(self, output, settings):
        """Name -> weighted scalar: the losses of the latents. settings: Losses."""
        _, latents, indices = output
        codes = self._codes(indices)
        return {
            "codebook": F.mse_loss(codes, latents.detach()),
            "commitment": COMMITMENT * F.mse_loss(latents, codes.detach()),
        }

    def latents(self, images, generator=None):
        """Images -> raw latents (N,C,h,w), before quantization. Deterministic."""
        return self.encode(images)

    def _codes(self, indices):
        return self.quantize.embedding(indices).permute(0, 3, 1, 2)


class Reviver:
    """Moves unused codes onto latents of the batch, drawn at random.

    A code that is the nearest to no latent gets no gradient and would never move; most codes start
    like this. A code is unused if it was the nearest to none of the last PATIENCE · K latents. The
    first step moves unused codes at once, so that training starts with codes among the latents.

    model: a VQModel. generator: torch.Generator of the draws. `revived`: number of codes moved, a
    tensor.
    """

    def __init__(self, model, generator):
        self.codes, self.generator = model.quantize.embedding.weight, generator
        self.uses = torch.zeros(len(self.codes), dtype=torch.int64, device=self.codes.device)
        self.waiting = 0  # latents until the next revival
        self.revived = torch.zeros_like(self.uses[0])

    @torch.no_grad()
    def step(self, latents, indices):
        """Call after each optimizer step, with its latents (N,C,h,w) and code indices (N,h,w)."""
        indices = indices.flatten()  # not bincount, which waits for the device
        self.uses.index_add_(0, indices, torch.ones_like(indices))
        self.waiting -= len(indices) * dist.world_size()
        if self.waiting > 0:
            return
        dead = dist.all_reduce(self.uses) == 0
        self.codes.copy_(torch.where(dead[:, None], self._places(latents), self.codes))
        self.revived += dead.sum()
        self.uses.zero_()
        self.waiting = PATIENCE * len(self.codes)

    def _places(self, latents):
        """A latent of rank 0 for each code, (K, C); none repeats until all have been used."""
        points = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).float()
        device = self.generator.device
        order = torch.randperm(len(points), generator=self.generator, device=device)
        turns = torch.arange(len(self.codes), device=device) % len(points)
        places = points[order[turns].to(points.device)]
        return dist.all_reduce(places if dist.is_main() else torch.zeros_like(places))
