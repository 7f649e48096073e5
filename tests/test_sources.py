"""Pictures in zips, tars and Hugging Face's data sets. Run: pytest tests/test_sources.py"""

import io
import json
import pickle
import shlex
import shutil
import tarfile
import zipfile
import zlib

import pytest
import torch
from cli import complain
from conftest import write_images

import main_cache
import main_mar
from util.data import kind_of, open_data
from util.data.archive import Files
from util.data.loader import Loader
from util.data.settings import PLAIN, Reading
from util.data.tars import expand_braces, read_headers

SMALL = "--tokenizer pixels --img_size 8 --device cpu --num_workers 0"


@pytest.fixture(scope="module")
def files(images):
    """Name -> bytes of eight pictures, class/i.jpg."""
    paths = sorted((images / "train").rglob("*.jpg"))
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in paths}


def write_zip(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def write_tar(path, members, kind=tarfile.PAX_FORMAT, **facts):
    with tarfile.open(path, "w", format=kind) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for fact, value in facts.items():
                setattr(info, fact, value)
            archive.addfile(info, io.BytesIO(content))
    return path


def below(top, files):
    return {f"{top}{name}": content for name, content in files.items()}


def opened(path, split="train", **reading):
    return open_data(path, split, 32, PLAIN.but(**reading))


def same(dataset, images):
    """Whether a data set is that of the folder `images`: names, classes, labels and pixels."""
    expected = opened(images)
    assert (dataset.classes, dataset.targets) == (expected.classes, expected.targets)
    assert dataset.names() == expected.names()
    return all(torch.equal(dataset[i][0], expected[i][0]) for i in range(len(expected)))


def shard(files, start=0):
    """The members of a WebDataset's shard, with the name of a class in .cls."""
    members = {}
    for i, (name, content) in enumerate(files.items(), start):
        members |= {f"{i:06d}.jpg": content, f"{i:06d}.cls": name.split("/")[0].encode()}
    return members


# ---- zips ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", ["", "train/", "pictures/", "a/pictures/train/"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_read_as_a_folder(images, files, tmp_path, top, method):
    """With or without train and folders above; what systems put beside pictures is left out."""
    others = {"__MACOSX/a/._0.jpg": b"x", f"{top}.DS_Store": b"x", f"{top}cat/notes.txt": b"x"}
    path = write_zip(tmp_path / "data.ZIP", {**others, **below(top, files)}, method)
    assert same(opened(path), images)


def test_splits_of_a_zip(files, tmp_path, images):
    """A folder each; one that is not there is named. A class may be called train."""
    path = write_zip(tmp_path / "a.zip", {**below("x/train/", files), "x/val/cat/0.jpg": b"x"})
    assert same(opened(path), images) and len(opened(path, "val")) == 1
    with pytest.raises(ValueError, match="expected a folder test in it"):
        opened(path, "test")
    vehicles = {name.replace("dog", "train"): content for name, content in files.items()}
    assert opened(write_zip(tmp_path / "b.zip", vehicles)).classes == ["cat", "train"]


def test_zips_of_stylegan_and_edm(files, tmp_path):
    """dataset.json says the classes, as numbers in their order; its folders are none."""
    named = {f"00000/img{i}.jpg": content for i, content in enumerate(files.values())}
    labels = [[name, 10 if i % 2 else 9] for i, name in enumerate(named)]
    path = tmp_path / "edm.zip"
    write_zip(path, {**named, "dataset.json": json.dumps({"labels": labels}).encode()})
    found = opened(path)
    assert found.classes == ["9", "10"] and found.targets == [0] * 4 + [1] * 4
    assert found.names()[:2] == ["9/00000/img0.jpg", "9/00000/img2.jpg"]
    write_zip(path, {**named, "dataset.json": b'{"labels": null}'})
    assert opened(path).classes == ["all"]
    (tmp_path / "own.csv").write_text("00000/img0.jpg,a\n00000/img3.jpg,b\n")
    assert opened(path, label_file=str(tmp_path / "own.csv")).classes == ["a", "b"]


def test_damage_in_a_zip_is_found(files, tmp_path):
    """By the check, with the name of the picture, also where it still decodes."""
    path = write_zip(tmp_path / "a.zip", files)
    content = bytearray(path.read_bytes())
    content[content.index(files["cat/1.jpg"]) + 400] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"1 unreadable.*a\.zip/cat/1\.jpg \(damaged: its check"):
        opened(path).check(2, None)
    with pytest.raises(ValueError, match=r"a\.zip/cat/1\.jpg: .*damaged"):
        opened(path)[1]


def test_zips_that_are_refused(files, tmp_path, capsys):
    """In one line with the reason."""
    for name, content, message in (
        ("none.zip", None, "No such file"),
        ("text.zip", b"not a zip", "not a readable zip"),
        ("empty.zip", {}, "expected images, found none"),
        ("texts.zip", {"a/b.txt": b""}, r"found none \(left out of .*: 1 .txt\)"),
        ("out.zip", {"../../0.jpg": b""}, "a path out of the archive"),
    ):
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content is not None:
            write_zip(tmp_path / name, content)
        with pytest.raises(ValueError, match=message):
            opened(tmp_path / name)
    path = write_zip(tmp_path / "lzma.zip", files, zipfile.ZIP_LZMA)
    with pytest.raises(ValueError, match="cat/0.jpg is packed by method 14, expected stored or"):
        opened(path)
    line = complain(capsys, main_mar.main, "--data_path", tmp_path / "none.zip")
    assert "none.zip: not a readable zip (No such file or directory)" in line


# ---- tars ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_are_read_as_tarfile_does(tmp_path, kind):
    """Of all three formats, with long names and, as WebDataset writes them, times in fractions."""
    names = ["a", "b/" + 90 * "x", 60 * "y" + "/" + 60 * "z", *map(str, range(20))]
    names += ["ü.jpg", 300 * "l", "d/" * 40 + "f.cls"] if kind != tarfile.USTAR_FORMAT else []
    members = {name: bytes(37 * i) for i, name in enumerate(names)}
    facts = {"mtime": 1.5} if kind == tarfile.PAX_FORMAT else {}
    path = write_tar(tmp_path / "a.tar", members, kind, **facts)
    with tarfile.open(path) as archive:
        expected = [(info.name, info.offset_data, info.size) for info in archive if info.isreg()]
    found = [tuple(member[:3]) for member in read_headers(Files([path]), 0)]
    assert found == expected and len(found) == len(names)


def test_braces():
    """As a shell expands them."""
    assert expand_braces("a/{08..11}.tar") == ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]
    assert expand_braces("{b,a}-{1..0}") == ["b-1", "b-0", "a-1", "a-0"]
    assert expand_braces("a.tar") == ["a.tar"]


def test_a_webdataset(images, files, tmp_path):
    """Members of one key belong together; shards are one data set, by braces or by *."""
    for k in range(2):
        part = dict([*files.items()][k::2])
        write_tar(tmp_path / f"{k:04d}.tar", {**shard(part), "readme.md": b"x"}, mtime=1.5)
    expected = opened(images)
    for pattern in ("{0000..0001}.tar", "*.tar"):
        found = opened(tmp_path / pattern)
        assert (found.classes, found.targets) == (expected.classes, expected.targets)
        assert found.names()[1] == "cat/0000/000001.jpg"
        order = [0, 2, 1, 3, 4, 6, 5, 7]  # shard by shard
        assert all(torch.equal(found[i][0], expected[k][0]) for i, k in enumerate(order))
    found.follow(["dog", "cat"])
    assert found.targets == expected.targets and torch.equal(found[0][0], expected[4][0])
    with pytest.raises(ValueError, match="expected train, not val"):
        opened(tmp_path / "*.tar", "val")


@pytest.mark.parametrize(
    ("ending", "texts", "classes"),
    [
        ("cls", [b"10", b"9\n"] * 4, ["9", "10"]),
        ("json", [b'{"label": 3}', b'{"label": "x"}'] * 4, ["3", "x"]),
        ("txt", [b"dog", b"cat"] * 4, ["cat", "dog"]),
        ("txt", [f"a photo of {i}".encode() for i in range(8)], ["all"]),
        ("json", [b'{"width": 3}', b"nothing"] * 4, ["all"]),
    ],
)
def test_classes_in_tars(files, tmp_path, ending, texts, classes):
    """In .cls, .json or .txt; captions, which differ, are no classes."""
    members = {}
    for i, (content, text) in enumerate(zip(files.values(), texts, strict=True)):
        members |= {f"{i}.{ending}": text, f"{i}.jpg": content}
    assert opened(write_tar(tmp_path / "a.tar", members)).classes == classes


def test_a_tar_of_folders(images, files, tmp_path):
    """Is read as a zip of them; pictures in several tars may have the same names."""
    path = write_tar(tmp_path / "a.tar", below("./data/train/", files))
    assert same(opened(path), images)
    flat = {name.split("/")[1]: content for name, content in files.items()}
    for name in ("x.tar", "y.tar"):
        write_tar(tmp_path / name, flat)
    found = opened(tmp_path / "{x,y}.tar")
    assert found.classes == ["all"] and found.names()[0] == "all/x/0.jpg" and len(found) == 8


def test_tars_that_are_refused(files, tmp_path):
    """In one line with the reason."""
    path, whole = tmp_path / "a.tar", shard(files)
    write_tar(path, whole)
    cut, bad = path.read_bytes()[:5000], bytearray(path.read_bytes())
    bad[124] ^= 1
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz"):
        pass
    cases = {
        "a.tar.gz": ("compressed by gzip: no picture", None),
        "b.tar": ("compressed by xz", b"\xfd7zXZ"),
        "c.tar": ("ends within a file, at 5000 bytes", cut),
        "d.tar": ("not a tar, or damaged: no header at byte 0", bytes(bad)),
        "{0..3}.tar": ("4 of 4 are no files: ", None),
        "https://a/b.tar": ("expected files on a disk", None),
        "e.tar": ("two pictures of one key: 000000", {**whole, "000000.png": b"x"}),
        "f.tar": ("1 pictures have no class: x.jpg", {**whole, "x.jpg": b"x"}),
        "g.tar": ("expected a name without slashes", {"0.jpg": b"x", "0.cls": b"a/b"}),
        "h.tar": ("a path out of the archive", {"../0.jpg": b"x"}),
        "i.tar": ("expected images, found none", {}),
    }
    for name, (message, content) in cases.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content is not None:
            write_tar(tmp_path / name, content)
        with pytest.raises(ValueError, match=message) as error:
            opened(name if "://" in name else tmp_path / name)
        assert "\n" not in str(error.value)


# ---- used ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["zip", "tar"])
def packed(request, files, tmp_path_factory):
    """(path, function that writes the files again with changes) of an archive."""
    path = tmp_path_factory.mktemp("packed") / f"data.{request.param}"
    write = {"zip": write_zip, "tar": write_tar}[request.param]
    write(path, files)
    return path, lambda to, **changes: write(to, {**files, **changes})


def test_other_processes_read_it(packed, images):
    """A worker, and a process that gets it by pickle."""
    dataset = opened(packed[0])
    dataset[0]
    again = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(again[i][0], dataset[i][0]) for i in range(8))
    alone, worker = (Loader(opened(packed[0]), 4, workers, 0) for workers in (0, 1))
    for one, other in zip(alone.epoch(1), worker.epoch(1), strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    worker.close()


def test_it_is_cached_and_trained_on(packed, images, files, tmp_path, capsys):
    """As a folder is: the same latents; an edited picture is encoded anew, others are not."""
    path, write = packed
    flags, folder = [*SMALL.split(), "--cached_path"], tmp_path / "cache"
    copy = shutil.copy(path, tmp_path / path.name)
    for data, cached in ((copy, folder), (images, tmp_path / "expected")):
        main_cache.main([*flags, str(cached), "--data_path", str(data)])
    for file in (tmp_path / "expected").rglob("*.npz"):
        other = folder / file.relative_to(tmp_path / "expected")
        assert zlib.crc32(file.read_bytes()) == zlib.crc32(other.read_bytes())
    write(copy, **{"dog/1.jpg": files["cat/0.jpg"]})
    capsys.readouterr()
    line = complain(capsys, main_cache.main, *flags, folder, "--verify", "--data_path", copy)
    assert "1 differ: dog/1.jpg (edited)" in line
    main_cache.main([*flags, str(folder), "--data_path", str(copy)])
    assert "1 written, 7 there already" in capsys.readouterr().out
    train = f"--model mar_tiny --patch_size 2 --buffer_size 4 {SMALL} --epochs 1 --batch_size 4"
    train += " --diffloss_d 1 --diffloss_w 32 --warmup_epochs 0 --num_sampling_steps 2 --num_iter 2"
    out = ("--data_path", str(path), "--output_dir", str(tmp_path / "out"))
    main_mar.main([*shlex.split(train), *out])
    losses = [json.loads(x) for x in (tmp_path / "out/log.jsonl").open()]
    assert sum("loss" in record for record in losses) >= 1


# ---- Hugging Face --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(files):
    """The eight pictures with a named class each, of three."""
    datasets = pytest.importorskip("datasets")
    labels = [{"cat": 2, "dog": 1}[name.split("/")[0]] for name in files]
    columns = {"img": [{"bytes": x, "path": None} for x in files.values()], "label": labels}
    kinds = {"img": datasets.Image(), "label": datasets.ClassLabel(names=["a/b", "dog", "cat"])}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def test_data_sets_of_hugging_face(table, images, tmp_path, monkeypatch):
    """Of save_to_disk, with and without splits, and .parquet; classes keep names and numbers."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "kept"))
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "validation": table.select([0])}).save_to_disk(
        tmp_path / "two"
    )
    (tmp_path / "hub/data").mkdir(parents=True)
    table.to_parquet(tmp_path / "hub/data/train-00000-of-00001.parquet")
    table.select([0, 1]).to_parquet(tmp_path / "hub/data/test-00000-of-00001.parquet")
    table.remove_columns("label").to_parquet(tmp_path / "x.parquet")
    expected = opened(images)
    for name in ("one", "two", "hub"):
        found = opened(tmp_path / name)
        assert found.classes == ["a_b", "dog", "cat"] and found.targets == [2] * 4 + [1] * 4
        assert all(torch.equal(found[i][0], expected[i][0]) for i in range(8))
        assert found.names()[5] == "dog/00000005"
        found.check(1, None)
        assert found.stat(3)[0] == len(found.read(3))
    assert len(opened(tmp_path / "two", "val")) == 1 and len(opened(tmp_path / "hub", "test")) == 2
    assert opened(tmp_path / "x.parquet").classes == ["all"]
    with pytest.raises(ValueError, match="expected a split test, found train, validation"):
        opened(tmp_path / "two", "test")
    (tmp_path / "y.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"y.parquet: not a readable data set \("):
        opened(tmp_path / "y.parquet")
    table.remove_columns("img").to_parquet(tmp_path / "z.parquet")
    with pytest.raises(ValueError, match=r"expected a column of images, found label \(ClassLabel"):
        opened(tmp_path / "z.parquet")


def test_without_the_package(tmp_path, monkeypatch, capsys):
    """One line that says what to install; and a folder is told from others by a look."""
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "state.json").write_text("{}")
    line = complain(capsys, main_mar.main, "--data_path", tmp_path)
    assert "the package `datasets` is needed: pip install datasets" in line
    assert kind_of(tmp_path).path.endswith("Hugging Face's datasets")
    assert kind_of(write_images(tmp_path / "folder")).path.startswith("a folder with train")


# ---- kept in memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_small_data_stay_in_memory(images, workers):
    """Decoded once, by whichever process, and the same bits as without; flips are drawn after."""
    dataset, plain = (open_data(images, "train", 32, Reading()) for _ in range(2))
    loader, other = Loader(dataset, 4, workers, 5), Loader(plain, 4, 0, 5)
    plain.kept = None
    for epoch in range(3):
        for one, expected in zip(loader.epoch(epoch), other.epoch(epoch), strict=True):
            assert torch.equal(one[0], expected[0]) and torch.equal(one[1], expected[1])
    loader.close()
    assert dataset.kept.there.sum() == 8  # here, though a worker has decoded them
    dataset.source = None  # nothing is read any more
    assert torch.equal(dataset.pixels(3), plain.pixels(3))
    assert pickle.loads(pickle.dumps(dataset.kept)) is None


def test_large_data_do_not(images):
    """Crops of all images together must fit; without a loader nothing is kept."""
    dataset = opened(images)
    assert dataset.kept is None
    dataset.keep(8 * 3 * 32 * 32 - 1)
    assert dataset.kept is None
    dataset.keep(8 * 3 * 32 * 32)
    assert dataset[0][0].is_contiguous() and dataset[0][0].is_contiguous()
    assert dataset.kept.there.tolist() == [1] + [0] * 7
    dataset.take_channels(1)
    assert dataset.kept is None and dataset[0][0].shape == (1, 32, 32)
