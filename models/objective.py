"""The loss of an autoencoder, and of its discriminator: latent diffusion's recipe.

    L1 + perceptual + regularizers (KL, or codebook and commitment) + λ · disc_weight · adversarial

from Rombach et al. 2022 (arXiv 2112.10752), appendix G, and VQGAN (Esser et al. 2021, arXiv
2012.09841), eq. 7 for λ. The authors sum the losses of a KL autoencoder over an image; here all are
per element of an image, that is divided by I·H·W, so that they do not depend on the resolution.
"""

import torch
import torch.nn.functional as F
from torch.func import functional_call

from models.discriminator import hinge

EPSILON = 1e-4  # added to the norm of the adversarial gradient
MAX_WEIGHT = 1e4  # limit of λ, in the authors' units


class Objective:
    """The losses of a network's training.

    Args:
        settings: Losses.
        network: the autoencoder, without DDP.
        perceptual: module of models/perceptual.py, or None.
        discriminator: PatchDiscriminator, without DDP, or None.
    """

    def __init__(self, settings, network, perceptual=None, discriminator=None):
        self.settings, self.network = settings, network
        self.perceptual, self.discriminator = perceptual, discriminator

    def adversarial(self, step):
        """Whether the discriminator takes part in this optimizer step."""
        return self.discriminator is not None and step >= self.settings.disc_start

    def loss(self, target, output, step, scale=1.0):
        """The network's loss, and its terms: name -> detached scalar.

        The terms are weighted and their sum is the loss, but for `adaptive_weight`, which is λ.
        Computed in float32, also within autocast. The discriminator gets no gradient.

        Args:
            target: the images (N,I,H,W) that `output` should show.
            output: of `network.forward`.
            step: number of optimizer steps before this one.
            scale: the GradScaler's, for gradients that pass through float16.
        """
        decoded = output[0].float()
        with _float32(decoded):
            terms = {"l1": F.l1_loss(decoded, target)}
            if self.perceptual is not None:
                distance = self.perceptual(target, decoded).mean()
                terms["perceptual"] = self.settings.perceptual_weight * distance
            reconstruction = sum(terms.values())
            terms |= self.network.regularizers(output, self.settings)
            weights = {}
            if self.adversarial(step):
                adversarial = -self._logits(decoded).mean()
                weight = self._adaptive_weight(reconstruction, adversarial, target, scale)
                terms["adversarial"] = self.settings.disc_weight * weight * adversarial
                weights["adaptive_weight"] = weight
            loss = sum(terms.values())
        return loss, {name: value.detach() for name, value in (terms | weights).items()}

    def discriminator_loss(self, pair, target, decoded):
        """The discriminator's loss, and its terms: name -> detached scalar.

        pair: Pair, with or without DDP. target, decoded: images (N,I,H,W), real and decoded; the
        network gets no gradient.
        """
        decoded = decoded.detach().float()
        with _float32(decoded):
            real, fake = pair(target, decoded)
            loss = hinge(real, fake)
        terms = {"discriminator": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return loss, {name: value.detach() for name, value in terms.items()}

    def _logits(self, decoded):
        """The discriminator's logits, whose gradient reaches the images alone."""
        weights = dict(self.discriminator.named_parameters())
        frozen = {name: value.detach() for name, value in weights.items()}
        return functional_call(self.discriminator, frozen, decoded)

    def _adaptive_weight(self, reconstruction, adversarial, target, scale):
        """λ, a scalar: the ratio of both losses' gradients at the decoder's last layer.

        A sum over an image has I·H·W times our gradient, hence I·H·W times our λ: where the authors
        sum, their limit on λ is as many times lower for ours. On 256×256 pixels that is 0.05.
        """
        limit = MAX_WEIGHT / (target[0].numel() if self.network.summed else 1)
        norms = [self._norm(loss, scale) for loss in (reconstruction, adversarial)]
        weight = norms[0] / (norms[1] + EPSILON)
        # where one overflows in float16, the scaler skips this step
        finite = torch.stack(norms).isfinite().all()
        return torch.where(finite, weight.clamp(0, limit), torch.zeros_like(weight))

    def _norm(self, loss, scale):
        """Norm of a loss's gradient at the last layer, a scalar without a graph."""
        layer = self.network.last_layer
        (gradient,) = torch.autograd.grad(loss * scale, layer, retain_graph=True)
        return gradient.float().norm() / scale


def _float32(images):
    return torch.autocast(images.device.type, enabled=False)
