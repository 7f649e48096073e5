"""Models that are passed on, and their cards. Run: python -m pytest tests/test_pretrained.py"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from cli import ROOT, complain
from conftest import TINY_KL16
from PIL import Image
from rule import GOLDEN, by_rule
from safetensors.torch import save_file

import models
from models import export
from models.ar import AR
from models.dit import DiT
from models.mar import MAR, mar_tiny
from models.tokenizer import PixelTokenizer
from models.vae import AutoencoderKL
from util import hub, jsonl
from util.files import file_sha256
from util.images import save_image
from util.published import FILES
from util.rng import image_generators
from util.run.resume import load_start
from util.weights import digest

SIZES = {"img_size": 8, "vae_stride": 1, "patch_size": 2, "vae_embed_dim": 1, "class_num": 3}
ARGUMENTS = {"name": "mar_tiny", **SIZES, "buffer_size": 4, "diffloss_d": 1, "diffloss_w": 16}
PIXELS = {"name": "pixels", "channels": 1}
SAMPLING = {"num_iter": 2, "num_sampling_steps": "3"}
CONFIG = {"model": ARGUMENTS, "tokenizer": PIXELS, "sampling": SAMPLING}
PUBLISHED = GOLDEN / "checkpoint-published.pth"
OWN = "mine"


def drawn(model, config):
    """Latents of two images at fixed seeds."""
    sampling = models.sampling_of(model, config, **SAMPLING).asdict()
    generators = image_generators(0, range(2))
    return model.sample_tokens(2, labels=torch.tensor([0, 1]), generator=generators, **sampling)


@pytest.fixture(scope="module")
def model():
    """A model of build_model, which knows its arguments only."""
    return by_rule(models.build_model(**ARGUMENTS))


@pytest.fixture
def folder(model, tmp_path):
    """The model, passed on."""
    model.save_pretrained(tmp_path / OWN, config=CONFIG)
    return tmp_path / OWN


def kl_checkpoint(path, vae_path, more=None):
    """A checkpoint of a tiny model of KL-16's latents, with flags as in a run."""
    sizes = {"img_size": 32, "vae_stride": 16, "patch_size": 1, "vae_embed_dim": 16}
    arguments = {**ARGUMENTS, **sizes}
    model = by_rule(models.build_model(**arguments))
    config = {
        "model": arguments,
        "tokenizer": {"name": "kl16", "vae_path": str(vae_path), "scale": 0.2325, "shift": 0.0},
        "sampling": SAMPLING,
        "data": {"classes": ["cat", "dog", "e|k"], "counts": [5, 6, 7], "reading": {"flip": True}},
        "init_from": {"file": str(path.parent / "before.pth"), "sha256": "0" * 64},
    }
    config["data"]["reading"]["label_file"] = str(path.parent / "labels.csv")
    args = {"output_dir": str(path.parent), "lr": 0.5, "epochs": 400, "ema_rate": 0.9}
    content = {"model": model.state_dict(), "model_ema": model.state_dict(), "epoch": 7}
    torch.save(content | {"args": args, "config": config, "format": 2, **(more or {})}, path)
    return model


def own_file(path):
    """The file of an autoencoder that is no published one."""
    torch.manual_seed(0)
    torch.save({"model": AutoencoderKL(**TINY_KL16).state_dict(), "scale": 0.5}, path)
    return path


# ---- the same model ------------------------------------------------------------------------------

ELSEWHERE = """
import sys, torch, models
from models.mar import MAR
from util.rng import image_generators
from util.run.resume import load_start

model, tokenizer, config = models.load("passed")
sampling = models.sampling_of(model, config, num_iter=2, num_sampling_steps="3").asdict()
latents = model.sample_tokens(
    2, labels=torch.tensor([0, 1]), generator=image_generators(0, range(2)), **sampling
)
again = MAR.from_pretrained("passed").config
torch.save((latents, tokenizer.decode(latents), again == config), "drawn.pt")
"""


def test_a_published_file_is_passed_on(tmp_path, vae_path):
    """A process that has the folder only, and the library, draws the same bits: the tokenizer's
    file is in the folder, as it was asked for."""
    run = tmp_path / "run"
    shutil.copytree(GOLDEN, run, ignore=lambda _, names: set(names) - {PUBLISHED.name})
    model, config = models.load_model(run / PUBLISHED.name)
    tokenizer = models.build_tokenizer("kl16", vae_path=vae_path)
    flags = ["--vae_path", vae_path, "--with_tokenizer"]
    export.main([str(a) for a in (run / PUBLISHED.name, tmp_path / "there" / "passed", *flags)])
    shutil.rmtree(run)
    code = [sys.executable, "-c", ELSEWHERE]
    subprocess.run(
        code, cwd=tmp_path / "there", env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True
    )
    latents, images, same = torch.load(tmp_path / "there" / "drawn.pt")
    assert same and torch.equal(latents, drawn(model, config))
    assert torch.equal(images, tokenizer.decode(latents))


def test_a_published_file_beside_the_config_of_another_library(folder, tmp_path):
    """Is loaded as it is elsewhere; beside one of ours it is not, which is of other weights."""
    whole = models.load_model(PUBLISHED)[0].state_dict()
    save_file(whole, tmp_path / hub.WEIGHTS)
    (tmp_path / hub.CONFIG).write_text('{"model_type": "mar"}')
    found = models.load_model(tmp_path)[0].state_dict()
    assert digest(found) == digest(whole)
    shutil.copy(folder / hub.CONFIG, tmp_path)
    with pytest.raises(ValueError, match="config.json: of other weights"):
        models.load_model(tmp_path)


def test_a_folder_is_a_checkpoint_for_the_scripts(folder, tmp_path):
    """sample.py --ckpt, also of its file of weights alone, and what --init_from begins with."""
    import sample

    flags, images = ["--device", "cpu", "--per_class", "1", "--out"], []
    for ckpt in (folder, folder / hub.WEIGHTS, shutil.copy(folder / hub.WEIGHTS, tmp_path)):
        sample.main(["--ckpt", str(ckpt), *flags, str(tmp_path / "out.npz")])
        images.append(np.load(tmp_path / "out.npz")["arr_0"])
    assert images[0].shape == (3, 8, 8, 3)
    assert np.array_equal(images[0], images[1]) and np.array_equal(images[0], images[2])
    content, path = load_start(str(folder))
    assert path == folder / hub.WEIGHTS and content["config"]["sampling"] == SAMPLING
    assert content["record"] == {"tokenizer": digest({})}


def test_a_model_keeps_its_configuration(folder, tmp_path):
    """So that it can be passed on again, with its licence; both folders are the same."""
    again = tmp_path / "again"
    first = MAR.from_pretrained(folder)
    assert not first.training and first.config["sampling"] == SAMPLING
    first.save_pretrained(again, name=OWN, license="mit")
    second = tmp_path / "second"
    MAR.from_pretrained(again).save_pretrained(second, name=OWN)
    for name in (hub.CONFIG, hub.CARD):
        assert (again / name).read_bytes() == (second / name).read_bytes()
    assert (second / hub.CARD).read_text().startswith("---\nlicense: mit\n")


def test_a_model_of_a_notebook_says_what_is_missing(model, tmp_path):
    """`build_model` and `build_tokenizer` know their arguments; a constructor does not."""
    plain = mar_tiny(**{k: v for k, v in ARGUMENTS.items() if k != "name"})
    for lacking, config in ((plain, None), (model, None), (plain, {"tokenizer": PIXELS})):
        with pytest.raises(ValueError, match="of this MAR is not known, expected config={'"):
            lacking.save_pretrained(tmp_path / "x", config=config)
    with pytest.raises(ValueError, match="the tokenizer of this MAR is not known"):
        model.save_pretrained(tmp_path / "x", tokenizer=PixelTokenizer(1))
    assert not (tmp_path / "x").exists()
    model.save_pretrained(tmp_path / "x", tokenizer=models.build_tokenizer(**PIXELS))
    plain.save_pretrained(tmp_path / "y", config={"model": ARGUMENTS, "tokenizer": PIXELS})
    assert MAR.from_pretrained(tmp_path / "y").config["sampling"] == {"num_iter": 16}
    assert digest(MAR.from_pretrained(tmp_path / "x").state_dict()) == digest(model.state_dict())


def test_another_backbone_is_refused(folder, tmp_path):
    """In a line that names the right class."""
    for wrong in (AR, DiT):
        message = f"mar_tiny, a model of class MAR, expected {wrong.__name__}; MAR.from_pretrained"
        with pytest.raises(ValueError, match=message):
            wrong.from_pretrained(folder)
    config = {**CONFIG, "model": {"name": "dit_tiny", **SIZES}}
    by_rule(models.build_model(**config["model"])).save_pretrained(tmp_path / "dit", config=config)
    assert DiT.from_pretrained(tmp_path / "dit").config["model"]["name"] == "dit_tiny"


# ---- the tokenizer -------------------------------------------------------------------------------


def test_a_published_tokenizer_is_named(tmp_path, vae_path, capsys, monkeypatch):
    """Not copied: it is found at its usual place or by vae_path, and another decoder is told of."""
    facts = {"size": vae_path.stat().st_size, "sha256": file_sha256(vae_path)}
    monkeypatch.setitem(FILES, "kl16", replace(FILES["kl16"], **facts))
    trained = digest(models.build_tokenizer("kl16", vae_path=vae_path).state_dict())
    kl_checkpoint(tmp_path / "last.pth", vae_path, {"record": {"tokenizer": trained}})
    out = tmp_path / "out"
    export.main([str(tmp_path / "last.pth"), str(out)])
    assert not (out / hub.TOKENIZER).exists()
    said = json.loads((out / hub.CONFIG).read_text())
    assert said["tokenizer"]["vae_path"] == "pretrained_models/vae/kl16.ckpt"
    assert said["tokenizer_sha256"] == trained
    assert "python -m util.download kl16" in (out / hub.CARD).read_text()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"kl16.ckpt: no such file. To fetch it: python -m util"):
        models.load(out)
    capsys.readouterr()
    models.load(out, vae_path=vae_path)
    assert not capsys.readouterr().out
    models.load(out, vae_path=own_file(tmp_path / "other.ckpt"), scale=1.0)
    assert not capsys.readouterr().out  # the same weights
    content = torch.load(vae_path)
    content["model"]["post_quant_conv.bias"] += 1
    torch.save(content, tmp_path / "other.ckpt")
    models.load(out, vae_path=tmp_path / "other.ckpt")
    note = capsys.readouterr().out
    assert note.count("\n") == 1 and "other.ckpt: another decoder of the same latents" in note


def test_an_own_tokenizer_is_copied(tmp_path):
    """As main_tokenizer.py writes it, so that it can be used for other models, too; also one with
    the name of a published one, and another size."""
    from models.found import of_file

    path = own_file(tmp_path / "kl16.ckpt")
    model = kl_checkpoint(tmp_path / "last.pth", path)
    export.main([str(tmp_path / "last.pth"), str(tmp_path / "out")])
    before = models.build_tokenizer("kl16", vae_path=path)
    path.unlink()
    again, tokenizer, config = models.load(tmp_path / "out")
    assert tokenizer.scale == config["tokenizer"]["scale"] == 0.2325
    assert digest(again.state_dict()) == digest(model.state_dict())
    assert digest(tokenizer.state_dict()) == digest(before.state_dict())
    copy = tmp_path / "out" / hub.TOKENIZER
    assert config["tokenizer"]["vae_path"] == str(copy)
    assert of_file(copy) == {"tokenizer": "kl16", "img_size": 32}
    with zipfile.ZipFile(copy) as archive:  # not the name of this host
        assert {name.split("/")[0] for name in archive.namelist()} == {"archive"}
    copy.unlink()
    with pytest.raises(ValueError, match=r"tokenizer.ckpt: no such file"):
        models.load(tmp_path / "out")


def test_a_picture_is_made_again_where_the_folder_is_now(tmp_path, monkeypatch):
    """Of a model of the hub, whose files' place is not in the picture, and of a folder that moved:
    each with the tokenizer beside the weights."""
    import sample

    kl_checkpoint(tmp_path / "last.pth", own_file(tmp_path / "vae.ckpt"))
    export.main([str(tmp_path / "last.pth"), str(tmp_path / "out")])
    (tmp_path / "vae.ckpt").unlink()
    place = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **kwargs: place[-1])
    monkeypatch.chdir(tmp_path)
    place.append(str(tmp_path / "out"))
    flags = ["--labels", "2", "--num_images", "1", "--device", "cpu"]
    sample.main(["--ckpt", "me/mine", *flags, "--out", "hub.png"])
    sample.main(["--ckpt", "out", *flags, "--out", "a.png"])
    assert str(tmp_path).encode() not in Path("hub.png").read_bytes()
    place.append(str(Path("out").rename(tmp_path / "moved")))
    for name, *more in (["hub.png"], ["hub.png", "--ckpt", "moved"], ["a.png", "--ckpt", "moved"]):
        sample.main(["--like", name, *more, "--device", "cpu", "--out", "again.png"])
        assert np.array_equal(*map(pixels, ("again.png", "a.png")))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


# ---- the card ------------------------------------------------------------------------------------


def test_the_card_says_what_is_known(tmp_path):
    """Data, recipe, metrics of these weights alone, the newest grid that is not of
    later ones; no path of this machine."""
    path = own_file(tmp_path / "vae.ckpt")
    model = kl_checkpoint(tmp_path / "last.pth", path)
    line = {"frechet_distance": 2.5, "images": 9, "weights": "ema", "cfg": 1.0}
    line |= {"weights_sha256": digest(model.state_dict()), "reference": str(tmp_path / "r.npz")}
    for more in ({}, {"cfg": 3.0, "frechet_distance": 7.25}, {"weights_sha256": "another's"}):
        jsonl.append(tmp_path / "results.jsonl", {**line, **more, "real": {"images": 5}})
    grids = {"epoch8_ema": 8, "epoch7_ema": 7, "epoch8_raw": 1, "epoch12_ema": 12}
    for name, grey in grids.items():
        save_image(tmp_path / "samples" / f"{name}.png", np.full((8, 8, 3), grey, np.uint8))
    out = tmp_path / "out"
    export.main([str(tmp_path / "last.pth"), str(out), "--name", "me/cats", "--data", "Our cats."])
    card = (out / hub.CARD).read_text()
    for text in (
        "Our cats.\n\n3 classes: cat, dog, e|k.\n\n18 images, 5 to 7 of a class.",
        "half of them mirrored at random",
        "8 epochs, averaged weights (EMA, decay 0.9).",
        "```\n--lr 0.5 --ema_rate 0.9\n```",
        "| 9 | 1.0 | 2.5 |\n| 9 | 3.0 | 7.25 |\n| real images, 5 |  | – |\n\nWith reference r.npz.",
        'models.load("me/cats")',
        "Not stated by who passed",
        "`before.pth`",
    ):
        assert text in card, text
    assert "![samples](samples.png)" in card and "license:" not in card
    raw = models.load_model(tmp_path / "last.pth", "raw")[0]
    raw.save_pretrained(tmp_path / "raw", run=tmp_path)
    assert [
        (pixels(place / hub.SAMPLES) == grey).all()
        for place, grey in ((out, 8), (tmp_path / "raw", 1))
    ] == [True, True]
    for file in out.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file


def test_the_code_on_a_card_runs(model, tmp_path, monkeypatch):
    """Both the Python and the command, from the folder beside, and a grid can be drawn for it."""
    import sample

    monkeypatch.chdir(tmp_path)
    model.save_pretrained(OWN, config=CONFIG, samples=True)
    assert not model.training and read_png_size(tmp_path / OWN / hub.SAMPLES)[1] > 64
    card = (tmp_path / OWN / hub.CARD).read_text()
    exec(card.split("```python\n")[1].split("```")[0], {})
    assert Path("images.png").is_file()
    command = card.split("```\npython -m sample ")[1].split("\n")[0]
    sample.main([*command.split(), "--device", "cpu"])
    assert Path("samples.png").is_file()


def read_png_size(path):
    return Image.open(path).size


# ---- the hub -------------------------------------------------------------------------------------


class PlayedApi:
    """Keeps what would be uploaded."""

    calls = []

    def create_repo(self, name, **kwargs):
        self.calls.append((name, kwargs))
        return f"https://hub/{name}"

    def upload_folder(self, repo_id, folder_path):
        self.calls.append((repo_id, sorted(p.name for p in Path(folder_path).iterdir())))
        self.calls.append((Path(folder_path) / hub.CARD).read_text())


def test_push_to_hub(model, monkeypatch):
    """A repository is created, and the whole folder uploaded, whose card names it."""
    monkeypatch.setattr(huggingface_hub, "HfApi", PlayedApi)
    address = model.push_to_hub("me/mine", private=True, config=CONFIG)
    created, uploaded, card = PlayedApi.calls
    assert address == "https://hub/me/mine"
    assert created == ("me/mine", {"private": True, "exist_ok": True})
    assert uploaded == ("me/mine", [hub.CARD, hub.CONFIG, hub.WEIGHTS])
    assert 'models.load("me/mine")' in card
    with pytest.raises(ValueError, match="push_to_hub 'mine': expected a name like user/name"):
        model.push_to_hub("mine")


def test_without_a_network(model, monkeypatch):
    """Uploading and fetching end in one line that says why."""

    def refuse(*args, **kwargs):
        raise OSError("no route\nto the host")

    monkeypatch.setattr(PlayedApi, "create_repo", refuse)
    monkeypatch.setattr(huggingface_hub, "HfApi", PlayedApi)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=r"'me/mine': not uploaded \(no route\); .* login$"):
        model.push_to_hub("me/mine", config=CONFIG)
    with pytest.raises(ValueError, match=r"^me/mine: no such .* hub \(no route\)$"):
        MAR.from_pretrained("me/mine")


def test_a_name_of_the_hub_is_fetched(folder, monkeypatch, tmp_path):
    """But no local path that looks like one, whether it is there or not."""
    asked = []

    def played(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", played)
    monkeypatch.chdir(tmp_path)
    assert MAR.from_pretrained("me/mine").config["model"]["name"] == "mar_tiny"
    assert models.load("me/mine")[2]["tokenizer"]["name"] == "pixels"
    assert asked == [("me/mine", [hub.WEIGHTS, hub.CONFIG, hub.TOKENIZER])] * 2
    (tmp_path / "runs").mkdir()
    for name in ("runs/first", "me/mine.pth", "none", "a/b/c", "../me", "/me"):
        with pytest.raises(ValueError, match=f"^{name}: no such file or folder$"):
            models.load_model(name)
    assert len(asked) == 2


def test_the_hubs_cache_is_read_without_a_network(folder, tmp_path, monkeypatch):
    """What was fetched once is found again, by the library of the hub itself."""
    cache = tmp_path / "hf" / "hub" / "models--me--mine"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, cache / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert MAR.from_pretrained("me/mine").config["format"] == 1
    with pytest.raises(ValueError, match="^me/other: no such file or folder, and not fetched"):
        MAR.from_pretrained("me/other")


# ---- what is wrong -------------------------------------------------------------------------------


def test_damage_is_told_in_a_line(folder, tmp_path, capsys):
    """Of any of the files of a folder, as a user sees it."""
    import sample

    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = json.loads(whole[hub.CONFIG])
    flipped = bytearray(whole[hub.WEIGHTS])
    flipped[-9] ^= 1
    wrong = {
        "model.safetensors without its config.json": {hub.CONFIG: None},
        "no checkpoint in it: expected checkpoint-last.pth or": {hub.WEIGHTS: None},
        "config.json: cannot be read": {hub.CONFIG: b"{"},
        "config.json: not of a model of this library": {hub.CONFIG: b'{"model_type": "bert"}'},
        "of format 9, expected at most 1": {hub.CONFIG: config | {"format": 9}},
        "config.json: of other weights": {hub.CONFIG: config | {"weights_sha256": "0"}},
        "does not fit its sha256: it is damaged": {hub.WEIGHTS: bytes(flipped)},
        "config's model class_num": {hub.CONFIG: config | {"model": ARGUMENTS | {"class_num": ""}}},
        "config's training is 'x'": {hub.CONFIG: config | {"training": "x"}},
        "config's training is dict": {hub.CONFIG: config | {"training": {"epochs": "x"}}},
        "config's about is dict": {hub.CONFIG: config | {"about": {"license": 1}}},
        "config's latent_range is 1": {hub.CONFIG: config | {"latent_range": 10**400}},
        "tokenizer kl16: expected vae_path": {hub.CONFIG: config | {"tokenizer": {"name": "kl16"}}},
    }
    for message, files in wrong.items():
        for name, content in {**whole, **files}.items():
            content = json.dumps(content).encode() if isinstance(content, dict) else content
            (folder / name).unlink(missing_ok=True)
            if content is not None:
                (folder / name).write_bytes(content)
        said = complain(capsys, sample.main, "--ckpt", folder, "--device", "cpu")
        assert message in said, (message, said)


def test_nothing_of_others_is_overwritten(model, tmp_path, capsys):
    """A folder with another's README.md or config.json is refused, and so are wrong texts."""
    (tmp_path / hub.CARD).write_text("my project")
    with pytest.raises(ValueError, match=r"holds a README.md that is not of a model"):
        model.save_pretrained(tmp_path, config=CONFIG)
    for about, message in {
        ("license", "All rights"): "license 'All rights': expected an identifier such as mit",
        ("title", ""): "title '': expected a text",
        ("author", "me"): "author: no text of a card, expected some of title, license, data",
        ("samples", tmp_path / "no.png"): "samples .*no.png: no picture",
    }.items():
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path / "new", config=CONFIG, **dict([about]))
    assert (tmp_path / hub.CARD).read_text() == "my project" and not (tmp_path / "new").exists()
    said = complain(capsys, export.main, PUBLISHED, tmp_path / "x.pth")
    assert "x.pth: expected a folder, or a name ending in .safetensors" in said


def test_a_strangers_card_is_checked_again(folder, tmp_path):
    """What their config.json says of licence and title, before it is passed on."""
    config = json.loads((folder / hub.CONFIG).read_text())
    for about, message in {
        ("license", "mit\nx: y"): r"license 'mit\\nx: y': expected an identifier",
        ("title", "a\n<img>"): r"title 'a\\n<img>': expected one line",
    }.items():
        (folder / hub.CONFIG).write_text(json.dumps(config | {"about": dict([about])}))
        with pytest.raises(ValueError, match=message):
            MAR.from_pretrained(folder).save_pretrained(tmp_path / "x")


def test_values_that_are_not_finite_are_not_passed_on(tmp_path):
    """They could not be loaded again."""
    broken = by_rule(models.build_model(**ARGUMENTS))
    broken.mask_token.data[:] = float("nan")
    with pytest.raises(ValueError, match="not saved, values are not finite: mask_token"):
        broken.save_pretrained(tmp_path / "x", config=CONFIG)
