"""The KL autoencoder: published numbers and names, every form of file, and what is refused.

Run: python -m pytest tests/test_vae.py
"""

import json
import os
import re
import sys

import numpy as np
import pytest
import torch
from rule import GOLDEN, by_rule, rule_input
from safetensors.torch import save_file

from models.autoencoder_settings import Losses
from models.vae import AutoencoderKL, DiagonalGaussian, kl_variant, load_first_stage
from util.weights import load_strictly, read_weights

KL8 = {"embed_dim": 4, "ch_mult": (1, 2, 4, 4), "encoder_attention": False}
TINY = {"embed_dim": 2, "ch_mult": (1, 2, 2), "ch": 8}
VARIANTS = {
    "mar": {},
    "ldm": {"decoder_attention": True},
    "no attention": {"encoder_attention": False},
    "decoder only": {"encoder_attention": False, "decoder_attention": True},
    "kl8-like": {"embed_dim": 4, "ch_mult": (1, 2, 4, 4), "encoder_attention": False},
    "as SD3": {"embed_dim": 4, "quant_conv": False, "post_quant_conv": False},
    "one block a level": {"res_blocks": 1},
    "three blocks, all attention": {"res_blocks": 3, "decoder_attention": True},
    "grey, stride 2": {"in_channels": 1, "ch_mult": (1, 2), "encoder_attention": False},
}


def tiny(**changes):
    """A small autoencoder, every weight different and set by its name."""
    return by_rule(AutoencoderKL(**{**TINY, **changes}))


def assert_same_state(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.fixture
def save(tmp_path):
    """save(content, name) -> the path of the file written."""

    def write(content, name="vae.ckpt"):
        path = tmp_path / name
        (save_file if name.endswith(".safetensors") else torch.save)(content, path)
        return path

    return write


# The published network


@pytest.fixture(scope="module")
def kl16():
    return by_rule(AutoencoderKL())


@pytest.fixture(scope="module")
def golden():
    return {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / "kl16.npz").items()}


@torch.no_grad()
def test_encoder_computes_the_published_numbers(kl16, golden):
    """moments, mean and std agree with the published KL-16's for the same weights and image."""
    posterior = kl16.encode(torch.tanh(rule_input("vae/image", (1, 3, 64, 64))))
    for name in ("moments", "mean", "std"):
        torch.testing.assert_close(getattr(posterior, name), golden[name], atol=1e-3, rtol=1e-3)
    assert posterior.parameters is posterior.moments  # the published name


@torch.no_grad()
def test_decoder_computes_the_published_numbers(kl16, golden):
    """The decoded image agrees with the published KL-16's for the same weights and latent."""
    images = kl16.decode(rule_input("vae/latent", (1, 16, 4, 4)))
    torch.testing.assert_close(images, golden["decoded"], atol=1e-3, rtol=1e-3)


def test_names_and_shapes_are_the_published_ones(kl16):
    """A published KL-16 file loads strictly: the same names, shapes and number of parameters."""
    published = json.loads((GOLDEN / "checkpoint_shapes.json").read_text())["kl16"]
    shapes = {name: list(value.shape) for name, value in kl16.state_dict().items()}
    assert shapes == published["shapes"]
    assert sum(p.numel() for p in kl16.parameters()) == published["parameters"]


def test_kl8_has_no_level_attention():
    """KL-8 is Stable Diffusion's autoencoder: 83,653,863 parameters, attention in the middle."""
    with torch.device("meta"):
        model = AutoencoderKL(**KL8)
    assert sum(p.numel() for p in model.parameters()) == 83_653_863
    attending = {
        re.sub(r"\.(norm|q|k|v|proj_out)\..*", "", n) for n in model.state_dict() if ".q." in n
    }
    assert attending == {"encoder.mid.attn_1", "decoder.mid.attn_1"}
    assert model.stride == 8


# Shapes and randomness


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_shapes_and_gradients(changes):
    """Non-square images there and back: latents are `stride` times smaller; all weights train."""
    model = tiny(**changes)
    s, c, colours = model.stride, model.config["embed_dim"], model.config["in_channels"]
    images, posterior = model(rule_input("image", (2, colours, 2 * s, 3 * s)), torch.Generator())
    assert posterior.moments.shape == (2, 2 * c, 2, 3)
    assert posterior.mode().shape == (2, c, 2, 3)
    assert images.shape == (2, colours, 2 * s, 3 * s)
    (images.square().mean() + posterior.kl().mean()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_sample_is_reproducible_and_leaves_the_global_generator_alone():
    """The same generator state gives the same draw, another a different one."""
    posterior = DiagonalGaussian(rule_input("moments", (2, 8, 4, 4)))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draws = [posterior.sample(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_sample_has_the_posterior_s_mean_and_std():
    """100,000 draws at mean 3, std 1/2: a mean off by 0.01 would be 6 standard errors."""
    moments = torch.tensor([3.0, 2 * np.log(0.5)]).view(1, 2, 1, 1).expand(1, 2, 250, 400)
    sample = DiagonalGaussian(moments).sample(torch.Generator().manual_seed(0))
    assert abs(sample.mean() - 3) < 0.01
    assert abs(sample.std() - 0.5) < 0.01


def test_change_is_applied_to_what_is_decoded():
    """forward decodes change(sample): the posterior stays, and gradients pass through it."""
    model = tiny()
    images = rule_input("image", (2, 3, 8, 16))
    plain, posterior = model(images, torch.Generator().manual_seed(0))
    changed, same = model(images, torch.Generator().manual_seed(0), lambda z: 0.5 * z.flip(0))
    assert torch.equal(posterior.moments, same.moments)
    sample = posterior.sample(torch.Generator().manual_seed(0))
    assert torch.equal(changed, model.decode(0.5 * sample.flip(0)))
    assert not torch.equal(changed, plain)
    changed.sum().backward()
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0


def test_regularizers_weigh_the_kl():
    """The KL per element, times its weight; `losses` are those of the default settings."""
    model = tiny()
    images = rule_input("image", (2, 3, 8, 16))
    output = model(images, torch.Generator().manual_seed(0))
    plain, strong = (model.regularizers(output, Losses.of(kl_weight=w)) for w in (1e-6, 0.5))
    assert plain == {"kl": model.losses(images, output)["kl"]}
    assert strong["kl"].item() == pytest.approx(0.5 * output[1].kl().mean().item() / 384)


def test_losses_are_ldm_s_divided_by_the_elements():
    """|error| and 1e-6 KL, both summed over an image in LDM's recipe, divided by its elements."""
    model = tiny()
    images = rule_input("image", (2, 3, 8, 16))
    output = decoded, posterior = model(images, torch.Generator().manual_seed(0))
    whole = (decoded - images).abs().sum(dim=(1, 2, 3)) + 1e-6 * posterior.kl()
    losses = model.losses(images, output)
    assert set(losses) == {"l1", "kl"}
    torch.testing.assert_close(sum(losses.values()), whole.mean() / (3 * 8 * 16))
    assert losses["kl"].item() == pytest.approx(1e-6 * posterior.kl().mean().item() / 384)


def test_log_variance_is_clamped():
    """A log-variance of -1e9 acts as -30, so that the draw is the mean; one of 1e9 acts as 20."""
    mean = rule_input("mean", (1, 4, 2, 2))
    narrow = DiagonalGaussian(torch.cat([mean, torch.full_like(mean, -1e9)], dim=1))
    torch.testing.assert_close(narrow.sample(), mean, atol=1e-5, rtol=0)
    assert torch.equal(narrow.mode(), mean)
    wide = DiagonalGaussian(torch.cat([mean, torch.full_like(mean, 1e9)], dim=1))
    torch.testing.assert_close(wide.std, torch.full_like(mean, np.exp(10)))


def test_kl_is_that_of_torch_distributions():
    """kl() agrees with torch.distributions, and is 0 for the standard normal itself."""
    posterior = DiagonalGaussian(rule_input("moments", (3, 8, 2, 2)))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(
        normal(posterior.mean, posterior.std), normal(0, 1)
    )
    torch.testing.assert_close(posterior.kl(), expected.sum(dim=(1, 2, 3)))
    assert DiagonalGaussian(torch.zeros(2, 8, 2, 2)).kl().tolist() == [0, 0]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 8, 10), "8x10"),
        (torch.zeros(1, 3, 0, 8), "0x8"),
        (torch.zeros(3, 8, 8), r"\(3, 8, 8\)"),
        (torch.zeros(1, 1, 8, 8), r"\(1, 1, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
    ],
)
def test_encode_refuses_what_is_no_image(images, message):
    """A side that is no multiple of the stride (4), or another shape or dtype, is shown."""
    with pytest.raises(ValueError, match=message):
        AutoencoderKL(**TINY).encode(images)


def test_colours_must_be_the_network_s():
    """A network of grey images refuses colour ones, showing both."""
    with pytest.raises(ValueError, match=r"\(N, 1, H, W\), got \(1, 3, 8, 8\)"):
        AutoencoderKL(**TINY, in_channels=1).encode(torch.zeros(1, 3, 8, 8))


def test_other_latents_are_refused():
    """Latents and moments of another shape are shown."""
    with pytest.raises(ValueError, match=r"\(N, 2, h, w\), got \(1, 4, 2, 2\)"):
        AutoencoderKL(**TINY).decode(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match=r"\(1, 3, 2, 2\)"):
        DiagonalGaussian(torch.zeros(1, 3, 2, 2))


# Files


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("vae.safetensors", None),  # always flat
        ("vae.ckpt", None),
        ("vae.ckpt", "model"),
        ("vae.ckpt", "state_dict"),
    ],
)
def test_every_layout_loads(save, name, entry, prefix):
    """Plain, as published and Lightning files, alone or in a whole Stable Diffusion checkpoint,
    with the entries of losses, discriminator and EMA dropped.
    """
    model = tiny()
    state = {prefix + k: v for k, v in model.state_dict().items()}
    state[prefix + "loss.discriminator.main.0.weight"] = torch.ones(3)
    state["model_ema.decay"] = torch.tensor(0.9999)
    state["discriminator.main.0.weight" if not prefix else "cond_stage_model.x"] = torch.ones(3)
    content = {entry: state, "epoch": 3} if entry else state
    path = save(content, name)
    assert_same_state(AutoencoderKL(**TINY, ckpt_path=path).state_dict(), model.state_dict())
    assert_same_state(AutoencoderKL.from_file(str(path)).state_dict(), model.state_dict())


def test_model_comes_before_model_ema_and_state_dict(save):
    """Of several entries, `model` is read."""
    state = tiny().state_dict()
    other = {k: torch.zeros_like(v) for k, v in state.items()}
    path = save({"model_ema": other, "state_dict": other, "model": state})
    assert_same_state(load_first_stage(path), state)


def to_diffusers(state, levels, old):
    """The inverse renaming: LDM's state dict as diffusers would write it."""
    result = {}
    for name, value in state.items():
        parts = name.split(".")
        if "attn" in name:
            q, k, v, out = (
                ("query", "key", "value", "proj_attn")
                if old
                else ("to_q", "to_k", "to_v", "to_out.0")
            )
            part = {"norm": "group_norm", "q": q, "k": k, "v": v, "proj_out": out}
            parts[-2] = part[parts[-2]]
            value = value.flatten(1) if value.ndim == 4 else value
        side, rest = parts[0], parts[1:]
        if rest[0] in ("down", "up"):
            level = int(rest[1])
            level = level if rest[0] == "down" else levels - 1 - level
            kind = rest[2]
            rest[:3] = [f"{rest[0]}_blocks.{level}"]
            if kind in ("downsample", "upsample"):
                rest.insert(1, f"{kind}rs.0")
            else:
                rest.insert(1, {"block": "resnets", "attn": "attentions"}[kind])
        elif rest[0] == "mid":
            renamed = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}
            rest[:2] = ["mid_block", renamed[rest[1]]]
        name = ".".join([side, *rest]).replace("nin_shortcut", "conv_shortcut")
        result[name.replace("norm_out", "conv_norm_out")] = value.contiguous()
    return result


@pytest.mark.parametrize("name", ["vae.bin", "vae.safetensors"])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_diffusers_there_and_back(save, changes, old, name):
    """diffusers' names, new and old, give LDM's names and the same weights for every variant."""
    model = tiny(**changes)
    levels = len(model.config["ch_mult"])
    path = save(to_diffusers(model.state_dict(), levels, old), name)
    assert_same_state(load_first_stage(path), model.state_dict())
    loaded = AutoencoderKL.from_file(path)
    assert loaded.config == model.config
    images = rule_input("image", (1, model.config["in_channels"], 16, 16))
    assert torch.equal(loaded.encode(images).mean, model.encode(images).mean)


def test_diffusers_names_are_the_real_ones():
    """The inverse above makes names that Stable Diffusion's published VAE has."""
    names = to_diffusers(tiny(**VARIANTS["kl8-like"]).state_dict(), levels=4, old=False)
    published = {
        "encoder.conv_in.weight",
        "encoder.conv_norm_out.bias",
        "encoder.conv_out.weight",
        "encoder.down_blocks.0.downsamplers.0.conv.weight",
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
        "encoder.down_blocks.3.resnets.1.norm2.bias",
        "encoder.mid_block.attentions.0.group_norm.weight",
        "encoder.mid_block.attentions.0.to_q.bias",
        "decoder.mid_block.attentions.0.to_out.0.weight",
        "decoder.mid_block.resnets.1.conv1.weight",
        "decoder.up_blocks.0.upsamplers.0.conv.bias",
        "decoder.up_blocks.2.upsamplers.0.conv.bias",
        "decoder.up_blocks.2.resnets.0.conv_shortcut.weight",
        "decoder.up_blocks.3.resnets.0.conv_shortcut.weight",
        "decoder.up_blocks.3.resnets.2.norm1.bias",
        "quant_conv.weight",
        "post_quant_conv.bias",
    }
    assert published <= names.keys()
    assert "decoder.up_blocks.3.upsamplers.0.conv.bias" not in names  # the full resolution


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_variant_is_read_from_the_weights(changes):
    """kl_variant gives back the arguments that made the model."""
    model = AutoencoderKL(**{**TINY, **changes})
    assert kl_variant(model.state_dict()) == model.config
    assert kl_variant(AutoencoderKL(**model.config).state_dict()) == model.config


@pytest.mark.parametrize("wrap", ["module.", "_orig_mod.", "_orig_mod.module.", "inner"])
@pytest.mark.parametrize("diffusers", [False, True])
def test_names_of_wrapped_networks(save, wrap, diffusers):
    """Saved inside DDP or torch.compile, whole or in part, and inside a whole checkpoint."""
    model = tiny()
    state = to_diffusers(model.state_dict(), 3, old=False) if diffusers else model.state_dict()
    if wrap == "inner":
        state = {k.replace("encoder.", "encoder._orig_mod."): v for k, v in state.items()}
    else:
        state = {wrap + k: v for k, v in state.items()}
    assert_same_state(AutoencoderKL.from_file(save(state)).state_dict(), model.state_dict())
    whole = {f"module.first_stage_model.{k}": v for k, v in state.items()}
    assert_same_state(load_first_stage(save({"state_dict": whole})), model.state_dict())


# What does not fit, and what is refused


@pytest.mark.parametrize("in_file", [True, False])
def test_decoder_attention_mismatch_names_the_variant(save, in_file):
    """Level attention in the decoder on one side only: the message says which argument fits."""
    path = save(tiny(decoder_attention=in_file).state_dict())
    with pytest.raises(ValueError, match=f"decoder_attention={in_file}") as caught:
        AutoencoderKL(**TINY, decoder_attention=not in_file, ckpt_path=path)
    message = str(caught.value)
    side = "in the file, not in this model" if in_file else "in this model, not in the file"
    assert str(path) in message
    assert f"decoder.up.2.attn.0.norm.weight: {side}" in message
    assert "and 27 more" in message  # 3 attentions of 10 tensors, 3 of which are shown
    assert "\n" not in message


def test_kl8_mismatch_shows_both_shapes(save):
    """KL-8's file in a KL-16-like model: shapes, counts and the arguments that fit."""
    path = save(tiny(**VARIANTS["kl8-like"]).state_dict())
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        AutoencoderKL(embed_dim=16, ch=8, ckpt_path=path)
    message = str(caught.value)
    assert "encoder.down.1.block.0.conv1.weight: (16, 8, 3, 3) in the file, (8, 8, 3, 3)" in message
    assert re.search(r"and \d+ more \(in all \d+ shapes differ, \d+ names unexp", message)
    assert "embed_dim=4, ch_mult=(1, 2, 4, 4), encoder_attention=False" in message
    assert len(message) < 1500


def test_a_failed_load_changes_nothing():
    """load_strictly compares before it copies: one wrong name and no weight is touched."""
    model, other = tiny(), AutoencoderKL(**TINY).state_dict()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    other["extra"] = other.pop("quant_conv.bias")
    with pytest.raises(ValueError, match=r"extra: in the file.*quant_conv.bias: in this model"):
        load_strictly(model, other, "here")
    assert_same_state(model.state_dict(), before)


def test_missing_file_says_how_to_get_it(tmp_path):
    """A path without a file names the path and the download command."""
    path = tmp_path / "kl16.ckpt"
    with pytest.raises(ValueError, match=r"kl16\.ckpt: no such file.*util\.download kl16"):
        AutoencoderKL(**TINY, ckpt_path=str(path))
    with pytest.raises(ValueError, match="no such file"):
        AutoencoderKL.from_file(tmp_path)  # a folder


@pytest.mark.parametrize("name", ["vae.ckpt", "vae.safetensors"])
@pytest.mark.parametrize("kept", [0, 100, 5000, 0.5, 0.999])
def test_truncated_file_is_a_clear_error(save, name, kept):
    """A file cut anywhere (an interrupted download) is one line that says so."""
    path = save(tiny().state_dict(), name)
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(ValueError, match="truncated") as caught:
        load_first_stage(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"<html>404 Not Found</html>", bytes(range(256)) * 4])
def test_other_files_are_a_clear_error(tmp_path, content):
    """A web page or noise in place of the weights is one line that says so."""
    path = tmp_path / "vae.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no weight file"):
        load_first_stage(path)


@pytest.mark.parametrize("content", [{"epoch": 3, "args": "x"}, {}, [torch.ones(2)]])
def test_files_without_weights_are_named(save, content):
    """A readable file that holds no state dict says what it holds."""
    with pytest.raises(ValueError, match=r"vae\.ckpt: holds"):
        read_weights(save(content))


def test_other_weights_are_no_autoencoder(save):
    """from_file on, say, a MAR checkpoint names the file and the weight that it looked for."""
    path = save({"model": {"mask_token": torch.zeros(1, 1, 8)}})
    with pytest.raises(ValueError, match=r"vae\.ckpt: not the weights .* encoder\.conv_in\.weight"):
        AutoencoderKL.from_file(path)


class Runs:
    """Unpickled, this would make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


class Stranger:
    pass


def test_pickled_objects_are_refused(save, tmp_path):
    """A file with an arbitrary object is refused by name, and its code does not run."""
    folder = tmp_path / "made"
    path = save({"model": tiny().state_dict(), "extra": Runs(str(folder))})
    with pytest.raises(ValueError, match=r"vae\.ckpt: refused.*\.mkdir.*its state dict alone"):
        load_first_stage(path)
    assert not folder.exists()
    with pytest.raises(ValueError, match=r"refused.*Stranger"):
        load_first_stage(save({"model": tiny().state_dict(), "extra": Stranger()}))


def test_published_extras_are_harmless(save, monkeypatch):
    """Lightning's callbacks and NumPy scalars, as in LDM's checkpoints, do not stand in the way,
    and Lightning need not be installed to read them.
    """
    name = "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": name})
    for i in range(1, name.count(".") + 2):
        module = type(os)(".".join(name.split(".")[:i]))
        module.ModelCheckpoint = callback
        monkeypatch.setitem(sys.modules, module.__name__, module)
    state = tiny().state_dict()
    callbacks = {callback: {"best_model_score": np.float32(0.5), "best": np.float64(0.25)}}
    path = save({"epoch": 3, "state_dict": state, "callbacks": callbacks})
    monkeypatch.undo()
    with pytest.raises(Exception, match="not an allowed global"):
        torch.load(path, weights_only=True)  # so this file does hold what it should
    assert_same_state(load_first_stage(path), state)
