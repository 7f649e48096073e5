"""The VQ autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752): VQ-16.

    images (N,3,H,W) -> encode -> latents (N,C,H/s,W/s) -> quantize -> ids (N,H/s,W/s)
    images           <- decode <- codes (N,C,H/s,W/s)   <- lookup   <-

The latents before quantization are continuous and can be tokens themselves; decoding them then
begins with quantizing. Modules carry the names of the authors' code, as in models/vae.py. The
defaults are LDM's vq-f16: stride 16, 16,384 codes of 8 dimensions, attention in the lowest level
of the encoder and of the decoder.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.vae import CODEBOOK, Autoencoder, Decoder, Encoder, read_variant
from util import dist
from util.precision import full_precision

MAX_DISTANCES = 2**24  # held at once by `nearest`: 64 MiB, whatever the number of latents
COMMITMENT = 0.25  # of the encoder to its codes, against the codes to the encoder's latents
PATIENCE = 20  # latents a code, to one of which at least a code in use is nearest


def nearest(points, codes):
    """The index of the nearest code to each point, by Euclidean distance; the first of equals.

    points (M, C), codes (K, C) -> (M,) int64. In float32 and by the chunk, see MAX_DISTANCES.
    """
    with full_precision(points.device.type):
        points, codes = points.float(), codes.float()
        square = codes.square().sum(1)
        # |p - c|² = |p|² + |c|² - 2 p·c, of which |p|² is the same for every code
        chunks = points.split(max(1, MAX_DISTANCES // len(codes)))
        return torch.cat([(square - 2 * chunk @ codes.T).argmin(1) for chunk in chunks])


class Codebook(nn.Module):
    """K codes of C dimensions, `embedding.weight` (K, C), uniform within 1/K of zero at first."""

    def __init__(self, num_codes, dim):
        super().__init__()
        self.embedding = nn.Embedding(num_codes, dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)

    def forward(self, latents):
        """Latents (N, C, h, w) to the numbers of their nearest codes, (N, h, w) int64."""
        n, c, h, w = latents.shape
        points = latents.permute(0, 2, 3, 1).reshape(-1, c)
        return nearest(points, self.embedding.weight).view(n, h, w)


class VQModel(Autoencoder):
    """Images to latents, latents to code numbers, and back.

    Args:
        embed_dim: channels C of a latent, which are a code's dimensions.
        num_codes: K.
        ch_mult: widths of the levels, full resolution first, in units of `ch`.
        ch: base width.
        encoder_attention, decoder_attention: whether the lowest level attends after each block.
        in_channels: of an image, I below.

    Attributes: `config`, these arguments; `VQModel(**config)` is its like.
    """

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

    @property
    def num_codes(self):
        """How many codes there are."""
        return self.config["num_codes"]

    def encode(self, images):
        """images (N,I,H,W) in [-1,1] -> latents (N,C,H/stride,W/stride), before quantization.

        `quantize(latents)` is the module above: (N,C,h,w) -> ids (N,h,w).

        Raises:
            ValueError: as AutoencoderKL.encode.
        """
        self._check_images(images)
        return self.quant_conv(self.encoder(images))

    def lookup(self, ids):
        """ids (N,h,w), integers -> their codes (N,C,h,w).

        Raises:
            ValueError: ids that are no integers of 0 to num_codes - 1.
        """
        if ids.is_floating_point():
            raise ValueError(f"ids must be integers, got {ids.dtype}")
        low, high = ids.min().item(), ids.max().item()
        if low < 0 or high >= self.num_codes:
            raise ValueError(f"ids from {low} to {high}: expected 0 to {self.num_codes - 1}")
        return self._codes(ids)

    def decode(self, latents):
        """latents (N,C,h,w), codes or nearly -> images (N,I,h*stride,w*stride), unclipped.

        Nothing is quantized here: `decode(lookup(quantize(latents)))` is what the decoder was
        trained on.

        Raises:
            ValueError: another shape.
        """
        self._check_latents(latents)
        return self.decoder(self.post_quant_conv(latents))

    def forward(self, images, generator=None):
        """For training: images -> (their decoding, latents (N,C,h,w), ids (N,h,w)).

        The decoder sees the codes, and its gradient passes them by to the latents: straight-through
        (Bengio et al. 2013, van den Oord et al. 2017). Nothing is drawn.
        """
        latents = self.encode(images).float()
        ids = self.quantize(latents)
        codes = latents + (self._codes(ids) - latents).detach()
        return self.decode(codes), latents, ids

    def losses(self, images, output):
        """Name -> scalar, which add up to the training loss of `output = model(images)`.

        The mean absolute error; codes towards their latents; latents towards their codes
        (van den Oord et al. 2017, eq. 3). LDM's recipe has a perceptual and an adversarial loss
        beside these, which are not here.
        """
        decoded, latents, ids = output
        codes = self._codes(ids)
        return {
            "l1": F.l1_loss(decoded.float(), images),
            "codebook": F.mse_loss(codes, latents.detach()),
            "commitment": COMMITMENT * F.mse_loss(latents, codes.detach()),
        }

    def latents(self, images, generator=None):
        """Images -> unscaled latents (N,C,h,w), before quantization. Nothing is drawn."""
        return self.encode(images)

    def _codes(self, ids):
        return self.quantize.embedding(ids).permute(0, 3, 1, 2)


class Reviver:
    """Gives codes that are not in use a new place: a latent of the batch, drawn at random.

    A code that is nearest to no latent gets no gradient and would stay where it is; most codes
    start like that. Not in use is what was nearest to none of PATIENCE latents a code. The first
    call revives at once, so that the codes start among the latents.

    `revived` counts those that were, a tensor.
    """

    def __init__(self, model, generator):
        self.codes, self.generator = model.quantize.embedding.weight, generator
        self.uses = torch.zeros(len(self.codes), dtype=torch.int64, device=self.codes.device)
        self.waiting = 0  # for so many more latents
        self.revived = torch.zeros_like(self.uses[0])

    @torch.no_grad()
    def step(self, latents, ids):
        """After each step of the optimiser: the latents (N,C,h,w) and ids (N,h,w) of its batch."""
        ids = ids.flatten()  # not bincount, which waits for the device
        self.uses.index_add_(0, ids, torch.ones_like(ids))
        self.waiting -= len(ids) * dist.world_size()
        if self.waiting > 0:
            return
        dead = dist.all_reduce(self.uses) == 0
        self.codes.copy_(torch.where(dead[:, None], self._places(latents), self.codes))
        self.revived += dead.sum()
        self.uses.zero_()
        self.waiting = PATIENCE * len(self.codes)

    def _places(self, latents):
        """A latent (K, C) for each code, no latent twice before all were taken: those of rank 0."""
        points = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).float()
        device = self.generator.device
        order = torch.randperm(len(points), generator=self.generator, device=device)
        turns = torch.arange(len(self.codes), device=device) % len(points)
        places = points[order[turns].to(points.device)]
        return dist.all_reduce(places if dist.is_main() else torch.zeros_like(places))


def vq_variant(state):
    """The keyword arguments of the `VQModel` that `state` (LDM's names) belongs to.

    Raises:
        ValueError: it is no VQ autoencoder's.
    """
    variant = read_variant(state, "VQ")
    if CODEBOOK not in state:
        raise ValueError(f"not the weights of a VQ autoencoder: there is no {CODEBOOK}")
    return {**variant, "num_codes": state[CODEBOOK].shape[0]}
