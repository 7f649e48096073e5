"""MAR against the published numbers, and what must hold of any such model.

Run: python -m pytest tests/test_mar.py
"""

import json

import numpy as np
import pytest
import torch
from rule import GOLDEN, by_rule, rule_input

import models.diffloss
from models.autoregressive import take, token_counts
from models.mar import mar_base, mar_huge, mar_large, mar_tiny

TAGS = {"p1": {"img_size": 64, "patch_size": 1}, "p2": {"img_size": 128, "patch_size": 2}}
LABELS = torch.tensor([1, 7, 4])


def tiny(**kwargs):
    settings = {
        "img_size": 64,
        "class_num": 10,
        "buffer_size": 8,
        "diffloss_d": 2,
        "diffloss_w": 64,
        "num_sampling_steps": "10",
    }
    return mar_tiny(**{**settings, **kwargs})


@pytest.fixture(scope="module", params=TAGS)
def golden(request):
    """A model by the rule, its input latents and the published numbers of one tag."""
    tag, model = request.param, by_rule(tiny(**TAGS[request.param]))
    side = 4 * TAGS[tag]["patch_size"]
    latents = rule_input(f"mar/{tag}/latents", (3, 16, side, side))
    file = np.load(GOLDEN / "mar.npz")
    values = {k[3:]: torch.from_numpy(file[k]) for k in file.files if k.startswith(tag)}
    return model, latents, values


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["mar_base-d6-w1024", "mar_large-d8-w1280", "mar_huge-d12-w1536"])
def test_published_names_and_shapes(name):
    """Parameter names, their order and their shapes are those of the published checkpoints."""
    check_shapes(name)


def test_ablation_default_names_and_shapes():
    """The same for the paper's default head, 3 blocks of width 1024."""
    check_shapes("mar_large-d3-w1024")


def check_shapes(name):
    expected = json.loads((GOLDEN / "checkpoint_shapes.json").read_text())[name]
    size, depth, width = name.split("-")
    build = {"mar_base": mar_base, "mar_large": mar_large, "mar_huge": mar_huge}[size]
    with torch.device("meta"):
        model = build(diffloss_d=int(depth[1:]), diffloss_w=int(width[1:]))
    shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
    assert shapes == expected["shapes"]
    assert list(shapes) == list(expected["shapes"])
    assert sum(p.numel() for p in model.parameters()) == expected["parameters"]


def test_tokens(golden):
    """patchify orders rows, columns and channels as published, and unpatchify undoes it."""
    model, latents, values = golden
    tokens = model.patchify(latents)
    close(tokens, values["tokens"])
    assert torch.equal(model.unpatchify(tokens), latents)
    close(model.unpatchify(tokens), values["roundtrip"])


@pytest.mark.parametrize("masked", [16, 15, 12])
def test_encoder_and_z(golden, masked):
    """Encoder output and z with the first tokens of each order unknown."""
    model, latents, values = golden
    tokens, orders = model.patchify(latents), values["orders"]
    known = orders[:, masked:].sort(1).values
    with torch.no_grad():
        classes = model.embed_labels(LABELS, 3)
        encoded = model.encode(take(tokens, known), known, classes)
        close(encoded, values[f"masked{masked}/encoder"])
        close(model.decode(encoded, known), values[f"masked{masked}/z"])
        if masked == 12:
            z = model.decode(
                model.encode(take(tokens, known), known, model.embed_labels(None, 3)), known
            )
            close(z, values["masked12/z_uncond"])


@pytest.mark.parametrize("num_iter", [1, 4, 16])
@pytest.mark.parametrize(("cfg", "schedule"), [(1.0, "linear"), (3.0, "linear"), (3.0, "constant")])
def test_sampled_latents(golden, monkeypatch, num_iter, cfg, schedule):
    """Whole sampling loops from x_T = 0 at temperature 0, with and without guidance."""
    model, _, values = golden
    monkeypatch.setattr(models.diffloss, "randn", lambda shape, *_: torch.zeros(shape))
    latents = model.sample_tokens(
        bsz=3,
        num_iter=num_iter,
        cfg=cfg,
        cfg_schedule=schedule,
        labels=LABELS,
        temperature=0.0,
        orders=values["orders"],
    )
    expected = values[f"sample/cfg{cfg}-{schedule}-iter{num_iter}"]
    assert (latents - expected).abs().max() / expected.abs().max() < 1e-4


def test_sampled_without_labels(golden, monkeypatch):
    """The same without a class."""
    model, _, values = golden
    monkeypatch.setattr(models.diffloss, "randn", lambda shape, *_: torch.zeros(shape))
    latents = model.sample_tokens(bsz=3, num_iter=4, temperature=0.0, orders=values["orders"])
    expected = values["sample/unconditional-iter4"]
    assert (latents - expected).abs().max() / expected.abs().max() < 1e-4


def test_tokens_a_step():
    """The cosine schedule for every length and number of steps on record."""
    file = np.load(GOLDEN / "mar.npz")
    names = [k for k in file.files if k.startswith("schedule/")]
    assert names
    for name in names:
        length, num_iter = (int(part.lstrip("Liter")) for part in name.split("/")[1].split("-"))
        assert token_counts(length, num_iter) == file[name].tolist(), name
