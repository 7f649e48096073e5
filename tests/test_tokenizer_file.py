"""What the file of a tokenizer says, in every script. Run: pytest tests/test_tokenizer_file.py"""

import shlex
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import complain

import edit
import main_cache
import main_mar
import main_tokenizer
import models
import sample
from demo.studio import Studio
from models import build_tokenizer, export
from models.autoencoder_settings import Losses, Network
from models.pca import PatchPCA
from models.tokenizer_file import (
    add_metrics,
    data_facts,
    describe,
    flags_of,
    read,
    training_facts,
    write,
)
from models.vae import AutoencoderKL
from models.vq import VQModel
from util.checkpoint import LAST, load_checkpoint
from util.data.manifest import read_manifest
from util.weights import digest

FIXTURES = Path(__file__).parent / "fixtures"
KL = FIXTURES / "kl.ckpt"  # trained on 16×16 pixels, stride 4
CPU = "--device cpu --num_workers 0"
SIZES = {"embed_dim": 4, "ch_mult": (1, 2), "ch": 8, "encoder_attention": False}
NETWORKS = {
    "kl": partial(AutoencoderKL, **SIZES),
    "vq": partial(VQModel, num_codes=16, **SIZES),
    "vq_latent": partial(VQModel, num_codes=16, **SIZES),
    "pca": partial(PatchPCA, 4, 2),
}


class Pictures(list):
    """A data set."""

    classes = ("cat", "dog")


def write_tiny(path, name="kl", **more):
    """Write a tiny network, of which all is known; returns it."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    about = {
        "data": data_facts(Pictures([1, 2, 3]), "/home/someone/pets"),
        "training": training_facts(Network(ch=8), Losses(kl_weight=0.5), steps=20),
    }
    about |= {"scale": 0.5, "shift": 0.0, "img_size": [16, 8], "tokenizer": name} | more
    write(path, network, about.pop("scale"), about.pop("shift"), **about)
    return network


# ---- what it says --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_says_what_it_is(tmp_path, name):
    """All that was written is read, in words too; its sha256 is that of caches and checkpoints."""
    path = tmp_path / "tokenizer.ckpt"
    network = write_tiny(path, name)
    said, tokenizer = read(path), build_tokenizer(vae_path=path)
    assert tokenizer.config["name"] == name
    assert said["sha256"] == digest(tokenizer.state_dict())
    assert said["network"] == network.config and said["tokenizer"] == name
    assert (said["img_size"], said["scale"], said["shift"]) == ([16, 8], 0.5, 0.0)
    assert said["data"] == {"name": "pets", "images": 3, "classes": 2}
    assert said["training"]["flags"] == "--ch 8 --kl_weight 0.5"
    lines = describe(path)
    assert "images of 16×8 pixels as 8×4 latents" in lines[1] and "data: name pets" in lines[4]
    assert lines[-1] == f"sha256 {said['sha256']}"


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_groups_of_norms_are_the_files(tmp_path, kind):
    """--norm_groups has no weights, so a network is read with the number that its file names."""
    path, images = tmp_path / "tokenizer.ckpt", torch.randn(2, 3, 16, 16)
    decoded = {}
    for groups in (2, 32):
        torch.manual_seed(0)
        network = NETWORKS[kind](norm_groups=groups).eval()
        write(path, network, 1.0, 0.0, tokenizer=kind, img_size=[16, 16], data={}, training={})
        loaded = build_tokenizer(vae_path=path)
        decoded[groups] = loaded.decode(loaded.sample(loaded.encode(images), torch.Generator()))
        assert {n.num_groups for n in norms(loaded)} == ({2} if groups == 2 else {8, 16})
    assert not torch.equal(decoded[2], decoded[32])


def norms(tokenizer):
    """The GroupNorms of a tokenizer."""
    return [m for m in tokenizer.modules() if isinstance(m, torch.nn.GroupNorm)]


def test_metrics_are_added(tmp_path):
    """In place of older ones, finite ones only; network, scale and the rest stay."""
    path = tmp_path / "tokenizer.ckpt"
    network = write_tiny(path, scale=[1.0, 2.0, 3.0, 4.0], shift=[0.0, 0.0, -1.0, 0.0])
    before = read(path)
    add_metrics(path, {"rfd": 3.0, "psnr": float("inf"), "extractor": "tiny"})
    add_metrics(path, {"rfd": 2.0, "images": 8})
    after = read(path)
    assert after == {**before, "metrics": {"rfd": 2.0, "extractor": "tiny", "images": 8}}
    loaded = build_tokenizer("kl", path)
    assert digest(loaded.vae.state_dict()) == digest(network.state_dict())
    assert (loaded.scale, loaded.shift) == ([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, -1.0, 0.0])


def test_a_file_names_no_places(tmp_path):
    """Only the last part of a path is in it, of the data and of a flag."""
    said = flags_of(Losses(perceptual="lpips", perceptual_weights="/home/someone/vgg.pth"))
    assert said == "--perceptual lpips --perceptual_weights vgg.pth"
    write_tiny(tmp_path / "a.ckpt", training={"flags": said})
    assert b"someone" not in (tmp_path / "a.ckpt").read_bytes()


def test_other_weights_are_told_of(tmp_path):
    """Where a file's network is not the one that it describes."""
    path = tmp_path / "tokenizer.ckpt"
    write_tiny(path)
    content = torch.load(path)
    content["model"]["decoder.conv_out.bias"] += 1
    torch.save(content, path)
    assert describe(path)[-1].startswith("NOTE: it describes other weights, of sha256 ")


def test_older_and_foreign_files(tmp_path, vae_path):
    """Of an earlier version, what it has; from elsewhere, nothing."""
    said = read(KL)
    assert (said["tokenizer"], said["img_size"], said["sha256"]) == ("kl", 16, None)
    assert read(FIXTURES / "vq.ckpt")["tokenizer"] == "vq"
    assert said["data"] == {"name": "pictures"} and said["training"]["epochs"] == 3
    assert any("epochs 3" in line for line in describe(KL))
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    assert read(vae_path) == read(tmp_path) == read(tmp_path / "tensor.pt") == {}
    with pytest.raises(ValueError, match="kl16.ckpt: says nothing of itself, expected a file of"):
        describe(vae_path)
    with pytest.raises(ValueError, match="kl16.ckpt: says nothing of itself"):
        build_tokenizer(vae_path=vae_path)
    with pytest.raises(ValueError, match="none.ckpt: no such file"):
        describe(tmp_path / "none.ckpt")


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("network", [1]),
        ("network", {"ch_mult": [[1], 2]}),
        ("network", {"embed_dim": 2**60}),
        ("tokenizer", "nothing"),
        ("tokenizer", ["kl"]),
        ("tokenizer", "pixels"),
        ("img_size", None),
        ("img_size", [16]),
        ("img_size", 2**40),
        ("sha256", "abc"),
        ("data", "pets"),
        ("training", {"steps": "many"}),
        ("metrics", {"rfd": float("nan")}),
        ("metrics", {1: 2.0}),
        ("scale", [1.0]),
        ("scale", float("inf")),
        ("shift", "0"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, capsys, entry, value):
    """In one line with the file and the entry, before anything is done."""
    path = tmp_path / "tokenizer.ckpt"
    write_tiny(path)
    content = torch.load(path)
    (content if entry in ("scale", "shift") else content["config"])[entry] = value
    torch.save(content, path)
    line = complain(capsys, main_tokenizer.main, "--vae_path", path, "--data_path", "digits")
    assert f"{path}: " in line and entry in line


# ---- where it is not the one ---------------------------------------------------------------------


def changed(path, part):
    """A copy of the fixture with other weights of a part; returns its path."""
    content = torch.load(KL)
    content["model"][part] += 1
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A folder with a cache and a run of pictures twice as high as wide, by a tokenizer of square
    ones: each script is given its file, and learns the rest from it."""
    folder = tmp_path_factory.mktemp("trained")
    where = f"{CPU} --data_path {images} --cached_path {folder}/cache"
    main_cache.main(shlex.split(f"--vae_path {KL} {where} --img_size 32 16"))
    flags = f"--vae_path {KL} {where} --use_cached --model mar_tiny --class_num 2 --buffer_size 4"
    flags += " --diffloss_d 1 --diffloss_w 16 --patch_size 2 --batch_size 8 --num_sampling_steps 2"
    flags += " --max_timestep 950 --num_iter 2 --epochs 1 --warmup_epochs 0 --eval_freq 9"
    main_mar.main(shlex.split(f"{flags} --output_dir {folder}/run"))
    return folder


def test_the_sequence_follows_the_picture(trained):
    """32×16 pixels at stride 4 and patches of 2: 4×2 tokens, learned and sampled."""
    model, tokenizer, config = models.load(trained / "run")
    assert config["model"]["img_size"] == [32, 16] and model.seq_len == (32 // 8) * (16 // 8)
    assert config["tokenizer"]["name"] == "kl" and tokenizer.scale == read(KL)["scale"]
    out = trained / "samples.npz"
    flags = f"--ckpt {trained}/run --vae_path {KL} --per_class 1 --out {out} --device cpu"
    sample.main(shlex.split(flags))
    assert np.load(out)["arr_0"].shape == (2, 32, 16, 3)


def test_the_page_takes_the_file(trained, tmp_path):
    """Where it is now; what pictures are made by names that place."""
    path = shutil.copy(KL, tmp_path / "moved.ckpt")
    studio = Studio(trained / "run", tmp_path, vae_path=str(path))
    assert studio.identity["tokenizer"]["vae_path"] == str(path)


def test_another_encoder_is_refused(trained, tmp_path, capsys, images):
    """By every script that decodes a model's latents, and by a cache, with both sha256."""
    other = changed(tmp_path / "other.ckpt", "encoder.conv_in.bias")
    both = [digest(build_tokenizer("kl", path).state_dict())[:12] for path in (other, KL)]
    run, more = f"{trained}/run", f"--vae_path {other}"
    scripts = {
        sample.main: f"--ckpt {run} {more} --out {tmp_path}/a.png --device cpu",
        edit.main: f"--ckpt {run} {more} --outpaint left=8 --out {tmp_path}/a.png --device cpu",
        main_mar.main: f"--evaluate --resume {run} {more} --extractor tiny {CPU} --num_images 16 "
        f"--data_path {images} --reference {images} --output_dir {tmp_path}",
        export.main: f"{run} {tmp_path}/out {more}",
    }
    for main, flags in scripts.items():
        line = complain(capsys, main, *shlex.split(flags))
        assert f"not the tokenizer of the model's latents (sha256 {both[0]}, in training" in line
        assert both[1] in line and ("expected the file" if main is export.main else str(KL)) in line
    cached = f"--vae_path {other} {CPU} --cached_path {trained}/cache --img_size 32 16"
    train = f"{cached} --use_cached --output_dir {tmp_path}/run --patch_size 2 --model mar_tiny"
    made = f"{cached} --data_path {images}"
    for main, flags in ((main_cache.main, made), (main_mar.main, train)):
        line = complain(capsys, main, *shlex.split(flags))
        assert f"latents of tokenizer kl ({KL}, sha256 {both[1]}), here it is kl ({other}, " in line
        assert both[0] in line


def test_another_decoder_is_told_of(trained, tmp_path, capsys):
    """It decodes the same latents; so does a file of 16 bits. Of older checkpoints, which do not
    say what the latents depend on, any other weights are told of."""
    decoder = changed(tmp_path / "decoder.ckpt", "decoder.conv_out.bias")
    content = torch.load(KL)
    half = {name: value.half() for name, value in content["model"].items()}
    torch.save({**content, "model": half}, tmp_path / "half.ckpt")
    for path in (decoder, tmp_path / "half.ckpt"):
        models.load(trained / "run", vae_path=path)
        assert f"NOTE: {path}: another decoder of the same latents" in capsys.readouterr().out
    models.load(trained / "run", vae_path=KL)
    assert not capsys.readouterr().out
    older = load_checkpoint(trained / "run" / LAST)
    del older["record"]["encoder"]
    torch.save(older, tmp_path / "older.pth")
    encoder = changed(tmp_path / "encoder.ckpt", "encoder.conv_in.bias")
    models.load(tmp_path / "older.pth", vae_path=encoder)
    assert "NOTE: " in (said := capsys.readouterr().out) and "may not decode (sha256 " in said


def test_what_is_passed_on_knows_its_tokenizer(trained, tmp_path):
    """A file of weights alone and a folder, whose copy says all that the tokenizer's file said."""
    other = changed(tmp_path / "other.ckpt", "encoder.conv_in.bias")
    for out in ("weights.safetensors", "folder"):
        export.main([f"{trained}/run", f"{tmp_path}/{out}"])
        with pytest.raises(ValueError, match="not the tokenizer of the model's latents"):
            models.load(tmp_path / out, vae_path=other)
    copy = read(tmp_path / "folder" / "tokenizer.ckpt")
    assert copy["training"]["epochs"] == 3 and copy["data"] == {"name": "pictures"}
    made = read_manifest(trained / "cache")
    assert copy["img_size"] == 16 and copy["sha256"] == made["tokenizer"]


# ---- what wins -----------------------------------------------------------------------------------


def test_a_cache_says_how_its_latents_were_made(trained, tmp_path):
    """If the same file made them: as which tokenizer, and of which size."""
    from models.found import complete
    from util.data.manifest import write_manifest

    write_tiny(path := tmp_path / "vq.ckpt", "vq", img_size=16)
    facts = {"tokenizer": read(path)["sha256"], "tokenizer_name": "vq_latent", "img_size": [8, 16]}
    write_manifest(tmp_path, facts)
    flags = ["--use_cached", "--cached_path", str(tmp_path), "--vae_path", str(path)]
    args, given = main_mar.get_parser().parse_given(flags)
    complete(args, given)
    assert (args.tokenizer, args.img_size, args.vae_path) == ("vq_latent", [8, 16], str(path))
    write_manifest(tmp_path, facts | {"tokenizer": "0" * 64})
    args, given = main_mar.get_parser().parse_given(flags)
    complete(args, given)
    assert (args.tokenizer, args.img_size) == ("vq", [8, 16])
