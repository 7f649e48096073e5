"""Fine-tuning from a checkpoint. Run: python -m pytest tests/test_transfer.py"""

import json

import pytest
import torch
from cli import DIGITS, ROOT, complain
from rule import GOLDEN
from timm.data import ImageNetInfo

import main_mar
from models import build_model, presets
from models.found import complete
from models.pca import PatchPCA
from models.tokenizer_file import write
from models.transfer import Fit, class_names, fill_flags, open_start, resize, rows_for
from util.checkpoint import LAST, export_ema, load_checkpoint
from util.data.manifest import write_manifest
from util.weights import digest, load_strictly

TINY = {"img_size": 8, "vae_stride": 1, "patch_size": 2, "vae_embed_dim": 1, "class_num": 3}
CHECKPOINT = ROOT / "tests/fixtures/checkpoint.pth"
QUICK = ("--batch_size", "512", "--num_sampling_steps", "3", "--num_iter", "1", "--lr", "0")


def tiny(name="mar_tiny", seed=0, **arguments):
    """A small model."""
    torch.manual_seed(seed)
    arguments = {**TINY, **arguments}
    return build_model(
        name, **(arguments if name != "mar_tiny" else {"buffer_size": 4} | arguments)
    )


def fitted(model, source, rows=None):
    """The Fit of a model that was given the weights of another."""
    fit = Fit(model, source, source.state_dict(), rows)
    load_strictly(model, fit.state, "file")
    return fit


def differing(model, source):
    """Names of the tensors of a model that are not those of another."""
    own, others = model.state_dict(), source.state_dict()
    return {name for name in own if name not in others or not torch.equal(own[name], others[name])}


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mar_tiny", "ar_tiny", "dit_tiny"])
def test_the_same_model_is_taken_whole(name):
    """Every tensor, bit by bit."""
    source, model = tiny(name), tiny(name, seed=1)
    fit = fitted(model, source)
    assert not differing(model, source) and not (fit.new or fit.resized or fit.unused)
    count = len(fit.state)
    assert fit.describe() == f"{count} of {count} tensors as they are"


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        ("mar_tiny", {"encoder_pos_embed_learned": 4, "decoder_pos_embed_learned": 4}
         | {"diffusion_pos_embed_learned": 0}),
        ("ar_tiny", {"pos_embed_learned": 1, "target_pos_embed_learned": 0}),
        ("dit_tiny", {"pos_embed_learned": 0}),
    ],
)  # fmt: skip
def test_another_size_changes_the_tables_of_positions_only(name, tables):
    """16×16 instead of 8×8 images: rows in front stay, all else is the file's."""
    order = {"order": "random"} if name == "ar_tiny" else {}
    source, model = tiny(name, **order), tiny(name, seed=1, img_size=16, **order)
    fit = fitted(model, source)
    assert differing(model, source) == set(fit.resized) == set(tables) and not fit.new
    for table, front in tables.items():
        old, new = source.state_dict()[table], model.state_dict()[table]
        assert torch.equal(old[:, :front], new[:, :front])
        assert 0.5 < new[:, front:].std() / old[:, front:].std() < 1


def test_a_ramp_stays_a_ramp():
    """Interpolation follows rows and columns, to more and to fewer, square or not."""

    def ramp(h, w):
        rows, columns = (torch.arange(n).add(0.5) / n for n in (h, w))
        return torch.stack([rows[:, None].expand(h, w), columns.expand(h, w)], -1).view(1, -1, 2)

    def inner(table, h, w):
        return table.view(h, w, 2)[h // 4 : -h // 4, w // 4 : -w // 4]

    for old, new in (((8, 8), (16, 16)), ((16, 8), (8, 16)), ((8, 12), (8, 24))):
        found = resize(ramp(*old), (0, *old), (0, *new), ramp(*new))
        torch.testing.assert_close(inner(found, *new), inner(ramp(*new), *new), atol=2e-3, rtol=0)


@pytest.mark.parametrize(("buffer", "kept"), [(6, 4), (2, 2)])
def test_class_tokens_in_front_are_kept_and_new_ones_are_the_models(buffer, kept):
    """With another --buffer_size; those of the tokens stay as they are."""
    source, model = tiny(), tiny(seed=1, buffer_size=buffer)
    before, fresh = source.encoder_pos_embed_learned, model.encoder_pos_embed_learned.clone()
    fitted(model, source)
    table = model.encoder_pos_embed_learned
    assert torch.equal(table[:, :kept], before[:, :kept])
    assert torch.equal(table[:, kept:buffer], fresh[:, kept:buffer])
    assert torch.equal(table[:, buffer:], before[:, 4:])


@pytest.mark.parametrize(
    ("changes", "new", "unused"),
    [
        ({"head": "l2"}, ["l2"], ["diffloss"]),
        ({"diffloss_w": 32}, ["diffloss"], []),
        ({"diffloss_d": 1}, ["diffloss"], []),
        ({"vae_embed_dim": 3}, ["z_proj", "diffloss"], []),
        ({"img_size": 4, "patch_size": 1}, ["z_proj", "diffloss"], []),
        ({"head": "ce", "num_codes": 8, "img_size": 4, "patch_size": 1}, ["z_proj", "ce"]
         , ["diffloss"]),
    ],
)  # fmt: skip
def test_another_head_or_token_is_new(changes, new, unused):
    """Whole modules as the model had them; the rest is the file's."""
    source, model, untouched = tiny(), tiny(seed=1, **changes), tiny(seed=1, **changes)
    fit = fitted(model, source)
    assert (sorted(fit.new), fit.unused) == (sorted(new), unused)
    changed = differing(model, source)
    assert {name.split(".")[0] for name in changed} == set(new)
    assert not changed & differing(model, untouched)


def test_a_causal_model_may_learn_another_order():
    """Its second table of positions is new, or not used."""
    raster, random = tiny("ar_tiny"), tiny("ar_tiny", order="random")
    assert fitted(random, raster).new == ["target_pos_embed_learned"]
    assert fitted(raster, random).unused == ["target_pos_embed_learned"]


@pytest.mark.parametrize(
    "changes",
    [{"mlp_ratio": 2}, {"encoder_depth": 1}, {"decoder_depth": 3}, {"encoder_embed_dim": 32}],
)
def test_what_is_not_understood_is_refused(changes):
    """Blocks of another shape, width or number; the model stays as it was."""
    model, untouched = tiny(seed=1, **changes), tiny(seed=1, **changes)
    with pytest.raises(ValueError, match="file does not fit this MAR: .*"):
        fitted(model, tiny())
    assert not differing(model, untouched)


# ---- classes -------------------------------------------------------------------------------------


def test_rows_go_by_name():
    """A class of the same name has its row, another begins as no class."""
    rows = rows_for(["wolf", "dog", "cat"], ["cat", "dog"], 2)
    assert rows == [None, 1, 0]
    source, model = tiny(class_num=2), tiny(seed=1)
    fitted(model, source, rows)
    old, new = source.class_emb.weight, model.class_emb.weight
    assert torch.equal(new, torch.stack([source.fake_latent[0], old[1], old[0]]))
    assert torch.equal(model.fake_latent, source.fake_latent)


def test_unknown_names():
    """As many classes without names stay as they are; another number of them is new."""
    assert rows_for(["a", "b"], None, 2) is None
    assert rows_for(["a", "b"], ["a", "b"], 2) is None
    assert rows_for(["a", "b"], None, 3) == [None, None]


def test_classes_of_imagenet_by_id_and_by_word():
    """A folder may be named by WordNet id or by a word that stands for one class only."""
    ids = ImageNetInfo().label_names()
    names = ["n01443537", "goldfish", "Great_White_Shark", "crane", "3"]
    assert rows_for(names, ids, 1000) == [1, 1, 2, None, None]
    assert rows_for(["goldfish", "n01443537"], ["cat", "n01443537"], 2) == [1, 1]


# ---- runs ----------------------------------------------------------------------------------------


def starting(*flags):
    """(flags, Start) of a run that has parsed these."""
    args, given = presets.apply(main_mar.get_parser(), [str(flag) for flag in flags])
    return args, open_start(args, given, None)


def test_a_published_checkpoint_brings_its_architecture():
    """Flags that are given override it."""
    path = GOLDEN / "checkpoint-published.pth"
    args, start = starting("--init_from", path, "--diffloss_w", "32", "--preset", "table4-huge")
    own = start.config["model"]
    assert (args.model, args.img_size, args.buffer_size, args.diffloss_d) == (
        *(own[name] for name in ("name", "img_size", "buffer_size", "diffloss_d")),
    )
    assert (args.diffloss_w, args.tokenizer, start.classes) == (32, "kl16", None)
    config = {"model": {**own, "class_num": 1000}}
    assert class_names({"config": None}, config)[1] == "n01443537"
    assert digest(start.weights) == digest(load_checkpoint(path)["model_ema"])


def network_file(path, tokenizer):
    """A file as main_tokenizer.py writes it, without weights; returns its path."""
    torch.save(
        {"config": {"network": {"embed_dim": 4}, "tokenizer": tokenizer, "img_size": 8}}, path
    )
    return str(path)


@pytest.mark.parametrize("kind", ["kl", "pca"])
@pytest.mark.parametrize("flags", [(), ("--vae_scale", "3", "--vae_shift", "1")])
def test_another_network_has_its_own_scale_and_shift(tmp_path, kind, flags):
    """Those of the checkpoint are of its network only; flags win."""
    flags = "--init_from", "x", "--vae_path", network_file(tmp_path / "a", kind), *flags
    args, given = main_mar.get_parser().parse_given(flags)
    own = {"name": "kl", "vae_path": "b", "scale": 0.5, "shift": 0.25}
    config = {"model": {"name": "mar_tiny"}, "tokenizer": own, "sampling": {}}
    fill_flags(args, given, config, "x")
    complete(args, given)
    expected = (3.0, 1.0) if "vae_scale" in given else (None, None)
    assert (args.tokenizer, args.vae_scale, args.vae_shift) == (kind, *expected)


def test_an_autoencoder_for_pixels_is_refused(tmp_path, capsys):
    """Also where it is the file of the network that says what it is."""
    path, about = tmp_path / "tokenizer.ckpt", {"data": {}, "training": {}}
    write(path, PatchPCA(4, 2, 1), 1.0, 0.0, tokenizer="pca", img_size=8, **about)
    flags = ["--output_dir", tmp_path / "out", "--init_from", CHECKPOINT, "--vae_path", path]
    said = complain(capsys, main_mar.main, *DIGITS, *flags)
    assert f"--tokenizer pca: {CHECKPOINT} was trained with pixels" in said


def test_a_cache_brings_its_network(tmp_path):
    """Its scale and shift are those of its file, unless the checkpoint has the same."""
    for own, expected in (("a", 0.5), ("b", None)):
        path = network_file(tmp_path / own, "kl")
        flags = ["--use_cached", "--cached_path", str(tmp_path), "--vae_scale", "0.5"]
        args = main_mar.get_parser().parse_args([*flags, "--vae_path", path, "--tokenizer", "kl"])
        write_manifest(tmp_path, {"tokenizer_name": "kl", "vae_path": str(tmp_path / "a")})
        complete(args, set())
        assert (args.vae_path, args.vae_scale) == (str(tmp_path / "a"), expected)


def test_a_run_begins_with_the_ema_and_is_resumed_without_it(tmp_path, capsys):
    """The same command, called again, resumes; checkpoints say where the weights are from.

    Also from an export. At a learning rate of 0 the weights stay those of the file.
    """
    file = tmp_path / "ema.safetensors"
    checkpoint = load_checkpoint(CHECKPOINT)
    export_ema(checkpoint, file, checkpoint["config"])
    out = str(tmp_path / "out")
    flags = [*DIGITS, *QUICK, "--output_dir", out, "--resume", out, "--init_from", str(file)]
    for epochs in ("1", "2"):
        main_mar.main([*flags, "--epochs", epochs])
        file.unlink(missing_ok=True)
        said = capsys.readouterr().out
        assert ("tensors as they are" in said, "is not used again" in said) == (
            (True, False) if epochs == "1" else (False, True)
        )
    after = load_checkpoint(tmp_path / "out" / LAST)
    source = digest(checkpoint["model_ema"])
    assert digest(after["model"]) == digest(after["model_ema"]) == source
    assert after["config"]["init_from"] == {"file": str(file), "weights": "ema", "sha256": source}
    assert after["epoch"] == 1 and digest(checkpoint["model"]) != source
    lines = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--init_from", "nowhere"], "--init_from 'nowhere': expected a checkpoint, found none"),
        (["--evaluate"], "begins training; --evaluate has --resume"),
        (["--model", "ar_tiny"], "--model ar_tiny: {} holds mar_tiny; leave the flag out"),
        (["--tokenizer", "kl16"], "--tokenizer kl16: {} was trained with pixels"),
        (["--model_kwargs", "mlp_ratio=2"], "{} does not fit this MAR: "),
        (["--class_num", "7"], "--class_num 7: the data have 10 classes"),
    ],
)
def test_wrong_flags(tmp_path, capsys, flags, message):
    """One line says what was expected."""
    flags = [*DIGITS, "--output_dir", tmp_path, "--init_from", CHECKPOINT, *flags]
    assert message.format(CHECKPOINT) in complain(capsys, main_mar.main, *flags)
