"""Images that are not square. Run: python -m pytest tests/test_sizes.py"""

import json
import shlex

import numpy as np
import pytest
import torch
from cli import complain, read_lines
from PIL import Image

import main_cache
import main_mar
import main_tokenizer
import sample
from models import build_model
from models.stored import check_config
from util.checkpoint import LAST, load_checkpoint
from util.data.cached import open_cache
from util.data.crop import center_crop_arr
from util.evaluation.__main__ import main as evaluate
from util.images import grid
from util.sizes import plain, shown, sides

CPU = "--device cpu --num_workers 0"
SIZE = "--img_size 16 8"
TINY = {"vae_stride": 16, "vae_embed_dim": 3, "class_num": 4}


def test_one_form():
    """A size of two equal sides is the int, as before; height comes first."""
    assert plain([8, 8]) == plain(8) == 8 and plain((16, 8)) == [16, 8]
    assert (shown(256), shown([512, 256])) == ("256", "512×256")
    assert sides((512, 256), 16) == (32, 16) and sides(32) == (32, 32)
    for wrong in (0, None, "8", [8], [8, 8, 8], [8, -1], [8, 2.0], [True, 8]):
        with pytest.raises(ValueError, match="expected an integer, at least 1, or two"):
            sides(wrong)


@pytest.mark.parametrize("script", [main_mar, main_cache, main_tokenizer])
def test_flag(script, capsys):
    """--img_size takes one side, or height and width."""
    parser, more = script.get_parser(), ["--cached_path", "c"] if script is main_cache else []
    assert parser.get_default("img_size") == 256
    for text, size in (("256", 256), ("8 8", 8), ("512 256", [512, 256])):
        assert parser.parse_args(["--img_size", *text.split(), *more]).img_size == size
    assert "8 8 8: expected one side, or height and width" in complain(
        capsys, script.main, "--img_size", "8", "8", "8"
    )


def test_crop():
    """A crop covers the image: what is cut off is on two sides only, and as much on each."""
    ramp = np.arange(64) * 4
    pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :48], 0), -1).astype(np.uint8)
    image = Image.fromarray(pixels)  # 64 high, 48 wide
    tall, wide = (np.asarray(center_crop_arr(image, size)) for size in ((32, 16), (16, 32)))
    assert tall.shape == (32, 16, 3) and wide.shape == (16, 32, 3)
    # 32×24, of which columns 4 to 19 remain
    assert (tall == pixels.reshape(32, 2, 24, 2, 3).mean((1, 3)).astype(np.uint8)[:, 4:20]).all()
    assert np.ptp(wide[..., 1]) > 180 and 60 < np.ptp(wide[..., 0]) < 100


@pytest.mark.parametrize("name", ["mar_tiny", "ar_tiny", "dit_tiny"])
def test_models(name):
    """Of 64×32 pixels at stride 16, 4×2 tokens in raster order are learned and sampled."""
    more = {"num_sampling_steps": "3"} if name == "dit_tiny" else {"head": "l2"}
    model = build_model(name, img_size=(64, 32), **TINY, **more)
    latents = torch.randn(2, 3, 4, 2)
    tokens = model.patchify(latents)
    assert torch.equal(tokens[:, 2], latents[:, :, 1, 0])
    assert torch.equal(model.unpatchify(tokens), latents)
    assert model(latents, torch.tensor([0, 3])).isfinite()
    sampled = model.eval().sample_tokens(2, num_iter=8, labels=torch.tensor([0, 3]))
    assert sampled.shape == latents.shape
    with pytest.raises(ValueError, match="img_size 64×40: expected a multiple"):
        build_model(name, img_size=(64, 40), **TINY)
    with pytest.raises(ValueError, match=r"expected \(N, 3, 4, 2\)"):
        model.patchify(latents.mT)


def test_grid():
    """A grid of images that are not square; small ones are enlarged by their shorter side."""
    assert grid(np.zeros((4, 16, 8, 3), np.uint8), 2, 2, min_side=16).shape == (70, 38, 3)


@pytest.mark.parametrize("size", [[16], [16, 8, 8], [16, "8"], [16, 2**40], [True, 8], (16, 0)])
def test_sizes_in_checkpoints(size):
    """A size in a file that is none is refused before anything is built."""
    model = build_model("mar_tiny", img_size=[16, 8], vae_stride=8, vae_embed_dim=1, class_num=2)
    config = {"name": "mar_tiny", "vae_stride": 8, "vae_embed_dim": 1, "class_num": 2}
    parts = {"tokenizer": {"name": "pixels"}, "sampling": {}}
    check_config({"model": config | {"img_size": [16, 8]}, **parts}, model.state_dict(), "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: .*(img_size|size)"):
        check_config({"model": config | {"img_size": size}, **parts}, model.state_dict(), "a.pth")


def test_from_pictures_to_metrics(tmp_path, images, capsys):
    """16×8: a tokenizer is trained, latents are cached in both layouts, a MAR is trained on them,
    its samples are saved in all ways and measured; a run resumes only with its own size."""
    training = f"--tokenizer kl --epochs 1 --batch_size 8 --ch 8 --extractor tiny {CPU} {SIZE}"
    main_tokenizer.main(shlex.split(f"{training} --data_path {images} --output_dir {tmp_path}"))
    (record,) = read_lines(tmp_path / "results.jsonl")
    assert record["img_size"] == [16, 8] and record["rfd"] > 0
    kl = f"{CPU} --tokenizer kl --vae_path {tmp_path}/tokenizer.ckpt"
    for layout in ("images", "shards"):
        made = f"{kl} {SIZE} --data_path {images} --cached_path {tmp_path}/{layout}"
        main_cache.main(shlex.split(f"{made} --layout {layout}"))
        manifest = json.loads((tmp_path / layout / "cache.json").read_text())
        assert manifest["img_size"] == [16, 8]
        assert open_cache(tmp_path / layout)[0][0].shape == (8, 8, 4)
        turned = shlex.split(made.replace("16 8", "8 16"))
        line = complain(capsys, main_cache.main, *turned, "--layout", layout)
        assert "latents of img_size [16, 8], here it is [8, 16]" in line

    flags = f"{kl} --model mar_tiny --class_num 2 --buffer_size 4 --diffloss_d 1 --diffloss_w 32"
    flags += " --patch_size 2 --batch_size 8 --num_sampling_steps 3 --max_timestep 950"
    flags += f" --use_cached --warmup_epochs 0 --output_dir {tmp_path}/run --resume {tmp_path}/run"
    for epochs, layout in ((1, "shards"), (2, "images")):
        more = f"--epochs {epochs} --cached_path {tmp_path}/{layout}"
        main_mar.main(shlex.split(f"{flags} {SIZE} {more}"))
    checkpoint = load_checkpoint(tmp_path / "run" / LAST)
    assert checkpoint["config"]["model"]["img_size"] == [16, 8]
    assert checkpoint["config"]["sampling"]["num_iter"] == 8  # 4×2 tokens
    line = complain(capsys, main_mar.main, *shlex.split(f"{flags} {more} --img_size 8 16"))
    assert "--img_size 8 16: " in line and "holds 16 8; leave the flag" in line
    line = complain(capsys, main_mar.main, *shlex.split(f"{flags} {more} --img_size 16"))
    assert "--img_size 16: " in line

    out = [tmp_path / name for name in ("grid.png", "samples.npz", "folder")]
    drawn = f"--ckpt {tmp_path}/run --device cpu --per_class 2 --reference {images}"
    drawn += f" --extractor tiny --metrics frechet_distance --stats_dir {tmp_path}/stats"
    sample.main([*shlex.split(drawn), "--out", *map(str, out)])
    found = read_lines(tmp_path / "run" / "results.jsonl")[-1]
    array = np.load(out[1])["arr_0"]
    assert array.shape == (4, 16, 8, 3)
    assert Image.open(out[0]).size == (2 * (64 + 2) + 2, 2 * (128 + 2) + 2)  # 8 times as large
    for source in out[1:]:
        measured = f"{source} --reference {images} --extractor tiny --device cpu"
        measured += f" --metrics frechet_distance --stats_dir {tmp_path}/stats"
        measured += f" --output_dir {tmp_path}/measured"
        evaluate(shlex.split(measured))
        same = read_lines(tmp_path / "measured" / "results.jsonl")[-1]
        assert same["frechet_distance"] == found["frechet_distance"]
    line = complain(capsys, evaluate, str(out[1]), "--img_size", "8", "16", "--device", "cpu")
    assert "arr_0 is uint8 (4, 16, 8, 3), expected uint8 (N, 8, 16, 3)" in line
    (out[2] / "000001.png").unlink()  # resumes with what is missing
    sample.main([*shlex.split(drawn), "--out", str(out[2])])
    assert (np.asarray(Image.open(out[2] / "000001.png")) == array[1]).all()
