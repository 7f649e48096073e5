"""Base of class-conditional models of latents: patches to tokens, and class embeddings."""

import torch
from torch import nn

from models.fast.linear import speed_up
from models.pretrained import Pretrained
from models.settings import USUAL
from models.token_norm import project
from util.rng import rand
from util.sizes import shown, sides


class LatentModel(Pretrained, nn.Module):
    """Latents as a sequence of tokens, each a patch of p×p latents, and a class per image.

    img_size: side of the images, or (height, width). num_codes: number of codes of a discrete
    tokenizer, whose latents are code indices (N, 1, h, w), stored as floats; None for continuous
    latents. token_norm: whether latents have norm √C at each position, see models/token_norm.py.
    Raises ValueError for sizes that do not fit.
    """

    compiled = False  # whether modules are compiled, for training
    usual = USUAL  # see models.heads.Head

    def __init__(
        self,
        img_size,
        vae_stride,
        patch_size,
        vae_embed_dim,
        class_num,
        label_drop_prob,
        width,
        num_codes=None,
        token_norm=False,
    ):
        super().__init__()
        stride = vae_stride * patch_size
        if any(side % stride for side in sides(img_size)):
            raise ValueError(
                f"img_size {shown(img_size)}: expected a multiple of vae_stride × patch_size, "
                f"{vae_stride} × {patch_size}"
            )
        assert not (num_codes and token_norm), "code indices have no norm"
        if num_codes and (vae_embed_dim, patch_size) != (1, 1):
            raise ValueError(
                f"patch_size {patch_size}, vae_embed_dim {vae_embed_dim}: expected 1 and 1 for a "
                "discrete tokenizer, a code index is one token"
            )
        self.patch_size = patch_size
        self.vae_embed_dim = vae_embed_dim
        self.num_codes = num_codes
        self.token_norm = token_norm
        self.grid = self.seq_h, self.seq_w = sides(img_size, stride)
        self.seq_len = self.seq_h * self.seq_w
        self.token_embed_dim = vae_embed_dim * patch_size**2
        self.class_num = class_num
        self.label_drop_prob = label_drop_prob
        self.class_emb = nn.Embedding(class_num, width)
        self.fake_latent = nn.Parameter(torch.zeros(1, width))  # the class embedding of no class

    def position_tables(self):
        """Name of each table of positions (1, n + L, D) -> n, its rows before those of tokens."""
        raise NotImplementedError

    def token_modules(self):
        """Names of the modules whose shapes depend on what a token is."""
        raise NotImplementedError

    def patchify(self, latents):
        """(N, C, h, w) to (N, L, C·p²), in raster order. Raises ValueError for another shape."""
        p, h, w = self.patch_size, self.seq_h, self.seq_w
        if latents.shape[1:] != (self.vae_embed_dim, h * p, w * p):
            raise ValueError(
                f"latents of shape {tuple(latents.shape)}: "
                f"expected (N, {self.vae_embed_dim}, {h * p}, {w * p})"
            )
        x = latents.reshape(-1, self.vae_embed_dim, h, p, w, p)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, h * w, self.token_embed_dim)

    def unpatchify(self, tokens):
        """(N, L, C·p²) to (N, C, h, w): the inverse of `patchify`."""
        p, h, w = self.patch_size, self.seq_h, self.seq_w
        x = tokens.reshape(-1, h, w, self.vae_embed_dim, p, p)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, self.vae_embed_dim, h * p, w * p)

    def project(self, tokens):
        """Tokens (…, C·p²), each of whose p² latents is scaled to norm √C if `token_norm`."""
        if not self.token_norm:
            return tokens
        return project(tokens.unflatten(-1, (self.vae_embed_dim, -1)), dim=-2).flatten(-2)

    def embed_labels(self, labels, bsz, generator=None):
        """Class embeddings (bsz, D); no class for labels None, and for dropped ones in training.

        Raises ValueError for labels of the wrong type or shape and, except in training, for classes
        that do not exist.
        """
        if labels is None:
            return self.fake_latent.expand(bsz, -1)
        self._check_labels(labels, bsz)
        classes = self.class_emb(labels)
        if self.training:
            dropped = rand((bsz, 1), generator, classes.device) < self.label_drop_prob
            classes = torch.where(dropped, self.fake_latent, classes)
        return classes

    def _check_labels(self, labels, bsz):
        expected = f"expected ({bsz},) integers from 0 to {self.class_num - 1}, a tensor"
        if not isinstance(labels, torch.Tensor) or labels.dtype not in (torch.int64, torch.int32):
            kind = getattr(labels, "dtype", type(labels).__name__)
            raise ValueError(f"labels of type {kind}: {expected}")
        if labels.shape != (bsz,):
            raise ValueError(f"labels of shape {tuple(labels.shape)}: {expected}")
        if self.training:  # not checked, to avoid waiting for the device
            return
        low, high = labels.min().item(), labels.max().item()
        if low < 0 or high >= self.class_num:
            raise ValueError(f"labels from {low} to {high}: {expected}")


class TokenEmbedding(nn.Embedding):
    """Code indices (N, n, 1), stored as floats, to embeddings (N, n, D)."""

    def forward(self, indices):
        return super().forward(indices.squeeze(-1).long())


def embed_tokens(embedding, tokens):
    """Tokens (N, n, C) through a linear layer or a TokenEmbedding: (N, n, D)."""
    if isinstance(embedding, nn.Linear):
        tokens = tokens.to(embedding.weight.dtype)  # indices stay in float32, which is exact
    return embedding(tokens)


def initialize(model):
    """Initialize as published: linear layers Xavier-uniform with zero bias; embeddings, and the
    tables among the model's direct parameters, from a normal distribution with std 0.02."""
    speed_up(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for table in model.parameters(recurse=False):
        nn.init.normal_(table, std=0.02)


def take(x, positions):
    """The rows of x (N, L, C) at positions (N, n): (N, n, C)."""
    return x.gather(1, columns(positions, x))


def columns(positions, x):
    """Positions (N, n) repeated for each column of x (N, L, C): (N, n, C)."""
    return positions.unsqueeze(-1).expand(-1, -1, x.shape[-1])
