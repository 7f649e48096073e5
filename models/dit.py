"""DiT, a diffusion model of all tokens at once: the baseline of the paper's speed/accuracy plot.

A Transformer whose blocks are modulated by timestep and class (Peebles and Xie 2023, adaLN-Zero),
on the same latents, with the same diffusion process and guidance as Diffusion Loss.
"""

from functools import partial

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import nn
from torch.nn import functional as F

from diffusion.solvers import reverse
from models.diffloss import Diffused, FinalLayer, TimestepEmbedder, modulate
from models.fast.denoiser import guided
from models.latents import LatentModel, initialize
from models.layers import run_block
from models.options import check_options
from models.settings import Sampling
from util.precision import full_precision


class DiT(Diffused, LatentModel):
    """Predicts the noise in noisy latents. The arguments are those of `MAR`, where both have them.

    It samples all tokens in one step, so num_iter, orders and schedules have no effect.
    """

    head_name = ""  # no head: weight decay applies throughout
    one_at_a_time = False
    # names of the fields of models.settings.Sampling that this model does not use
    without_effect = (
        *("num_iter", "cfg_schedule", "token_schedule", "order"),
        *("anneal", "cfg_interval", "refresh_every"),
    )

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
        timesteps=None,
        loss_weight="none",
        **options,
    ):
        super().__init__(
            img_size, vae_stride, patch_size, vae_embed_dim, class_num, label_drop_prob, embed_dim
        )
        check_options(self, options)
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
        self.start_diffusion(num_sampling_steps, vlb, max_timestep, timesteps, loss_weight)

    @classmethod
    def parts(cls, head):
        """No part receives options."""
        return ()

    def forward(self, latents, labels, generator=None, step_generator=None):
        """The training loss, a scalar: latents (N, C, h, w), labels (N,)."""
        tokens = self.patchify(latents)  # (N, L, C·p²)
        classes = self.embed_labels(labels, len(tokens), generator)  # (N, D)
        t = self.draw_timesteps((len(tokens), 1), generator, tokens.device)
        t = t.expand(tokens.shape[:2])  # one for all tokens of an image
        return self.losses(lambda x, t: self.net(x, t, classes), tokens, t, generator).mean()

    def held_out_losses(self, latents, labels, generators, mask_ratio):
        """See `Autoregressive.held_out_losses`; nothing is masked."""
        tokens = self.patchify(latents)
        classes = self.embed_labels(labels, len(tokens))
        return self.quarter_losses(lambda x, t: self.net(x, t, classes), tokens, generators, 1)

    def position_tables(self):
        """Name of the table of positions -> its rows before those of tokens; see LatentModel."""
        return {"pos_embed_learned": 0}

    def token_modules(self):
        """Names of the modules whose shapes depend on what a token is."""
        return "z_proj", "final_layer"

    def to_compile(self):
        """(module, dynamic) for each module to compile for training."""
        self.compiled = True
        return [(block, False) for block in self.blocks]

    def to_shard(self):
        """Modules whose weights --fsdp gathers one after the other."""
        return list(self.blocks)

    def check(self, sampling, guide=None):
        """Raises ValueError for settings of autoregressive sampling, which DiT does not do, and for
        another model that guides it."""
        if guide:
            raise ValueError("guide: DiT is guided by itself without the class only")
        plain = Sampling()
        for name in ("anneal", "cfg_interval", "refresh_every"):
            value, known = (s.asdict()[name] for s in (sampling, plain))
            if value != known:
                raise ValueError(f"{name} {value}: DiT samples in one step; leave it out")
        self.plan(sampling)

    def check_orders(self, orders, what):
        """Raises ValueError; see `Autoregressive.check_orders`."""
        raise ValueError(f"{what}: DiT generates all tokens at once, in no order")

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
        latents=None,
        mask=None,
        guide=None,
        **settings,
    ):
        """Sampled latents (bsz, C, h, w), with constant guidance `cfg`. See `Autoregressive`.

        Raises ValueError for latents and mask (inpainting) and for a guide, which DiT does not
        support.
        """
        for name, value in (("latents", latents), ("mask", mask)):
            if value is not None:
                raise ValueError(f"{name}: DiT generates all tokens at once and cannot keep any")
        sampling = Sampling.of(cfg=cfg, temperature=temperature, **settings)
        self.check(sampling, guide)
        steps_at, draws = self.plan(sampling)
        _, steps = steps_at(0.0)
        shape = (bsz, self.seq_len, self.token_embed_dim)
        noise = self.draw_noise(shape, generator, self.fake_latent.device, draws)
        noise = self.scale_start(noise, sampling)
        predict = self._predictor(bsz, labels, cfg, steps[0])
        return self.unpatchify(reverse(steps, predict, noise[0], noise[1:], temperature))

    def sample_steps(self, bsz, **settings):
        """Yield latents (bsz, C, h, w) and the mask (bsz, L), 1 for each token not yet generated,
        after its only step. Arguments and ValueError as of `sample_tokens`."""
        latents = self.sample_tokens(bsz, **settings)
        yield latents, torch.zeros(bsz, self.seq_len, device=latents.device)

    def _predictor(self, bsz, labels, cfg, first):
        """Noise and v, each (N, L, C), as a function of x (N, L, C) and a ReverseStep.

        first: the step that is computed in the precision of the weights, because it amplifies the
        network's error: 316-fold from t = 999 in 100 steps, every later step at most 1.6-fold.
        """
        classes, uncond = self.embed_labels(labels, bsz), self.embed_labels(None, bsz)
        both = torch.cat([classes, uncond])

        def network(x, step):
            t = torch.full((), step.timestep, device=x.device).expand(x.shape[:-1])
            if cfg == 1.0:
                return self.net(x, t, classes).float().chunk(2, dim=-1)
            return guided(self.net(torch.cat([x, x]), torch.cat([t, t]), both), cfg)

        def predict(x, step):
            if step is not first:
                return network(x, step)
            with full_precision(x.device.type):
                return network(x, step)

        return predict

    def net(self, x, t, classes):
        """Noise and v (N, L, 2C) for noisy tokens x (N, L, C) at t (N, L), one per image."""
        y = (self.time_embed(t[:, :1]) + classes.unsqueeze(1)).to(self.z_proj.weight.dtype)
        y = F.silu(y)
        x = self.z_proj(x.to(self.z_proj.weight.dtype)) + self.pos_embed_learned
        for block in self.blocks:
            x = run_block(block, self.grad_checkpointing, x, y)
        return self.final_layer(x, y)


class ModulatedBlock(nn.Module):
    """A block whose norms are shifted, scaled and gated by y: x (N, L, D), SiLU(y) (N, 1, D)."""

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
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation[1](y).chunk(6, -1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


def _size(width, depth, heads):
    return partial(DiT, embed_dim=width, depth=depth, num_heads=heads)


dit_tiny = _size(64, 4, 4)  # for tests and 8×8 images
dit_mini = _size(128, 6, 4)  # for small data on a CPU
dit_small = _size(256, 8, 8)  # for small data
dit_xl = _size(1152, 28, 16)
