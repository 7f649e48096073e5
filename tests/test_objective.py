"""The losses of an autoencoder: values computed by hand, and who gets whose gradient.

Run: python -m pytest tests/test_objective.py
"""

import copy
import re
from types import SimpleNamespace

import lpips
import pytest
import timm
import torch
import torchvision
from rule import by_rule, rule_input
from torch import nn

import models.perceptual
from models.autoencoder_settings import Losses
from models.discriminator import Pair, PatchDiscriminator, check_sides, hinge, smallest_side
from models.objective import Objective
from models.perceptual import open_perceptual
from models.vae import AutoencoderKL
from models.vq import VQModel
from util import dist
from util.weights import read_weights

SMALL = {"embed_dim": 2, "ch_mult": (1, 2), "ch": 8}
GAN = Losses(disc_weight=0.5, disc_layers=1, disc_ch=4)


def images(name="images", shape=(2, 3, 8, 8)):
    return rule_input(name, shape).clamp(-1, 1)


def network(kind=AutoencoderKL):
    return by_rule(kind(**SMALL)).train()


def output_of(model, target):
    return model(target, torch.Generator().manual_seed(0))


def small_discriminator():
    torch.manual_seed(0)
    return PatchDiscriminator(ch=4, layers=1)


class Twice(nn.Module):
    """Two weights a, b; decodes x (N,1,1,2) to a·x₀, b·x₁."""

    summed = False

    def __init__(self, a, b):
        super().__init__()
        self.last_layer = nn.Parameter(torch.tensor([a, b]))

    def forward(self, images):
        return (self.last_layer * images,)

    def regularizers(self, output, settings):
        return {}


class Sum(nn.Module):
    """A discriminator whose one logit is weight · the sum of an image."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, images):
        return self.weight * images.sum((1, 2, 3), keepdim=True)


def toy(weight=0.1, summed=False, scale=1.0):
    """(terms, loss) of Twice on one image (1, 3) decoded to (2, 6)."""
    model = Twice(2.0, 2.0)
    model.summed = summed
    target = torch.tensor([[[[1.0, 3.0]]]])
    objective = Objective(Losses(disc_weight=0.5), model, discriminator=Sum(weight))
    loss, terms = objective.loss(target, model(target), 0, scale)
    return terms, loss


# ---- values by hand -------------------------------------------------------------------------


def test_hinge():
    """½ (mean max(0, 1 − real) + mean max(0, 1 + fake))."""
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.5])
    assert hinge(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1.5) / 2))


def test_adaptive_weight_by_hand():
    """λ is the ratio of both gradients' norms at the last layer, plus 1e-4 below.

    L1 = (|a−1| + 3|b−1|) / 2 has the gradient (½, 3/2); −0.1 (a + 3b) has −0.1 (1, 3).
    """
    terms, loss = toy()
    wanted = (10**0.5 / 2) / (0.1 * 10**0.5 + 1e-4)
    assert terms["adaptive_weight"].item() == pytest.approx(wanted, rel=1e-6)
    assert terms["l1"].item() == pytest.approx(2)
    assert terms["adversarial"].item() == pytest.approx(0.5 * wanted * -0.8, rel=1e-6)
    assert loss.item() == pytest.approx(2 + 0.5 * wanted * -0.8, abs=1e-6)


def test_adaptive_weight_has_the_authors_limit():
    """λ is at most 1e4 for losses averaged over an image, for sums 1e4 per element of ours."""
    assert toy(weight=1e-9)[0]["adaptive_weight"].item() == pytest.approx(1e4)
    assert toy(weight=1e-9, summed=True)[0]["adaptive_weight"].item() == pytest.approx(1e4 / 2)


def test_scale_leaves_the_adaptive_weight():
    """The GradScaler's factor cancels; gradients that overflow give 0, not NaN."""
    assert toy(scale=1024.0)[0]["adaptive_weight"] == toy()[0]["adaptive_weight"]
    assert toy(scale=float("inf"))[0]["adaptive_weight"] == 0


def test_adaptive_weight_is_a_constant():
    """λ is detached: the gradient is that of L1 − λ · disc_weight · logits."""
    model = Twice(2.0, 2.0)
    target = torch.tensor([[[[1.0, 3.0]]]])
    objective = Objective(Losses(disc_weight=0.5), model, discriminator=Sum(0.1))
    loss, terms = objective.loss(target, model(target), 0)
    loss.backward()
    factor = 0.5 - 0.5 * terms["adaptive_weight"].item() * 0.1
    assert model.last_layer.grad.tolist() == pytest.approx([factor, 3 * factor], rel=1e-5)


@pytest.mark.parametrize("kind", [AutoencoderKL, VQModel])
def test_default_losses_are_the_networks_own(kind):
    """With the default settings the loss has the bits of the sum of `network.losses`."""
    model, target = network(kind), images()
    output = output_of(model, target)
    loss, terms = Objective(Losses(), model).loss(target, output, 0)
    wanted = model.losses(target, output)
    assert torch.equal(loss, sum(wanted.values()))
    assert terms.keys() == wanted.keys()
    assert not any(value.requires_grad for value in terms.values())


def test_terms_are_weighted_and_add_up():
    """L1 + w · perceptual + w · KL per element of an image, each by its formula."""
    model, target = network(), images()
    decoded, posterior = output = output_of(model, target)
    settings = Losses(kl_weight=0.01, perceptual_weight=0.25)
    distance = lambda a, b: (a - b).square().sum((1, 2, 3))  # noqa: E731
    loss, terms = Objective(settings, model, distance).loss(target, output, 0)
    mean, logvar = posterior.mean, posterior.logvar
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / len(target)
    wanted = {
        "l1": (decoded - target).abs().sum() / target.numel(),
        "perceptual": 0.25 * (decoded - target).square().sum() / len(target),
        "kl": 0.01 * kl / (3 * 8 * 8),
    }
    assert list(terms) == list(wanted)
    for name, value in wanted.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-5), name
    assert loss.item() == pytest.approx(sum(wanted.values()).item(), rel=1e-5)


# ---- who gets whose gradient ----------------------------------------------------------------


def test_no_discriminator_before_its_start():
    """Before disc_start the loss has the bits of one without a discriminator, which is not run."""
    model, target = network(), images()
    output = output_of(model, target)
    discriminator = small_discriminator()
    state = copy.deepcopy(discriminator.state_dict())
    objective = Objective(GAN.but(disc_start=3), model, discriminator=discriminator)
    loss, terms = objective.loss(target, output, 2)
    without, _ = Objective(Losses(), model).loss(target, output, 2)
    assert torch.equal(loss, without) and "adversarial" not in terms
    assert not objective.adversarial(2) and objective.adversarial(3)
    assert all(torch.equal(v, state[k]) for k, v in discriminator.state_dict().items())
    assert "adversarial" in objective.loss(target, output, 3)[1]


def test_discriminator_gets_no_gradient_from_the_networks_loss():
    """The network's step leaves the discriminator without gradients, but uses batch statistics."""
    model, target, discriminator = network(), images(), small_discriminator()
    loss, terms = Objective(GAN, model, discriminator=discriminator).loss(
        target, output_of(model, target), 0
    )
    loss.backward()
    assert terms["adversarial"] != 0
    assert all(weight.grad is None for weight in discriminator.parameters())
    assert all(weight.requires_grad for weight in discriminator.parameters())
    assert all(weight.grad is not None for weight in model.parameters())
    norms = [module for module in discriminator.main if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.num_batches_tracked == 1 for norm in norms)


def test_adversarial_gradient_reaches_the_network():
    """The loss's gradient is that of its formula, with the discriminator as it is."""
    model, target, discriminator = network(), images(), small_discriminator()
    output = output_of(model, target)
    loss, terms = Objective(GAN, model, discriminator=discriminator).loss(target, output, 0)
    first = model.encoder.conv_in.weight
    (found,) = torch.autograd.grad(loss, first, retain_graph=True)
    weight = 0.5 * terms["adaptive_weight"]
    wanted = sum(model.losses(target, output).values()) - weight * discriminator(output[0]).mean()
    assert torch.allclose(found, torch.autograd.grad(wanted, first)[0], rtol=1e-4, atol=1e-9)


def test_network_gets_no_gradient_from_the_discriminators_loss():
    """The discriminator's step leaves the network without gradients; its loss is the hinge's."""
    model, target, discriminator = network(), images(), small_discriminator()
    decoded = output_of(model, target)[0]
    objective = Objective(GAN, model, discriminator=discriminator)
    loss, terms = objective.discriminator_loss(Pair(discriminator), target, decoded)
    loss.backward()
    assert all(weight.grad is None for weight in model.parameters())
    assert all(weight.grad is not None for weight in discriminator.parameters())
    assert loss == hinge(discriminator(target), discriminator(decoded))
    assert terms.keys() == {"discriminator", "logits_real", "logits_fake"}
    assert terms["logits_real"] == discriminator(target).mean()


def test_discriminator_learns_in_a_wrapped_pair():
    """Steps of both losses, in turn and through dist.wrap, tell real from decoded images."""
    model, target, discriminator = network(), images(), small_discriminator()
    objective = Objective(GAN, model, discriminator=discriminator)
    pair = dist.wrap(Pair(discriminator), torch.device("cpu"))
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-2)
    for step in range(10):
        output = output_of(model, target)
        objective.loss(target, output, step)[0].backward()
        optimizer.zero_grad()
        loss, terms = objective.discriminator_loss(pair, target, output[0])
        loss.backward()
        optimizer.step()
    assert terms["logits_real"] > terms["logits_fake"] + 0.3


def test_same_within_autocast():
    """The losses are float32 and the same whether or not autocast is on around them."""
    model, target, discriminator = network(), images(), small_discriminator()
    objective = Objective(GAN, model, discriminator=discriminator)
    with torch.autocast("cpu", torch.bfloat16):
        output = output_of(model, target)
        assert output[0].dtype == torch.bfloat16
        within, terms = objective.loss(target, output, 0)
        score, _ = objective.discriminator_loss(Pair(discriminator), target, output[0])
    assert torch.equal(within, objective.loss(target, output, 0)[0])
    assert within.dtype == score.dtype == terms["adaptive_weight"].dtype == torch.float32


# ---- discriminator --------------------------------------------------------------------------


def test_discriminator_is_the_authors():
    """LDM's layout: 2,765,633 weights, 70×70 pixels a logit, names, and initial weights."""
    torch.manual_seed(0)
    model = PatchDiscriminator()
    assert sum(weight.numel() for weight in model.parameters()) == 2_765_633
    strides = [m.stride[0] for m in model.main if isinstance(m, nn.Conv2d)]
    assert strides == [2, 2, 2, 1, 1]
    field = 1
    for stride in reversed(strides):
        field = field * stride + 4 - stride
    assert field == 70
    assert {m.negative_slope for m in model.main if isinstance(m, nn.LeakyReLU)} == {0.2}
    assert model.main[8].weight.shape == (512, 256, 4, 4) and model.main[8].bias is None
    assert model.main[8].weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert model.main[9].weight.mean().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_smallest_images_of_a_discriminator(layers):
    """`smallest_side` leaves one logit; a pixel less is refused with the number that fits."""
    model, side = PatchDiscriminator(ch=2, layers=layers), smallest_side(layers)
    assert model(torch.zeros(2, 3, side, side + 1)).shape == (2, 1, 1, 1)
    with pytest.raises(
        ValueError, match=f"--disc_layers {layers - 1} fits" if layers > 1 else "no "
    ):
        model(torch.zeros(2, 3, side, side - 1))


def test_layers_that_fit_are_named():
    """The message names the sides and the largest number of layers that fits."""
    check_sides(3, (24, 24))
    with pytest.raises(
        ValueError, match=r"images of 8×30 pixels.*at least 96; --disc_layers 1 fits"
    ):
        check_sides(5, (8, 30))


# ---- perceptual -----------------------------------------------------------------------------


def vgg_layers():
    """torchvision's layers of VGG-16, without the classifier."""
    return torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """A file of random VGG-16 features by torchvision's names, and their state dict."""
    names = vgg_layers().state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {
        f"features.{name}": torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5
        for name, value in names.items()
    }
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(state, path)
    return path, state


@pytest.fixture(scope="module")
def tiny_timm(tmp_path_factory):
    """A file of random weights of a small network of timm."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "model.pth"
    torch.save(timm.create_model(TIMM).state_dict(), path)
    return path


TIMM = "test_efficientnet"


@pytest.fixture(params=["lpips", "timm"])
def perceptual(request, vgg, tiny_timm):
    name, path = {"lpips": ("lpips", vgg[0]), "timm": (f"timm:{TIMM}", tiny_timm)}[request.param]
    return open_perceptual(name, path)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1, 8, 8)])
def test_perceptual_distance(perceptual, shape):
    """0 for equal images, else positive and differentiable; grey and small images are taken."""
    target = images(shape=shape)
    decoded = (target + 0.1 * rule_input("noise", shape)).requires_grad_()
    distances = perceptual(target, decoded)
    assert distances.shape == (2,) and distances.dtype == torch.float32
    assert (distances > 0).all() and (perceptual(target, target) == 0).all()
    distances.sum().backward()
    assert decoded.grad.isfinite().all() and decoded.grad.abs().sum() > 0
    assert not any(weight.requires_grad for weight in perceptual.parameters())


def test_lpips_is_the_packages(vgg, monkeypatch):
    """The same numbers as the package's own LPIPS with the same VGG-16."""
    path, state = vgg
    layers = vgg_layers()
    layers.load_state_dict({name.removeprefix("features."): v for name, v in state.items()})
    model = SimpleNamespace(features=layers)  # without its classifier, which takes seconds
    monkeypatch.setattr(lpips.pretrained_networks.tv, "vgg16", lambda pretrained: model)
    theirs = lpips.LPIPS(net="vgg", verbose=False)
    a, b = images("a", (2, 3, 32, 40)), images("b", (2, 3, 32, 40))
    assert torch.allclose(open_perceptual("lpips", path)(a, b), theirs(a, b).flatten(), rtol=1e-5)


def test_timm_distance_by_hand(tiny_timm):
    """Normalized as timm says, levels of stride 2 to 16, each position's features of norm 1."""
    model = timm.create_model(TIMM, features_only=True, out_indices=(0, 1, 2, 3))
    state = read_weights(tiny_timm)
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    model.eval()
    assert model.feature_info.reduction() == [2, 4, 8, 16]
    mean, std = (torch.tensor(model.pretrained_cfg[n]).view(3, 1, 1) for n in ("mean", "std"))
    a, b = images("a", (2, 3, 32, 40)), images("b", (2, 3, 32, 40))
    wanted = torch.zeros(2)
    with torch.no_grad():
        for x, y in zip(*(model(((i + 1) / 2 - mean) / std) for i in (a, b)), strict=True):
            x, y = (f / f.norm(dim=1, keepdim=True) for f in (x, y))
            wanted += (x - y).square().sum(1).flatten(1).mean(1)
    found = open_perceptual(f"timm:{TIMM}", tiny_timm)(a, b)
    assert torch.allclose(found, wanted, rtol=1e-4)


def test_small_images_are_enlarged(tiny_timm):
    """Images of 8×12 pixels are compared as if four times as large; those of 32 as they are."""
    perceptual = open_perceptual(f"timm:{TIMM}", tiny_timm)
    a, b = images("a", (2, 3, 8, 12)), images("b", (2, 3, 8, 12))
    large = [nn.functional.interpolate(i, scale_factor=4, mode="bilinear") for i in (a, b)]
    assert torch.equal(perceptual(a, b), perceptual(*large))
    assert large[0].shape[2:] == (32, 48)


def test_gradient_where_all_features_are_zero(perceptual, monkeypatch):
    """Positions without any feature, as after a ReLU, give no NaN."""
    features = perceptual.features
    monkeypatch.setattr(perceptual, "features", lambda i: [0 * level for level in features(i)])
    decoded = images(shape=(2, 3, 32, 32)).requires_grad_()
    perceptual(images("other", (2, 3, 32, 32)), decoded).sum().backward()
    assert (decoded.grad == 0).all()


def test_what_perceptual_losses_refuse(vgg, tiny_timm, tmp_path, monkeypatch):
    """One line each: unknown names, wrong files, no network, fixed sizes, four channels."""
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fail)
    fixed = tmp_path / "vit.pth"
    torch.save(timm.create_model("test_vit3").state_dict(), fixed)
    for name, file, message in [
        ("vgg", None, "--perceptual 'vgg': expected one of none, lpips, timm:NAME"),
        ("timm", None, "--perceptual 'timm': expected one of none, lpips, timm:NAME"),
        ("none", "file.pth", "--perceptual_weights file.pth: expected a --perceptual"),
        ("timm:nothing", None, "--perceptual timm:nothing: not available"),
        ("timm:test_vit3", fixed, "no features of 32×32 pixels"),
        (f"timm:{TIMM}", vgg[0], "does not fit this EfficientNet"),
        ("lpips", tiny_timm, "Expected torchvision's vgg16: https://download.pytorch.org/"),
        ("lpips", "missing.pth", "missing.pth: no such file"),
        ("lpips", None, "(no network); download https://download.pytorch.org/models/vgg16-"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            open_perceptual(name, file)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="images of 4 channels: .* expects 1 or 3"):
        open_perceptual(f"timm:{TIMM}", tiny_timm)(*torch.zeros(2, 1, 4, 32, 32))
    monkeypatch.setattr(models.perceptual, "MAX_STRIDE", 1)
    with pytest.raises(ValueError, match="no level has a stride of 1 or less"):
        open_perceptual(f"timm:{TIMM}", tiny_timm)
    assert open_perceptual("none") is None


def fail(*args, **kwargs):
    raise OSError("no network")
