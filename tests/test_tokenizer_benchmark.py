"""Losses and latent noise compared. Run: python -m pytest tests/test_tokenizer_benchmark.py"""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from benchmarks import tokenizers
from util.images import grid, save_image

RECORD = {"rfd": 12.3456, "psnr": 20.0, "ssim": 0.5, "images": 30, "split": "test"}
RECORD |= {"extractor": "grey-pixels"}


def samples(*distances):
    """The records of a MAR, by guidance."""
    more = {"precision": 0.5, "recall": 0.25, "images": 8, "real": {"frechet_distance": 1.0}}
    lines = [{"frechet_distance": distance, **more} for distance in distances]
    return dict(zip(tokenizers.GUIDANCE, lines, strict=True))


def test_table():
    """A row for each tokenizer, and for each guidance one over all seeds, with their spread."""
    found = {
        "kl-l1": {**RECORD, "latent_mean": 0.25, "latent_std": 2.0},
        "vq-adversarial-noise": {**RECORD, "codes_used": 0.5, "code_perplexity": 100.0},
    }
    models = {"kl-adversarial": {1: samples(10.0, 6.0), 2: samples(12.0, 6.0)}}
    text = tokenizers.table(found, models)
    assert "| KL, L1 | 12.35 | 20 | 0.5 | 0.25 | 2 | – | – |" in text
    label = "VQ, L1 + perceptual + adversarial, noise 3"
    assert f"| {label} | 12.35 | 20 | 0.5 | – | – | 0.5 | 100 |" in text
    row = "| KL, L1 + perceptual + adversarial |"
    assert f"{row} 1 | 11.0 ± 1.4 | 10.0, 12.0 | 0.5 | 0.25 |" in text
    assert f"{row} 3 | 6.0 ± 0.0 | 6.0, 6.0 |" in text
    assert "8 samples; as many real training images have a distance of 1.0." in text


def test_without_models():
    """The table of the tokenizers alone."""
    text = tokenizers.table({"kl-l1": RECORD}, {})
    assert "30 images of the split test, features of grey-pixels." in text
    assert "MAR" not in text


def test_reconstructions_are_put_together(tmp_path):
    """The originals once, then what each row made of them."""
    black, grey, white = (np.full((8, 64, 64, 3), value, np.uint8) for value in (0, 128, 255))
    strips = {}
    for words, decoded in (("a", grey), ("b", white)):
        strips[words] = tmp_path / f"{words}.png"
        save_image(strips[words], grid(np.concatenate([black, decoded]), 8))
    tokenizers.draw(tmp_path / "all.png", strips)
    with Image.open(tmp_path / "all.png") as image:
        cell = image.height // 3
        column = tokenizers.LABEL + cell // 2
        found = [image.getpixel((column, int((i + 0.5) * cell)))[0] for i in range(3)]
    assert found == [0, 128, 255]


@pytest.mark.slow
def test_all_of_it_is_run_once(tmp_path, capsys):
    """Three tokenizers and two MARs; the second time nothing is trained or sampled again."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 10)):
        for name in "ab":
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(draw.integers(0, 255, (4, 4, 3), dtype=np.uint8))
                image.resize((16, 16)).save(tmp_path / "data" / split / name / f"{i}.png")
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    flags = ["--data_path", tmp_path / "data", "--img_size", "16", "--class_num", "2"]
    flags += ["--rows", "kl-adversarial", "kl-adversarial-noise", "vq-l1", "--seeds", "1"]
    flags += ["--ch", "8", "--ch_mult", "1,2,2", "--tokenizer_epochs", "1", "--epochs", "1"]
    flags += ["--perceptual", "timm:test_resnet", "--perceptual_weights", tmp_path / "weights.pth"]
    flags += ["--per_class", "2", "--extractor", "grey-pixels", "--device", "cpu"]
    flags = [*map(str, flags), "--output_dir", str(tmp_path / "out")]
    tokenizers.main(flags)
    text = (tmp_path / "out" / "TABLE.md").read_text()
    assert text.count("| KL, ") == 2 + 2 * len(tokenizers.GUIDANCE) and text.count("| VQ, ") == 1
    assert (tmp_path / "out" / "reconstructions.png").is_file()
    assert len(list(tmp_path.rglob("samples.png"))) == 2
    capsys.readouterr()
    tokenizers.main(flags)
    output = capsys.readouterr().out
    assert "training:" not in output and output.count("there already") == 4
    assert (tmp_path / "out" / "TABLE.md").read_text() == text
    with pytest.raises(ValueError, match="made with other flags; pass another --output_dir"):
        tokenizers.main([*flags, "--tokenizer_epochs", "2"])
