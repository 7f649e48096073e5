"""Networks as others save them: diffusers' folders, config.json beside a file, whole checkpoints.

The diffusers library itself writes and computes. Run: pytest tests/test_diffusers_files.py
"""

import json
import shlex

import pytest
import torch
from rule import by_rule, rule_input
from safetensors.torch import save_file

import main_mar
import sample
from models import build_tokenizer
from models.autoencoder_files import _from_diffusers as from_diffusers
from models.autoencoder_files import kl_variant
from models.vae import AutoencoderKL
from util.checkpoint import LAST, load_checkpoint
from util.weights import check_fits

diffusers = pytest.importorskip("diffusers")

WIDTHS = (32, 64, 64)
MEAN, STD = [0.5, -1.0, 0.25, 0.0], [2.0, 0.5, 1.0, 4.0]
NO_CONVS = {"use_quant_conv": False, "use_post_quant_conv": False}
# name -> (arguments of diffusers' AutoencoderKL, scale and shift of the latents)
NETWORKS = {
    "sdxl": ({"latent_channels": 4, "scaling_factor": 0.13025}, 0.13025, 0.0),
    "sd3": (
        {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, **NO_CONVS},
        1.5305,
        0.0609,
    ),
    "by channel": (
        {"latent_channels": 4, "scaling_factor": 0.5, "latents_mean": MEAN, "latents_std": STD},
        [0.25, 1.0, 0.5, 0.125],
        MEAN,
    ),
    "one layer": ({"latent_channels": 4, "layers_per_block": 1}, 0.18215, 0.0),
    "one convolution": ({"latent_channels": 4, "use_post_quant_conv": False}, 0.18215, 0.0),
}


def theirs(widths=WIDTHS, **arguments):
    """A small AutoencoderKL of diffusers with the blocks of Stable Diffusion's."""
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        **{"layers_per_block": 2, **arguments},
    ).eval()


@pytest.fixture(scope="module", params=NETWORKS)
def saved(request, tmp_path_factory):
    """(the network of diffusers, its folder, scale, shift)."""
    arguments, scale, shift = NETWORKS[request.param]
    model, folder = theirs(**arguments), tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder / "vae")
    return model, folder / "vae", scale, shift


def channels(number):
    return torch.tensor(number).view(-1, 1, 1)


@torch.no_grad()
def test_folders_agree_with_diffusers(saved):
    """The same moments, latents and images; a pipeline's folder is as good as that of its vae."""
    model, folder, scale, shift = saved
    tokenizer = build_tokenizer("kl", folder)
    assert (tokenizer.scale, tokenizer.shift) == (scale, shift)
    images = rule_input("image", (2, 3, 16, 24)).tanh()
    posterior = model.encode(images).latent_dist
    torch.testing.assert_close(tokenizer.encode(images), posterior.parameters, atol=1e-5, rtol=1e-5)
    latents = (posterior.mean - channels(shift)) * channels(scale)
    torch.testing.assert_close(tokenizer.to_latents(posterior.mean), latents)
    decoded = model.decode(latents / channels(scale) + channels(shift)).sample
    torch.testing.assert_close(tokenizer.decode(latents), decoded, atol=1e-5, rtol=1e-5)
    pipeline = build_tokenizer("kl", str(folder.parent))
    assert pipeline.scale == scale and torch.equal(
        pipeline.decode(latents), tokenizer.decode(latents)
    )


@pytest.mark.parametrize(
    ("name", "parameters"), [("sdxl", 83_653_863), ("sd3", 83_819_683)], ids=["sdxl", "sd3"]
)
def test_full_size(name, parameters):
    """All names and shapes of the networks as published, FLUX.1's like Stable Diffusion 3's."""
    with torch.device("meta"):
        state = from_diffusers(theirs((128, 256, 512, 512), **NETWORKS[name][0]).state_dict())
        ours = AutoencoderKL(**kl_variant(state))
    check_fits(ours, state, "")
    assert sum(p.numel() for p in ours.parameters()) == parameters
    assert ours.stride == 8 and ours.config["quant_conv"] == (name == "sdxl")


@pytest.mark.parametrize("kind", ["bin", "fp16", "renamed"])
def test_other_files_of_a_folder(tmp_path, kind):
    """torch.save's, half precision, and a file of any name with the config.json beside it."""
    model = theirs(**NETWORKS["sdxl"][0])
    how = {"bin": {"safe_serialization": False}, "fp16": {"variant": "fp16"}, "renamed": {}}
    model.save_pretrained(tmp_path, **how[kind])
    path = tmp_path
    if kind == "renamed":
        path = tmp_path / "sdxl_vae.safetensors"
        (tmp_path / "diffusion_pytorch_model.safetensors").rename(path)
    tokenizer = build_tokenizer("kl", path)
    assert tokenizer.scale == 0.13025
    assert torch.equal(tokenizer.vae.encoder.conv_in.weight, model.encoder.conv_in.weight)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """The folder of a narrow SDXL autoencoder."""
    folder = tmp_path_factory.mktemp("sdxl")
    theirs((32, 64, 128, 128), **NETWORKS["sdxl"][0]).save_pretrained(folder)
    return folder


def test_kl8_takes_the_scale_of_the_configuration(sdxl, tmp_path, capsys):
    """SDXL's is 0.13025 where its config.json is there; the file alone has Stable Diffusion's."""
    assert build_tokenizer("kl8", sdxl).scale == 0.13025
    assert build_tokenizer("kl8", sdxl, scale=2.0).scale == 2.0
    path = tmp_path / "sdxl.safetensors"
    path.write_bytes((sdxl / "diffusion_pytorch_model.safetensors").read_bytes())
    assert build_tokenizer("kl8", path).scale == 0.18215
    with pytest.raises(ValueError, match="SDXL, --vae_scale 0.13025"):
        build_tokenizer("kl", path)
    (tmp_path / "config.json").write_text((sdxl / "config.json").read_text())
    assert build_tokenizer("kl8", path).scale == build_tokenizer("kl", path).scale == 0.13025
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"_class_name": "UNet2DConditionModel"}', ""),
        ("{", ""),
        (
            '{"_class_name": "AutoencoderKL", "latent_channels": 16, "scaling_factor": 9}',
            "NOTE: {}/config.json is not of a.safetensors, and not used: latent_channels 16, "
            "expected 4\n",
        ),
    ],
)
def test_a_configuration_of_another_file(sdxl, tmp_path, capsys, text, said):
    """Beside a file it is not used, and it is said if it could be meant; a folder's is refused."""
    weights = (sdxl / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "a.safetensors").write_bytes(weights)
    assert build_tokenizer("kl8", tmp_path / "a.safetensors").scale == 0.18215
    assert capsys.readouterr().out == said.format(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"config\.json: "):
        build_tokenizer("kl8", tmp_path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "of class AutoencoderTiny, expected AutoencoderKL"),
        ({"act_fn": "gelu"}, "act_fn gelu, expected silu"),
        ({"norm_num_groups": 16}, "norm_num_groups 16, expected 32"),
        ({"layers_per_block": 3}, "layers_per_block 3, expected 2"),
        ({"layers_per_block": 1}, "layers_per_block 1, expected 2"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention False, expected True"),
        ({"up_block_types": ["SkipUpBlock2D"]}, r"up_block_types \['SkipUpBlock2D'\], expected"),
        ({"block_out_channels": "wide"}, "block_out_channels wide, expected"),
        ({"use_quant_conv": False}, "use_quant_conv False, expected True"),
        ({"scaling_factor": "x"}, "scale x: expected a finite number above 0"),
        ({"scaling_factor": None}, "holds no scale"),
        ({"shift_factor": [1.0, 2.0]}, "shift 1.0,2.0: expected one number, or 4"),
        ({"latents_mean": MEAN, "latents_std": [1, 1, 1, 0]}, "latents_std 0: expected a number"),
        ({"latents_mean": MEAN[:2], "latents_std": STD}, "shift 0.5,-1.0: expected one number"),
        ({"latents_mean": MEAN, "latents_std": STD, "shift_factor": 1.0}, "no shift_factor"),
    ],
)
def test_what_ours_is_not_is_refused_by_name(sdxl, tmp_path, entries, message):
    """One line with the entry, what it is and what was expected."""
    for file in sdxl.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((sdxl / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | entries))
    with pytest.raises(ValueError, match=message) as got:
        build_tokenizer("kl", tmp_path)
    assert str(got.value).startswith(str(tmp_path)) and "\n" not in str(got.value)


def test_folders_without_weights(tmp_path):
    """The message names the file that was expected."""
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors: no such file"):
        build_tokenizer("kl", tmp_path)


@torch.no_grad()
def test_vq_folders(tmp_path):
    """A VQModel's too; its scaling_factor is KL-8's for any network, so it is not used."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2}
    blocks |= {"up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 2}
    how = {"block_out_channels": (32, 64), "latent_channels": 4, "num_vq_embeddings": 16}
    model = diffusers.VQModel(**how, **blocks).eval()
    model.save_pretrained(tmp_path)
    tokenizer = build_tokenizer("vq", tmp_path)
    images = rule_input("image", (2, 3, 8, 8))
    expected = model.quantize(model.encode(images).latents)[2][2]
    assert torch.equal(tokenizer.encode(images).flatten().long(), expected)
    with pytest.raises(ValueError, match="holds no scale"):
        build_tokenizer("vq_latent", tmp_path)
    with pytest.raises(ValueError, match="of class VQModel, expected AutoencoderKL"):
        build_tokenizer("kl", tmp_path)


# Files in LDM's names


def test_flux_as_its_authors_save_it(tmp_path):
    """LDM's names without the two convolutions: the numbers, which are not in it, are told."""
    arguments = {"embed_dim": 16, "ch_mult": (1, 2, 4, 4), "ch": 8, "encoder_attention": False}
    model = by_rule(AutoencoderKL(**arguments, quant_conv=False, post_quant_conv=False))
    path = tmp_path / "ae.safetensors"
    save_file(model.state_dict(), path)
    message = r"--vae_scale 1\.5305 --vae_shift 0\.0609, or of FLUX\.1, --vae_scale 0\.3611 --vae"
    with pytest.raises(ValueError, match=message):
        build_tokenizer("kl", path)
    tokenizer = build_tokenizer("kl", path, scale=0.3611, shift=0.1159)
    assert tokenizer.vae.config == model.config
    images = rule_input("image", (1, 3, 16, 16))
    assert torch.equal(tokenizer.encode(images), model.encode(images).moments)
    with pytest.raises(ValueError, match="variant is embed_dim=16.*quant_conv=False"):
        build_tokenizer("kl8", path)


@pytest.mark.parametrize(
    ("convs", "other", "expected"),
    [
        (True, "conditioner.embedders.0.transformer.weight", (0.13025, 0.0)),
        (True, "cond_stage_model.transformer.weight", (0.18215, 0.0)),
        (False, "model.diffusion_model.joint_blocks.0.weight", (1.5305, 0.0609)),
    ],
)
def test_a_whole_checkpoint_tells_its_kind(tmp_path, convs, other, expected):
    """By the names of its other parts."""
    arguments = {"embed_dim": 4 if convs else 16, "ch_mult": (1, 2, 4, 4), "ch": 8}
    arguments |= {"encoder_attention": False, "quant_conv": convs, "post_quant_conv": convs}
    state = by_rule(AutoencoderKL(**arguments)).state_dict()
    path = tmp_path / "whole.safetensors"
    whole = {f"first_stage_model.{name}": value for name, value in state.items()}
    save_file(whole | {other: torch.ones(1)}, path)
    tokenizer = build_tokenizer("kl8" if convs else "kl", path)
    assert (tokenizer.scale, tokenizer.shift) == expected


# In a run


def test_a_run_with_a_folder(tmp_path, capsys):
    """Its checkpoint holds scales and shifts by channel, and is sampled; that a random network's
    latents have another std is said once."""
    arguments = NETWORKS["by channel"][0]
    theirs((32, 32), in_channels=1, out_channels=1, **arguments).save_pretrained(tmp_path / "vae")
    out = tmp_path / "run"
    flags = f"--preset digits --tokenizer kl --vae_path {tmp_path} --device cpu --batch_size 720"
    flags += f" --num_sampling_steps 2 --num_iter 2 --epochs 1 --output_dir {out}"
    main_mar.main(shlex.split(flags))
    said = capsys.readouterr().out
    assert said.count("NOTE: the latents of the first batch have std") == 1
    stored = load_checkpoint(out / LAST)["config"]["tokenizer"]
    assert (stored["scale"], stored["shift"]) == NETWORKS["by channel"][1:]
    image = tmp_path / "a.png"
    sample.main(shlex.split(f"--ckpt {out / LAST} --device cpu --labels 1 --out {image}"))
    assert image.is_file()
