"""The model as it is commonly written: the baseline of `benchmarks.speed`.

The same network with the same names of parameters, computed the straightforward way of the
published code: the head is trained on all tokens and masked afterwards, guidance doubles the state
of the reverse process, each step of it recreates its tables on the host, tokens are picked by
boolean masks, and the averaged weights are updated one parameter at a time.
"""

import math
from functools import partial

import numpy as np
import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional as F

from diffusion import create_diffusion


class PlainMAR(nn.Module):
    """A MAR with the weights of `model`, one of ours with the Diffusion Loss head."""

    def __init__(self, model):
        super().__init__()
        self.seq_len, self.buffer_size = model.seq_len, model.buffer_size
        self.mul = model.diffloss.diffusion_batch_mul
        width, heads = model.fake_latent.shape[1], model.encoder_blocks[0].attn.heads
        dropout = model.encoder_blocks[0].mlp.drop1.p

        def blocks(count):
            return nn.ModuleList(
                Block(
                    width,
                    heads,
                    4.0,
                    qkv_bias=True,
                    proj_drop=dropout,
                    attn_drop=dropout,
                    norm_layer=partial(nn.LayerNorm, eps=1e-6),
                )
                for _ in range(count)
            )

        length = self.buffer_size + self.seq_len
        self.class_emb = nn.Embedding(model.class_num, width)
        self.fake_latent = nn.Parameter(torch.zeros(1, width))
        self.z_proj = nn.Linear(model.token_embed_dim, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, width))
        self.encoder_blocks = blocks(len(model.encoder_blocks))
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, width))
        self.decoder_blocks = blocks(len(model.decoder_blocks))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, self.seq_len, width))
        self.diffloss = PlainDiffLoss(model.diffloss)
        self.load_state_dict(model.state_dict())

    def forward(self, tokens, classes, mask, t, noise):
        """The loss of tokens (N, L, C), classes (N, D), mask (N, L), t (mul·N·L,), noise (…, C)."""
        z = self.decode(self.encode(tokens, mask, classes), mask)
        target = tokens.reshape(-1, tokens.shape[-1]).repeat(self.mul, 1)
        z = z.reshape(-1, z.shape[-1]).repeat(self.mul, 1)
        return self.diffloss(target, z, mask.reshape(-1).repeat(self.mul), t, noise)

    def encode(self, tokens, mask, classes):
        x = self.z_proj(tokens)
        bsz, _, width = x.shape
        x = torch.cat([torch.zeros(bsz, self.buffer_size, width, device=x.device), x], dim=1)
        mask = torch.cat([torch.zeros(bsz, self.buffer_size, device=x.device), mask], dim=1)
        x[:, : self.buffer_size] = classes.unsqueeze(1)
        x = self.z_proj_ln(x + self.encoder_pos_embed_learned)
        x = x[(1 - mask).nonzero(as_tuple=True)].reshape(bsz, -1, width)
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def decode(self, x, mask):
        x = self.decoder_embed(x)
        bsz, _, width = x.shape
        mask = torch.cat([torch.zeros(bsz, self.buffer_size, device=x.device), mask], dim=1)
        all_tokens = self.mask_token.repeat(bsz, mask.shape[1], 1).to(x.dtype)
        all_tokens[(1 - mask).nonzero(as_tuple=True)] = x.reshape(-1, width)
        x = all_tokens + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, self.buffer_size :] + self.diffusion_pos_embed_learned

    @torch.no_grad()
    def sample(self, orders, labels, num_iter, cfg, noise=None):
        """Tokens (N, L, C) after num_iter steps, for orders (N, L) and labels (N,).

        noise: (S + 1, N, L, C), of the tokens by position; drawn if not given.
        """
        bsz, device = len(orders), orders.device
        mask = torch.ones(bsz, self.seq_len, device=device)
        tokens = torch.zeros(bsz, self.seq_len, self.diffloss.channels, device=device)
        for step in range(num_iter):
            tokens, mask = self.step(tokens, mask, orders, labels, step, num_iter, cfg, noise)
        return tokens

    @torch.no_grad()
    def step(self, tokens, mask, orders, labels, step, num_iter, cfg, noise=None):
        """One of the steps of `sample`: the tokens and the mask (N, L) after it."""
        bsz, device, guided = len(tokens), tokens.device, cfg != 1.0
        classes = self.class_emb(labels)
        masks, both = mask, tokens
        if guided:
            classes = torch.cat([classes, self.fake_latent.repeat(bsz, 1)])
            masks, both = torch.cat([mask, mask]), torch.cat([tokens, tokens])
        z = self.decode(self.encode(both, masks, classes), masks)

        ratio = np.cos(math.pi / 2.0 * (step + 1) / num_iter)
        length = torch.tensor([np.floor(self.seq_len * ratio)], device=device)
        length = torch.maximum(
            torch.tensor([1.0], device=device),
            torch.minimum(mask.sum(-1, keepdim=True) - 1, length),
        )[0]
        following = torch.zeros_like(mask).scatter(
            1, orders[:, : int(length.item())], torch.ones_like(mask)
        )
        if step >= num_iter - 1:
            to_predict = mask.bool()
        else:
            to_predict = torch.logical_xor(mask.bool(), following.bool())
        z = z[torch.cat([to_predict] * (2 if guided else 1)).nonzero(as_tuple=True)]
        scale = 1 + (cfg - 1) * (self.seq_len - length) / self.seq_len
        drawn = None if noise is None else noise[:, to_predict]
        sampled = self.diffloss.sample(z, scale, guided=guided, noise=drawn)
        if guided:
            sampled, _ = sampled.chunk(2)
        tokens = tokens.clone()
        tokens[to_predict.nonzero(as_tuple=True)] = sampled.to(tokens.dtype)
        return tokens, following


class PlainDiffLoss(nn.Module):
    """Diffusion Loss with the sizes of `head`, one of ours."""

    def __init__(self, head):
        super().__init__()
        self.channels = head.in_channels
        self.net = PlainMLP(head.net)
        self.train_tables = Tables(create_diffusion())
        self.tables = Tables(create_diffusion(head.spacing))
        self.start_at(None)

    def start_at(self, timestep):
        """Start the reverse process at this timestep or just below; None is its end."""
        timesteps = self.tables.arrays["timesteps"]
        self.count = len(timesteps) if timestep is None else int((timesteps <= timestep).sum())

    def forward(self, target, z, mask, t, noise):
        """Mean over masked rows of the squared error of the noise and the variational term."""
        d = self.train_tables
        alpha = d.at("alphas_cumprod", t, target.shape)
        x = alpha.sqrt() * target + (1 - alpha).sqrt() * noise
        predicted, v = self.net(x, d.trained(t), z).float().chunk(2, dim=1)
        mse = (noise - predicted).square().mean(1)
        mean, log_variance = d.posterior(predicted.detach(), v, x, t)
        true_mean = d.at("posterior_mean_coef1", t, x.shape) * target
        true_mean = true_mean + d.at("posterior_mean_coef2", t, x.shape) * x
        true_log = d.at("posterior_log_variance_clipped", t, x.shape)
        kl = -1 + log_variance - true_log + (true_log - log_variance).exp()
        kl = 0.5 * (kl + (true_mean - mean).square() * (-log_variance).exp())
        upper, lower = (
            _cdf((target - mean + edge) * (-0.5 * log_variance).exp())
            for edge in (1 / 255, -1 / 255)
        )
        middle = (upper - lower).clamp(min=1e-12).log()
        inner = torch.where(target > 0.999, (1 - lower).clamp(min=1e-12).log(), middle)
        likelihood = torch.where(target < -0.999, upper.clamp(min=1e-12).log(), inner)
        bound = torch.where(t == 0, -likelihood.mean(1), kl.mean(1)) / math.log(2)
        return ((mse + bound) * mask).sum() / mask.sum()

    def sample(self, z, cfg=1.0, guided=False, noise=None):
        """Tokens for z, the conditional half first; noise: (S + 1, R, C), drawn if not given."""
        rows = len(z) // 2 if guided else len(z)
        x = torch.randn(rows, self.channels, device=z.device) if noise is None else noise[0]
        if guided:
            x = torch.cat([x, x])
        for i in reversed(range(self.count)):
            t = torch.tensor([i] * len(x), device=z.device)
            if guided:
                output = self._guided(x, t, z, cfg)
            else:
                output = self.net(x, self.tables.trained(t), z)
            predicted, v = output.float().chunk(2, dim=1)
            mean, log_variance = self.tables.posterior(predicted, v, x, t)
            if noise is None:
                drawn = torch.randn_like(x)
            else:
                drawn = torch.cat([noise[1 + i]] * (2 if guided else 1))
            not_last = (t != 0).float().view(-1, 1)
            x = mean + not_last * (0.5 * log_variance).exp() * drawn
        return x

    def _guided(self, x, t, z, cfg):
        half = x[: len(x) // 2]
        output = self.net(torch.cat([half, half]), self.tables.trained(t), z)
        noise, rest = output[:, : self.channels], output[:, self.channels :]
        cond, uncond = noise.chunk(2)
        noise = uncond + cfg * (cond - uncond)
        return torch.cat([torch.cat([noise, noise]), rest], dim=1)


class Tables:
    """The tables of a diffusion as NumPy arrays on the host, looked up there for each use."""

    names = (
        "timesteps",
        "alphas_cumprod",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "posterior_log_variance_clipped",
    )

    def __init__(self, diffusion):
        self.arrays = {name: getattr(diffusion, name).numpy() for name in self.names}
        self.arrays["log_betas"] = diffusion.betas.log().numpy()
        self.arrays["recip"] = np.sqrt(1 / self.arrays["alphas_cumprod"])
        self.arrays["recip_less_one"] = np.sqrt(1 / self.arrays["alphas_cumprod"] - 1)

    def at(self, name, t, shape):
        values = torch.from_numpy(self.arrays[name]).to(t.device)[t].float()
        return values.view(-1, 1) + torch.zeros(shape, device=t.device)

    def trained(self, t):
        """The timesteps of the trained process that steps t are."""
        return torch.tensor(self.arrays["timesteps"].tolist(), device=t.device)[t]

    def posterior(self, predicted, v, x, t):
        """Mean and log-variance of the previous x, for predicted noise and v."""
        low = self.at("posterior_log_variance_clipped", t, x.shape)
        high = self.at("log_betas", t, x.shape)
        fraction = (v + 1) / 2
        log_variance = fraction * high + (1 - fraction) * low
        start = self.at("recip", t, x.shape) * x
        start = start - self.at("recip_less_one", t, x.shape) * predicted
        mean = self.at("posterior_mean_coef1", t, x.shape) * start
        return mean + self.at("posterior_mean_coef2", t, x.shape) * x, log_variance


class PlainMLP(nn.Module):
    """The denoising MLP, layer by layer, for rows with individual t and z."""

    def __init__(self, net):
        super().__init__()
        width, channels = net.input_proj.out_features, net.input_proj.in_features
        self.time_embed = nn.Module()
        self.time_embed.mlp = nn.Sequential(
            nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.cond_embed = nn.Linear(net.cond_embed.in_features, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(PlainResBlock(width) for _ in net.res_blocks)
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(width, 2 * channels)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, t, z):
        # published: made on the host. Here where t is, as exp of two devices may differ by one bit
        # in some rates, which t magnifies to what the check of differences is about
        rates = torch.arange(0, 128, dtype=torch.float32, device=t.device)
        rates = torch.exp(-math.log(10000) * rates / 128)
        angles = t[:, None].float() * rates[None]
        times = self.time_embed.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1))
        x = self.input_proj(x)
        y = times + self.cond_embed(z)
        for block in self.res_blocks:
            x = block(x, y)
        shift, scale = self.final_layer.adaLN_modulation(y).chunk(2, dim=-1)
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return self.final_layer.linear(x)


class PlainResBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


def _cdf(x):
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@torch.no_grad()
def update_ema(averages, parameters, rate):
    """Update one parameter at a time."""
    for average, parameter in zip(averages, parameters, strict=True):
        average.detach().mul_(rate).add_(parameter, alpha=1 - rate)


def optimizer(model, weight_decay=0.02):
    """AdamW as in the published code: the default implementation of torch."""
    some = [p for n, p in model.named_parameters() if p.ndim > 1 and not n.startswith("diffloss.")]
    chosen = {id(p) for p in some}
    none = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": none, "weight_decay": 0.0}, {"params": some, "weight_decay": weight_decay}]
    return torch.optim.AdamW(groups, lr=8e-4, betas=(0.9, 0.95))
