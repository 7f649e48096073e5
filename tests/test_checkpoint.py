"""Checkpoints, published and ours. Run: python -m pytest tests/test_checkpoint.py"""

import argparse
import json

import pytest
import torch
from rule import GOLDEN
from safetensors.torch import save_file

from engine_mar import parameter_groups
from models import build_model, checkpoint_config, export, load_model
from models.mar import mar_tiny
from util.checkpoint import LAST, TrainState, find_checkpoint, load_checkpoint
from util.ema import EMA
from util.weights import read_file, unwrapped

PUBLISHED = GOLDEN / "checkpoint-published.pth"
MODEL = {
    "name": "mar_tiny",
    "img_size": 8,
    "vae_stride": 1,
    "patch_size": 2,
    "vae_embed_dim": 1,
    "class_num": 10,
    "buffer_size": 4,
    "diffloss_d": 2,
    "diffloss_w": 32,
}
CONFIG = {
    "model": MODEL,
    "tokenizer": {"name": "pixels", "channels": 1},
    "sampling": {"num_iter": 4, "cfg": 1.0, "cfg_schedule": "linear", "temperature": 1.0},
    "latent_range": 1.0,
}


def trained(steps=2):
    """A tiny model, its EMA and its optimizer after some steps."""
    torch.manual_seed(0)
    model = build_model(**MODEL)
    ema = EMA(model, 0.5)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.02), lr=1e-2)
    for _ in range(steps):
        model(torch.randn(4, 1, 8, 8), torch.arange(4)).backward()
        optimizer.step()
        ema.update(model)
    return model, ema, optimizer


def save(path, scaler=False):
    model, ema, optimizer = trained()
    scaler = torch.amp.GradScaler("cpu", enabled=scaler)
    TrainState(model, ema, optimizer, scaler, 8).save(path, CONFIG, {"epochs": 9})
    return model, ema


def test_published_checkpoint_loads_for_sampling():
    """Its sizes come from the weights, though its own flags say otherwise; EMA and raw differ."""
    checkpoint = load_checkpoint(PUBLISHED)
    assert checkpoint["args"]["model"] == "mar_base"
    model, config = load_model(PUBLISHED)
    assert config["model"]["name"] == "mar_tiny"
    assert (config["model"]["img_size"], config["model"]["class_num"]) == (64, 10)
    assert (config["model"]["diffloss_d"], config["model"]["diffloss_w"]) == (2, 64)
    assert config["sampling"]["num_iter"] == 64
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, checkpoint["model_ema"][name])
    raw, _ = load_model(PUBLISHED, weights="raw")
    assert not torch.equal(raw.mask_token, model.mask_token)


def test_published_optimizer_loads_for_resuming():
    """Its states, by position, belong to parameters of the same shape; a step can follow."""
    checkpoint = load_checkpoint(PUBLISHED)
    model = build_model(**checkpoint_config(checkpoint, "")["model"])
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.02), lr=1.0)
    optimizer.load_state_dict(checkpoint["optimizer"])
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
            assert optimizer.state[parameter]["step"] == 20
    model.load_state_dict(checkpoint["model"])
    model(torch.randn(2, 16, 4, 4), torch.tensor([1, 2])).backward()
    optimizer.step()


def test_weight_decay_groups_are_the_published():
    """Which parameters decay, and in which order they stand."""
    expected = json.loads((GOLDEN / "optimisation.json").read_text())
    model = mar_tiny(img_size=64, class_num=10, buffer_size=8, diffloss_d=2, diffloss_w=64)
    names = {id(p): n for n, p in model.named_parameters()}
    none, some = parameter_groups(model, 0.02)
    assert [names[id(p)] for p in none["params"]] == expected["no_weight_decay"]
    assert [names[id(p)] for p in some["params"]] == expected["weight_decay"]
    assert (none["weight_decay"], some["weight_decay"]) == (0.0, 0.02)


def test_our_checkpoint_has_the_published_entries(tmp_path):
    """What the published code reads is there, and nothing that its fp16 scaler would choke on."""
    path = tmp_path / LAST
    model, _ = save(path)
    content = torch.load(path, weights_only=True)  # no class of anybody's: plain data only
    assert set(content) == {"model", "model_ema", "optimizer", "epoch", "args", "config", "format"}
    assert content["epoch"] == 7
    assert set(content["model"]) == {name for name, _ in model.named_parameters()}
    assert set(content["model_ema"]) == set(content["model"])
    assert [len(g["params"]) for g in content["optimizer"]["param_groups"]] == [
        len(g["params"]) for g in parameter_groups(model, 0.02)
    ]
    save(path, scaler=True)
    assert "scale" in torch.load(path, weights_only=True)["scaler"]


def test_checkpoint_rebuilds_its_model(tmp_path):
    """There and back: a path is all that is needed."""
    model, ema = save(tmp_path / LAST)
    loaded, config = load_model(tmp_path / LAST)
    assert config["tokenizer"] == CONFIG["tokenizer"]
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, ema.module.state_dict()[name])
    raw, _ = load_model(tmp_path / LAST, weights="raw")
    for name, value in raw.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    short, config = load_model(tmp_path / LAST, num_sampling_steps="5", max_timestep=900)
    assert short.diffloss.gen_diffusion.num_steps == 5
    assert config["model"]["max_timestep"] == 900


def test_export(tmp_path):
    """The EMA alone, as safetensors, samples as its checkpoint does; published ones export too."""
    _, ema = save(tmp_path / LAST)
    out = tmp_path / "ema.safetensors"
    export.main([str(tmp_path / LAST), str(out)])
    loaded, config = load_model(out)
    assert config == CONFIG
    assert all(torch.equal(v, ema.module.state_dict()[n]) for n, v in loaded.state_dict().items())
    export.main([str(PUBLISHED), str(out)])
    loaded, _ = load_model(out)
    assert torch.equal(loaded.mask_token, load_checkpoint(PUBLISHED)["model_ema"]["mask_token"])
    with pytest.raises(ValueError, match="ending in .safetensors"):
        export.main([str(PUBLISHED), str(tmp_path / "ema.pth")])


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    """A checkpoint takes its place only when it is whole, and leaves nothing beside it."""
    path = tmp_path / LAST
    save(path)
    before = path.read_bytes()

    def half(state, file):
        file.write(b"half a checkpoint")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [LAST]


def test_find_checkpoint(tmp_path):
    """A file is itself; a folder is its last checkpoint; neither is None."""
    assert find_checkpoint(tmp_path) is None
    assert find_checkpoint(tmp_path / "none") is None
    (tmp_path / LAST).touch()
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path / LAST) == tmp_path / LAST


@pytest.mark.parametrize("wrap", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "inner"])
@pytest.mark.parametrize("form", ["published", "ours", "safetensors"])
def test_names_of_wrapped_models(tmp_path, wrap, form):
    """With the prefixes of DDP and torch.compile, of the whole or of blocks, it is the same model,
    and a checkpoint of one set of weights is still said to have only one."""
    path = tmp_path / ("a.safetensors" if form == "safetensors" else LAST)
    model, _ = save(tmp_path / LAST)
    content = torch.load(tmp_path / LAST, weights_only=True)

    def wrapped(state):
        if wrap == "inner":
            return {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in state.items()}
        return {wrap.format(name): value for name, value in state.items()}

    content |= {part: wrapped(content[part]) for part in ("model", "model_ema")}
    assert content["model"].keys() != model.state_dict().keys()
    if form == "published":
        content = read_file(PUBLISHED)
        content = {"model": wrapped(content["model"]), "args": content["args"]}
    if form == "safetensors":
        save_file(content["model"], path, {"config": json.dumps(CONFIG)})
    else:
        torch.save(content, path)
    held = load_checkpoint(path)
    assert held["model"].keys() == held["model_ema"].keys()
    load_model(path)
    if form == "ours":
        raw, _ = load_model(path, weights="raw")
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in raw.state_dict().items())
    else:
        with pytest.raises(ValueError, match="holds one set of weights only"):
            load_model(path, weights="raw")


def test_two_names_that_would_become_one():
    """Are left as they are, for strict loading to refuse."""
    both = {"a.weight": torch.zeros(1), "module.a.weight": torch.ones(1)}
    assert unwrapped(both) is both


@pytest.mark.parametrize("name", ["EMA", "eam", "", None])
def test_weights_are_ema_or_raw(tmp_path, name):
    """Anything else is no other name of the raw ones."""
    with pytest.raises(ValueError, match=f"weights {name!r}: expected 'ema' or 'raw'"):
        load_model(PUBLISHED, weights=name)


class Stranger:
    """A class that no checkpoint should hold."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": {}}, "expected an entry 'model', found weights"),
        ({"model": {"a.weight": torch.zeros(2)}}, "not the weights of a MAR"),
        ({"model": {}, "args": Stranger()}, "refused, because it holds a pickled .*Stranger"),
        ([1, 2], "expected an entry 'model', found list"),
        ({str(i): 0 for i in range(99)}, "found 0, 1, 2, 3, 4 and 94 more"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    """One line with the path and what is wrong; nothing in the file is run."""
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_damaged_file(tmp_path):
    """A checkpoint that was cut short is reported as truncated."""
    path = tmp_path / LAST
    save(path)
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(ValueError, match="truncated"):
        load_model(path)


def test_flipped_bits_are_found(tmp_path):
    """By the checksums inside the file, though weights are mapped from it and not read."""
    path = tmp_path / LAST
    save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="the checksum of .* does not fit.*it is damaged"):
        load_model(path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    """Whole, but of a run that went wrong; the others of the file are fine."""
    path = tmp_path / LAST
    save(path)
    content = torch.load(path, weights_only=True)
    content["model_ema"]["mask_token"][..., 3] = float("nan")
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"1 of its \d+ weights .* not finite, such as mask_token"):
        load_model(path)
    load_model(path, weights="raw")


def test_unknown_size_of_published_weights(tmp_path):
    """Weights of no known size are refused rather than given a wrong number of heads."""
    checkpoint = dict(load_checkpoint(PUBLISHED))
    checkpoint["model"] = {
        k: v for k, v in checkpoint["model"].items() if not k.startswith("decoder_blocks.1.")
    }
    torch.save({"model": checkpoint["model"], "args": argparse.Namespace()}, tmp_path / LAST)
    with pytest.raises(ValueError, match="width 64 with 3 blocks is none of mar_tiny"):
        load_model(tmp_path / LAST)
