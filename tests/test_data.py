"""Data sets, and what is reported about bad ones. Run: python -m pytest tests/test_data.py"""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image
from rule import GOLDEN
from torch.utils.data import DataLoader, IterableDataset

import main_cache
import main_mar
import main_tokenizer
from engine_mar import cache_latents
from models import build_tokenizer
from util.checkpoint import LAST, load_checkpoint
from util.data import DATASETS, Kind, check_data_set, checked, is_data_set, kind_of, open_data
from util.data.cached import CachedFolder, check_cache, open_cache
from util.data.crop import center_crop_arr
from util.data.digits import digits
from util.data.loader import Loader, open_loader
from util.data.pictures import Probe
from util.data.settings import Reading


def test_a_path_has_one_kind(images):
    """The digits by their name, a folder by its pictures; the first row that claims it."""
    assert kind_of("digits") is DATASETS["digits"]
    for folder in (images, images / "train", images / "train/cat"):
        assert kind_of(folder) is kind_of(str(folder)) is DATASETS["folder"]
    assert is_data_set("digits") and is_data_set(images)


def test_wrong_paths_have_no_kind(images, tmp_path):
    """No folder, one without pictures, a file, another name: the message says what is expected."""
    (tmp_path / "train").write_text("a file")
    for path in (tmp_path, tmp_path / "none", images / "train/cat/0.jpg", "Digits", "digit", None):
        assert kind_of(path) is None and not is_data_set(path)
        with pytest.raises(
            ValueError, match=r"expected a folder with train/class/.*or 'digits'"
        ) as error:
            check_data_set(path)
        assert f"--data_path {path}: " in str(error.value)


@pytest.mark.parametrize("name", ["digits", "folder"])
def test_what_a_kind_promises(images, name):
    """Images and attributes as the contract says, of both splits that are named."""
    kind = DATASETS[name]
    path, size = (images, 16) if name == "folder" else ("digits", 8)
    assert kind.defaults.get("img_size", size) == size
    held = [open_data(path, split, size) for split in ("train", kind.held_out)]
    for dataset in held:
        image, label = dataset[len(dataset) - 1]
        assert image.shape == (dataset.channels, dataset.img_size, dataset.img_size)
        assert dataset.channels == kind.channels and dataset.img_size == size
        assert image.dtype == torch.float32 and -1 <= image.min() < image.max() <= 1
        assert int(label) in range(len(dataset.classes))
        assert all(isinstance(each, str) for each in dataset.classes)
        assert isinstance(dataset.description, str)
        again = open_data(path, "train" if dataset is held[0] else kind.held_out, size)
        assert again.description == dataset.description
    assert (held[0].description == held[1].description) == (kind.held_out == "train")
    assert kind.defaults.get("class_num", len(dataset.classes)) == len(dataset.classes)


def test_descriptions_tell_data_apart(images, tmp_path):
    """Kept statistics depend on them: on the pictures, their classes, size and reading, not on
    times or places."""
    root = copy(images, tmp_path / "data")
    one, larger = open_data(root, "train", 32), open_data(root, "train", 64)
    stored = open_data(root, "train", 32, Reading(orientation="stored"))
    assert stored.description.endswith(" ADM centre crop 32")
    assert one.description == f"{stored.description} orientation exif"
    assert open_data("digits", "test", 8).description == "digits test"
    other = Path(shutil.copytree(root, tmp_path / "other", copy_function=shutil.copyfile))
    assert open_data(other, "train", 32).description == one.description
    (other / "train/cat/0.jpg").rename(other / "train/dog/9.jpg")
    found = {dataset.description for dataset in (one, larger, open_data(other, "train", 32))}
    (root / "train/cat/0.jpg").unlink()
    assert len({*found, open_data(root, "train", 32).description}) == 4


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
    dataset = open_data(images, "train", 32, Reading())
    torch.manual_seed(0)
    draws = [dataset[0][0] for _ in range(200)]
    assert draws[0].shape == (3, 32, 32)
    assert draws[0].min() >= -1 and draws[0].max() <= 1 and draws[0].min() < 0 < draws[0].max()
    plain = open_data(images, "train", 32)[0][0]
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


def test_a_missing_image_is_named(images, tmp_path):
    """A dangling link is one line, not a traceback."""
    root = copy(images, tmp_path / "copy")
    (root / "train/cat/zz.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(ValueError, match=r"1 unreadable or truncated images: .*zz.jpg"):
        open_checked(root, 32, 2, tmp_path / "record.txt")
    with pytest.raises(ValueError, match="found 2 classes"):  # said before anything is read
        open_checked(root, 32, 3, tmp_path / "record.txt")


def test_a_cache_knows_its_tokenizer_and_size(tmp_path):
    """Latents of two tokenizers are not mixed; a cache that says nothing is taken as it is."""
    check_cache(tmp_path, "a" * 64, 32)
    assert not list(tmp_path.iterdir())
    check_cache(tmp_path, "a" * 64, 32, write=True)
    check_cache(tmp_path, "a" * 64, 32)
    both = r"latents of tokenizer \(sha256 aaaaaaaaaaaa\), here it is kl \(b.ckpt, sha256 bbbb"
    with pytest.raises(ValueError, match=both):
        check_cache(tmp_path, "b" * 64, 32, tokenizer_name="kl", vae_path="b.ckpt")
    with pytest.raises(ValueError, match="latents of img_size 32, here it is 64; pass another"):
        check_cache(tmp_path, "a" * 64, 64, write=True)


def open_checked(root, img_size, class_num, record):
    """A folder's training images as main_mar.py opens them."""
    return open_data(root, "train", img_size, Reading(), record=record, class_num=class_num)


def copy(images, path):
    shutil.copytree(images, path)
    return path


def test_truncated_and_foreign_files(images, tmp_path):
    """A JPEG cut short and a text file named .png are counted and named before any training."""
    root = copy(images, tmp_path / "data")
    whole = root / "train/cat/0.jpg"
    whole.write_bytes(whole.read_bytes()[:-300])
    (root / "train/dog/notes.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"2 unreadable or truncated .*0.jpg.*notes.png") as error:
        open_checked(root, 32, 2, tmp_path / "record.txt")
    assert "\n" not in str(error.value)


def test_empty_class(images, tmp_path):
    """A class without images is named."""
    root = copy(images, tmp_path / "data")
    (root / "train/emu").mkdir()
    with pytest.raises(ValueError, match="emu"):
        open_checked(root, 32, 3, tmp_path / "record.txt")


def test_number_of_classes(images):
    """A count that differs from --class_num says which value fits."""
    with pytest.raises(ValueError, match="found 2 classes, .* pass --class_num 2"):
        open_data(images, "train", 32, class_num=1000)


def test_small_images(images, tmp_path, capsys):
    """Images smaller than asked are enlarged, and that is reported once."""
    dataset = open_checked(images, 64, 2, tmp_path / "record.txt")
    assert dataset[0][0].shape == (3, 64, 64)
    assert "8 of 8 images are smaller than --img_size 64 (the smallest is 36×40, height first)" in (
        capsys.readouterr().out
    )


def test_missing_folder(tmp_path):
    """No picture below the path, or no such path, is one line that names it."""
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=f"{path}: expected a folder of images for each class"):
            open_data(path, "train", 32)


def test_wrong_size_of_digits():
    """The digits have one size."""
    with pytest.raises(ValueError, match="img_size 32: the digits are 8×8"):
        open_data("digits", "train", 32)


def test_too_few_images(images):
    """A batch larger than the data is refused, not an epoch of no steps."""
    with pytest.raises(ValueError, match="batch_size 16 .* only 8 images"):
        Loader(open_data(images, "train", 32), 16, 0, 1)


def test_epochs_are_shuffled_and_repeatable(images):
    """An epoch has its own order, whichever was before; what does not fill a batch is left out."""
    dataset = digits("train")
    dataset.tensors = (dataset.tensors[0], torch.arange(len(dataset)))
    loader = open_loader(dataset, 100, 0, seed=3)
    assert isinstance(loader, Loader) and (loader.steps, loader.images) == (14, 1437)
    orders = [torch.cat([labels for _, labels in loader.epoch(n)]).tolist() for n in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert all(len(set(order)) == 1400 for order in orders)
    assert isinstance(open_loader(open_data(images, "train", 32, Reading()), 4, 0, 0), Loader)


class Stream(IterableDataset):
    """Sixteen new images each epoch, dark or bright: without length or indices."""

    classes, channels, img_size, description = ["dark", "bright"], 1, 8, "a stream"

    def __init__(self):
        self.epochs = []

    def __iter__(self):
        draw = torch.Generator().manual_seed(self.epochs[-1])
        for i in range(16):
            yield torch.rand(1, 8, 8, generator=draw) - 1 + i % 2, i % 2

    def training_loader(self, batch_size, num_workers, seed, pin_memory):
        return StreamLoader(self, batch_size)


class StreamLoader:
    """What train_one_epoch asks of a loader, and nothing else."""

    def __init__(self, stream, batch_size):
        self.stream, self.batch_size = stream, batch_size
        self.steps, self.images = 16 // batch_size, 16

    def epoch(self, n):
        self.stream.epochs.append(n)
        return DataLoader(self.stream, self.batch_size)


def test_a_stream_is_a_row(monkeypatch, tmp_path, capsys):
    """It trains by the same path, brings its own flags and loader, and is told its epochs."""
    stream = Stream()
    row = Kind(
        claims=lambda path: path == "stream",
        open=lambda path, split, img_size, reading: stream,
        channels=1,
        defaults={"img_size": 8, "class_num": 2, "tokenizer": "pixels", "patch_size": 2},
    )
    monkeypatch.setitem(DATASETS, "stream", row)
    assert kind_of("stream") is row
    flags = "--data_path stream --model mar_tiny --buffer_size 4 --diffloss_d 1 --diffloss_w 32"
    flags += " --batch_size 4 --warmup_epochs 1 --num_sampling_steps 4 --num_iter 2 --lr 1e-3"
    flags += f" --max_timestep 950 --save_last_freq 1 --device cpu --output_dir {tmp_path}"
    main_mar.main(shlex.split(f"{flags} --epochs 2"))
    assert "16 images of 2 classes, 4 steps of 4 per epoch" in capsys.readouterr().out
    checkpoint = load_checkpoint(tmp_path / LAST)
    assert checkpoint["epoch"] == 1 and checkpoint["config"]["model"]["vae_embed_dim"] == 1
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert [line["step"] for line in lines if "loss" in line] == [4, 8]
    main_mar.main(shlex.split(f"{flags} --epochs 3 --resume {tmp_path}"))
    assert stream.epochs == [0, 1, 2]
    assert load_checkpoint(tmp_path / LAST)["epoch"] == 2
    with pytest.raises(ValueError, match="stream: found 2 classes, --class_num is 3"):
        main_mar.main(shlex.split(f"{flags} --epochs 2 --class_num 3"))
    assert "stream, or a folder with" in " ".join(main_mar.get_parser().format_help().split())


def test_data_without_names_is_not_cached(tmp_path):
    """The digits have no files that latents could be named after."""
    flags = f"--data_path digits --img_size 8 --cached_path {tmp_path}"
    args = main_cache.get_parser().parse_args(shlex.split(flags))
    with pytest.raises(ValueError, match="digits: its images have no names"):
        main_cache.open_images(args)


def test_the_size_of_a_kind_is_its_own(tmp_path):
    """Where images have one size, --img_size may be left out, and another one is refused."""
    flags = f"--data_path digits --tokenizer pixels --device cpu --output_dir {tmp_path}"
    with pytest.raises(ValueError, match="img_size 32: the digits are 8×8"):
        main_tokenizer.main(shlex.split(f"{flags} --img_size 32"))
    flags += " --split test --num_workers 0 --extractor grey-pixels"
    main_tokenizer.main(shlex.split(f"{flags} --num_images 20"))
    assert json.loads((tmp_path / "results.jsonl").read_text())["img_size"] == 8


def test_images_are_read_once_to_check_them(images, tmp_path, monkeypatch):
    """What is remembered of them spares a second run the reading, as does its own record."""
    record = tmp_path / "out" / "data_checked.txt"
    open_checked(images, 32, 2, record)
    again = Probe(None, "read again", [])
    monkeypatch.setattr(checked, "probe", lambda *args: again)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", None)
        open_checked(images, 32, 2, tmp_path / "other.txt")
    monkeypatch.setenv("MAR_CACHE", str(tmp_path / "empty"))
    open_checked(images, 32, 2, record)
    open_data(images, "train", 64)  # without a record they are not checked
    more = write_images(tmp_path / "more", count=5)
    with pytest.raises(ValueError, match="read again"):
        open_checked(more, 32, 2, record)


@pytest.fixture
def cached(images, vae_path, tmp_path):
    """(tokenizer, data set, folder of its latents, counts of the run that wrote them)."""
    tokenizer = build_tokenizer("kl16", vae_path)
    dataset = open_data(images, "train", 32)
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
        open_cache(folder, (32, 16, 16), 2)


def test_damaged_cache_file(cached):
    """A file that is no cache is named."""
    _, _, folder, _ = cached
    (folder / "cat/0.jpg.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="0.jpg.npz: not a cached latent"):
        CachedFolder(folder, (32, 2, 2))
