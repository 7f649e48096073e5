"""DiT, a diffusion model of all tokens at once: the baseline of the paper's speed/accuracy figure.

A Transformer whose blocks are modulated by timestep and class (Peebles and Xie 2023, adaLN-Zero),
on the same latents, with the same diffusion process and guidance as Diffusion Loss.
"""

from functools import partial

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.denoiser import guided
from models.diffloss import Diffused, FinalLayer, TimestepEmbedder, modulate
from models.latents import LatentModel, initialize


class DiT(LatentModel, Diffused):
    """Noisy latents to their noise. The arguments are those of `MAR` where it has them.

    It has one step, so num_iter, order and the schedule of the guidance mean nothing to it.
    """

    head_name = ""  # weight decay as in the rest: there is no head
    one_at_a_time = False

    def __init__(
        self,
        img_size=256,
        vae_stride=16,
        patch_size=1,
        embed_dim=1152,
        depth=28,
        num_heads=16,
        mlp_ratio=4.0,
        vae_embed_dim=16,
        label_drop_prob=0.1,
        class_num=1000,
        num_sampling_steps="250",
        grad_checkpointing=False,
        vlb=True,
        max_timestep=None,
    ):
        super().__init__(
            img_size, vae_stride, patch_size, vae_embed_dim, class_num, label_drop_prob, embed_dim
        )
        self.grad_checkpointing = grad_checkpointing
        self.z_proj = nn.Linear(self.token_embed_dim, embed_dim)
        self.pos_embed_learned = nn.Parameter(torch.zeros(1, self.seq_len, embed_dim))
        self.time_embed = TimestepEmbedder(embed_dim)
        self.blocks = nn.ModuleList(
            ModulatedBlock(embed_dim, num_heads, mlp_ratio) for _ in range(depth)
        )
        self.final_layer = FinalLayer(embed_dim, 2 * self.token_embed_dim)
        initialize(self)
        # every block starts as the identity, and the network predicts zero
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        self.start_diffusion(num_sampling_steps, vlb, max_timestep)

    @property
    def head(self):
        """What holds the diffusion: the model itself."""
        return self

    def forward(self, latents, labels, generator=None, step_generator=None):
        """The training loss, a scalar, of latents (N, C, h, w) with labels (N,)."""
        tokens = self.patchify(latents)
        classes = self.embed_labels(labels, len(tokens), generator)
        t = self.draw_timesteps((len(tokens), 1), generator, tokens.device)
        t = t.expand(tokens.shape[:2])  # one for all tokens of an image
        return self.losses(lambda x, t: self.net(x, t, classes), tokens, t, generator).mean()

    def compile_training(self):
        """Compile the blocks."""
        for block in self.blocks:
            block.compile()

    def check_sampling(
        self, solver="ddpm", anneal=None, cfg_interval=(0.0, 1.0), refresh_every=1, **more
    ):
        """Raises ValueError for approximations of autoregressive sampling, which this is not."""
        asked = solver, anneal, tuple(cfg_interval), refresh_every
        if asked != ("ddpm", None, (0.0, 1.0), 1):
            raise ValueError(
                f"solver {solver}, anneal {anneal}, cfg_interval {cfg_interval}, refresh_every "
                f"{refresh_every}: DiT knows none of these; leave them out"
            )

    @torch.no_grad()
    def sample_tokens(
        self,
        bsz,
        num_iter=1,
        cfg=1.0,
        cfg_schedule="constant",
        labels=None,
        temperature=1.0,
        progress=False,
        generator=None,
        max_timestep=None,
        order=None,
        **approximations,
    ):
        """Sampled latents (bsz, C, h, w), with constant guidance `cfg`. See `Autoregressive`."""
        self.check_sampling(**approximations)
        classes = self.embed_labels(labels, bsz)
        uncond = self.embed_labels(None, bsz)

        def network(x, t):
            if cfg == 1.0:
                return self.net(x, t, classes)
            both = self.net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([classes, uncond]))
            return torch.cat(guided(both, cfg), dim=-1)

        shape = (bsz, self.seq_len, self.token_embed_dim)
        noise = self.draw_noise(shape, generator, classes.device)
        return self.unpatchify(self.denoise(network, noise, temperature, max_timestep))

    def net(self, x, t, classes):
        """Noise and v (N, L, 2C) for noisy tokens x (N, L, C) at t (N, L), one for each image."""
        y = (self.time_embed(t[:, :1]) + classes.unsqueeze(1)).to(self.z_proj.weight.dtype)
        x = self.z_proj(x.to(self.z_proj.weight.dtype)) + self.pos_embed_learned
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, y, use_reentrant=False)
            else:
                x = block(x, y) if self.training else block.forward(x, y)
        return self.final_layer(x, y)


class ModulatedBlock(nn.Module):
    """A block whose norms are shifted, scaled and gated by y: x (N, L, D), y (N, 1, D)."""

    def __init__(self, width, heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(
            width, int(width * mlp_ratio), act_layer=partial(nn.GELU, approximate="tanh")
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, y):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(y).chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


def _size(width, depth, heads):
    return partial(DiT, embed_dim=width, depth=depth, num_heads=heads)


dit_tiny = _size(64, 4, 4)  # for small data and tests
dit_xl = _size(1152, 28, 16)
