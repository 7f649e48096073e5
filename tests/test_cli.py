"""The scripts as a user calls them. Run: python -m pytest tests/test_cli.py"""

import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
from cli import DIGITS, ROOT, complain, read_lines
from conftest import write_images
from rule import GOLDEN

import main_cache
import main_mar
import main_tokenizer
import sample
from models import presets
from util.checkpoint import LAST, load_checkpoint
from util.images import GridWriter


def test_resuming_takes_the_head_from_the_weights(capsys, ckpt, tmp_path):
    """--resume needs no flag of the architecture, and refuses one that contradicts the weights."""
    flags = ["--resume", ckpt, "--data_path", "digits", "--device", "cpu", "--num_workers", "0"]
    flags += ["--batch_size", "512", "--epochs", "2", "--num_sampling_steps", "5"]
    flags += ["--output_dir", tmp_path, "--max_timestep", "950"]
    main_mar.main([str(f) for f in flags])
    assert load_checkpoint(tmp_path / LAST)["config"]["model"]["name"] == "mar_tiny"
    capsys.readouterr()
    line = complain(capsys, main_mar.main, *flags, "--diffloss_d", "6")
    assert "--diffloss_d 6:" in line and "holds 3" in line


def test_published_checkpoint_evaluates_and_resumes(tmp_path, vae_path, capsys):
    """The published evaluation command on a published file; then training resumes from it."""
    published = GOLDEN / "checkpoint-published.pth"
    common = f"--vae_path {vae_path} --vae_embed_dim 16 --vae_stride 16 --patch_size 1 --device cpu"
    common += f" --diffloss_d 2 --diffloss_w 64 --num_sampling_steps 3 --resume {published}"
    flags = f"{common} --eval_bsz 4 --num_images 10 --num_iter 4 --cfg 2.9 --cfg_schedule linear"
    flags += f" --temperature 1.0 --output_dir {tmp_path}/out --evaluate"
    flags += f" --extractor tiny --out {tmp_path}/images"
    main_mar.main(shlex.split(flags))
    record = json.loads((tmp_path / "out/results.jsonl").read_text())
    assert (record["images"], record["cfg"], record["num_sampling_steps"]) == (10, 2.9, "3")
    assert len(list((tmp_path / "images").glob("*.png"))) == 10

    images = write_images(tmp_path / "data", classes="abcdefghij", count=1, size=(64, 64))
    flags = f"{common} --data_path {images} --epochs 5 --batch_size 5 --num_workers 0 --lr 1e-4"
    main_mar.main([*shlex.split(flags), "--output_dir", str(tmp_path / "on")])
    assert "4 epochs are done" in capsys.readouterr().out
    after = load_checkpoint(tmp_path / "on" / LAST)
    assert after["epoch"] == 4
    # 20 steps were there, an epoch of 2 came on top
    assert {int(s["step"]) for s in after["optimizer"]["state"].values()} == {22}


@pytest.mark.parametrize(
    "backbone",
    ["ar_tiny", pytest.param("ar_tiny --order random", marks=pytest.mark.slow), "dit_tiny"],
)
def test_other_backbones_train_resume_and_sample(tmp_path, backbone, capsys):
    """The same scripts serve them all; the checkpoint says which it is."""
    flags = f"--preset digits --device cpu --model {backbone} --batch_size 512"
    flags += f" --num_sampling_steps 3 --save_last_freq 1 --output_dir {tmp_path}"
    main_mar.main(shlex.split(f"{flags} --epochs 1"))
    plain = f"--resume {tmp_path} --data_path digits --output_dir {tmp_path} --device cpu"
    main_mar.main(shlex.split(f"{plain} --epochs 2 --batch_size 512 --num_workers 0"))
    assert load_checkpoint(tmp_path / LAST)["epoch"] == 1
    (changed,) = [x for x in capsys.readouterr().out.splitlines() if "not as before" in x]
    assert "--lr" in changed and "None" not in changed  # nor settings that the model does not have
    out = tmp_path / "samples.npz"
    sample.main(["--ckpt", str(tmp_path), "--device", "cpu", "--cfg", "2", "--out", str(out)])
    assert np.load(out)["arr_0"].shape == (80, 8, 8, 3)


def test_a_raster_model_is_not_trained_on_in_another_order(tmp_path, capsys):
    """Resuming it with --order random is refused before any step; the checkpoint is as it was."""
    flags = f"--preset digits --device cpu --model ar_tiny --batch_size 512 --output_dir {tmp_path}"
    main_mar.main(shlex.split(f"{flags} --num_sampling_steps 3 --epochs 1"))
    before = (tmp_path / LAST).read_bytes()
    capsys.readouterr()
    line = complain(
        capsys,
        main_mar.main,
        *shlex.split(f"{flags} --resume {tmp_path} --epochs 2 --order random"),
    )
    assert "order random: this model learned the raster order only" in line
    assert (tmp_path / LAST).read_bytes() == before


def test_images_to_cache_to_training_to_samples(tmp_path, images, vae_path):
    """The whole path: a folder, its cache, a model trained on that, images from its file."""
    cache = tmp_path / "cache"
    common = f"--img_size 32 --vae_path {vae_path} --device cpu --num_workers 0"
    for _ in range(2):  # the second run finds everything there
        main_cache.main(
            shlex.split(f"{common} --data_path {images} --cached_path {cache} --batch_size 3")
        )
    assert len(list(cache.rglob("*.npz"))) == 8
    flags = f"{common} --use_cached --cached_path {cache} --class_num 2 --model mar_tiny"
    flags += " --buffer_size 4 --diffloss_d 1 --diffloss_w 32 --batch_size 4 --epochs 2 --lr 1e-3"
    flags += " --warmup_epochs 1 --max_timestep 950 --num_sampling_steps 4 --num_iter 3"
    main_mar.main([*shlex.split(flags), "--output_dir", str(tmp_path / "run")])
    checkpoint = load_checkpoint(tmp_path / "run" / LAST)
    assert checkpoint["config"]["tokenizer"]["vae_path"] == str(vae_path)
    out = tmp_path / "samples.npz"
    sample.main(["--ckpt", str(tmp_path / "run" / LAST), "--labels", "all", "--out", str(out)])
    assert np.load(out)["arr_0"].shape == (16, 32, 32, 3)


def test_evaluation_says_what_it_measured(ckpt, tmp_path, capsys):
    """--evaluate prints a table and one JSON line, which results.jsonl and TensorBoard keep."""
    flags = [*DIGITS, "--resume", ckpt, "--evaluate", "--num_images", "20", "--num_iter", "2"]
    flags += ["--output_dir", tmp_path / "run", "--stats_dir", tmp_path / "stats"]
    for _ in range(2):
        main_mar.main([str(f) for f in flags])
    output = capsys.readouterr().out
    records = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert records == read_lines(tmp_path / "run/results.jsonl")
    first, second = records
    assert first["frechet_distance"] == second["frechet_distance"]
    assert {"inception_score", "precision", "recall", "accuracy", "seconds_per_image"} <= set(first)
    assert first["weights_sha256"] == second["weights_sha256"] and first["weights"] == "ema"
    assert (first["images"], first["real"]["images"]) == (20, 20)
    assert any("covariance is singular" in note for note in first["notes"])
    assert "real images" in output and "seconds per image" in output
    assert list((tmp_path / "run").glob("events.out.tfevents*"))


def test_online_evaluation_measures_ema_and_raw_weights(tmp_path):
    """--online_eval, of both, with different metrics."""
    flags = [*DIGITS, "--epochs", "1", "--batch_size", "256", "--num_sampling_steps", "5"]
    flags += ["--online_eval", "--num_images", "20", "--num_iter", "2", "--eval_bsz", "20"]
    flags += ["--stats_dir", tmp_path / "stats", "--output_dir", tmp_path / "run"]
    main_mar.main([str(f) for f in flags])
    ema, raw = read_lines(tmp_path / "run/results.jsonl")
    assert (ema["weights"], raw["weights"]) == ("ema", "raw")
    assert ema["frechet_distance"] != raw["frechet_distance"]
    logged = {name for line in read_lines(tmp_path / "run/log.jsonl") for name in line}
    assert {"eval_ema/frechet_distance", "eval_raw/frechet_distance"} <= logged


def test_classes_take_turns_but_for_a_grid(ckpt, tmp_path):
    """ADM's Inception Score splits consecutive images: sorted by class it would be far too low."""
    args, _ = presets.apply(main_mar.get_parser(), [*DIGITS, "--num_images", "25"])
    config = {"model": {"class_num": 10}}
    labels, said = main_mar.Run(args, config, None, None, None, "fp32").labels()
    assert labels[:12] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert said["labels"].startswith("balanced, ")
    writer = GridWriter(tmp_path / "a.png", [7, 0, 7, 0], columns=2)
    assert writer.order == [0, 2, 1, 3]


def test_a_folder_to_resume_may_have_a_dot(tmp_path):
    """The same command serves the first run and the next."""
    folder = tmp_path / "blr1.0e-4"
    flags = [*DIGITS, "--epochs", "1", "--batch_size", "512", "--num_sampling_steps", "3"]
    main_mar.main([*map(str, flags), "--output_dir", str(folder), "--resume", str(folder)])
    assert (folder / LAST).is_file()


def test_tokenizer_is_measured(images, vae_path, tmp_path):
    """Metrics and an image, which do not depend on the batches."""
    records = []
    for batch_size in (8, 3):
        flags = f"--data_path {images} --img_size 32 --vae_path {vae_path} --extractor tiny"
        flags += f" --device cpu --num_workers 0 --batch_size {batch_size}"
        main_tokenizer.main([*shlex.split(flags), "--output_dir", str(tmp_path / str(batch_size))])
        records.append(json.loads((tmp_path / str(batch_size) / "results.jsonl").read_text()))
    metrics = ("rfd", "psnr", "ssim", "latent_mean", "latent_std", "latent_scale")
    for name in metrics:
        assert records[0][name] == pytest.approx(records[1][name], rel=1e-4), name
    assert records[0]["latent_scale"] == pytest.approx(1 / records[0]["latent_std"])
    assert 0 < records[0]["psnr"] < 20 and records[0]["rfd"] > 0
    assert (tmp_path / "8/reconstructions.png").is_file()


def test_pixels_lose_nothing(tmp_path, capsys):
    """The tokenizer that is the identity: distance 0, PSNR infinite, null in JSON."""
    flags = "--tokenizer pixels --data_path digits --split test --device cpu --num_workers 0"
    main_tokenizer.main([*shlex.split(flags), "--output_dir", str(tmp_path)])
    record = json.loads((tmp_path / "results.jsonl").read_text())
    assert abs(record["rfd"]) < 1e-6 and record["psnr"] is None and record["images"] == 360
    wrong = (*shlex.split(flags), "--split", "val")
    assert "split 'val': " in complain(capsys, main_tokenizer.main, *wrong)
    line = complain(capsys, main_tokenizer.main, "--tokenizer", "vq", "--output_dir", tmp_path)
    assert "--tokenizer vq: expected --epochs to train one, or a --vae_path" in line


@pytest.mark.slow
def test_a_terminal_gets_no_other_files(tmp_path):
    """Scripts write where they are told: nothing appears in the folder they are called from."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    flags = [*DIGITS, "--epochs", "1", "--batch_size", "512", "--output_dir", "out"]
    flags += ["--num_sampling_steps", "3", "--num_iter", "2"]
    subprocess.run(
        [sys.executable, ROOT / "main_mar.py", *flags],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
    )
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    json.loads((tmp_path / "out/log.jsonl").read_text().splitlines()[0])
