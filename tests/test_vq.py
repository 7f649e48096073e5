"""The VQ autoencoder: vq-f16's layout, nearest codes, files, and another implementation.

Run: python -m pytest tests/test_vq.py
"""

import re

import pytest
import torch
from rule import by_rule, rule_input
from safetensors.torch import save_file

from models import codebook
from models.vae import AutoencoderKL
from models.vq import PATIENCE, Reviver, VQModel, nearest, vq_variant

TINY = {"embed_dim": 2, "num_codes": 16, "ch_mult": (1, 2), "ch": 8}
VARIANTS = {
    "vq-f16": {},
    "no attention": {"encoder_attention": False, "decoder_attention": False},
    "encoder only": {"decoder_attention": False},
    "decoder only": {"encoder_attention": False, "res_blocks": 1},
    "grey": {"in_channels": 1, "ch_mult": (1, 1, 2)},
}


def tiny(**changes):
    """A small VQ autoencoder, every weight different and set by its name."""
    return by_rule(VQModel(**{**TINY, **changes}))


def test_vq_f16_layout():
    """LDM's vq-f16: its names and shapes, attention in the lowest level of both halves and in both
    middles, 69,593,371 parameters (which diffusers' VQModel has too, see below).
    """
    with torch.device("meta"):
        model = VQModel()
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    expected = {
        "quantize.embedding.weight": (16384, 8),
        "quant_conv.weight": (8, 8, 1, 1),
        "post_quant_conv.weight": (8, 8, 1, 1),
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.conv_out.weight": (8, 512, 3, 3),  # plain, not mean and variance
        "encoder.down.3.downsample.conv.weight": (256, 256, 3, 3),
        "encoder.down.4.block.0.nin_shortcut.weight": (512, 256, 1, 1),
        "decoder.conv_in.weight": (512, 8, 3, 3),
        "decoder.up.4.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.up.0.block.2.conv2.bias": (128,),
        "decoder.conv_out.weight": (3, 128, 3, 3),
    }
    assert expected.items() <= shapes.items()
    attending = {n.removesuffix(".q.weight"): s for n, s in shapes.items() if ".q.weight" in n}
    names = ["encoder.down.4.attn.0", "encoder.down.4.attn.1", "encoder.mid.attn_1"]
    names += ["decoder.mid.attn_1", *(f"decoder.up.4.attn.{i}" for i in range(3))]
    assert attending == dict.fromkeys(names, (512, 512, 1, 1))
    assert len(shapes) == 343
    assert sum(p.numel() for p in model.parameters()) == 69_593_371
    assert model.stride == 16


def test_nearest_is_that_of_brute_force(monkeypatch):
    """Every distance computed in float64 gives the same codes, whole or by chunks of 3 points."""
    points, codes = rule_input("points", (100, 4)), rule_input("codes", (50, 4))
    distances = (points.double()[:, None] - codes.double()[None]).norm(dim=2)
    expected = distances.argmin(1)
    assert torch.equal(nearest(points, codes), expected)
    monkeypatch.setattr(codebook, "MAX_DISTANCES", 3 * 50)
    assert torch.equal(nearest(points, codes), expected)


def test_nearest_stays_in_float32_under_autocast():
    """Of codes closer than bfloat16 can tell, the right one is found in an autocast region too."""
    codes = torch.tensor([[1.0, 0.0], [1.001, 0.0], [1.002, 0.0]])
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest(codes + 1e-4, codes).tolist() == [0, 1, 2]


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_ids_there_and_back(changes):
    """Codes quantize to their own ids, and an image's ids decode to what their codes decode to."""
    model = tiny(**changes)
    s, colours = model.stride, model.config["in_channels"]
    latents = model.encode(rule_input("image", (2, colours, 2 * s, 3 * s)))
    assert latents.shape == (2, 2, 2, 3)
    ids = model.quantize(latents)
    assert ids.shape == (2, 2, 3) and ids.dtype == torch.int64
    assert len(ids.unique()) > 1
    codes = model.lookup(ids)
    assert torch.equal(model.quantize(codes), ids)
    images = model.decode(codes)
    assert images.shape == (2, colours, 2 * s, 3 * s)
    assert not torch.equal(images, model.decode(latents))  # decode itself quantizes nothing
    every = torch.arange(16).view(1, 4, 4)
    assert torch.equal(model.quantize(model.lookup(every)), every)
    assert torch.equal(model.lookup(every)[0, :, 1, 2], model.quantize.embedding.weight[6])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.full((1, 2, 2), 16), "code indices from 16 to 16: expected 0 to 15"),
        (torch.full((1, 2, 2), -1), "code indices from -1 to -1"),
        (torch.zeros(1, 2, 2), "must be integers, got torch.float32"),
    ],
)
def test_what_is_no_code_is_refused(ids, message):
    """Ids out of range, and latents given in their place."""
    with pytest.raises(ValueError, match=message):
        tiny().lookup(ids)


def test_other_shapes_are_refused():
    """Images and latents of another shape are shown, as by the KL autoencoder."""
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\), got \(1, 1, 8, 8\)"):
        tiny().encode(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="multiples of the stride 2, got 7x8"):
        tiny().encode(torch.zeros(1, 3, 7, 8))
    with pytest.raises(ValueError, match=r"\(N, 2, h, w\), got \(1, 8, 2, 2\)"):
        tiny().decode(torch.zeros(1, 8, 2, 2))


# Training


def test_losses_are_as_stated():
    """Mean |error|; mean squared distance of codes and latents, once and a quarter of it."""
    model = tiny()
    images = rule_input("image", (2, 3, 8, 8))
    output = decoded, latents, ids = model(images)
    codes = model.lookup(ids)
    assert torch.allclose(decoded, model.decode(codes), atol=1e-5)  # what the decoder is given
    distance = (codes - latents).square().mean().item()
    expected = {
        "l1": (decoded - images).abs().mean().item(),
        "codebook": distance,
        "commitment": distance / 4,
    }
    assert {k: v.item() for k, v in model.losses(images, output).items()} == pytest.approx(expected)


def test_gradients_pass_straight_through():
    """The reconstruction trains the encoder as if nothing were quantized, and no code; the codes
    are pulled by their own loss alone."""
    model = tiny()
    images = rule_input("image", (2, 3, 8, 8))
    codes = model.quantize.embedding.weight
    losses = model.losses(images, model(images))
    grads = {
        name: torch.autograd.grad(
            loss, (codes, model.quant_conv.weight), retain_graph=True, allow_unused=True
        )
        for name, loss in losses.items()
    }
    trained = {name: tuple(g is not None and bool(g.any()) for g in grads[name]) for name in grads}
    assert trained == {"l1": (False, True), "codebook": (True, False), "commitment": (False, True)}


def test_codes_out_of_use_are_revived():
    """Codes far from every latent move onto different latents, at once and then after PATIENCE
    latents a code; those in use stay where they are."""
    model = tiny()
    weight = model.quantize.embedding.weight
    weight.data[1:] += 1000
    in_use = weight[0].clone()
    reviver = Reviver(model, torch.Generator().manual_seed(0))
    latents = rule_input("latents", (1, 2, 8, 8))
    reviver.step(latents, model.quantize(latents))
    assert reviver.revived == 15
    assert torch.equal(weight[0], in_use)
    points = {tuple(p) for p in latents[0].flatten(1).T.tolist()}
    places = {tuple(p) for p in weight[1:].tolist()}
    assert places <= points and len(places) == 15

    weight.data[5] += 1000
    calls = 0
    while reviver.revived < 16:
        reviver.step(latents, model.quantize(latents))
        calls += 1
    assert calls == PATIENCE * 16 / 64
    assert tuple(weight[5].tolist()) in points


# Files


@pytest.fixture
def save(tmp_path):
    """save(content, name) -> the path of the file written."""

    def write(content, name="vq.ckpt"):
        path = tmp_path / name
        (save_file if name.endswith(".safetensors") else torch.save)(content, path)
        return path

    return write


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_layout_loads(save, changes):
    """LDM's training checkpoint, with its loss and EMA; inside a latent diffusion checkpoint; flat.
    The variant is read off the weights.
    """
    model = tiny(**changes)
    state = model.state_dict()
    training = {
        "loss.discriminator.main.0.weight": torch.ones(3),
        "model_ema.decay": torch.ones(()),
    }
    whole = {f"first_stage_model.{k}": v for k, v in {**state, **training}.items()}
    files = [
        save({"state_dict": {**state, **training}, "epoch": 3}, "ldm.ckpt"),
        save({"state_dict": {**whole, "cond_stage_model.x": torch.ones(3)}}, "whole.ckpt"),
        save({"model": state}, "ours.ckpt"),
        save(state, "flat.safetensors"),
    ]
    for path in files:
        loaded = VQModel.from_file(path)
        assert loaded.config == model.config == vq_variant(state)
        assert all(torch.equal(value, state[k]) for k, value in loaded.state_dict().items())


def test_wrong_files_are_refused(save):
    """The message starts with the file and says what differs first, or what it is instead."""
    path = save(tiny().state_dict())
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        VQModel.from_file(path, num_codes=32)
    message = str(caught.value)
    assert "quantize.embedding.weight: (16, 2) in the file, (32, 2) here" in message
    assert "The file's variant is num_codes=16." in message
    with pytest.raises(ValueError, match=r"vq\.ckpt: not the weights of a KL .* it is a VQ one"):
        AutoencoderKL.from_file(path)

    kl = AutoencoderKL(embed_dim=2, ch_mult=(1, 2), ch=8)
    with pytest.raises(ValueError, match=r"kl\.ckpt: .* VQ .* no quantize\.embedding\.weight"):
        VQModel.from_file(save(kl.state_dict(), "kl.ckpt"))
    with pytest.raises(ValueError, match=r"x\.ckpt: not the weights of a VQ .*conv_in"):
        VQModel.from_file(save({"model": {"x": torch.ones(1)}}, "x.ckpt"))
    incomplete = {k: v for k, v in tiny().state_dict().items() if k != "quant_conv.bias"}
    with pytest.raises(ValueError, match=r"quant_conv\.bias: in this model, not in the file"):
        VQModel.from_file(save(incomplete, "part.ckpt"))
    with pytest.raises(ValueError, match=r"nowhere\.ckpt: no such file"):
        VQModel.from_file("nowhere.ckpt")


# Another implementation


def diffusers_vq(ch, ch_mult, embed_dim, num_codes):
    """The diffusers library's VQModel with vq-f16's attention, names and all its own."""
    diffusers = pytest.importorskip("diffusers")
    plain = len(ch_mult) - 1
    return diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * plain + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * plain,
        block_out_channels=tuple(ch * m for m in ch_mult),
        layers_per_block=2,
        latent_channels=embed_dim,
        num_vq_embeddings=num_codes,
        vq_embed_dim=embed_dim,
        norm_num_groups=32,
    )


@torch.no_grad()
def test_agrees_with_diffusers(save):
    """The same weights give the same latents, codes and images in the diffusers library."""
    torch.manual_seed(0)
    theirs = diffusers_vq(32, (1, 2), 2, 16).eval()
    theirs.quantize.embedding.weight.normal_()
    ours = VQModel.from_file(save(theirs.state_dict(), "diffusers.safetensors"))
    images = rule_input("image", (2, 3, 8, 16))
    latents = ours.encode(images)
    torch.testing.assert_close(latents, theirs.encode(images).latents, atol=1e-4, rtol=1e-4)
    ids = theirs.quantize(latents)[2][2]
    assert torch.equal(ours.quantize(latents).flatten(), ids)
    decoded = ours.decode(ours.lookup(ours.quantize(latents)))
    torch.testing.assert_close(decoded, theirs.decode(latents).sample, atol=1e-4, rtol=1e-4)


def test_diffusers_counts_the_same_parameters():
    """vq-f16 in the diffusers library has 69,593,371 too."""
    with torch.device("meta"):
        model = diffusers_vq(128, (1, 1, 2, 2, 4), 8, 16384)
    assert sum(p.numel() for p in model.parameters()) == 69_593_371
