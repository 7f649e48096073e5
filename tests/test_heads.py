"""Cross-entropy and L2, the baselines. Run: python -m pytest tests/test_heads.py"""

import math

import pytest
import torch
from rule import by_rule

from models.heads import L2, CrossEntropy
from models.mar import mar_tiny

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
    """Sampled ids come as often as softmax(logits / τ) says."""
    head = CrossEntropy(CODES, CODES)
    torch.nn.init.eye_(head.linear.weight)
    logits = torch.linspace(-1, 1.5, CODES)
    z = logits.expand(40000, CODES)
    ids = head.sample(z, temperature, generator=torch.Generator().manual_seed(0))
    frequencies = torch.bincount(ids.long().flatten(), minlength=CODES) / len(z)
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
    ids = head.sample(z)
    expected = guided.log_softmax(-1).gather(-1, ids.long())[:, 0]
    torch.testing.assert_close(head.confidence(ids, z, 3.0, z_uncond), expected)


def test_mask_says_which_tokens_count():
    """The loss is the mean over tokens where the mask is 1."""
    torch.manual_seed(0)
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0])
    for head, target in ((CrossEntropy(CODES, 4), torch.tensor([[1.0], [2], [3], [4]])),
                         (L2(3, 4), torch.randn(4, 3))):  # fmt: skip
        z = torch.randn(4, 4)
        torch.testing.assert_close(head(target, z, mask), head(target[::2], z[::2]))


def test_l2_gives_the_mean_whatever_the_temperature():
    """Tokens that are ±1 at random are regressed to 0: what the paper's disaster is."""
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


def test_ids_survive_the_whole_way():
    """A discrete MAR patchifies, embeds and samples ids up to 16,383 without changing one."""
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
    ids = torch.randint(0, CODES, (64, 1, 4, 4)).float()
    assert 0.7 < model(ids, torch.arange(64) % 10).item() / math.log(CODES) < 2
