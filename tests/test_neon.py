"""Neon: weights led away from own samples. Run: python -m pytest tests/test_neon.py"""

import numpy as np
import pytest
import torch
from cli import complain
from conftest import TINY_KL16

import neon
from models import load_model
from models.neon import extrapolate
from models.settings import Sampling
from models.tokenizer import KLTokenizer, PixelTokenizer, VQTokenizer
from models.vq import VQModel
from util.checkpoint import load_checkpoint
from util.settings import to_flags


def states():
    draw = torch.Generator().manual_seed(0)
    return [{"a": torch.randn(3, 4, generator=draw), "b": torch.ones(2)} for _ in range(2)]


def test_weights_are_linear_in_w():
    """θ_base + w·(θ_base − θ_tuned): the base at 0, bit for bit, and what was tuned at −1."""
    base, tuned = states()
    for name, value in extrapolate(base, tuned, 0.0).items():
        assert torch.equal(value, base[name])
    for name, value in extrapolate(base, tuned, -1.0).items():
        torch.testing.assert_close(value, tuned[name])
    one, three = (extrapolate(base, tuned, w)["a"] for w in (1.0, 3.0))
    torch.testing.assert_close(one, 2 * base["a"] - tuned["a"])
    torch.testing.assert_close(three - base["a"], 3 * (one - base["a"]))
    with pytest.raises(ValueError, match="of another model"):
        extrapolate(base, {"a": tuned["a"]}, 1.0)


def test_moments_stand_for_latents_alone(vae_path, tmp_path):
    """What is drawn of a sample's moments is the sample, for each kind of tokenizer."""
    torch.manual_seed(0)
    vq = VQModel(ch=32, embed_dim=4, ch_mult=(1, 1), num_codes=8)
    torch.save(vq.state_dict(), tmp_path / "vq.ckpt")
    kinds = {
        PixelTokenizer(scale=2.0, shift=0.5): torch.randn(2, 3, 4, 4),
        KLTokenizer(vae_path, 0.5, 0.1, **TINY_KL16): torch.randn(2, 16, 4, 4),
        VQTokenizer(tmp_path / "vq.ckpt"): torch.randint(8, (2, 1, 4, 4)).float(),
    }
    for tokenizer, latents in kinds.items():
        moments = tokenizer.moments_of(latents)
        assert moments.shape[1] == tokenizer.moment_channels
        torch.testing.assert_close(tokenizer.sample(moments), latents, atol=1e-5, rtol=1e-5)


def test_settings_become_flags():
    """Those that are not the defaults, also of several values."""
    given = Sampling(cfg=2.5, cfg_interval=(0.25, 1.0), order=None)
    assert [*to_flags(Sampling, given.asdict())] == [
        "--cfg",
        "2.5",
        "--cfg_interval",
        "0.25",
        "1.0",
    ]


def test_the_script(ckpt, tmp_path, capsys):
    """A folder of samples, a training on them, and weights that load; called again, it only writes
    what is new; with other settings, it says what is in the way."""
    flags = ["--ckpt", ckpt, "--output_dir", tmp_path / "neon", "--device", "cpu"]
    flags += ["--num_images", 20, "--batch_size", 10, "--num_iter", 1, "--cfg", 2]
    flags += ["--num_sampling_steps", 2]
    flags = [str(each) for each in flags]
    neon.main([*flags, "--weight", "0", "1"])
    said = capsys.readouterr().out
    assert "all 10 as they are" in said and "--ckpt " in said
    base, _ = load_model(ckpt)
    tuned = load_checkpoint(tmp_path / "neon" / "tuned" / "checkpoint-last.pth")
    assert tuned["args"]["lr"] == pytest.approx(2e-4) and tuned["args"]["cfg"] == 2
    for weight in (0.0, 1.0):
        model, config = load_model(tmp_path / "neon" / f"neon-{weight:g}.safetensors")
        expected = extrapolate(base.state_dict(), tuned["model"], weight)
        assert all(torch.equal(value, expected[k]) for k, value in model.state_dict().items())
        assert config["neon"]["weight"] == weight and config["neon"]["sampling"]["cfg"] == 2
    assert not torch.equal(tuned["model"]["fake_latent"], base.state_dict()["fake_latent"])
    moments = np.load(tmp_path / "neon" / "samples" / "shard-00000.moments.npy")
    assert moments.shape == (20, 1, 8, 8) and moments.dtype == np.float32

    neon.main([*flags, "--weight", "2"])
    assert "nothing to train" in capsys.readouterr().out
    assert (tmp_path / "neon" / "neon-2.safetensors").exists()
    message = complain(capsys, neon.main, *flags, "--cfg", 3)
    assert "holds samples of other settings: cfg 3.0 (was 2.0)" in message
    message = complain(capsys, neon.main, *flags, "--lr", 0.1)
    assert "--lr 0.1: the training in" in message and message.endswith("or another --output_dir")


def test_fewer_images_than_a_batch_are_refused(ckpt, tmp_path):
    """Before any is sampled."""
    with pytest.raises(ValueError, match="--num_images 8: expected 64 or more"):
        neon.main(["--ckpt", str(ckpt), "--output_dir", str(tmp_path), "--num_images", "8"])
    assert not any(tmp_path.iterdir())


def test_a_base_whose_classes_have_no_names(ckpt, tmp_path):
    """As one of the published code: its table of classes is trained in its own order, also where
    indices as texts are in another, and the result says no names either."""
    content = torch.load(ckpt, weights_only=True)
    table = torch.randn(12, content["model"]["class_emb.weight"].shape[1])
    for part in ("model", "model_ema"):
        content[part] = {**content[part], "class_emb.weight": table}
    config = {k: v for k, v in content["config"].items() if k != "data"}
    content["config"] = {**config, "model": {**config["model"], "class_num": 12}}
    for name in ("record", "optimizer"):
        del content[name]
    torch.save(content, tmp_path / "base.pth")
    flags = ["--ckpt", tmp_path / "base.pth", "--output_dir", tmp_path, "--device", "cpu"]
    flags += ["--num_images", 12, "--batch_size", 12, "--num_iter", 1, "--lr", 1e-6]
    neon.main([str(each) for each in [*flags, "--num_sampling_steps", 2]])
    tuned = load_checkpoint(tmp_path / "tuned" / "checkpoint-last.pth")
    torch.testing.assert_close(tuned["model"]["class_emb.weight"], table, atol=1e-4, rtol=0)
    model, config = load_model(tmp_path / "neon-1.safetensors")
    assert model.class_num == 12 and "classes" not in config.get("data", {})
