"""Generalized autoregression: sets of tokens, each predicted from those before (section 3.4).

    p(x¹, …, xⁿ) = p(X¹, …, X^K) = ∏_k p(X^k | X¹, …, X^{k−1})

where X^k is the set of tokens generated at step k. This module holds what does not depend on the
backbone: the loss, and the wiring of the head. A backbone supplies `training_targets` and
`predict`; the loop over the steps is in models/sampling.py.
"""

import torch
from torch import nn
from tqdm import tqdm

from models.latents import LatentModel, TokenEmbedding, take
from models.layers import Attention, Block
from models.options import check_options, named_by
from models.sampling import check_sampling, sample_steps
from models.settings import HEADS, ORDERS, Sampling
from util.rng import rand, randn

# the published constructor's defaults for the options of Diffusion Loss
HEAD_DEFAULTS = {"diffloss_d": 3, "diffloss_w": 1024, "diffusion_batch_mul": 4}


class Autoregressive(LatentModel):
    """Base of the backbones. Parameters are named and ordered as in the published checkpoints.

    Attributes: `order`, the default order of sampling; `one_at_a_time`, whether it can generate
    only one token per step; `head_name`, the prefix of its head's parameters.
    """

    one_at_a_time = False
    order = "random"

    def __init__(self, *args, known_noise=0.0):
        super().__init__(*args)
        if not 0 <= known_noise <= 1:
            raise ValueError(f"known_noise {known_noise}: expected a number from 0 to 1")
        if known_noise and self.num_codes:
            raise ValueError(f"known_noise {known_noise}: expected 0 for code indices")
        self.known_noise = known_noise

    def forward(self, latents, labels, generator=None, step_generator=None):
        """The training loss, a scalar: latents (N, C, h, w), labels (N,).

        step_generator: CPU generator of the values drawn once per step, which processes can share;
        `generator` if not given.
        """
        tokens = self.patchify(latents)  # (N, L, C·p²)
        orders = self.sample_orders(len(tokens), generator)  # (N, L)
        classes = self.embed_labels(labels, len(tokens), generator)  # (N, D)
        tokens = take(tokens, orders)  # (N, L, C·p²), in the order of generation
        targets, z = self.training_targets(tokens, orders, classes, generator, step_generator)
        return self.head(targets, z, generator=generator)  # (N, n, C·p²), (N, n, D): a scalar

    def held_out_losses(self, latents, labels, generators, mask_ratio):
        """Losses of each image, to compare models by: name -> (N,). In evaluation mode.

        latents: (N, C, h, w). labels: (N,). generators: one per image. mask_ratio: the fraction of
        tokens that is masked; a causal model predicts all.
        """
        tokens = self.patchify(latents)
        orders = self.sample_orders(len(tokens), generators)
        classes = self.embed_labels(labels, len(tokens))
        tokens = take(tokens, orders)
        drawn = {"generator": generators, "mask_ratio": mask_ratio}
        targets, z = self.training_targets(tokens, orders, classes, **drawn)
        return self.head.held_out_losses(targets, z, generators)

    # ---- what a backbone supplies --------------------------------------------------------------

    def training_targets(
        self, tokens, orders, classes, generator=None, step_generator=None, mask_ratio=None
    ):
        """The tokens to predict in one training step (N, n, C·p²), and z (N, n, D) for them.

        tokens: (N, L, C·p²), in the order of orders (N, L). classes: (N, D). mask_ratio: the
        fraction of tokens to predict, where the backbone chooses one; drawn if None.
        """
        raise NotImplementedError

    def predict(self, tokens, orders, to_predict, classes, cache=None):
        """z (S·N, n, D) of the tokens at orders[:, to_predict], a slice of n.

        tokens: (N, L, C·p²) in the order of orders (N, L), known after the slice. classes: (S·N,
        D), the conditional embeddings, followed by the unconditional ones if S is 2 (guidance).
        cache: the result of `start_cache`, which holds what earlier steps computed.
        """
        raise NotImplementedError

    def start_cache(self, sampling):
        """The cache that `predict` uses across sampling steps; None for no cache.

        Raises ValueError for a `sampling.refresh_every` that the backbone does not support.
        """
        if sampling.refresh_every != 1:
            raise ValueError(
                f"refresh_every {sampling.refresh_every}: {type(self).__name__} supports only 1"
            )

    def needs_unconditional(self, done, interval):
        """Whether unconditional z is needed too, once the fraction `done` of the steps is done.

        interval: (begin, end), the fractions between which guidance is applied.
        """
        begin, end = interval
        return begin <= done < end

    def check_orders(self, orders, what):
        """Raises ValueError for orders (N, L) that this backbone cannot follow.

        what: setting that the message names.
        """

    # ---- shared by all -------------------------------------------------------------------------

    @property
    def head(self):
        """The Head that turns z into a loss or into tokens."""
        return self.get_submodule(self.head_name)

    @property
    def usual(self):
        """Field of models.settings.Sampling -> its value where none is given; see Head."""
        return self.head.usual

    @property
    def without_effect(self):
        """Names of the fields of models.settings.Sampling that this model does not use."""
        fixed = ("num_iter", "token_schedule", "refresh_every") if self.one_at_a_time else ()
        return (*self.head.without_effect, *fixed)

    def sample_orders(self, bsz, generator=None):
        """Orders (bsz, L) to train in."""
        return ORDERS[self.order]().start(bsz, self.grid, generator, self.fake_latent.device)

    def with_noise(self, tokens, generator=None):
        """Tokens (N, n, C·p²) as those that are known stand in the input, in training with noise.

        (1 − t)x + tε with ε ~ N(0, I) and t ~ U(0, known_noise) per image, as in flow matching: the
        noisy context of xAR (Ren et al. 2025, arXiv 2502.20388), whose t goes up to 1, differs
        within an image, and is known to the network. A sampled token is not quite one of the data.
        """
        if not (self.known_noise and self.training):
            return tokens
        t = self.known_noise * rand((len(tokens), 1, 1), generator, tokens.device)
        noise = randn(tokens.shape, generator, tokens.device)
        return self.project((1 - t) * tokens + t * noise)

    def statistics(self, reduce=None):
        """Name -> number to log, since the last call; see Head."""
        return self.head.statistics(reduce)

    def advice(self, sampling):
        """What to try if samples diverge: a sentence."""
        return self.head.advice(sampling)

    def token_modules(self):
        """Names of the modules whose shapes depend on what a token is."""
        return "z_proj", self.head_name

    def to_compile(self):
        """(module, dynamic) for each module to compile for training. Parameter names stay."""
        self.compiled = True
        # blocks are compiled for every length of the encoder's input
        torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
        blocks = [(module, False) for module in self.modules() if isinstance(module, Block)]
        # the head has one row per masked token, so their number varies
        return blocks + [(module, True) for module in self.head.to_compile()]

    def to_shard(self):
        """Modules whose weights --fsdp gathers one after the other; those within others first."""
        blocks = [module for module in self.modules() if isinstance(module, Block)]
        return [*blocks, *self.head.to_shard(), self.head]

    def check(self, sampling, guide=None):
        """Raises ValueError for a Sampling that `sample_steps` would refuse, before any work."""
        check_sampling(self, sampling, guide)

    def sample_tokens(
        self,
        bsz,
        num_iter=64,
        cfg=1.0,
        cfg_schedule="linear",
        labels=None,
        temperature=1.0,
        progress=False,
        **kwargs,
    ):
        """Sampled latents (bsz, C, h, w): the last of `sample_steps`, which documents `kwargs`."""
        steps = self.sample_steps(bsz, num_iter, cfg, cfg_schedule, labels, temperature, **kwargs)
        for latents, _ in tqdm(steps, total=num_iter, disable=not progress, leave=False):
            last = latents
        return last

    def sample_steps(
        self,
        bsz,
        num_iter=64,
        cfg=1.0,
        cfg_schedule="linear",
        labels=None,
        temperature=1.0,
        generator=None,
        orders=None,
        latents=None,
        mask=None,
        guide=None,
        **settings,
    ):
        """Sample step by step, yielding latents (bsz, C, h, w) and the mask (bsz, L) after each.

        In the mask, 1 marks a token not yet generated. labels: (bsz,), or None for no class.
        generator: as in util.rng; a sequence holds one per image. orders: (bsz, L), drawn if not
        given. latents, mask: for inpainting; tokens are preserved where the mask, of bsz·L entries,
        is 0, any number in each image. An image with fewer than num_iter unknown tokens takes a
        step for each, and stays as it is in the steps of the others. guide: a weaker model of the
        same tokens, in evaluation mode, from which guidance leads away, in place of this model
        without the class (autoguidance, Karras et al. 2024). settings: the other fields of
        models.settings.Sampling. Raises ValueError for arguments that do not fit.
        """
        sampling = Sampling.of(
            num_iter=num_iter,
            cfg=cfg,
            cfg_schedule=cfg_schedule,
            temperature=temperature,
            **settings,
        )
        return sample_steps(self, bsz, sampling, labels, generator, orders, latents, mask, guide)

    def _token_embedding(self, width):
        """The embedding of tokens (…, C) as (…, width): a table for code indices, else linear."""
        if self.num_codes:
            return TokenEmbedding(self.num_codes, width)
        return nn.Linear(self.token_embed_dim, width)

    @classmethod
    def parts(cls, head):
        """The classes that receive options, given the name of the head."""
        return Block, Attention, HEADS[head]

    def _add_head(self, name, z_channels, options):
        """Add the head of this name (None: the one that fits), with the options that it takes.

        Raises ValueError for a head that does not fit the tokenizer, and for unknown options.
        """
        name = name or ("ce" if self.num_codes else "diffloss")
        if HEADS[name].discrete != bool(self.num_codes):
            kind = "discrete" if self.num_codes else "continuous"
            fitting = [n for n, head in HEADS.rows() if head.discrete == bool(self.num_codes)]
            raise ValueError(
                f"head {name!r}: the tokenizer is {kind}, expected {' or '.join(fitting)}"
            )
        check_options(self, options, *self.parts(name))
        self.head_name = name
        out = self.num_codes or self.token_embed_dim
        arguments = named_by({**HEAD_DEFAULTS, **options}, HEADS[name])
        self.add_module(name, HEADS[name](out, z_channels, **arguments))
