"""Options of models: unknown ones, where the known ones end up, and their defaults.

Run: python -m pytest tests/test_options.py
"""

import pytest
import torch
from rule import by_rule, rule_input

import models.diffloss
import models.layers
from models import build_model
from models.config import default_of, takes
from models.diffloss import ResBlock
from models.layers import Attention, Block
from models.options import check_options, named_by, options_of
from models.settings import HEADS, MODELS, Model

TINY = {"img_size": 64, "class_num": 10}
BACKBONES = ("mar_tiny", "ar_tiny", "dit_tiny")
AUTOREGRESSIVE = BACKBONES[:2]


@pytest.fixture(params=BACKBONES)
def name(request):
    return request.param


def of_kind(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def test_unknown_options(name):
    """A ValueError with name, value and model, from each backbone."""
    with pytest.raises(ValueError, match=r"mlp_ration 2: \w+ has no such argument"):
        build_model(name, **TINY, mlp_ration=2)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("ar_tiny", {"mask_ratio_min": 0.5}),
        ("ar_tiny", {"buffer_size": 4}),
        ("dit_tiny", {"attn_dropout": 0.5}),
        ("dit_tiny", {"num_codes": 16}),
        ("mar_tiny", {"order": "raster"}),
    ],
)
def test_options_of_another_model(name, option):
    """Are not dropped in silence."""
    with pytest.raises(ValueError, match=rf"{next(iter(option))} .*: \w+ has no such argument"):
        build_model(name, **TINY, **option)


@pytest.mark.parametrize("option", ["width", "heads", "causal", "target_channels"])
@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_what_a_part_needs_is_no_option(name, option):
    """The backbone decides it."""
    with pytest.raises(ValueError, match=rf"{option} 8: \w+ has no such argument"):
        build_model(name, **TINY, **{option: 8})


def test_unknown_model():
    """It is named, with those that exist."""
    with pytest.raises(ValueError, match="model 'mar_giant': expected one of mar_tiny"):
        build_model("mar_giant")


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_options_of_the_blocks(name):
    """Every block of a backbone gets them."""
    options = {"mlp_ratio": 2.0, "attn_dropout": 0.3, "proj_dropout": 0.2}
    model = build_model(name, **TINY, **options)
    blocks = of_kind(model, Block)
    assert len(blocks) == 4
    for block in blocks:
        assert block.mlp.fc1.out_features == 128
        assert block.attn.attn_dropout == 0.3
        assert block.attn.proj_drop.p == block.mlp.drop1.p == 0.2


def test_the_mlp_ratio_of_dit():
    """Its blocks are others; the option is the same."""
    model = build_model("dit_tiny", **TINY, mlp_ratio=2.0)
    assert {block.mlp.fc1.out_features for block in model.blocks} == {128}


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_options_of_the_head(name):
    """Diffusion Loss gets those that it names, under their aliases where it has such."""
    options = {"diffloss_d": 5, "diffloss_w": 48, "diffusion_batch_mul": 7, "vlb": False}
    head = build_model(
        name, **TINY, **options, num_sampling_steps="7", max_timestep=800, grad_checkpointing=True
    ).head
    assert len(of_kind(head, ResBlock)) == 5 and head.net.input_proj.out_features == 48
    assert head.diffusion_batch_mul == 7 and head.vlb is False
    assert head.spacing == "7" and head.gen_diffusion.num_steps == 7
    assert head.max_timestep == 800 and head.net.grad_checkpointing


@pytest.mark.parametrize("head", ["l2", "ce"])
def test_options_of_another_head(head):
    """Those of Diffusion Loss do not disturb a head that has no use for them."""
    discrete = {"vae_embed_dim": 1, "num_codes": 32} if head == "ce" else {}
    model = build_model("mar_tiny", **TINY, **discrete, head=head, diffloss_d=5, vlb=False)
    assert model.head_name == head and not of_kind(model, ResBlock)


def test_options_of_the_diffusion_of_dit():
    """DiT names the same ones."""
    model = build_model("dit_tiny", **TINY, vlb=False, num_sampling_steps="7", max_timestep=800)
    assert model.vlb is False and model.spacing == "7" and model.max_timestep == 800


def test_options_of_the_backbone():
    """Of MAR, and the order of AR."""
    model = build_model(
        "mar_tiny", **TINY, buffer_size=5, mask_ratio_min=0.4, label_drop_prob=0.3, patch_size=2
    )
    assert model.encoder_pos_embed_learned.shape == (1, 5 + 4, 64)
    assert model.mask_ratio_min == 0.4 and model.label_drop_prob == 0.3
    assert model.token_embed_dim == 64
    assert build_model("ar_tiny", **TINY, order="random").order == "random"


def test_options_reach_parts_by_name():
    """Of values by name, each part takes those that its constructor has a default for."""

    class Part:
        aliases = {"part_depth": "depth"}

        def __init__(self, width, depth, rate=0.5):
            pass

    assert options_of(Part) == {"rate": "rate", "part_depth": "depth"}
    options = {"part_depth": 3, "rate": 0.1, "width": 8, "attn_dropout": 0.2}
    assert named_by(options, Part) == {"depth": 3, "rate": 0.1}
    assert named_by(options, Part, Attention) == {"depth": 3, "rate": 0.1, "attn_dropout": 0.2}
    check_options(Part, {"rate": 1, "part_depth": 1, "diffloss_d": 8}, Part)  # of another head
    with pytest.raises(ValueError, match="depth 1: type has no such argument"):
        check_options(Part, {"depth": 1}, Part)


def test_every_field_is_an_argument_of_some_model():
    """None of models.settings.Model is dropped without a word."""
    used = {name for model in MODELS for head in HEADS for name in takes(model, head)}
    assert set(Model.names()) - {"name"} <= used


@pytest.mark.parametrize("family", ["mar", "ar"])
@pytest.mark.parametrize(
    ("size", "width"), [("tiny", 64), ("small", 256), ("base", 1024), ("large", 1024)]
)
def test_the_head_s_width_is_in_proportion(family, size, width):
    """Unless told otherwise; the published models' is the published constructor's."""
    assert default_of(f"{family}_{size}", "diffloss_w") == width
    with torch.device("meta"):
        head = build_model(f"{family}_{size}").head
    assert head.net.input_proj.out_features == width and len(head.net.res_blocks) == 3
    assert head.diffusion_batch_mul == 4


@pytest.mark.parametrize("name", ["mar_small", "ar_small", "dit_small"])
def test_small_models_are_of_one_size(name):
    """About ten million parameters each, so that they can be compared."""
    with torch.device("meta"):
        model = build_model(name)
    assert 8e6 < sum(p.numel() for p in model.parameters()) < 12e6


@pytest.mark.parametrize("name", MODELS)
def test_every_model_can_be_built(name):
    """By its name, with its defaults; `takes` knows its arguments."""
    with torch.device("meta"):
        model = build_model(name)
    assert type(model).__name__.lower() == name.split("_")[0]
    assert {"img_size", "class_num", "label_drop_prob"} <= takes(name, "diffloss")


def test_checkpointing_changes_no_number(name, monkeypatch):
    """The loss and all gradients are the same, and every block is recomputed."""
    calls, checkpoint = [], models.layers.checkpoint

    def counted(function, *args, **kwargs):
        calls.append(type(function).__name__)
        return checkpoint(function, *args, **kwargs)

    for module in (models.layers, models.diffloss):
        monkeypatch.setattr(module, "checkpoint", counted)
    latents, labels, results = rule_input("latents", (2, 16, 4, 4)), torch.arange(2), []
    for grad_checkpointing in (False, True):
        model = build_model(name, **TINY, grad_checkpointing=grad_checkpointing)
        model = by_rule(model).train()
        torch.manual_seed(0)  # of dropout
        loss = model(latents, labels, torch.Generator().manual_seed(0))
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        assert bool(calls) == grad_checkpointing
    blocks = ["ModulatedBlock"] * 4 if name == "dit_tiny" else ["Block"] * 4 + ["ResBlock"] * 3
    assert calls == blocks
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-5)
