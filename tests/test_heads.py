"""Heads: cross-entropy and L2, and the contract. Run: python -m pytest tests/test_heads.py"""

import math
import re

import pytest
import torch
from rule import by_rule

from diffusion.flow import FLOW_SOLVERS
from diffusion.solvers import SOLVERS
from models.ar import ar_tiny
from models.autoregressive import HEAD_DEFAULTS
from models.diffloss import Diffused
from models.heads import L2, CrossEntropy, Head
from models.mar import mar_tiny
from models.options import named_by, options_of
from models.settings import HEADS, Model, Sampling
from util.rng import image_generators

CODES = 8


def test_cross_entropy_learns_the_entropy():
    """On codes with known probabilities the loss falls to their entropy, and no lower."""
    torch.manual_seed(0)
    probabilities = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.05, 0.03, 0.01, 0.01])
    entropy = -(probabilities * probabilities.log()).sum().item()
    head, z = CrossEntropy(CODES, 4), torch.ones(4096, 4)
    optimizer = torch.optim.Adam(head.parameters(), 0.05)
    for _ in range(300):
        target = probabilities.multinomial(4096, replacement=True).unsqueeze(-1).float()
        loss = head(target, z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # 4,096 draws: the entropy's standard error is 0.013
    assert abs(loss.item() - entropy) < 0.05
    torch.testing.assert_close(
        head.linear(z[:1]).softmax(-1)[0].detach(), probabilities, atol=0.03, rtol=0
    )


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_match_the_softmax(temperature):
    """Sampled indices come as often as softmax(logits / τ) says."""
    head = CrossEntropy(CODES, CODES)
    torch.nn.init.eye_(head.linear.weight)
    logits = torch.linspace(-1, 1.5, CODES)
    z = logits.expand(40000, CODES)
    indices = head.sample(z, temperature, generator=torch.Generator().manual_seed(0))
    frequencies = torch.bincount(indices.long().flatten(), minlength=CODES) / len(z)
    # the standard error of a frequency is at most 0.0025
    torch.testing.assert_close(frequencies, (logits / temperature).softmax(0), atol=0.01, rtol=0)


def test_temperature_zero_and_guidance():
    """τ = 0 takes the likeliest code of the guided logits, o_u + ω(o_c − o_u)."""
    head = CrossEntropy(CODES, CODES)
    torch.nn.init.eye_(head.linear.weight)
    z, z_uncond = torch.randn(50, CODES), torch.randn(50, CODES)
    assert torch.equal(head.sample(z, 0)[:, 0], z.argmax(-1).float())
    guided = z_uncond + 3 * (z - z_uncond)
    assert torch.equal(head.sample(z, 0, 3.0, z_uncond)[:, 0], guided.argmax(-1).float())
    indices = head.sample(z)
    expected = guided.log_softmax(-1).gather(-1, indices.long())[:, 0]
    torch.testing.assert_close(head.confidence(indices, z, 3.0, z_uncond), expected)


def test_mask_says_which_tokens_count():
    """The loss is the mean over tokens where the mask is 1."""
    torch.manual_seed(0)
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0])
    for head, target in ((CrossEntropy(CODES, 4), torch.tensor([[1.0], [2], [3], [4]])),
                         (L2(3, 4), torch.randn(4, 3))):  # fmt: skip
        z = torch.randn(4, 4)
        torch.testing.assert_close(head(target, z, mask), head(target[::2], z[::2]))


def test_l2_gives_the_mean_whatever_the_temperature():
    """Tokens that are ±1 at random are regressed to 0: why the paper's L2 fails."""
    torch.manual_seed(0)
    head = L2(2, 4)
    optimizer = torch.optim.Adam(head.parameters(), 0.05)
    for _ in range(200):
        target = torch.randint(0, 2, (512, 2)) * 2.0 - 1
        optimizer.zero_grad()
        loss = head(target, torch.ones(512, 4))
        loss.backward()
        optimizer.step()
    assert abs(loss.item() - 1) < 0.02
    assert head.sample(torch.ones(5, 4), temperature=2.0).abs().max() < 0.15


def test_code_indices_survive_the_whole_way():
    """A discrete MAR patchifies, embeds and samples indices up to 16,383 without changing one."""
    model = by_rule(mar_tiny(img_size=64, vae_embed_dim=1, num_codes=16384, class_num=10))
    latents = torch.arange(16368, 16384).float().view(1, 1, 4, 4)
    assert torch.equal(model.unpatchify(model.patchify(latents)), latents)
    mask = torch.ones(1, 4, 4)
    mask[:, :2] = 0
    sampled = model.sample_tokens(
        1, num_iter=3, latents=latents, mask=mask, labels=torch.tensor([1]), cfg=2.0
    )
    assert torch.equal(sampled[:, :, :2], latents[:, :, :2])
    assert torch.equal(sampled, sampled.round()) and 0 <= sampled.min() <= sampled.max() < 16384
    # what is a token's neighbour in number is not its neighbour in meaning: it is embedded
    classes = model.embed_labels(None, 1)
    orders = torch.arange(16).unsqueeze(0)
    z = [
        model.predict(model.patchify(x), orders, slice(0, 8), classes)
        for x in (latents, latents - 1)
    ]
    assert not torch.allclose(*z, atol=1e-3)


def test_untrained_cross_entropy_is_about_that_of_the_uniform():
    """At the start the loss is near ln K: the head is not confident of anything."""
    torch.manual_seed(0)
    model = mar_tiny(img_size=64, vae_embed_dim=1, num_codes=CODES, class_num=10).train()
    indices = torch.randint(0, CODES, (64, 1, 4, 4)).float()
    assert 0.7 < model(indices, torch.arange(64) % 10).item() / math.log(CODES) < 2


# ---- the contract, of every row of HEADS -----------------------------------------------------

CHANNELS, WIDTH = 3, 8  # of a token, of z


@pytest.fixture(params=HEADS)
def head(request):
    kind = HEADS[request.param]
    options = {**HEAD_DEFAULTS, "diffloss_w": 32, "num_sampling_steps": "4"}
    torch.manual_seed(0)
    head = kind(CODES if kind.discrete else CHANNELS, WIDTH, **named_by(options, kind))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # layers that start at zero pass nothing on
    return head


def token(head, *shape):
    if head.discrete:
        return torch.randint(0, CODES, (*shape, 1)).float()
    return torch.randn(*shape, CHANNELS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_loss_is_a_scalar_with_a_gradient(head):
    """Finite, decided by the generator; z and every parameter get a gradient."""
    z, target = torch.randn(2, 5, WIDTH, requires_grad=True), token(head, 2, 5)
    loss = head(target, z, generator=seeded())
    assert loss.shape == () and loss.isfinite()
    assert torch.equal(loss, head(target, z, generator=seeded()))
    loss.backward()
    assert z.grad.abs().amax(-1).gt(0).all()
    assert not [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()]


def test_tokens_where_the_mask_is_0_do_not_count(head):
    """They change neither the loss nor the gradient of any z."""
    mask = torch.tensor([[1.0, 0, 1, 0, 0], [0, 1, 1, 1, 0]])
    z, target = torch.randn(2, 5, WIDTH, requires_grad=True), token(head, 2, 5)
    other = torch.where(mask.unsqueeze(-1) == 1, target, token(head, 2, 5))
    assert not torch.equal(other, target)
    loss = head(target, z, mask, generator=seeded())
    assert torch.equal(loss, head(other, z, mask, generator=seeded()))
    loss.backward()
    assert torch.equal(z.grad.abs().amax(-1) > 0, mask == 1)


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_drawn_tokens(head, cfg):
    """Of the shape of targets, without a gradient; a generator per image decides what is drawn."""
    draw = head.sampler(Sampling(max_timestep=950))
    z, z_uncond = torch.randn(2, 5, WIDTH, requires_grad=True), torch.randn(2, 5, WIDTH)
    tokens, again = (draw(z, cfg, z_uncond, image_generators(0, range(2)), 0.5) for _ in range(2))
    assert tokens.shape == token(head, 2, 5).shape and tokens.isfinite().all()
    assert not tokens.requires_grad and torch.equal(tokens, again)
    alone = draw(z[1:], cfg, z_uncond[1:], image_generators(0, [1]), 0.5)
    torch.testing.assert_close(alone, tokens[1:], atol=1e-4, rtol=1e-4)
    if head.discrete:
        assert torch.equal(tokens, tokens.round()) and 0 <= tokens.min() <= tokens.max() < CODES


def test_guidance_changes_what_is_drawn(head):
    """At a scale other than 1, as far as z and its unconditional counterpart differ."""
    draw, z = head.sampler(Sampling(max_timestep=950)), torch.randn(1, 200, WIDTH)
    plain = draw(z, generator=seeded())
    guided = draw(z, 3.0, -z, generator=seeded())
    assert not torch.allclose(plain, guided, atol=1e-3)
    same = draw(z, 3.0, z, generator=seeded())
    assert (same - plain).abs().gt(1e-2).float().mean() < 0.02  # rounding may move a code


def test_confidence_is_a_log_probability(head):
    """Where a head has one: the probabilities of all tokens sum to 1."""
    if head.confidence is None:
        pytest.skip("this head knows no probability of a token")
    z = torch.randn(1, 5, WIDTH).expand(CODES, -1, -1)
    every = torch.arange(float(CODES)).view(-1, 1, 1).expand(-1, 5, 1)
    for guidance in ((), (2.0, z.flip(1))):
        total = head.confidence(every, z, *guidance).exp().sum(0)
        torch.testing.assert_close(total, torch.ones(5))


def test_what_a_head_says_of_itself(head):
    """Statistics are numbers by name, since the last call; advice is a sentence."""
    assert isinstance(head, Head) and isinstance(head.discrete, bool)
    head.train()
    head(token(head, 4, 5), torch.randn(4, 5, WIDTH))
    statistics = head.statistics(reduce=lambda sums: sums)
    assert all(isinstance(k, str) and isinstance(v, float) for k, v in statistics.items())
    assert head.statistics() == {}
    own = list(head.modules())
    assert all(module in own for module in head.to_compile())
    advice = head.advice(Sampling())
    assert isinstance(advice, str) and advice[0].isupper()


def test_statistics_are_summed_over_processes():
    """Diffusion Loss: sums and counts go through `reduce`, so that means are of all processes."""
    model = mar_tiny(img_size=64, class_num=10, diffusion_batch_mul=8).train()
    model(torch.randn(8, 16, 4, 4), torch.arange(8), seeded())
    quarters = model.head.quarters.clone()
    statistics = model.statistics(reduce=lambda sums: sums + torch.tensor([[8.0], [0.0]]))
    assert list(statistics) == ["loss_t0-249", "loss_t250-499", "loss_t500-749", "loss_t750-999"]
    torch.testing.assert_close(
        torch.tensor(list(statistics.values())), (quarters[0] + 8) / quarters[1]
    )


def test_options_of_a_head_are_fields(head):
    """Each is a field of the model's settings, by its own name or by its alias."""
    own = {name for name in options_of(type(head)) if name not in head.aliases.values()}
    assert own <= set(Model.names())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "rk4"}, "solver 'rk4'"),
        ({"anneal": "slowly"}, "anneal 'slowly'"),
        ({"temperature": -1.0}, r"temperature -1\.0: expected 0 or more"),
    ],
)
def test_settings_that_no_head_knows(head, settings, message):
    """Refused before anything is drawn."""
    with pytest.raises(ValueError, match=message):
        head.sampler(Sampling(**settings))


@pytest.mark.parametrize("solver", [*SOLVERS, *FLOW_SOLVERS])
def test_solvers(head, solver):
    """A head with a process has those of its table, and names them if asked for another; of the
    others, which have none, each lets pass what stands in older checkpoints."""
    known = getattr(head, "solvers", ["ddpm"])
    if solver in known:
        assert callable(head.sampler(Sampling(solver=solver)))
        return
    message = "has no diffusion" if known == ["ddpm"] else f"expected one of {', '.join(known)}"
    with pytest.raises(ValueError, match=f"solver '{re.escape(solver)}': .*{re.escape(message)}"):
        head.sampler(Sampling(solver=solver))


def test_annealing(head):
    """Heads without a diffusion refuse it, naming themselves."""
    if isinstance(head, Diffused):
        assert callable(head.sampler(Sampling(anneal="linear")))
    else:
        with pytest.raises(ValueError, match=f"{type(head).__name__} has no diffusion"):
            head.sampler(Sampling(anneal="linear"))


def test_usual_settings(head):
    """What is used where no setting is given, so that naming them changes nothing."""
    assert head.usual.keys() == {"solver", "num_sampling_steps"}
    z, plain = torch.randn(1, 5, WIDTH), Sampling(max_timestep=950)
    named = plain.but(solver=head.usual["solver"])
    drawn = (head.sampler(sampling)(z, generator=seeded()) for sampling in (plain, named))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("name", ["flow", "energy"])
def test_in_both_backbones(name):
    """MAR samples, also with few features computed anew and around known tokens, and so does AR."""
    options = {"img_size": 64, "class_num": 10, "head": name, "diffloss_w": 32}
    mar, labels = by_rule(mar_tiny(**options)), torch.tensor([1, 2])
    latents, mask = torch.randn(2, 16, 4, 4), torch.ones(2, 4, 4)
    mask[:, :2] = 0
    for more in ({}, {"refresh_every": 2}, {"latents": latents, "mask": mask}):
        drawn = mar.sample_tokens(2, num_iter=4, cfg=2.0, labels=labels, **more)
        assert drawn.isfinite().all() and drawn.std() > 0.01
    assert torch.equal(drawn[:, :, :2], latents[:, :, :2])
    ar = by_rule(ar_tiny(**options))
    drawn = ar.sample_tokens(2, num_iter=16, cfg=2.0, labels=labels)
    assert drawn.isfinite().all() and drawn.std() > 0.01


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_does_not_fit_the_tokenizer(name):
    """A discrete head for continuous latents, or the reverse, is refused, with those that fit."""
    other = {} if HEADS[name].discrete else {"vae_embed_dim": 1, "num_codes": CODES}
    fitting = " or ".join(n for n, h in HEADS.rows() if h.discrete != HEADS[name].discrete)
    with pytest.raises(ValueError, match=f"head '{name}': .* expected {fitting}"):
        mar_tiny(img_size=64, head=name, **other)
