"""Shards of latents, and the way between layouts. Run: python -m pytest tests/test_shards.py"""

import json
import pickle
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import complain
from conftest import write_images

import main_cache
import main_mar
from models import build_tokenizer
from models.vq import VQModel
from util.checkpoint import LAST, load_checkpoint
from util.data import cached, caching, convert, open_data, shards
from util.data.cached import CachedFolder, open_cache
from util.data.caching import cache_shards
from util.data.loader import open_loader
from util.data.shards import ShardedCache, read_manifest
from util.weights import digest

ROOT = Path(__file__).parent.parent
SHAPE = (4, 2, 2)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Eight images make three shards."""
    monkeypatch.setattr(shards, "SHARD_SIZE", 3)


def contents(folder):
    own = ("data_checked.txt", "run.lock")  # of a run, not of the latents
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in own}


def write_folder(folder, shape=SHAPE, draw=None):
    """A published cache of eight images of two classes, moments drawn by `draw`(shape)."""
    draw = draw or np.random.default_rng(0).standard_normal
    for i in range(8):
        one, other = (draw(shape).astype(np.float32) for _ in range(2))
        cached.write_moments(folder / ["cat", "dog"][i // 4] / f"{i}.jpg.npz", one, other)
    return folder


def command(images, vae_path, folder, *flags):
    common = f"--img_size 32 --vae_path {vae_path} --device cpu --num_workers 0 --batch_size 2"
    paths = ("--data_path", str(images), "--cached_path", str(folder), "--layout", "shards")
    return [*shlex.split(common), *paths, *map(str, flags)]


@pytest.fixture(scope="module")
def made(images, vae_path, tmp_path_factory):
    """Shards that main_cache.py made of eight images."""
    folder = tmp_path_factory.mktemp("made") / "shards"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_SIZE", 3)
        main_cache.main(command(images, vae_path, folder))
    return folder


@pytest.fixture
def copied(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "shards"))


def test_both_layouts_hold_the_same(images, vae_path, made, tmp_path):
    """Shards are the float16 of what the published layout has, with names, labels and classes."""
    flags = command(images, vae_path, tmp_path / "images")
    main_cache.main([*flags, "--layout", "images"])
    files, sharded = CachedFolder(tmp_path / "images"), ShardedCache(made)
    names = [f"{c}/{i}.jpg" for c in ("cat", "dog") for i in range(4)]
    assert sharded.names() == [files.name(i) for i in range(8)] == names
    assert sharded.labels.tolist() == files.targets == [0] * 4 + [1] * 4
    assert sharded.classes == files.classes == ["cat", "dog"]
    for i, (path, _) in enumerate(files.samples):
        for kept, moments in zip(sharded.views(i), cached.read_moments(path).values(), strict=True):
            assert kept.dtype == np.float16
            # batches of 2 do not cut shards as they cut the folder: rounding may differ by a bit
            np.testing.assert_allclose(kept, moments, rtol=2**-10, atol=1e-5)


def test_the_manifest_says_what_it_is(images, vae_path, made):
    """What made it, what it holds, and the hash of each file; numpy alone reads the arrays."""
    manifest, tokenizer = read_manifest(made), build_tokenizer("kl16", vae_path)
    expected = {"tokenizer_name": "kl16", "scale": 0.2325, "crop": "center_crop_arr (ADM)"}
    expected |= {"img_size": 32, "count": 8, "classes": ["cat", "dog"], "dtype": "float16"}
    expected |= {"shape": [32, 2, 2], "layout": "shards", "shard_size": 3}
    expected |= {"tokenizer": digest(tokenizer.state_dict())}
    assert {name: manifest[name] for name in expected} == expected
    assert [shard["count"] for shard in manifest["shards"]] == [3, 3, 2]
    last = manifest["shards"][2]
    assert set(last["sha256"]) == {*shards.PARTS}
    array = np.load(made / f"{last['file']}.flips.npy", mmap_mode="r")
    assert (array.dtype, array.shape) == (np.float16, (2, 32, 2, 2))
    with torch.no_grad():
        image = open_data(images, "train", 32)[7][0]
        expected = tokenizer.encode(image.flip(-1)[None])[0].numpy()
    np.testing.assert_allclose(array[1], expected, rtol=2**-10, atol=1e-4)


def test_from_a_folder_and_back(tmp_path):
    """Images to shards to images: the published layout, within the rounding of float16."""
    source, middle, back = (tmp_path / name for name in ("source", "middle", "back"))
    write_folder(source)
    flags = ("--num_workers", "0", "--layout")
    for _ in range(2):
        main_cache.main(
            ["--convert_from", str(source), "--cached_path", str(middle), *flags, "shards"]
        )
        main_cache.main(
            ["--convert_from", str(middle), "--cached_path", str(back), *flags, "images"]
        )
    files = sorted(p.relative_to(source) for p in source.rglob("*.npz"))
    assert files == sorted(p.relative_to(back) for p in back.rglob("*.npz"))
    for file in files:
        before, after = (cached.read_moments(folder / file) for folder in (source, back))
        for name, values in after.items():
            assert values.dtype == np.float32
            assert np.array_equal(values, before[name].astype(np.float16).astype(np.float32))
    manifest = read_manifest(middle)  # what the published code does not say is not made up
    assert manifest["tokenizer"] is manifest["scale"] is manifest["img_size"] is None
    cached.check_cache(middle, "a" * 64, 32)


def test_what_is_known_is_carried_over(made, tmp_path):
    """Shards to images to shards: the same facts, and the same bytes."""
    convert.convert(made, tmp_path / "images", "images")
    assert convert.convert(tmp_path / "images", tmp_path / "again", "shards") == (8, 0)
    assert contents(tmp_path / "again") == contents(made)
    with pytest.raises(ValueError, match="latents of tokenizer"):
        cached.check_cache(tmp_path / "images", "a" * 64, 32)


def test_damage_is_not_converted(copied, tmp_path):
    """As files of their own damaged latents would look whole."""
    path = copied / "shard-00001.moments.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="1 damaged files: shard-00001.moments.npy"):
        convert.convert(copied, tmp_path / "images", "images")
    assert not (tmp_path / "images").exists()


def test_conversion_to_files_goes_on(made, tmp_path):
    """Missing and damaged files are written, whole ones kept, those of other latents refused."""
    convert.convert(made, tmp_path / "images", "images")
    paths = sorted((tmp_path / "images").rglob("*.npz"))
    whole, times = paths[2].read_bytes(), [path.stat().st_mtime_ns for path in paths]
    paths[2].write_bytes(whole[:-100])
    paths[4].unlink()
    assert convert.convert(made, tmp_path / "images", "images") == (2, 6)
    assert paths[2].read_bytes() == whole
    kept = [p.stat().st_mtime_ns == time for p, time in zip(paths, times, strict=True)]
    assert kept == [i not in (2, 4) for i in range(8)]
    moments = cached.read_moments(paths[6])
    cached.write_moments(paths[6], moments["moments"] + 1, moments["moments_flip"])
    with pytest.raises(ValueError, match=r"2\.jpg\.npz: holds other moments"):
        convert.convert(made, tmp_path / "images", "images")


@pytest.mark.parametrize(
    "part", ["shard-00001.json", "shard-00001.flips.npy", "cut short", "a flipped bit"]
)
def test_a_run_resumes_where_it_was(images, vae_path, made, copied, part, capsys, monkeypatch):
    """A shard that is missing or partial is written again, the same; the others are not touched.

    The record of one is in the manifest, too.
    """
    encode, records = caching.moments_and_flips, []

    def spy(*args):
        records.append((copied / "shard-00001.json").is_file())
        return encode(*args)

    monkeypatch.setattr(caching, "moments_and_flips", spy)
    path = copied / "shard-00001.moments.npy"
    if part == "cut short":
        path.write_bytes(path.read_bytes()[:-10])
    elif part == "a flipped bit":
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    else:
        (copied / part).unlink()
    first = (copied / "shard-00000.moments.npy").stat().st_mtime_ns
    main_cache.main(command(images, vae_path, copied))
    new = 0 if part == "shard-00001.json" else 3
    assert f"{new} written, {8 - new} there already" in capsys.readouterr().out
    assert contents(copied) == contents(made)
    assert records == [False, False][:new]  # what is being replaced does not pass for whole
    assert (copied / "shard-00000.moments.npy").stat().st_mtime_ns == first


def test_a_run_that_stops_loses_one_batch(images, vae_path, made, tmp_path, monkeypatch):
    """Of an unfinished cache nothing is trained on; the next run writes what is not there."""
    tokenizer = build_tokenizer("kl16", vae_path)
    encode, calls = tokenizer.encode, []

    def stop(batch):
        calls.append(1)
        if len(calls) > 6:  # of two views of three batches: a shard, and two images of the next
            raise KeyboardInterrupt
        return encode(batch)

    dataset, facts = open_data(images, "train", 32), read_manifest(made)
    facts = {name: facts[name] for name in (*convert.FACTS, "reading", "vae_path")}
    how = {"batch_size": 2, "num_workers": 0, "device": torch.device("cpu")}
    monkeypatch.setattr(tokenizer, "encode", stop)
    with pytest.raises(KeyboardInterrupt):
        cache_shards(tokenizer, dataset, tmp_path, facts, **how)
    names = {p.name for p in tmp_path.iterdir()}
    assert "shard-00000.json" in names
    assert [n for n in names if "shard-00001" in n] == ["shard-00001.00000-00002.piece"]
    with pytest.raises(ValueError, match="not all shards are there"):
        ShardedCache(tmp_path)
    with pytest.raises(ValueError, match="not all shards are there"):
        convert.verify(tmp_path)
    monkeypatch.setattr(tokenizer, "encode", encode)
    assert cache_shards(tokenizer, dataset, tmp_path, facts, **how) == (3, 5)
    written, expected = contents(tmp_path), contents(made)
    assert json.loads(written.pop("cache.json")) == json.loads(expected.pop("cache.json"))
    assert written == expected


def test_other_images_or_latents_are_not_mixed_in(images, vae_path, copied, tmp_path):
    """A data set that changed, another tokenizer and another size are refused."""
    more = shutil.copytree(images, tmp_path / "more")
    shutil.copy(more / "train/cat/0.jpg", more / "train/cat/9.jpg")
    with pytest.raises(ValueError, match="data set has changed: .* of count 8, here it is 9"):
        main_cache.main(command(more, vae_path, copied))
    (more / "train/cat/0.jpg").unlink()
    with pytest.raises(ValueError, match="data set has changed: .* of names_sha256"):
        main_cache.main(command(more, vae_path, copied))
    with pytest.raises(ValueError, match="latents of img_size 32, here it is 16"):
        main_cache.main(command(images, vae_path, copied, "--img_size", "16"))
    foreign = write_folder(tmp_path / "foreign", (32, 2, 2))
    with pytest.raises(ValueError, match="its latents are of tokenizer .* here it is None"):
        convert.convert(foreign, copied, "shards")
    (copied / "cache.json").unlink()  # then nobody knows what the shards are of
    assert convert.convert(foreign, copied, "shards") == (8, 0)


@pytest.mark.parametrize("part", shards.PARTS)
def test_verify_finds_a_flipped_bit(copied, part, capsys):
    """In any of the arrays, with the name of the file; an intact cache is reported as intact."""
    main_cache.main(["--verify", "--cached_path", str(copied)])
    assert "8 images, all whole, in the layout shards" in capsys.readouterr().out
    path = copied / f"shard-00002.{part}.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (copied / "shard-00000.names.npy").unlink()
    line = complain(capsys, main_cache.main, "--verify", "--cached_path", copied)
    assert f"2 damaged files: shard-00000.names.npy (missing), shard-00002.{part}.npy (not" in line


def test_verify_of_a_folder(tmp_path, capsys):
    """A file that is damaged, of another shape, or not finite, is named."""
    folder = write_folder(tmp_path / "cache")
    assert convert.verify(folder) == ("images", 8)
    path = folder / "cat/0.jpg.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    cached.write_moments(folder / "dog/5.jpg.npz", *np.zeros((2, 4, 1, 1), np.float32))
    cached.write_moments(folder / "dog/6.jpg.npz", *np.full((2, *SHAPE), np.nan, np.float32))
    line = complain(capsys, main_cache.main, "--verify", "--cached_path", folder)
    assert (
        "3 damaged files: cat/0.jpg.npz (not readable), dog/5.jpg.npz (of shape (4, 1, 1)" in line
    )
    assert "dog/6.jpg.npz (not finite" in line


def test_what_float16_cannot_hold_is_refused(tmp_path):
    """The image is named, and the layout that holds it; what was begun is not taken for whole."""
    folder = write_folder(tmp_path / "cache")
    moments = np.ones((2, *SHAPE), np.float32)
    moments[1, 0, 0, 0] = 1e5
    cached.write_moments(folder / "dog/5.jpg.npz", *moments)
    with pytest.raises(ValueError, match=r"dog/5.jpg: moments as large as 100000.*--layout images"):
        convert.convert(folder, tmp_path / "shards", "shards")
    assert not list((tmp_path / "shards").glob("shard-00001*"))


def test_code_indices_stay_exact(images, tmp_path):
    """float16 holds integers up to 2,048 only: code indices are kept as int32 in either way."""
    folder = write_folder(
        tmp_path / "cache", (1, 2, 2), lambda s: np.random.default_rng(1).integers(16000, 16384, s)
    )
    convert.convert(folder, tmp_path / "shards", "shards")
    convert.convert(tmp_path / "shards", tmp_path / "back", "images")
    for path in folder.rglob("*.npz"):
        ids = cached.read_moments(path)["moments"]
        assert np.array_equal(
            cached.read_moments(tmp_path / "back" / path.relative_to(folder))["moments"], ids
        )
    tokenizer = tiny_vq(tmp_path / "vq.ckpt")
    how = {"batch_size": 4, "num_workers": 0, "device": torch.device("cpu")}
    facts = dict.fromkeys(convert.FACTS)
    dataset = open_data(images, "train", 32)
    cache_shards(tokenizer, dataset, tmp_path / "vq", facts, **how)
    with torch.no_grad():
        expected = tokenizer.encode(torch.stack([image for image, _ in dataset]))
    kept = np.stack([ShardedCache(tmp_path / "vq").views(i)[0] for i in range(8)])
    assert kept.dtype == np.int32 and kept.max() > 2048
    assert np.array_equal(kept, expected)


def tiny_vq(path):
    torch.manual_seed(0)
    network = {"embed_dim": 8, "num_codes": 16384, "ch": 32, "ch_mult": (1, 1, 2, 2, 4)}
    torch.save({"model": VQModel(**network).state_dict()}, path)
    return build_tokenizer("vq16", path)


def loader_of(folder, batch_size=4, workers=0):
    dataset = open_cache(folder, SHAPE, 2)
    return open_loader(dataset, batch_size, workers, 0, False)


def test_batches_are_gathered(tmp_path):
    """Each image once an epoch, with its label, either view half the time, from either loader."""
    write_folder(tmp_path / "cache")
    convert.convert(tmp_path / "cache", tmp_path / "shards", "shards")
    pairs = [ShardedCache(tmp_path / "shards").views(i) for i in range(8)]
    loader, flips = loader_of(tmp_path / "shards"), 0
    torch.manual_seed(0)
    for epoch in range(25):
        seen = []
        for moments, labels in loader.epoch(epoch):
            assert (moments.dtype, moments.shape) == (torch.float16, (4, *SHAPE))
            assert (labels.dtype, labels.shape) == (torch.int64, (4,))
            for one, label in zip(moments.numpy(), labels.tolist(), strict=True):
                places = [(i, f) for i in range(8) for f in (0, 1) if (pairs[i][f] == one).all()]
                ((index, flip),) = places
                assert label == index // 4
                seen.append(index)
                flips += flip
        assert sorted(seen) == list(range(8))
    assert 65 < flips < 135  # of 200: 5 standard errors
    torch.manual_seed(1)
    first = next(iter(loader.epoch(0)))[0]
    first += 1  # a batch is the caller's own
    torch.manual_seed(1)
    assert torch.equal(next(iter(loader.epoch(0)))[0] + 1, first)
    moments, label = open_cache(tmp_path / "shards", SHAPE, 2)[5]
    assert (moments.shape, label) == (SHAPE, 1)
    assert len(list(loader_of(tmp_path / "shards", workers=1).epoch(0))) == 2


def test_workers_get_names_of_files(made):
    """A set is small to send, though its arrays are large."""
    dataset = ShardedCache(made, (32, 2, 2))
    sent = pickle.dumps(dataset)
    assert len(sent) < 500
    again = pickle.loads(sent)
    torch.manual_seed(0)
    expected = dataset.__getitems__([7, 0])
    torch.manual_seed(0)
    assert all(map(torch.equal, again.__getitems__([7, 0]), expected))


def test_training_on_shards(images, vae_path, made, tmp_path, capsys):
    """As on a file an image: the same images and views, the same losses."""
    convert.convert(made, tmp_path / "images", "images")
    runs = []
    for folder in (made, tmp_path / "images"):
        run = tmp_path / f"run_{folder.name}"
        main_mar.main([*training(vae_path, folder), "--output_dir", str(run)])
        losses = [json.loads(x)["loss"] for x in (run / "log.jsonl").open() if "loss" in x]
        runs.append((losses, load_checkpoint(run / LAST)["config"]["latent_range"]))
    assert len(runs[0][0]) == 2
    # a model that is this young has a loss of 1 on any latents: their range tells them apart
    assert runs[0] == runs[1]
    other = tmp_path / "other.ckpt"
    weights = torch.load(vae_path)
    weights["model"]["quant_conv.bias"] += 1
    torch.save(weights, other)
    wrong = (*training(other, made), "--output_dir", tmp_path / "wrong")
    capsys.readouterr()
    assert "latents of tokenizer" in complain(capsys, main_mar.main, *wrong)
    wrong = (*training(vae_path, made), "--img_size", "64", "--output_dir", tmp_path / "wrong")
    assert "latents of img_size 32, here it is 64" in complain(capsys, main_mar.main, *wrong)


def training(vae_path, folder):
    flags = f"--img_size 32 --vae_path {vae_path} --device cpu --num_workers 0 --use_cached"
    flags += f" --cached_path {folder} --class_num 2 --model mar_tiny --buffer_size 4"
    flags += " --diffloss_d 1 --diffloss_w 32 --batch_size 4 --epochs 2 --lr 1e-3"
    flags += " --warmup_epochs 1 --max_timestep 950 --num_sampling_steps 4 --num_iter 3"
    return shlex.split(flags)


def test_a_damaged_cache_is_said_before_training(copied):
    """Another shape or number of classes, a file cut short, a manifest that is none."""
    with pytest.raises(ValueError, match=r"shape \(32, 2, 2\), expected \(8, 4, 4\)"):
        open_cache(copied, (8, 4, 4), 2)
    with pytest.raises(ValueError, match="found 2 classes, --class_num is 10"):
        open_cache(copied, (32, 2, 2), 10)
    path = copied / "shard-00001.moments.npy"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"00001.moments.npy: not a part of a shard"):
        open_cache(copied, (32, 2, 2), 2)
    (copied / "cache.json").write_text("nothing")
    with pytest.raises(ValueError, match=r"cache.json: not the manifest of a cache"):
        open_cache(copied, (32, 2, 2), 2)


def test_wrong_flags(made, tmp_path, capsys, images, vae_path):
    """What does not go together is one line, and nothing is written."""
    write_folder(tmp_path / "files")
    before = sorted(tmp_path.rglob("*"))
    to = ("--cached_path", tmp_path / "files")
    for flags, message in (
        ((*to, "--verify", "--convert_from", made), "not together with --verify"),
        ((*to, "--convert_from", tmp_path / "x/../files"), "expected another than --cached_path"),
        ((*to, "--convert_from", tmp_path / "none"), "holds no cache, expected a cache"),
        ((*to, "--convert_from", made, "--layout", "shards"), "holds a cache with --layout images"),
        (("--cached_path", made, "--convert_from", tmp_path / "files"), "with --layout shards"),
        (("--cached_path", tmp_path / "none", "--verify"), "expected a cache of latents, found"),
        (("--cached_path", "", "--convert_from", made), "--cached_path '': expected the name"),
        (command(images, vae_path, tmp_path / "files"), "holds a cache with --layout images"),
    ):
        assert message in complain(capsys, main_cache.main, *flags), flags
    assert [p for p in sorted(tmp_path.rglob("*")) if p.name != "run.lock"] == before
    images = write_images(tmp_path / "pictures")
    line = complain(capsys, main_cache.main, *to, "--convert_from", images)
    assert "pictures: holds no cache" in line
    line = complain(capsys, main_cache.main, *to, "--convert_from", write_folder(tmp_path / "more"))
    assert "more: holds images already, expected a cache in the layout other than" in line
