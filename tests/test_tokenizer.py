"""Tokenizers and their one interface. Run: python -m pytest tests/test_tokenizer.py"""

import json
import shlex
import sys
import zipfile

import numpy as np
import pytest
import torch
from cli import complain
from rule import by_rule, rule_input
from safetensors.torch import save_file

import engine_mar as engine
import main_tokenizer
from models import TOKENIZERS, build_tokenizer
from models.pca import PatchPCA
from models.vae import AutoencoderKL, load_first_stage
from models.vq import VQModel
from util.data import open_data
from util.data.cached import CachedFolder
from util.data.digits import digits
from util.rng import image_generators


@pytest.fixture(scope="module")
def vq_path(tmp_path_factory):
    """A file of a narrow vq-f16, as LDM's training leaves it, with codes as wide as its latents."""
    path = tmp_path_factory.mktemp("vq") / "vq16.ckpt"
    state = by_rule(VQModel(ch=32)).state_dict()
    state["quantize.embedding.weight"] *= 5
    torch.save({"state_dict": state, "epoch": 1}, path)
    return path


@pytest.fixture(scope="module")
def consistency_path(tmp_path_factory):
    """A folder of a tiny Consistency Decoder, saved by the diffusers library itself."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.ConsistencyDecoderVAE(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        decoder_layers_per_block=1,
    )
    path = tmp_path_factory.mktemp("consistency") / "decoder"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory, vae_path, vq_path):
    """Tokenizer -> a weight file for it."""
    path = tmp_path_factory.mktemp("kl8") / "kl8.ckpt"
    kl8 = AutoencoderKL(embed_dim=4, ch_mult=(1, 2, 4, 4), ch=32, encoder_attention=False)
    torch.save({"model": kl8.state_dict(), "scale": 0.5}, path)
    found = dict.fromkeys(("vq16", "vq16_latent", "vq", "vq_latent"), vq_path)
    found["pca"] = path.with_name("pca.ckpt")
    torch.save({"model": PatchPCA(24, 8).state_dict(), "scale": [0.5] * 24}, found["pca"])
    return {**found, "kl16": vae_path, "kl8": path, "kl": path, "pixels": None}


@pytest.mark.parametrize("name", TOKENIZERS)
@torch.no_grad()
def test_one_face(name, paths, request):
    """Every row of the table: shapes as it says itself, and images back in the same shape."""
    if name == "consistency":
        paths = {name: request.getfixturevalue("consistency_path")}
    scale = 0.7 if name in ("vq16_latent", "vq_latent") else None
    tokenizer = build_tokenizer(name, paths[name], scale=scale)
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    moments = tokenizer.encode(images)
    height, width = 32 // tokenizer.stride, 48 // tokenizer.stride
    assert moments.shape == (2, tokenizer.moment_channels, height, width)
    assert moments.dtype == torch.float32
    latents = tokenizer.sample(moments, image_generators(0, range(2)))
    assert latents.shape == (2, tokenizer.channels, height, width)
    again = [tokenizer.decode(latents, image_generators(1, range(2))) for _ in range(2)]
    assert again[0].shape == images.shape
    assert torch.equal(*again)
    assert (tokenizer.num_codes is None) == (name not in ("vq16", "vq"))
    assert (tokenizer.scale is None) == (name in ("vq16", "vq"))
    assert not any(p.requires_grad for p in tokenizer.parameters())
    assert name == "pixels" or not tokenizer.vae.training


def test_kl_moments_to_latents(vae_path):
    """Latents are the posterior's draw times the scale; decoding divides by it again."""
    tokenizer = build_tokenizer("kl16", vae_path)
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    moments = tokenizer.encode(images)
    assert moments.shape == (2, 32, 2, 3)
    draws = [tokenizer.sample(moments, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    mean, std = moments[:, :16], (moments[:, 16:].clamp(-30, 20) / 2).exp()
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws[0], 0.2325 * (mean + std * noise))
    torch.testing.assert_close(tokenizer.decode(draws[0]), tokenizer.vae.decode(draws[0] / 0.2325))


def test_scale_can_be_chosen(vae_path):
    """A retrained KL-16 has a scale of its own."""
    ours, other = (build_tokenizer("kl16", vae_path, scale=s) for s in (None, 0.5))
    moments = torch.randn(1, 32, 2, 2).index_fill(1, torch.arange(16, 32), -30.0)
    torch.testing.assert_close(
        other.sample(moments) / ours.sample(moments),
        torch.tensor(0.5 / 0.2325).expand(1, 16, 2, 2),
        rtol=1e-3,
        atol=1e-3,
    )


def test_published_scales(tmp_path, vae_path):
    """0.2325 for KL-16, 0.18215 for Stable Diffusion's KL-8, which has patches of 2×2."""
    path = tmp_path / "kl8.ckpt"
    kl8 = AutoencoderKL(embed_dim=4, ch_mult=(1, 2, 4, 4), ch=32, encoder_attention=False)
    torch.save(kl8.state_dict(), path)
    kl16, kl8 = build_tokenizer("kl16", vae_path), build_tokenizer("kl8", path)
    assert (kl16.scale, kl16.stride, kl16.channels, kl16.patch_size) == (0.2325, 16, 16, 1)
    assert (kl8.scale, kl8.stride, kl8.channels, kl8.patch_size) == (0.18215, 8, 4, 2)
    with pytest.raises(ValueError, match="variant is embed_dim=4, ch_mult=.1, 2, 4, 4."):
        build_tokenizer("kl16", path)


def test_attention_in_the_decoder_is_taken_from_the_file(tmp_path):
    """LDM's own KL-16, with attention in its decoder, is a kl16 too."""
    path = tmp_path / "ldm.ckpt"
    torch.save({"state_dict": AutoencoderKL(ch=32, decoder_attention=True).state_dict()}, path)
    tokenizer = build_tokenizer("kl16", path)
    assert tokenizer.decode(torch.zeros(1, 16, 1, 1)).shape == (1, 3, 16, 16)


def test_pixels_are_themselves():
    """Nothing is lost and nothing is drawn."""
    tokenizer = build_tokenizer("pixels", scale=2.0)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    latents = tokenizer.sample(tokenizer.encode(images))
    assert torch.equal(latents, 2 * images)
    assert torch.equal(tokenizer.decode(latents), images)


# Codes


@torch.no_grad()
def test_ids_are_the_nearest_codes(vq_path):
    """Moments are code indices as floats, sampled unchanged, decoded through their codes."""
    tokenizer = build_tokenizer("vq16", vq_path)
    assert (tokenizer.stride, tokenizer.channels, tokenizer.patch_size) == (16, 1, 1)
    assert tokenizer.num_codes == 16384
    images = rule_input("images", (2, 3, 64, 32))
    moments = tokenizer.encode(images)
    vq = tokenizer.vae
    ids = vq.quantize(vq.encode(images))
    assert len(ids.unique()) > 4
    assert torch.equal(moments[:, 0], ids.float())
    assert tokenizer.sample(moments) is moments
    assert torch.equal(tokenizer.decode(moments), vq.decode(vq.lookup(ids)))
    with pytest.raises(ValueError, match="code indices from 16384 to 16384: expected 0 to 16383"):
        tokenizer.decode(torch.full((1, 1, 2, 2), 16384.0))
    with pytest.raises(ValueError, match="scale 0.5: code indices have no scale"):
        build_tokenizer("vq16", vq_path, scale=0.5)


@torch.no_grad()
def test_every_id_survives_as_a_float(vq_path):
    """All 16,384 indices, as a model returns them, are those of their own codes."""
    tokenizer = build_tokenizer("vq16", vq_path)
    ids = torch.arange(16384).view(1, 1, 128, 128)
    assert torch.equal(ids.float().long(), ids)
    codes = []
    tokenizer.vae.decode = codes.append
    tokenizer.decode(ids.float())
    expected = tokenizer.vae.quantize.embedding.weight.T.reshape(1, 8, 128, 128)
    assert torch.equal(codes[0], expected)


@torch.no_grad()
def test_latents_before_quantization(vq_path):
    """The continuous VQ-16: latents are scaled; decoding quantizes first, so that a small error of
    the model's is rounded away, and ends at what the discrete one decodes."""
    tokenizer = build_tokenizer("vq16_latent", vq_path, scale=0.25)
    discrete = build_tokenizer("vq16", vq_path)
    images = rule_input("images", (2, 3, 64, 32))
    moments = tokenizer.encode(images)
    latents = tokenizer.sample(moments)
    torch.testing.assert_close(latents, 0.25 * tokenizer.vae.encode(images))
    decoded = tokenizer.decode(latents)
    assert torch.equal(decoded, discrete.decode(discrete.encode(images)))
    codes = 0.25 * tokenizer.vae.lookup(tokenizer.vae.quantize(moments))
    assert torch.equal(tokenizer.decode(codes + 1e-4), decoded)


def test_a_scale_nobody_published_is_asked_for(vq_path):
    """Without a scale the error says how to measure one, and with which flag to pass it."""
    with pytest.raises(
        ValueError, match=r"vq16\.ckpt: holds no scale.*--vae_scale 1 .*--vae_scale"
    ):
        build_tokenizer("vq16_latent", vq_path)
    with pytest.raises(ValueError, match="scale 0.0: expected a number above 0"):
        build_tokenizer("vq16_latent", vq_path, scale=0.0)


def test_the_file_s_scale_is_used_unless_given(paths):
    """A retrained network's scale comes with its file, also where another one was published."""
    for name in ("kl", "kl8"):
        assert build_tokenizer(name, paths[name]).scale == 0.5
        assert build_tokenizer(name, paths[name], scale=2.0).scale == 2.0


def test_kinds_are_not_confused(vq_path, vae_path):
    """KL weights for a VQ tokenizer, and the other way round, are refused by name."""
    with pytest.raises(ValueError, match=r"kl16\.ckpt: not the weights of a VQ autoencoder"):
        build_tokenizer("vq16", vae_path)
    with pytest.raises(ValueError, match=r"vq16\.ckpt: not the weights of a KL autoencoder"):
        build_tokenizer("kl", vq_path)


def test_ids_are_cached_like_moments(vq_path, images, tmp_path):
    """main_cache.py's layout, (1, h, w) float32, for the image and its mirror image."""
    tokenizer = build_tokenizer("vq16", vq_path)
    dataset = open_data(images, "train", 32)
    device = torch.device("cpu")
    engine.cache_latents(tokenizer, dataset, tmp_path, batch_size=3, num_workers=0, device=device)
    with np.load(tmp_path / f"{dataset.name(0)}.npz") as file:
        assert {file[name].shape for name in file} == {(1, 2, 2)}
        assert {file[name].dtype for name in file} == {np.dtype("float32")}
        with torch.no_grad():
            expected = tokenizer.encode(dataset[0][0][None].flip(-1))[0].numpy()
        assert np.array_equal(file["moments_flip"], expected)
    assert CachedFolder(tmp_path, (1, 2, 2))[0][0].shape == (1, 2, 2)


# The Consistency Decoder


@torch.no_grad()
def test_consistency_latents_are_kl8_s(consistency_path):
    """Its encoder is KL-8's: the same weights in our network give the same moments."""
    tokenizer = build_tokenizer("consistency", consistency_path)
    assert (tokenizer.stride, tokenizer.channels, tokenizer.patch_size) == (8, 4, 2)
    assert tokenizer.scale == 0.18215
    state = load_first_stage(consistency_path / "diffusion_pytorch_model.safetensors")
    ours = AutoencoderKL(4, (1, 1, 1, 1), ch=32, encoder_attention=False).eval()
    names = {name for name in ours.state_dict() if name.startswith(("encoder.", "quant_conv."))}
    ours.load_state_dict({name: state[name] for name in names}, strict=False)
    images = rule_input("images", (2, 3, 16, 24))
    torch.testing.assert_close(
        tokenizer.encode(images), ours.encode(images).moments, atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_consistency_draws_from_the_generator(consistency_path):
    """An image depends on its own generator, not on the batch; the latent is unscaled before."""
    tokenizer = build_tokenizer("consistency", consistency_path)
    latents = rule_input("latents", (3, 4, 2, 3))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    together = tokenizer.decode(latents, image_generators(0, range(3)))
    alone = tokenizer.decode(latents[1:2], tuple(image_generators(0, [1])))
    other = tokenizer.decode(latents[1:2], image_generators(0, [2]))
    assert torch.equal(torch.get_rng_state(), before)
    assert together.shape == (3, 3, 16, 24)
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)
    assert (other - alone).abs().max() > 0.01
    scaled = build_tokenizer("consistency", consistency_path, scale=1.0)
    same = scaled.decode(latents[1:2] / 0.18215, image_generators(0, [1]))
    torch.testing.assert_close(same, alone, atol=1e-4, rtol=1e-4)


def test_consistency_files(consistency_path, vae_path, tmp_path):
    """A file beside its config.json is as good as the folder; another network is refused."""
    file = consistency_path / "diffusion_pytorch_model.safetensors"
    one, two = (build_tokenizer("consistency", path) for path in (consistency_path, file))
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    )
    with pytest.raises(ValueError, match=r"multiples of the stride 8, got 12x16"):
        one.encode(torch.zeros(1, 3, 12, 16))
    with pytest.raises(ValueError, match="model.safetensors: no such file"):
        build_tokenizer("consistency", tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(ValueError, match="config.json: the configuration of class AutoencoderKL"):
        build_tokenizer("consistency", tmp_path)
    (tmp_path / "config.json").write_text((consistency_path / "config.json").read_text())
    with pytest.raises(ValueError, match="does not fit .* x: in the file, not in this model"):
        build_tokenizer("consistency", tmp_path)


def test_consistency_without_the_library(monkeypatch):
    """The error names what to install."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"pip install 'mar-diffloss\[consistency\]'"):
        build_tokenizer("consistency", "anything")


def test_unknown_tokenizer_and_missing_weights():
    """Both are one line that says what there is."""
    with pytest.raises(ValueError, match="tokenizer 'vq9': expected one of kl16, kl8, pixels"):
        build_tokenizer("vq9")
    with pytest.raises(ValueError, match="nowhere.ckpt: no such file. .*util.download --help"):
        build_tokenizer("kl16", "nowhere.ckpt")
    with pytest.raises(ValueError, match="ldm_vq16.ckpt: no such file. .*util.download ldm_vq16"):
        build_tokenizer("vq16", "folder/ldm_vq16.ckpt")


# Training

DIGITS = "--data_path digits --split test --device cpu --num_workers 0 --extractor grey-pixels"
SMALL = f"{DIGITS} --epochs 2 --batch_size 32 --ch 8 --ch_mult 1,2 --lr 5e-3"


@pytest.fixture(scope="module", params=["kl", "vq"])
def trained(request, tmp_path_factory):
    """(kind, the folder of a short training on the digits)."""
    folder = tmp_path_factory.mktemp("trained")
    flags = f"--tokenizer {request.param} {SMALL} --num_codes 32 --output_dir {folder}"
    main_tokenizer.main(shlex.split(flags))
    return request.param, folder


def test_training_lowers_the_loss(trained):
    """Over 88 steps the error falls by a third and more, and what comes out is the image: a PSNR
    above 12.5 dB, where the mean digit in place of every image has 11.4."""
    kind, folder = trained
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["l1"] < 0.67 * lines[0]["l1"]
    parts = {"kl": ("l1", "kl"), "vq": ("l1", "codebook", "commitment")}[kind]
    assert lines[0]["loss"] == pytest.approx(sum(lines[0][name] for name in parts), rel=1e-4)
    assert lines[-1]["lr"] < 1e-4 < 4e-3 < lines[0]["lr"] <= 5e-3
    record = json.loads((folder / "results.jsonl").read_text())
    assert record["psnr"] > 12.5 and record["images"] == 360
    assert (folder / "reconstructions.png").is_file()
    if kind == "vq":
        assert record["codes_used"] > 0.9 and 16 < record["code_perplexity"] <= 32
        assert lines[0]["codes_revived"] > 25  # nearly all at the first step
        assert "latent_std" not in record


@torch.no_grad()
def test_a_trained_network_is_a_tokenizer(trained):
    """Its file holds the network and the scale that gives its latents unit standard deviation."""
    kind, folder = trained
    path = folder / "tokenizer.ckpt"
    images = digits("train")[:][0]
    for name in {"kl": ["kl"], "vq": ["vq", "vq_latent"]}[kind]:
        tokenizer = build_tokenizer(name, path)
        assert (tokenizer.stride, tokenizer.patch_size) == (2, 1)
        latents = tokenizer.sample(tokenizer.encode(images), torch.Generator().manual_seed(0))
        assert latents.shape[2:] == (4, 4)
        assert tokenizer.decode(latents[:2]).shape == (2, 1, 8, 8)
        if name == "vq":
            assert tokenizer.num_codes == 32
        else:
            assert tokenizer.channels == 4
            assert latents.std().item() == pytest.approx(1, abs=0.01)
    content = torch.load(path, weights_only=True)
    assert content["config"]["network"] == tokenizer.vae.config
    assert content["config"]["training"]["epochs"] == 2
    with zipfile.ZipFile(path) as archive:  # not the name of this host
        assert {name.split("/")[0] for name in archive.namelist()} == {"archive"}


def test_training_is_reproducible(trained, tmp_path):
    """The same seed gives the same weights."""
    kind, folder = trained
    flags = f"--tokenizer {kind} {SMALL} --num_codes 32 --output_dir {tmp_path}"
    main_tokenizer.main(shlex.split(flags))
    one, two = (
        torch.load(path / "tokenizer.ckpt", weights_only=True)["model"]
        for path in (folder, tmp_path)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epochs 3", "--epochs 3: expected 0 for the tokenizer kl16"),
        ("--tokenizer kl --ch_mult 1,2", "--ch_mult 1,2: is for training, pass --epochs"),
        ("--tokenizer vq --epochs 1 --ch_mult 1,1,1,1,1", "images of 8 pixels, .* stride 16"),
        ("--tokenizer vq --epochs 1 --vae_path x", "--vae_path x: with --epochs"),
        ("--tokenizer kl --epochs 1 --vae_scale 2", "--vae_scale 2.0: with --epochs"),
    ],
)
def test_wrong_training_flags(flags, message, tmp_path):
    """Refused before anything is trained."""
    with pytest.raises(ValueError, match=message):
        main_tokenizer.main(shlex.split(f"{DIGITS} {flags} --output_dir {tmp_path}"))
    assert not (tmp_path / "tokenizer.ckpt").exists()


def test_wrong_widths(capsys):
    """Refused before torch is loaded."""
    said = complain(capsys, main_tokenizer.main, "--tokenizer", "kl", "--ch_mult", "1,x")
    assert "argument --ch_mult: '1,x': expected integers, at least 1, such as 1,2,4" in said
