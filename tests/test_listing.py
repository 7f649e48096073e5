"""Which files of a folder are the data, and of which classes. Run: pytest tests/test_listing.py"""

import hashlib
import itertools
import json
import os
import pickle
import shlex
import shutil
from pathlib import Path

import pytest
from torchvision import datasets

import main_cache
import main_mar
from models.found import open_training_data
from models.mar import mar_tiny
from models.settings import Sampling
from util.checkpoint import LAST, load_checkpoint
from util.data import check_data_set, checked, facts_of, follow_classes, is_data_set, open_data
from util.data.cached import open_cache
from util.data.classes import ALL
from util.data.label_files import read_labels
from util.data.listing import describe_left_out, list_data, pictures_below, walk
from util.data.settings import Reading
from util.run import record
from util.run.record import compare, contents_of

TINY = "--model mar_tiny --buffer_size 4 --tokenizer pixels --patch_size 4 --img_size 16 --lr 1e-3"
TINY += " --diffloss_d 1 --diffloss_w 32 --max_timestep 950 --num_sampling_steps 4 --num_iter 2"
TINY += " --device cpu --num_workers 0 --batch_size 4 --epochs 1 --warmup_epochs 0 --ema_rate 0.5"


def touch(root, *names):
    """Empty files below a folder."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def flat(images, path):
    """The eight pictures in one folder, cat0.jpg to dog3.jpg."""
    path.mkdir()
    for file in (images / "train").glob("*/*.jpg"):
        shutil.copy(file, path / f"{file.parent.name}{file.name}")
    return path


# ---- files ---------------------------------------------------------------------------------------


def test_ordinary_folders_are_listed_as_torchvision_does(images, tmp_path):
    """The same pictures, in the same order, with the same labels, also in folders of classes."""
    places = itertools.product(("B", "a", "a b"), ("", "x/", "x-y/", "x/z/", "X"), (1, 10, 2))
    names = [f"{name}/{inner}{i}.jpg" for name, inner, i in places]
    for root in (images / "train", touch(tmp_path / "data", *names)):
        theirs, ours = datasets.ImageFolder(str(root)), open_data(root, "train", 16)
        assert (ours.samples, ours.targets) == (theirs.samples, theirs.targets)
        assert ours.classes == theirs.classes and str(ours.root) == theirs.root


def test_what_is_no_data_is_counted(tmp_path):
    """What systems and notebooks leave behind is neither class nor picture; one line counts it."""
    root = touch(tmp_path, "cat/0.png", "cat/1.JPG", "cat/2.jfif", "cat/x.png/3.webp", "dog/4.gif")
    touch(root, ".ipynb_checkpoints/0.png", "__MACOSX/cat/._0.png", "cat/._0.png", "@eaDir/1.png")
    touch(root, "lost+found/9.png", "cat/Thumbs.db", "desktop.ini", "dog/a.txt", "b.txt", "dog/c")
    touch(root, "loose.png", "cat/v.mp4", "dog/.git/x.png")
    os.mkfifo(root / "dog/pipe.png")
    found = list_data(root, "train")
    assert found.classes == ["cat", "dog"]
    assert found.paths == ["cat/0.png", "cat/1.JPG", "cat/2.jfif", "cat/x.png/3.webp", "dog/4.gif"]
    counts = {"hidden file{s}": 1, "hidden folder{s}": 2, ".txt": 2, ".mp4": 1, "named pipe{s}": 1}
    counts |= {"picture{s} beside class folders": 1, "file{s} without an ending": 1}
    counts |= dict.fromkeys(("__MACOSX", "@eaDir", "lost+found", "Thumbs.db", "desktop.ini"), 1)
    assert found.left_out == counts
    (line,) = found.sentences()
    assert line.startswith(f"left out of {root}: 2 .txt, 2 hidden folders, 1 .mp4, 1 @eaDir, ")
    assert line.endswith(", 4 others")
    assert describe_left_out(
        "X", {"hidden file{s}": 1, ".txt": 12, "named pipe{s}": 3, ".a": 0}
    ) == ("left out of X: 12 .txt, 3 named pipes, 1 hidden file")


def test_links(tmp_path):
    """Those to folders elsewhere are followed, circles are not, a link to nothing is named."""
    root = touch(tmp_path / "data", "cat/0.png", "dog/1.png")
    touch(tmp_path / "elsewhere", "2.png", "deep/3.png")
    (root / "emu").symlink_to(tmp_path / "elsewhere")
    (root / "cat/again").symlink_to(root)
    (root / "dog/up").symlink_to(tmp_path)
    (tmp_path / "elsewhere/back").symlink_to(root / "emu")
    paths, folders, left_out = walk(root)
    assert paths == ["cat/0.png", "dog/1.png", "emu/2.png", "emu/deep/3.png"]
    assert (folders, [*left_out.items()]) == (
        ["cat", "dog", "emu"],
        [("link{s} to a folder that holds it", 3)],
    )
    assert pictures_below(root)[0][2] == root / "emu/2.png"
    (root / "gnu").symlink_to(tmp_path / "unmounted")
    with pytest.raises(ValueError, match=r"data/gnu: a link to nothing \(No such file"):
        walk(root)


# ---- layouts -------------------------------------------------------------------------------------


def test_layouts(images, tmp_path, capsys):
    """With train/ or without, also by itself: the same pictures of the same classes."""
    found = [open_data(path, "train", 16) for path in (images, images / "train")]
    assert found[0].samples == found[1].samples and found[0].classes == ["cat", "dog"]
    one = open_data(flat(images, tmp_path / "flat"), "train", 16)
    assert one.classes == [ALL] and one.targets == [0] * 8 and one.name(3) == "all/cat3.jpg"
    assert "flat: no class folders and no labels: all pictures are of one class" in (
        capsys.readouterr().out
    )
    touch(tmp_path / "flat", "empty/notes.txt")
    assert len(open_data(tmp_path / "flat", "train", 16)) == 8
    shutil.rmtree(tmp_path / "flat/empty")
    (tmp_path / "split").mkdir()
    (tmp_path / "flat").rename(tmp_path / "split/train")
    assert open_data(tmp_path / "split", "train", 16).classes == [ALL]
    # a class of that name
    touch(tmp_path / "split", "plane/0.jpg", "val/0.jpg")
    assert open_data(tmp_path / "split", "train", 16).classes == ["plane", "train", "val"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["readme.txt"], r"or of images, found no picture there \(left out of .*: 1 .txt\)"),
        (["cat/0.png", "dog/notes.txt"], "class folders without pictures: dog"),
        (["val/cat/0.png", "test/cat/0.png"], "found test, val, but no folder train"),
        (["train/readme.txt", "cat/0.png"], "train: expected a folder of images for each class"),
    ],
)
def test_wrong_layouts(tmp_path, names, message):
    """One line says what is there."""
    with pytest.raises(ValueError, match=message):
        open_data(touch(tmp_path, *names), "train", 16)


def test_a_folder_without_pictures_is_no_data_set(tmp_path):
    """Nor is what cannot be read; hidden pictures do not count."""
    touch(tmp_path, "a/b/c.txt", ".cache/0.png", "a/.b/0.png", "latents/0.npz")
    assert not is_data_set(tmp_path)
    with pytest.raises(ValueError, match="expected a folder with train/class/image"):
        check_data_set(tmp_path)
    assert is_data_set(touch(tmp_path, "b/0.png"))


# ---- classes -------------------------------------------------------------------------------------


def test_numbers_are_in_their_order_unless_a_checkpoint_has_another(tmp_path, capsys):
    """Class 2 is before class 10; a resumed run keeps the order of its checkpoint."""
    root = touch(tmp_path, *(f"{name}/{i}.png" for name in (1, 10, 2) for i in range(2)))
    dataset = open_data(root, "train", 16)
    assert dataset.classes == ["1", "2", "10"] and dataset.targets == [0, 0, 1, 1, 2, 2]
    before = datasets.ImageFolder(str(root))
    follow_classes(dataset, before.classes, "the checkpoint")
    assert "NOTE: the classes are in the order of the checkpoint: 1, 10, 2" in (
        capsys.readouterr().out
    )
    assert (dataset.samples, dataset.targets) == (before.samples, before.targets)
    facts = facts_of(dataset)
    assert (facts["classes"], facts["counts"]) == (["1", "10", "2"], [2, 2, 2])
    for others in (before.classes, ["1", "2"], None):
        follow_classes(dataset, others, "the checkpoint")
    assert not capsys.readouterr().out and dataset.classes == before.classes


def test_checkpoints_of_the_published_code_sort_names_as_texts(tmp_path):
    """They name no classes; label 1 is that of class 10, of images and of latents alike."""
    touch(tmp_path, *(f"{name}/{i}.png" for name in (1, 10, 2) for i in range(2)))
    args = main_mar.get_parser().parse_args(["--data_path", str(tmp_path), "--img_size", "16"])
    assert open_training_data(args, {"img_size"}, {}).classes == ["1", "2", "10"]
    dataset = open_training_data(args, {"img_size"}, {"model": {"img_size": 16}})
    assert dataset.classes == ["1", "10", "2"] and dataset.name(2) == "10/0.png"


RECORDS = [{"file_name": "cat0.jpg", "label": "a"}, {"file_name": "./dog1.jpg", "label": "b"}]
FORMS = {
    "dataset.json": json.dumps({"labels": [["cat0.jpg", "a"], ["dog1.jpg", "b"]]}),
    "labels.json": json.dumps({"cat0.jpg": "a", "dog1.jpg": "b"}),
    "records.json": json.dumps(RECORDS),
    "metadata.jsonl": "\n".join(map(json.dumps, RECORDS)) + "\n\n",
    "metadata.csv": "text,file_name,label\nx,cat0.jpg,a\nx,dog1.jpg,b\n",
    "labels.csv": "cat0.jpg,a\ndog1.jpg,b\n",
    "tabs.tsv": "\ufefffilename\tclass\r\ncat0.jpg\ta\r\nflat\\dog1.jpg\tb\r\n",
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_label_files(images, tmp_path, name):
    """JSON and CSV as they are around; found by itself, or given and elsewhere."""
    root = flat(images, tmp_path / "flat")
    (tmp_path / name).write_text(FORMS[name])
    given = open_data(root, "train", 16, Reading(label_file=str(tmp_path / name)))
    assert given.classes == ["a", "b"]
    assert [given.name(i) for i in range(2)] == ["a/cat0.jpg", "b/dog1.jpg"]
    assert given.listing.sentences()[1] == (
        f"left out of {root}: 6 pictures that {name} does not name"
    )
    if name in ("records.json", "tabs.tsv"):
        return
    (tmp_path / name).rename(root / name)
    found = open_data(root, "train", 16)
    assert found.samples == given.samples and found.listing.notes == [
        f"classes: those of {root / name}"
    ]


def test_labels_in_a_folder_with_classes_are_used_if_given(images, tmp_path):
    """As of StyleGAN's folders 00000/…; otherwise this is said."""
    root = tmp_path / "data"
    shutil.copytree(images / "train", root)
    pairs = [[f"{name}/{i}.jpg", i % 2] for name in ("cat", "dog") for i in range(4)]
    (root / "dataset.json").write_text(json.dumps({"labels": pairs}))
    found = open_data(root, "train", 16)
    assert found.classes == ["cat", "dog"]
    assert found.listing.notes == [
        f"{root}/dataset.json is not used: --label_file takes classes from it"
    ]
    found = open_data(root, "train", 16, Reading(label_file=str(root / "dataset.json")))
    assert found.classes == ["0", "1"] and found.targets == [0] * 4 + [1] * 4
    assert not found.listing.sentences()[1:]
    (root / "dataset.json").write_text('{"labels": null}')
    found = open_data(root, "train", 16, Reading(label_file=str(root / "dataset.json")))
    assert found.classes == [ALL] and len(found) == 8


def test_a_file_of_captions_is_not_used(images, tmp_path, capsys):
    """A metadata.csv need not be about classes; this is said, and an error if it was given."""
    root = flat(images, tmp_path / "flat")
    (root / "metadata.csv").write_text("file_name,text\ncat0.jpg,a cat\n")
    assert open_data(root, "train", 16).classes == [ALL]
    assert "metadata.csv: has no label, expected one of label, class" in capsys.readouterr().out
    with pytest.raises(ValueError, match="metadata.csv: has no label"):
        open_data(root, "train", 16, Reading(label_file=str(root / "metadata.csv")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cat0.jpg,a\nnone.jpg,b\n", "1 of its 2 files are no pictures below .*flat: none.jpg"),
        ("cat0.jpg,a\ncat0.jpg,b\n", "cat0.jpg is of two classes, a and b"),
        ("cat0.jpg,a\n./cat0.jpg,b\n", "cat0.jpg is of two classes, a and b"),
        ("cat0.jpg,a/b\n", "cat0.jpg is of class 'a/b', expected a name without slashes"),
        ("cat0.jpg,\n", "cat0.jpg is of class ''"),
        ("cat0.jpg\n", "not a file of labels; expected file and class"),
        ("", "names no file"),
    ],
)
def test_wrong_label_files(images, tmp_path, content, message):
    """A line that names the file and what is wrong in it."""
    root = flat(images, tmp_path / "flat")
    (root / "labels.csv").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        open_data(root, "train", 16)
    assert "labels.csv" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", ["{", "3", '[["a.png", 1.5]]', '[["a.png"]]', "\0", '{"a": {}}']
)
def test_wrong_json(tmp_path, content):
    """Neither is damaged JSON, nor other content, a traceback."""
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(ValueError, match=r"labels.json: .*expected"):
        read_labels(tmp_path / "labels.json")


# ---- models without classes ----------------------------------------------------------------------


def test_pictures_without_classes_make_an_unconditional_model(images, tmp_path, capsys):
    """No label is dropped, guidance is refused, and a resumed run keeps that."""
    root = flat(images, tmp_path / "flat")
    flags = f"{TINY} --data_path {root} --output_dir {tmp_path / 'out'}"
    main_mar.main(shlex.split(flags))
    model = load_checkpoint(tmp_path / "out" / LAST)["config"]["model"]
    assert (model["class_num"], model["label_drop_prob"]) == (1, 0.0)
    capsys.readouterr()
    flags += f" --resume {tmp_path / 'out'} --epochs 2"
    main_mar.main(shlex.split(flags))
    assert "label_drop_prob" not in capsys.readouterr().out
    for more in ("", " --evaluate"):
        with pytest.raises(ValueError, match=r"cfg 2.0: the model was .* --label_drop_prob 0, so"):
            main_mar.main(shlex.split(f"{flags}{more} --cfg 2"))


def test_guidance_needs_dropped_labels():
    """A model that never saw an image without a label has no unconditional mode."""
    sizes = {"img_size": 8, "vae_stride": 1, "patch_size": 2, "vae_embed_dim": 1, "class_num": 3}
    sizes |= {"buffer_size": 4, "diffloss_d": 1, "diffloss_w": 32, "num_sampling_steps": "4"}
    mar_tiny(**sizes).check(Sampling(cfg=2.0))
    mar_tiny(**sizes, label_drop_prob=0.0).check(Sampling())
    with pytest.raises(ValueError, match="cfg 2.0: .*no unconditional mode; expected 1"):
        mar_tiny(**sizes, label_drop_prob=0.0).check(Sampling(cfg=2.0))


def test_caches_keep_classes(images, vae_path, tmp_path):
    """Those of a file of labels: the latents are of these, in whatever order is followed."""
    root, file, folder = flat(images, tmp_path / "flat"), tmp_path / "l.csv", tmp_path / "cache"
    names = [f"{name}{i}.jpg" for name in ("cat", "dog") for i in range(4)]
    file.write_text("".join(f"{name},{i % 3 * 5}\n" for i, name in enumerate(names)))
    flags = f"--vae_path {vae_path} --img_size 32 --data_path {root} --cached_path {folder}"
    flags += f" --label_file {file} --layout shards --device cpu --num_workers 0 --batch_size 8"
    main_cache.main(shlex.split(flags))
    dataset = open_cache(folder)
    assert dataset.classes == ["0", "5", "10"]
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    follow_classes(dataset, ["0", "10", "5"], "the checkpoint")
    for cache in (dataset, pickle.loads(pickle.dumps(dataset))):
        assert cache.classes == ["0", "10", "5"]
        assert cache.labels.tolist() == [0, 0, 0, 2, 2, 2, 1, 1]


# ---- what is remembered --------------------------------------------------------------------------


def decoded(monkeypatch, dataset, record=None):
    """The names of the pictures that a check of a data set decodes."""
    found = []
    with monkeypatch.context() as patch:
        look = checked.probe
        patch.setattr(
            checked, "probe", lambda source, reading, name: (
                found.append(name), look(source, reading, name))[1])  # fmt: skip
        dataset.check(2, record)
    return sorted(os.path.relpath(name, dataset.root) for name in found)


def test_pictures_are_known_by_content(images, tmp_path, monkeypatch, capsys):
    """A copy is compared, not decoded; of changed data, only what has changed is."""
    first = open_data(images, "train", 48)
    assert len(decoded(monkeypatch, first)) == 8
    assert "8 of 8 images are smaller" in capsys.readouterr().out
    copy = Path(shutil.copytree(images, tmp_path / "copy", copy_function=shutil.copyfile))
    again = open_data(copy, "train", 48)
    assert decoded(monkeypatch, again) == []
    assert "8 of 8 images are smaller" in capsys.readouterr().out  # said, without decoding
    assert again.crcs.tolist() == first.crcs.tolist()
    path = copy / "train/cat/1.jpg"
    content = bytearray(path.read_bytes())
    content[15] ^= 1  # dots per inch
    path.write_bytes(content)
    assert decoded(monkeypatch, open_data(copy, "train", 48)) == ["cat/1.jpg"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", None)  # nothing is read
        assert decoded(monkeypatch, open_data(copy, "train", 48)) == []
    again = open_data(images, "train", 48)  # each folder has its own
    assert decoded(monkeypatch, again) == ["cat/1.jpg"]
    assert again.crcs.tolist() == first.crcs.tolist()


@pytest.mark.parametrize("how", ["damaged", "read-only", "gone"])
def test_what_cannot_be_remembered(images, tmp_path, monkeypatch, how):
    """Is read again, without a word."""
    monkeypatch.setenv("MAR_CACHE", str(tmp_path / "cache"))
    open_data(images, "train", 32).check(2, None)
    for path in (tmp_path / "cache/pictures").iterdir():
        path.write_bytes(path.read_bytes()[:-30] if how == "damaged" else path.read_bytes())
    if how == "gone":
        shutil.rmtree(tmp_path / "cache")
    if how == "read-only":
        monkeypatch.setenv("MAR_CACHE", os.devnull)
    dataset = open_data(images, "train", 32)
    assert len(decoded(monkeypatch, dataset)) == 8 and len(dataset.crcs) == 8


def test_a_record_of_an_earlier_version_is_enough(images, tmp_path, monkeypatch):
    """A run that it resumes does not read its pictures again; nor does any call that has one."""
    files = [(path, path.stat()) for path in sorted((images / "train").rglob("*.jpg"))]
    lines = "\n".join(f"{path} {found.st_size} {found.st_mtime_ns}" for path, found in files)
    record = tmp_path / "data_checked.txt"
    record.write_text(hashlib.sha256(f"32\n{lines}".encode()).hexdigest())
    stored = open_data(images, "train", 32, Reading(orientation="stored"))
    assert decoded(monkeypatch, stored, record) == []
    other = open_data(images, "train", 16, Reading(orientation="stored"))
    assert len(decoded(monkeypatch, other, record)) == 8


@pytest.mark.parametrize("how", ["sizes", "none"])
def test_check_data(images, tmp_path, monkeypatch, how):
    """Nothing is read, and an empty file is found by its size alone."""
    root = Path(shutil.copytree(images, tmp_path / "data"))
    (root / "train/cat/0.jpg").write_bytes(b"")
    dataset = open_data(root, "train", 16, Reading(check_data=how))
    monkeypatch.setattr(Path, "read_bytes", None)
    if how == "none":
        return dataset.check(2, None)
    with pytest.raises(ValueError, match="1 missing or empty images: .*cat/0.jpg"):
        dataset.check(2, None)


def test_processes_with_other_pictures_are_refused(images, monkeypatch):
    """As on nodes with disks of their own: before one reads what another one has listed."""
    monkeypatch.setattr(
        record, "all_gather", lambda own: [own, ("other", {"pictures": "f"}, {"pictures": "7"})]
    )
    with pytest.raises(ValueError, match=r"pictures: expected the same .* 8 in .*on other: 7"):
        open_data(images, "train", 16).check(2, None)


def test_exchanged_classes_are_noticed(images, tmp_path):
    """Two folders that changed names, with files of the same names, spoil a resumed run."""
    pictures = Path(shutil.copytree(images, tmp_path / "data"))

    def described():
        dataset = open_data(pictures, "train", 16)
        dataset.check(2, None)
        return {"classes": dataset.classes, "contents": contents_of(dataset), "files": "x"}

    before = described()
    assert compare(({}, {**before, "files": "y"}), ({}, before)) == ([], [])  # a copy
    (pictures / "train/cat/0.jpg").write_bytes((pictures / "train/cat/1.jpg").read_bytes())
    edited = described()
    assert compare(({}, edited), ({}, before)) == (
        [],
        ["other content of pictures, of the classes cat"],
    )
    cat, dog = pictures / "train/cat", pictures / "train/dog"
    cat.rename(pictures / "train/.x"), dog.rename(cat), (pictures / "train/.x").rename(dog)
    assert compare(({}, described()), ({}, edited))[0] == [
        "the pictures of class cat are those that class dog had"
    ]
