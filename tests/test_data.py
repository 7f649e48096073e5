"""Data sets, and what is said about bad ones. Run: python -m pytest tests/test_data.py"""

import shutil

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image
from rule import GOLDEN

from engine_mar import cache_latents
from models import build_tokenizer
from util import data
from util.crop import center_crop_arr
from util.data import CachedFolder, ImageFolder, digits, image_folder, training_set


@pytest.mark.parametrize("name", np.load(GOLDEN / "center_crop.npz").files)
def test_center_crop_is_the_published(name):
    """ADM's crop, to within one grey level, larger and smaller images alike."""
    expected = np.load(GOLDEN / "center_crop.npz")[name]
    width, height, size = map(int, name.replace("-", "x").split("x"))
    draw = np.random.Generator(np.random.PCG64(width * 1000 + height))
    image = Image.fromarray((draw.random((height, width, 3)) * 255).astype(np.uint8))
    cropped = np.asarray(center_crop_arr(image, size)).astype(int)
    assert np.abs(cropped - expected).max() <= 1


def test_images_are_in_range_and_flipped_half_the_time(images):
    """(3, size, size) in [-1, 1]; over 200 draws both mirror images come up."""
    dataset = ImageFolder(images / "train", 32)
    torch.manual_seed(0)
    draws = [dataset[0][0] for _ in range(200)]
    assert draws[0].shape == (3, 32, 32)
    assert draws[0].min() >= -1 and draws[0].max() <= 1 and draws[0].min() < 0 < draws[0].max()
    plain = ImageFolder(images / "train", 32, flip=False)[0][0]
    flips = sum(not torch.equal(draw, plain) for draw in draws)
    assert all(torch.equal(d, plain) or torch.equal(d, plain.flip(-1)) for d in draws)
    assert 60 < flips < 140  # 5.6 standard errors


def test_digits_are_split_once_and_for_all():
    """1,437 and 360 images that have nothing in common but rare duplicates, all classes in both."""
    train, test = digits("train"), digits("test")
    assert (len(train), len(test)) == (1437, 360)
    assert torch.equal(digits("train").tensors[0], train.tensors[0])
    images, labels = train.tensors
    assert images.shape[1:] == (1, 8, 8)
    assert (images.min(), images.max()) == (-1, 1)
    assert labels.bincount().min() > 130 and test.tensors[1].bincount().min() >= 34
    both = {tuple(x.flatten().tolist()) for x in images}
    assert not both & {tuple(x.flatten().tolist()) for x in test.tensors[0]}


def test_a_picture_that_is_gone_is_named(images, tmp_path):
    """A dangling link is one line, not a traceback."""
    root = copy(images, tmp_path / "copy")
    (root / "train/cat/zz.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(ValueError, match=r"1 unreadable or truncated images: .*zz.jpg"):
        training_set(root, 32, 2, record=tmp_path / "record.txt")
    with pytest.raises(ValueError, match="found 2 classes"):  # said before anything is read
        training_set(root, 32, 3)


def test_a_cache_knows_its_tokenizer_and_size(tmp_path):
    """Latents of two tokenizers are not mixed; a cache that says nothing is taken as it is."""
    data.check_cache(tmp_path, "a" * 64, 32)
    assert not list(tmp_path.iterdir())
    data.check_cache(tmp_path, "a" * 64, 32, write=True)
    data.check_cache(tmp_path, "a" * 64, 32)
    with pytest.raises(ValueError, match="latents of tokenizer aaaaaaaaaaaa, here it is bbbb"):
        data.check_cache(tmp_path, "b" * 64, 32)
    with pytest.raises(ValueError, match="latents of img_size 32, here it is 64; pass another"):
        data.check_cache(tmp_path, "a" * 64, 64, write=True)


def copy(images, path):
    shutil.copytree(images, path)
    return path


def test_truncated_and_foreign_files(images, tmp_path):
    """A JPEG cut short and a text file named .png are counted and named before any training."""
    root = copy(images, tmp_path / "data")
    whole = root / "train/cat/0.jpg"
    whole.write_bytes(whole.read_bytes()[:-300])
    (root / "train/dog/notes.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"2 unreadable or truncated .*0.jpg .*notes.png") as error:
        training_set(root, 32, 2)
    assert "\n" not in str(error.value)


def test_empty_class(images, tmp_path):
    """A class without images is named."""
    root = copy(images, tmp_path / "data")
    (root / "train/emu").mkdir()
    with pytest.raises(ValueError, match="emu"):
        training_set(root, 32, 3)


def test_number_of_classes(images):
    """A count that differs from --class_num says which value fits."""
    with pytest.raises(ValueError, match="found 2 classes, .* pass --class_num 2"):
        training_set(images, 32, 1000)


def test_small_images(images, capsys):
    """Images smaller than asked are enlarged, and that is said once."""
    dataset = training_set(images, 64, 2)
    assert dataset[0][0].shape == (3, 64, 64)
    assert "8 of 8 images are smaller than --img_size 64 (the smallest is 40×36)" in (
        capsys.readouterr().out
    )


def test_missing_folder(tmp_path):
    """No train/ below the path is one line that names it."""
    with pytest.raises(ValueError, match="train: expected a folder of images for each class"):
        training_set(tmp_path, 32, 2)


def test_wrong_size_of_digits():
    """The digits have one size."""
    with pytest.raises(ValueError, match="img_size 32: the digits are 8×8"):
        training_set("digits", 32, 10)


def test_too_few_images(images):
    """A batch larger than the data is refused, not an epoch of no steps."""
    with pytest.raises(ValueError, match="batch_size 16 .* only 8 images"):
        data.training_loader(training_set(images, 32, 2), 16, 0, 1, False)


def test_images_are_read_once_to_check_them(images, tmp_path, monkeypatch):
    """The record spares a second run the reading; other files are read again."""
    record = tmp_path / "out" / "data_checked.txt"
    image_folder(images, 32, record=record)
    monkeypatch.setattr(data, "_probe", lambda path: (path, None, "read again"))
    image_folder(images, 32, record=record)
    more = write_images(tmp_path / "more", count=5)
    with pytest.raises(ValueError, match="read again"):
        image_folder(more, 32, record=record)


@pytest.fixture
def cached(images, vae_path, tmp_path):
    """(tokenizer, data set, folder of its latents, counts of the run that wrote them)."""
    tokenizer = build_tokenizer("kl16", vae_path)
    dataset = image_folder(images, 32, flip=False)
    counts = cache(tokenizer, dataset, tmp_path / "cache")
    return tokenizer, dataset, tmp_path / "cache", counts


def cache(tokenizer, dataset, folder):
    return cache_latents(
        tokenizer, dataset, folder, batch_size=3, num_workers=0, device=torch.device("cpu")
    )


def test_cache_has_the_published_layout(cached):
    """class/name.ext.npz with float32 moments of the image and of its mirror image."""
    tokenizer, dataset, folder, counts = cached
    assert counts == (8, 0)
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.npz")) == [
        f"{c}/{i}.jpg.npz" for c in ("cat", "dog") for i in range(4)
    ]
    image = dataset[5][0].unsqueeze(0)
    file = np.load(folder / "dog/1.jpg.npz")
    for name, view in (("moments", image), ("moments_flip", image.flip(-1))):
        assert (file[name].dtype, file[name].shape) == (np.float32, (32, 2, 2))
        expected = tokenizer.encode(view)[0].numpy()
        np.testing.assert_allclose(file[name], expected, atol=1e-4)


def test_cache_goes_on_where_it_was(cached):
    """Whole files are kept; a damaged and a missing one are written again, and nothing else."""
    tokenizer, dataset, folder, _ = cached
    paths = sorted(folder.rglob("*.npz"))
    before = {path: path.stat().st_mtime_ns for path in paths}
    whole = paths[2].read_bytes()
    paths[2].write_bytes(whole[:-100])
    paths[4].unlink()
    assert cache(tokenizer, dataset, folder) == (2, 6)
    assert paths[2].read_bytes() == whole
    changed = [p for p in paths if p.stat().st_mtime_ns != before[p]]
    assert changed == [paths[2], paths[4]]
    assert not list(folder.rglob("*.part"))


def test_cached_latents_are_read(cached):
    """Either of the two moments, half the time, with the label of the class folder."""
    _, _, folder, _ = cached
    dataset = CachedFolder(folder, (32, 2, 2))
    torch.manual_seed(0)
    draws = [dataset[6] for _ in range(100)]
    file = np.load(folder / "dog/2.jpg.npz")
    plain = sum(np.array_equal(d, file["moments"]) for d, _ in draws)
    flipped = sum(np.array_equal(d, file["moments_flip"]) for d, _ in draws)
    assert plain + flipped == 100
    assert 25 < plain < 75
    assert {label for _, label in draws} == {1}


def test_cache_of_another_tokenizer_or_size(cached):
    """Moments of another shape are refused at once, with both shapes."""
    _, _, folder, _ = cached
    with pytest.raises(ValueError, match=r"\(32, 2, 2\), expected \(32, 16, 16\)"):
        data.cached_set(folder, (32, 16, 16), 2)


def test_damaged_cache_file(cached):
    """A file that is no cache is named."""
    _, _, folder, _ = cached
    (folder / "cat/0.jpg.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="0.jpg.npz: not a cached latent"):
        CachedFolder(folder, (32, 2, 2))
