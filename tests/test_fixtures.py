"""Files that earlier versions wrote still load. Run: python -m pytest tests/test_fixtures.py

tests/fixtures/README.md says which version wrote them, and how.
"""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import complain

import main_cache
import main_mar
import sample
from models import build_tokenizer, load_model
from util.checkpoint import FORMAT, LAST, load_checkpoint

FIXTURES = Path(__file__).parent / "fixtures"
CHECKPOINT = FIXTURES / "checkpoint.pth"
TINY = "--model mar_tiny --buffer_size 4 --diffloss_d 1 --diffloss_w 16 --device cpu"
TINY += " --num_workers 0 --warmup_epochs 0 --lr 1e-3 --num_sampling_steps 3 --num_iter 3"


def test_checkpoint_loads():
    """Both sets of weights, and how it was trained and is sampled."""
    model, config = load_model(CHECKPOINT)
    raw, _ = load_model(CHECKPOINT, weights="raw")
    assert not torch.equal(raw.mask_token, model.mask_token)
    assert config["model"]["name"] == "mar_tiny" and config["model"]["diffloss_w"] == 16
    assert config["sampling"]["solver"] == "dpm++"
    content = load_checkpoint(CHECKPOINT)
    assert content["epoch"] == 29 and "format" not in torch.load(CHECKPOINT, weights_only=True)


def test_checkpoint_samples_as_before(tmp_path):
    """The images of the same seed are those that the earlier version drew.

    Some of its samples leave the range of the data, where the last bit of a sum, which depends on
    the processor, can grow to a grey level: therefore nearly all pixels, not all. An image of
    another seed agrees in about a third of them, which are black in both.
    """
    drawn = {}
    for seed in (4, 5):
        flags = f"--ckpt {CHECKPOINT} --per_class 1 --seed {seed} --device cpu"
        sample.main(shlex.split(f"{flags} --out {tmp_path}/{seed}.npz"))
        drawn[seed] = np.load(tmp_path / f"{seed}.npz")["arr_0"].astype(int)
    before = np.load(FIXTURES / "samples.npz")["arr_0"]
    near = {seed: (np.abs(images - before) <= 1).mean() for seed, images in drawn.items()}
    assert near[4] > 0.97 and near[5] < 0.6, near


def test_checkpoint_is_resumed(tmp_path, capsys):
    """The next epoch follows, with the optimizer's state; only what was changed is reported."""
    flags = "--preset digits --device cpu --ema_rate 0.98 --num_sampling_steps 10 --epochs 31"
    main_mar.main(shlex.split(f"{flags} --resume {CHECKPOINT} --output_dir {tmp_path}"))
    output = capsys.readouterr().out
    assert f"resumed {CHECKPOINT}: 30 epochs are done" in output
    (changed,) = [line for line in output.splitlines() if "not as before" in line]
    others = "--cfg_interval 0.0 1.0 (was 0.0 0.8), --epochs 31 (was 30), --solver ddpm (was dpm++)"
    assert changed == f"NOTE: not as before: {others}"
    before, after = load_checkpoint(CHECKPOINT), load_checkpoint(tmp_path / LAST)
    assert (after["epoch"], after["format"]) == (30, FORMAT)
    steps = [{int(s["step"]) for s in c["optimizer"]["state"].values()} for c in (before, after)]
    assert steps == [{30 * 22}, {31 * 22}]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").open()]
    assert all(0 < loss < 0.7 for loss in losses)  # about 1 for weights that are not trained


def test_checkpoint_of_a_newer_version_is_refused(tmp_path, capsys):
    """In one line, by every script that reads it."""
    path = tmp_path / LAST
    torch.save({**torch.load(CHECKPOINT, weights_only=True), "format": FORMAT + 1}, path)
    message = f"{path}: a checkpoint of format {FORMAT + 1}, expected at most {FORMAT}: it was"
    cpu = ("--device", "cpu", "--output_dir", tmp_path / "out")
    assert message in complain(capsys, sample.main, "--ckpt", path, *cpu)
    assert message in complain(capsys, main_mar.main, "--resume", path, *cpu)


@pytest.mark.parametrize(
    ("name", "channels", "scale"), [("kl", 4, 1.0188), ("vq", 1, None), ("vq_latent", 4, 3.3127)]
)
def test_tokenizers_are_built(name, channels, scale):
    """With the scale of their files, though nothing else says what network it is."""
    tokenizer = build_tokenizer(name, str(FIXTURES / f"{name[:2]}.ckpt"))
    assert (tokenizer.channels, tokenizer.stride) == (channels, 4)
    assert tokenizer.num_codes == (16 if name == "vq" else None)
    assert tokenizer.scale == (scale and pytest.approx(scale, abs=1e-4))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = tokenizer.sample(tokenizer.encode(images), torch.Generator().manual_seed(0))
        assert latents.shape == (2, channels, 4, 4)
        assert tokenizer.decode(latents).shape == images.shape
    if name == "vq":
        assert set(latents.flatten().tolist()) <= set(range(16))


@pytest.mark.parametrize("layout", ["images", "shards"])
def test_caches_are_verified_and_trained_on(layout, tmp_path, capsys):
    """Those of both layouts, by the tokenizer that made them."""
    cache = shutil.copytree(FIXTURES / f"cache-{layout}", tmp_path / "cache")
    main_cache.main(["--verify", "--cached_path", str(cache)])
    assert f"6 images, all whole, in the layout {layout}" in capsys.readouterr().out
    flags = f"{TINY} --tokenizer kl --vae_path {FIXTURES}/kl.ckpt --img_size 16 --class_num 2"
    flags += f" --use_cached --cached_path {cache} --batch_size 3 --epochs 2"
    main_mar.main(shlex.split(f"{flags} --output_dir {tmp_path}/run"))
    assert load_checkpoint(tmp_path / "run" / LAST)["epoch"] == 1
    wrong = flags.replace("kl.ckpt", "vq.ckpt").replace("--tokenizer kl", "--tokenizer vq_latent")
    line = complain(capsys, main_mar.main, *shlex.split(wrong), "--output_dir", tmp_path / "wrong")
    assert "latents of tokenizer" in line


def test_caches_of_both_layouts_are_the_same(tmp_path):
    """Converted, one is the other, within the rounding of float16."""
    flags = f"--convert_from {FIXTURES}/cache-images --cached_path {tmp_path} --layout shards"
    main_cache.main(shlex.split(f"{flags} --num_workers 0"))
    for part in ("moments", "flips"):
        new, old = (
            np.load(folder / f"shard-00000.{part}.npy")
            for folder in (tmp_path, FIXTURES / "cache-shards")
        )
        np.testing.assert_allclose(new, old, rtol=2**-10, atol=1e-4)
