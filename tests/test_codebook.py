"""How codes of a VQ autoencoder are learned and stay in use; the entropy loss.

Run: python -m pytest tests/test_codebook.py
"""

import math
import threading
from io import BytesIO

import pytest
import torch
from rule import by_rule, rule_input

from models import codebook
from models.autoencoder_settings import CODEBOOKS, Losses
from models.codebook import (
    PATIENCE,
    TEMPERATURE,
    code_learner,
    entropy_loss,
    nearest,
)
from models.vae import AutoencoderKL
from models.vq import VQModel
from util.evaluation.metrics import code_use

TINY = {"embed_dim": 2, "num_codes": 16, "ch_mult": (1, 2), "ch": 8}


def tiny(codes=None):
    """A small VQ autoencoder, every weight set by its name, or with these codes, lists."""
    model = by_rule(VQModel(**{**TINY, "num_codes": len(codes or range(16))}))
    if codes:
        model.quantize.embedding.weight.data.copy_(torch.tensor(codes))
    return model


def learner(model, kind="ema", decay=0.5, seed=0):
    """The learner of the model's codes."""
    settings = Losses(codebook=kind, codebook_decay=decay)
    return code_learner(model, settings, torch.Generator().manual_seed(seed))


def as_latents(points):
    """Points, lists of C numbers, as latents (1, C, 1, M)."""
    return torch.tensor(points, dtype=torch.float32).T[None, :, None]


def step(learner, model, latents):
    """A step with latents and their nearest codes; returns these."""
    indices = model.quantize(latents)
    learner.step(latents, indices)
    return indices


# Moving averages


def test_moving_averages_by_hand():
    """Two codes, two steps, decay 0.5: N = 1 → 1.5 → 1.25 and 1 → 1 → 1.5, and their sums of
    latents; each code is their quotient."""
    model = tiny([[0.0, 0.0], [10.0, 10.0]])
    weight, averages = model.quantize.embedding.weight, learner(model)
    step(averages, model, as_latents([[1.0, 0.0], [2.0, 0.0], [12.0, 10.0]]))
    # N = (1 + 2) / 2, (1 + 1) / 2; m = (0 + 3, 0) / 2, (10 + 12, 10 + 10) / 2
    torch.testing.assert_close(averages.counts, torch.tensor([1.5, 1.0]))
    expected = torch.tensor([[1.0, 0.0], [11.0, 10.0]])
    torch.testing.assert_close(weight.data, expected, rtol=1e-4, atol=1e-4)
    step(averages, model, as_latents([[3.0, 1.0], [13.0, 9.0], [9.0, 9.0]]))
    # N = (1.5 + 1) / 2, (1 + 2) / 2; m = (1.5 + 3, 0 + 1) / 2, (11 + 22, 10 + 18) / 2
    torch.testing.assert_close(averages.counts, torch.tensor([1.25, 1.5]))
    expected = torch.tensor([[2.25 / 1.25, 0.5 / 1.25], [16.5 / 1.5, 14 / 1.5]])
    torch.testing.assert_close(weight.data, expected, rtol=1e-4, atol=1e-4)


def test_averages_are_smoothed(monkeypatch):
    """With one latent added to each of N = 1.5 and 0.5, codes are divided by 2.5 / 4 · 2 = 1.25
    and 1.5 / 4 · 2 = 0.75: a code without latents is not divided by 0."""
    monkeypatch.setattr(codebook, "SMOOTHING", 1)
    model = tiny([[0.0, 0.0], [10.0, 10.0]])
    averages = learner(model)
    averages.waiting = 100  # until a revival
    step(averages, model, as_latents([[1.0, 0.0], [2.0, 0.0]]))
    expected = torch.tensor([[1.5 / 1.25, 0.0], [5 / 0.75, 5 / 0.75]])
    torch.testing.assert_close(model.quantize.embedding.weight.data, expected)


def test_moving_averages_leave_no_gradient():
    """No loss reaches the codes: the codebook loss is not there, and their gradient stays None; the
    encoder is still pulled to them."""
    model, settings = tiny(), Losses(codebook="ema", entropy_weight=1.0)
    learner(model)
    images = rule_input("image", (2, 3, 8, 8))
    losses = model.regularizers(model(images), settings)
    assert set(losses) == {"commitment", "entropy"}
    (sum(losses.values()) + model.losses(images, model(images))["l1"]).backward()
    assert model.quantize.embedding.weight.grad is None
    assert model.quant_conv.weight.grad.any()


class Processes:
    """Two threads as two processes: what they reduce is added up."""

    def __init__(self, monkeypatch):
        self.here, self.given = threading.local(), [None, None]
        self.barrier = threading.Barrier(2, timeout=20)
        monkeypatch.setattr(codebook.dist, "all_reduce", self.all_reduce)
        monkeypatch.setattr(codebook.dist, "world_size", lambda: 2)
        monkeypatch.setattr(codebook.dist, "is_main", lambda: self.here.rank == 0)

    def all_reduce(self, tensor):
        self.given[self.here.rank] = tensor.clone()
        self.barrier.wait()
        tensor.copy_(self.given[0] + self.given[1])
        self.barrier.wait()
        return tensor

    def run(self, function):
        """[function(rank) for both]."""
        found = [None, None]

        def target(rank):
            self.here.rank = rank
            found[rank] = function(rank)

        threads = [threading.Thread(target=target, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


@pytest.mark.parametrize("revives", [False, True], ids=["averages", "revivals"])
def test_processes_learn_the_same_codes(revives, monkeypatch):
    """Two processes with half the latents each have the averages of one with all of them, and the
    same codes, bit for bit; so too where codes are moved onto latents of the first."""
    batches = [rule_input(f"latents {i}", (2, 2, 4, 4)).mul(64).round() for i in range(3)]

    def train(part):
        model = tiny()
        averages = learner(model, decay=0.75)
        averages.waiting = 0 if revives else 1000
        for batch in batches:
            step(averages, model, batch[part])
        return model.quantize.embedding.weight.data, averages

    codes, alone = train(slice(0, 2))
    (one, first), (two, second) = Processes(monkeypatch).run(
        lambda rank: train(slice(rank, rank + 1))
    )
    assert torch.equal(one, two)
    for name in first.tensors:
        assert torch.equal(getattr(first, name), getattr(second, name)), name
        assert revives or torch.equal(getattr(first, name), getattr(alone, name)), name
    assert bool(first.revived) == revives
    assert revives or torch.equal(codes, one)


# Gradients


def test_straight_through_gradient_is_the_decoder_s():
    """The latents get the gradient that the decoder's input has, bit for bit."""
    model = tiny()
    images = rule_input("image", (2, 3, 8, 8))
    given = []
    model.post_quant_conv.register_forward_pre_hook(lambda module, inputs: given.extend(inputs))
    decoded, latents, _ = model(images)
    loss = (decoded - images).square().sum()
    expected, found = torch.autograd.grad(loss, (given[0], latents))
    assert expected.any() and torch.equal(found, expected)


def test_codes_are_pulled_by_their_own_losses_alone():
    """The codes get a gradient of the codebook and the entropy loss; the encoder one of the
    commitment and the entropy loss."""
    model = tiny()
    images = rule_input("image", (2, 3, 8, 8))
    losses = model.regularizers(model(images), Losses(entropy_weight=0.5))
    assert set(losses) == {"codebook", "commitment", "entropy"}
    weights = (model.quantize.embedding.weight, model.quant_conv.weight)
    trained = {}
    for name, loss in losses.items():
        grads = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        trained[name] = tuple(g is not None and bool(g.any()) for g in grads)
    assert trained == {
        "codebook": (True, False),
        "commitment": (False, True),
        "entropy": (True, True),
    }


# Codes out of use


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_dead_codes_are_used_after_a_revival(kind):
    """Codes far from all latents move onto latents, one each, and are the nearest to them from the
    next step on; moving averages restart there."""
    model = tiny()
    weight = model.quantize.embedding.weight
    weight.data[1:] += 1000
    codes = learner(model, kind, decay=0.99)
    latents = rule_input("latents", (1, 2, 8, 8))
    assert step(codes, model, latents).unique().tolist() == [0]
    points = {tuple(point) for point in codebook.rows(latents).tolist()}
    assert {tuple(code) for code in weight[1:].tolist()} <= points
    assert kind != "ema" or codes.counts[1:].tolist() == [1.0] * 15
    moved = weight.detach().clone()
    assert len(step(codes, model, latents).unique()) == 16
    assert (weight - moved)[1:].abs().max() < 0.1  # not back to where they were

    weight.data[5] += 1000  # and what dies later
    if kind == "ema":
        codes.sums[5] += 1000
    metrics = codes.metrics()
    assert metrics["codes_revived"] == 15
    for _ in range(2 * PATIENCE * 16 // 64):  # it was used in the first half
        step(codes, model, latents)
    assert codes.metrics()["codes_revived"] == 1
    assert 5 in step(codes, model, latents)


# Metrics


def test_use_and_perplexity_by_hand():
    """Two codes of four, equally often: half are in use, and the perplexity is 2; with 3 to 1 it
    is exp(−¾ ln ¾ − ¼ ln ¼). Each call counts from the one before; of no latents, none are used."""
    model = tiny([[0.0, 0.0], [1.0, 0.0], [5.0, 5.0], [9.0, 9.0]])
    codes = learner(model, "gradient")
    codes.waiting = 100  # until a revival
    latents = as_latents([[0.1, 0.0], [0.9, 0.0]])
    step(codes, model, latents)
    step(codes, model, latents)
    assert codes.metrics() == pytest.approx(
        {"codes_used": 0.5, "code_perplexity": 2.0, "codes_revived": 0}
    )
    step(codes, model, as_latents([[9.0, 8.0]] * 3 + [[0.0, 0.0]]))
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    expected = {"codes_used": 0.5, "code_perplexity": math.exp(entropy), "codes_revived": 0}
    assert codes.metrics() == pytest.approx(expected)
    assert codes.metrics() == {"codes_used": 0.0, "code_perplexity": 1.0, "codes_revived": 0}
    assert code_use(torch.tensor([5, 5, 5, 5]))["code_perplexity"] == pytest.approx(4)


# Entropy loss


def test_entropy_loss_by_hand():
    """Two codes at 0 and 0.1, T = 0.01: a latent at 0 has p = (1, e⁻¹) / (1 + e⁻¹), one at 0.05
    has (½, ½)."""

    def entropy(p):
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    a = 1 / (1 + math.exp(-1))
    expected = (entropy(a) + math.log(2)) / 2 - entropy((a + 0.5) / 2)
    assert TEMPERATURE == 0.01
    codes = torch.tensor([[0.0], [0.1]])
    assert entropy_loss(as_latents([[0.0], [0.05]]), codes).item() == pytest.approx(expected)


def test_entropy_loss_at_its_extremes():
    """All latents at one code: 0. One at each of four codes far apart: −log 4. Gradients are finite
    though p of other codes underflows."""
    codes = (10 * torch.eye(4)).requires_grad_()
    together = entropy_loss(as_latents([[10.0, 0, 0, 0]] * 4), codes)
    latents = as_latents((10 * torch.eye(4)).tolist()).requires_grad_()
    apart = entropy_loss(latents, codes)
    assert together.item() == pytest.approx(0, abs=1e-6)
    assert apart.item() == pytest.approx(-math.log(4))
    (together + apart).backward()
    assert codes.grad.isfinite().all() and latents.grad.isfinite().all()


def test_entropy_loss_in_chunks(monkeypatch):
    """By chunks of 3 points, and with autocast, the loss and its gradients are those of the formula
    in float64."""
    latents = (0.1 * rule_input("latents", (2, 2, 3, 3))).requires_grad_()
    codes = (0.1 * rule_input("codes", (5, 2))).requires_grad_()
    square = (codebook.rows(latents).double()[:, None] - codes.double()).square().sum(2)
    p = (-square / TEMPERATURE).softmax(1)
    mean = p.mean(0)
    expected = -(p * p.log()).sum(1).mean() + (mean * mean.log()).sum()
    monkeypatch.setattr(codebook, "MAX_DISTANCES", 3 * 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = entropy_loss(latents, codes)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad(loss, (latents, codes)) for loss in (found, expected)]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_entropy_loss_spreads_latents():
    """Latents in one corner of the codes, moved down the gradient, come to use more of them."""
    codes = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)) / 8
    latents = (0.08 * rule_input("latents", (1, 2, 8, 8))).requires_grad_()

    def used():
        return len(nearest(codebook.rows(latents), codes).unique())

    before, optimizer = used(), torch.optim.Adam([latents], 0.01)
    for _ in range(30):
        optimizer.zero_grad()
        entropy_loss(latents, codes).backward()
        optimizer.step()
    assert used() > before + 3


# Resuming


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_resuming_is_bit_equal(kind):
    """A state from between two revivals, through a file, gives the same codes, averages, draws and
    metrics as going on."""
    batches = [rule_input(f"latents {i}", (2, 2, 8, 8)) for i in range(8)]
    model = tiny()
    codes = learner(model, kind, decay=0.9)
    for batch in batches[:2]:
        step(codes, model, batch)
    file = BytesIO()
    torch.save({"model": model.state_dict(), "codes": codes.state_dict()}, file)
    kept = codes.state_dict()
    file.seek(0)
    content = torch.load(file, weights_only=True)
    other = tiny()
    resumed = learner(other, kind, decay=0.9, seed=1)
    other.load_state_dict(content["model"])
    resumed.load_state_dict(content["codes"])
    for network, state in ((model, codes), (other, resumed)):
        for batch in batches[2:]:
            network.quantize.embedding.weight.data[3] += 1000  # out of use
            step(state, network, batch)
    assert torch.equal(*(net.quantize.embedding.weight for net in (model, other)))
    one, two = codes.state_dict(), resumed.state_dict()
    for before, now in ((content["codes"], kept), (one, two)):  # and a state is not changed later
        assert all(torch.equal(torch.as_tensor(before[k]), torch.as_tensor(now[k])) for k in now)
    assert codes.metrics() == resumed.metrics() and codes.metrics()["codes_revived"] == 0


def test_another_codebook_s_state_is_refused():
    """The state of moving averages is not that of codes with a gradient; KL has no codes."""
    ema, gradient = (learner(tiny(), kind) for kind in ("ema", "gradient"))
    with pytest.raises(ValueError, match="state of the codebook: counts, .* same --codebook"):
        gradient.load_state_dict(ema.state_dict())
    with pytest.raises(ValueError, match="expected counts"):
        ema.load_state_dict(gradient.state_dict())
    kl = AutoencoderKL(embed_dim=2, ch_mult=(1, 2), ch=8)
    assert learner(kl) is None
