"""The VQ autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752): VQ-16.

    images (N,3,H,W) -> encode -> latents (N,C,H/s,W/s) -> quantize -> code indices (N,H/s,W/s)
    images           <- decode <- codes (N,C,H/s,W/s)   <- lookup   <-

The latents before quantization are continuous and can serve as tokens instead; decoding then starts
by quantizing them. Modules are named as in the authors' code, see models/vae.py. The defaults are
LDM's vq-f16: stride 16, 16,384 codes of 8 dimensions, attention in the lowest level of the encoder
and of the decoder.
"""

import torch.nn as nn
import torch.nn.functional as F

from models.autoencoder_blocks import GROUPS, Decoder, Encoder, regroup
from models.autoencoder_files import vq_variant
from models.autoencoder_settings import Losses
from models.codebook import (  # noqa: F401 (published here)
    PATIENCE,
    Codebook,
    Reviver,
    entropy_loss,
    nearest,
)
from models.vae import Autoencoder

COMMITMENT = 0.25  # weight of the commitment loss; the codebook loss has weight 1


class VQModel(Autoencoder):
    """Images to latents, latents to code indices, and back.

    Args:
        embed_dim: channels C of the latents, i.e. dimensions of a code.
        num_codes: number of codes, K.
        ch_mult: width of each level in units of `ch`, full resolution first.
        ch: base width.
        encoder_attention, decoder_attention: whether the lowest level has attention.
        in_channels: channels I of the images.
        res_blocks: residual blocks of a level of the encoder; the decoder's have one more.
        norm_groups: see `regroup` in models/autoencoder_blocks.py.

    Attributes: `config`, these arguments.
    """

    diffusers = "VQModel"
    own_losses = ("codebook", "codebook_decay", "entropy_weight")
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
        res_blocks=2,
        norm_groups=GROUPS,
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
            "res_blocks": res_blocks,
            "norm_groups": norm_groups,
        }
        shape = embed_dim, ch, ch_mult
        self.encoder = Encoder(*shape, encoder_attention, in_channels, res_blocks)
        self.decoder = Decoder(*shape, decoder_attention, in_channels, res_blocks)
        self.quantize = Codebook(num_codes, embed_dim)
        self.quant_conv = nn.Conv2d(embed_dim, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, embed_dim, 1)
        regroup(self, norm_groups)

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

    def forward(self, images, generator=None, change=None):
        """Training: images (N,I,H,W) -> (decoded images, latents (N,C,h,w), indices (N,h,w)).

        The decoder is given the codes; its gradient is copied to the latents, the straight-through
        estimator (Bengio et al. 2013, van den Oord et al. 2017). Deterministic. change: function of
        the codes (N,C,h,w) that gives what is decoded instead, see models/changes.py.
        """
        latents = self.encode(images).float()
        indices = self.quantize(latents)
        codes = latents + (self._codes(indices) - latents).detach()
        return self.decode(change(codes) if change else codes), latents, indices

    def losses(self, images, output):
        """Name -> scalar; their sum is the training loss of `output = model(images)`.

        The mean absolute error, and `regularizers` by default.
        """
        return {"l1": F.l1_loss(output[0].float(), images), **self.regularizers(output, Losses())}

    def regularizers(self, output, settings):
        """Name -> scalar, weighted: the losses of `output = model(images)` beside the error.

        The codebook and commitment losses of van den Oord et al. 2017, eq. 3, and the entropy loss
        if it has a weight. Codes that get no gradient, as moving averages, have no codebook loss.
        settings: Losses.
        """
        _, latents, indices = output
        weight, codes = self.quantize.embedding.weight, self._codes(indices)
        losses = {"codebook": F.mse_loss(codes, latents.detach())} if weight.requires_grad else {}
        losses["commitment"] = COMMITMENT * F.mse_loss(latents, codes.detach())
        if settings.entropy_weight:
            losses["entropy"] = settings.entropy_weight * entropy_loss(latents, weight)
        return losses

    def latents(self, images, generator=None):
        """Images -> raw latents (N,C,h,w), before quantization. Deterministic."""
        return self.encode(images)

    def reconstruct(self, latents):
        """Raw latents (N,C,h,w) -> images (N,I,h*stride,w*stride), by way of their codes."""
        return self.decode(self.lookup(self.quantize(latents)))

    def _codes(self, indices):
        return self.quantize.embedding(indices).permute(0, 3, 1, 2)
