"""Scale and shift of latents, one or per channel. Run: python -m pytest tests/test_scale.py"""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import complain
from rule import rule_input

import main_cache
import main_mar
import main_tokenizer
import sample
from models import build_tokenizer, checkpoint_config
from models.tokenizer import KLTokenizer, mean_and_std
from models.vae import DiagonalGaussian
from util.checkpoint import LAST, load_checkpoint
from util.data.digits import digits
from util.weights import digest

FIXTURES = Path(__file__).parent / "fixtures"
KL, VQ = FIXTURES / "kl.ckpt", FIXTURES / "vq.ckpt"  # written before there was a shift
OLD_SCALE = 1.018833574477606
SCALE, SHIFT = [0.5, 1.0, 2.0, 3.0], [-1.0, 0.0, 0.25, 2.0]
CPU = "--device cpu --num_workers 0"


def draw(moments, seed=0):
    return DiagonalGaussian(moments).sample(torch.Generator().manual_seed(seed))


def tokens_of(tokenizer, moments, seed=0):
    return tokenizer.sample(moments, torch.Generator().manual_seed(seed))


@pytest.fixture
def save(tmp_path):
    """save(**entries) -> the path of kl.ckpt with these entries instead of its scale."""

    def write(**entries):
        content = torch.load(KL, weights_only=True)
        del content["scale"]
        torch.save(content | entries, tmp_path / "tokenizer.ckpt")
        return tmp_path / "tokenizer.ckpt"

    return write


# Numbers


@torch.no_grad()
@pytest.mark.parametrize(("name", "path"), [("kl", KL), ("vq_latent", VQ), ("pixels", None)])
def test_each_channel_has_its_own(name, path):
    """latents = (raw − shift) · scale in sampling, back in decoding, channel by channel."""
    scale, shift = (SCALE, SHIFT) if path else (SCALE[1:], SHIFT[1:])
    tokenizer = build_tokenizer(name, path, scale, shift)
    plain = build_tokenizer(name, path, 1.0, 0.0)
    images = rule_input("images", (2, 3, 16, 24))
    moments = tokenizer.encode(images)
    assert torch.equal(moments, plain.encode(images))
    raw = draw(moments) if name == "kl" else moments
    latents = tokens_of(tokenizer, moments)
    for c in range(tokenizer.channels):
        torch.testing.assert_close(latents[:, c], (raw[:, c] - shift[c]) * scale[c])
    torch.testing.assert_close(tokenizer.to_raw(latents), raw)
    torch.testing.assert_close(tokenizer.decode(latents), plain.decode(raw))
    assert (tokenizer.scale, tokenizer.shift) == (scale, shift)


@torch.no_grad()
def test_without_a_shift_the_bits_are_those_of_a_product():
    """What there was before shifts: times the scale, divided by it; also the sign of a zero."""
    tokenizer = build_tokenizer("kl", KL)
    moments = tokenizer.encode(rule_input("images", (2, 3, 16, 16)))
    latents = tokens_of(tokenizer, moments)
    assert torch.equal(latents, draw(moments) * OLD_SCALE)
    assert torch.equal(tokenizer.decode(latents), tokenizer.vae.decode(latents / OLD_SCALE))
    zeros = torch.full((1, 4, 1, 1), -0.0)
    assert tokenizer.to_raw(tokenizer.to_latents(zeros)).signbit().all()


def test_they_move_but_are_no_weights():
    """They follow the module to a device; a cache knows its tokenizer by the weights alone."""
    plain, other = build_tokenizer("kl", KL), build_tokenizer("kl", KL, SCALE, SHIFT)
    assert digest(plain.state_dict()) == digest(other.state_dict())
    other.to("meta")
    assert other.to_raw(torch.zeros(1, 4, 2, 2, device="meta")).device.type == "meta"


# Files and arguments


def test_old_files_have_a_scale_alone():
    """Files of before: a number, and shift 0."""
    kl, vq = build_tokenizer("kl", KL), build_tokenizer("vq_latent", VQ)
    assert (kl.scale, kl.shift) == (OLD_SCALE, 0.0)
    assert vq.scale > 0 and vq.shift == 0.0
    indices = build_tokenizer("vq", VQ)
    assert indices.scale is indices.shift is None


def test_given_then_the_file_s_then_published(save):
    """Each on its own; but a file with a scale and no shift has shift 0, whatever is published."""
    published = {"published_scale": 7.0, "published_shift": 8.0}

    def found(path, **given):
        tokenizer = KLTokenizer(path, **published, **given)
        return tokenizer.scale, tokenizer.shift

    path = save()
    assert found(path) == (7.0, 8.0)
    assert found(path, scale=2, shift=SHIFT) == (2.0, SHIFT)
    assert found(path, shift=0.0) == (7.0, 0.0)
    assert found(save(scale=3.0)) == (3.0, 0.0)
    assert found(save(scale=3.0, shift=0.5)) == (3.0, 0.5)
    path = save(scale=SCALE, shift=SHIFT)
    assert found(path) == (SCALE, SHIFT)
    assert found(path, scale=2.0) == (2.0, SHIFT)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scale": [1.0, 2.0]}, r"scale 1.0,2.0: expected one number, or 4, one per channel"),
        ({"shift": [1.0] * 5}, r"shift 1.0,1.0,1.0,1.0,1.0: .* got 5"),
        ({"scale": [1.0, 1.0, 0.0, 1.0]}, "scale 0.0: expected a number above 0"),
        ({"scale": -1.0}, "scale -1.0: expected a number above 0"),
        ({"shift": float("nan")}, "shift nan: expected a finite number"),
        ({"scale": "x"}, "scale x: expected a finite number above 0"),
    ],
)
def test_what_does_not_fit_is_refused(given, message, save):
    """As an argument and as an entry of a file."""
    with pytest.raises(ValueError, match=message):
        build_tokenizer("kl", KL, **given)
    with pytest.raises(ValueError, match=message):
        build_tokenizer("kl", save(**{"scale": 1.0, **given}))


def test_code_indices_have_neither():
    with pytest.raises(ValueError, match="shift 0.5: code indices have no shift, expected none"):
        build_tokenizer("vq", VQ, shift=0.5)


# Flags

SCRIPTS = {
    main_mar: f"--data_path digits --tokenizer kl --vae_path {KL}",
    main_cache: f"--data_path {{1}} --cached_path {{0}} --tokenizer kl --vae_path {KL} {CPU}",
    main_tokenizer: f"--data_path digits --split test --tokenizer pixels {CPU}",
    sample: f"--ckpt {FIXTURES / 'checkpoint.pth'} --device cpu --out {{0}}/a.png",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_of_every_script(script, images, tmp_path, capsys):
    """Numbers separated by commas; what is wrong is one line."""
    flags = shlex.split(SCRIPTS[script].format(tmp_path, images))
    parse = script.get_parser().parse_args
    args = parse([*flags, "--vae_scale", "2", "--vae_shift=-1,0.5"])
    assert (args.vae_scale, args.vae_shift) == (2.0, [-1.0, 0.5])
    for wrong, message in (
        ("--vae_scale=1,2,3", "scale 1.0,2.0,3.0: expected one number, or "),
        ("--vae_shift=1,2,3", "shift 1.0,2.0,3.0: expected one number, or "),
        ("--vae_scale=1,x", "--vae_scale: 1,x: expected a number above 0, or one per channel"),
        ("--vae_scale=1,0", "--vae_scale: 1,0: expected a number above 0, or one per channel"),
        ("--vae_shift=nan", "--vae_shift: nan: expected a number, or one per channel"),
    ):
        assert message in complain(capsys, script.main, *flags, wrong)


# Measured by main_tokenizer.py


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_measured_per_channel(kind, tmp_path):
    """A trained file's latents have mean 0 and standard deviation 1 in every channel.

    23,000 elements each: one standard error of a mean is 0.007. Without the flag the channels of
    this network differ in both.
    """
    flags = f"--tokenizer {kind} --data_path digits --split test {CPU} --extractor grey-pixels"
    flags += " --epochs 1 --ch 8 --batch_size 128 --num_codes 32 --lr 5e-3"
    files = []
    for name, more in (("all", ""), ("each", "--per_channel")):
        main_tokenizer.main(shlex.split(f"{flags} {more} --output_dir {tmp_path / name}"))
        files.append(torch.load(tmp_path / name / "tokenizer.ckpt", weights_only=True))
    assert digest(files[0]["model"]) == digest(files[1]["model"])
    assert isinstance(files[0]["scale"], float) and "shift" not in files[0]
    assert [len(files[1][name]) for name in ("scale", "shift")] == [4, 4]
    kind = {"kl": "kl", "vq": "vq_latent"}[kind]
    errors = [largest_error(kind, tmp_path / name / "tokenizer.ckpt") for name in ("all", "each")]
    assert errors[1] < (0.03 if kind == "kl" else 1e-4) < 0.1 < errors[0]


@torch.no_grad()
def largest_error(name, path):
    """Largest difference of a channel's mean from 0 or std from 1, over the digits' latents."""
    tokenizer = build_tokenizer(name, path)
    latents = tokens_of(tokenizer, tokenizer.encode(digits("train")[:][0]), seed=5)
    std, mean = torch.std_mean(latents, dim=(0, 2, 3))
    return max(mean.abs().max(), (std - 1).abs().max()).item()


def test_measuring_says_what_to_pass(tmp_path, capsys):
    """Of any continuous tokenizer: lists in results.jsonl, and a line for each flag."""
    common = f"--data_path digits --split test --extractor grey-pixels {CPU}"
    common += f" --output_dir {tmp_path} --per_channel"
    main_tokenizer.main(shlex.split(f"{common} --tokenizer pixels"))
    record = json.loads((tmp_path / "results.jsonl").read_text())
    assert record["shift_per_channel"] == pytest.approx([record["latent_mean"]])
    assert record["scale_per_channel"] == pytest.approx([record["latent_scale"]])
    out = capsys.readouterr().out
    assert f"--vae_shift={record['latent_mean']:.6g}" in out
    flags = shlex.split(f"{common} --tokenizer vq --vae_path {VQ}")
    assert "--per_channel: the code indices of vq" in complain(capsys, main_tokenizer.main, *flags)


# Through a cache, training and sampling


@pytest.fixture(scope="module")
def caches(images, tmp_path_factory):
    """(layout -> folder of cached latents, the tokenizer's file) with a shift per channel."""
    folder = tmp_path_factory.mktemp("scaled")
    flags = f"--tokenizer kl --data_path {images} --img_size 16 {CPU} --extractor tiny"
    flags += f" --epochs 1 --ch 8 --batch_size 4 --per_channel --output_dir {folder}"
    main_tokenizer.main(shlex.split(flags))
    found, path = {}, folder / "tokenizer.ckpt"
    for layout in ("images", "shards"):
        found[layout] = folder / layout
        flags = f"--tokenizer kl --vae_path {path} --data_path {images} --img_size 16 {CPU}"
        main_cache.main(
            shlex.split(f"{flags} --cached_path {found[layout]} --layout {layout} --batch_size 4")
        )
    return found, path


def test_a_cache_says_them(caches, tmp_path):
    """In cache.json of both layouts, and of what is converted; 0 is not said, as in old caches."""
    folders, path = caches
    content = torch.load(path, weights_only=True)
    flags = f"--convert_from {folders['shards']} --cached_path {tmp_path / 'again'} --num_workers 0"
    main_cache.main(shlex.split(flags))
    for folder in (*folders.values(), tmp_path / "again"):
        said = json.loads((folder / "cache.json").read_text())
        assert {name: said[name] for name in ("scale", "shift")} == {
            name: content[name] for name in ("scale", "shift")
        }
    assert "shift" not in json.loads((FIXTURES / "cache-images" / "cache.json").read_text())


def train(cache, path, folder, *more):
    flags = f"--model mar_tiny --class_num 2 --buffer_size 4 --diffloss_d 1 --diffloss_w 32 {CPU}"
    flags += f" --img_size 16 --tokenizer kl --vae_path {path} --use_cached --cached_path {cache}"
    flags += " --batch_size 4 --epochs 1 --warmup_epochs 0 --num_sampling_steps 4 --num_iter 3"
    main_mar.main([*shlex.split(f"{flags} --output_dir {folder}"), *more])
    return load_checkpoint(folder / LAST)["config"]


def test_trained_and_sampled_with_them(caches, tmp_path):
    """A checkpoint remembers them: sampling takes them from it, unless flags say otherwise."""
    folders, path = caches
    content = torch.load(path, weights_only=True)
    config = train(folders["images"], path, tmp_path)
    held = config["tokenizer"]
    assert (held["scale"], held["shift"]) == (content["scale"], content["shift"])
    assert 1 < config["latent_range"] < 8  # 32 images of 256 normal numbers

    flags = f"--ckpt {tmp_path / LAST} --device cpu --labels 0,1 --per_class 1"
    images = {}
    for name, more in (
        ("stored", ""),
        ("given", " ".join(f"--vae_{n}={','.join(map(str, held[n]))}" for n in ("scale", "shift"))),
        ("other", "--vae_shift=3"),
    ):
        sample.main(shlex.split(f"{flags} {more} --out {tmp_path / name}.npz"))
        with np.load(tmp_path / f"{name}.npz") as file:
            images[name] = file["arr_0"]
    assert np.array_equal(images["stored"], images["given"])
    assert not np.array_equal(images["stored"], images["other"])


def test_an_old_checkpoint_has_shift_0():
    """One that says a scale and no shift, whatever the file of another tokenizer says."""
    held = load_checkpoint(FIXTURES / "checkpoint.pth")
    assert "shift" not in held["config"]["tokenizer"]
    assert checkpoint_config(held, "")["tokenizer"]["shift"] == 0.0


def test_old_caches_and_files_train_as_ever(tmp_path):
    """What was written before there was a shift: scale as it was, shift 0."""
    for layout in ("images", "shards"):
        held = train(FIXTURES / f"cache-{layout}", KL, tmp_path / layout)["tokenizer"]
        assert (held["scale"], held["shift"]) == (OLD_SCALE, 0.0)


# The first batch of a run


def latents_of(tokenizer, std):
    """Latents of which the raw ones have this std."""
    values = rule_input("latents", (8, 4, 8, 8))
    return tokenizer.to_latents(values * std / values.std(correction=0))


@pytest.mark.parametrize(
    ("scale", "std", "better"),
    [(0.18215, 7.7, "0.1299"), (1.0, 0.79, "1.266"), (0.5, 2.4, None), (0.5, 1.62, None)],
)
def test_latents_far_from_std_1_are_said(capsys, scale, std, better):
    """SDXL's under Stable Diffusion's scale, with the scale that gives 1; 0.8 to 1.25 is usual."""
    tokenizer = build_tokenizer("kl", KL, scale)
    latents = latents_of(tokenizer, std)
    before = torch.get_rng_state()
    for _ in range(2):
        tokenizer.check_first(latents)
    said = capsys.readouterr().out
    assert said.count("NOTE") == (better is not None)
    if better:
        assert f"have std {scale * std:.2g}" in said and f" --vae_scale {better} gives" in said
    assert torch.equal(torch.get_rng_state(), before)


def test_scales_per_channel_are_said(capsys):
    """As the flag takes them."""
    tokenizer = build_tokenizer("kl", KL, SCALE)
    tokenizer.check_first(2 * rule_input("latents", (64, 4, 8, 8)))
    found = capsys.readouterr().out.split("--vae_scale ")[1].split()[0]
    assert [float(x) for x in found.split(",")] == pytest.approx([x / 2 for x in SCALE], rel=0.05)


def test_all_processes_are_measured(monkeypatch):
    """Mean and standard deviation are those of the latents of all, each with a mean of its own."""
    parts = [rule_input("a", (3, 4, 2, 2)) + 3, rule_input("b", (2, 4, 2, 2)) * 2 - 1]
    held = []
    monkeypatch.setattr("models.tokenizer.all_gather", lambda own: held.append(own) or held)
    found = [mean_and_std(part) for part in parts][-1]
    whole = torch.cat(parts)
    assert found == pytest.approx((whole.mean().item(), whole.std(correction=0).item()), rel=1e-5)


@pytest.mark.parametrize("latents", [torch.zeros(2, 4, 2, 2), torch.full((2, 4, 2, 2), torch.nan)])
def test_latents_without_a_std(capsys, latents):
    """Constant ones have no scale; those that are not finite are said with their images, later."""
    build_tokenizer("kl", KL).check_first(latents)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(("name", "path"), [("vq", VQ), ("pixels", None)])
def test_codes_and_pixels_have_no_such_std(capsys, name, path):
    """Of code indices it means nothing, and that of pixels is not 1."""
    build_tokenizer(name, path).check_first(rule_input("latents", (2, 1, 8, 8)) * 9)
    assert not capsys.readouterr().out
