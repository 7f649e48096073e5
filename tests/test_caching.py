"""Caching stopped, called again, and repairing. Run: python -m pytest tests/test_caching.py"""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import complain
from PIL import Image
from test_caches import (
    bit,
    command,
    contents,
    cut,
    empty,
    exchanged,
    gone,
    latents,
    make_both,
    make_old,
    swap,
)

import main_cache
from util import files
from util.data import cached, caching, convert, manifest, shard_writer, shards
from util.data.cached import read_moments
from util.data.manifest import layout_of, read_manifest
from util.data.shards import ShardedCache
from util.flags import run
from util.run import lock, stop

ROOT = Path(__file__).parent.parent
LAYOUTS = pytest.mark.parametrize("layout", ["images", "shards"])


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Eight images make three shards."""
    monkeypatch.setattr(shards, "SHARD_SIZE", 3)


@pytest.fixture(scope="module")
def made(images, vae_path, tmp_path_factory):
    """A folder with a cache of eight images in each layout."""
    return make_both(images, vae_path, tmp_path_factory.mktemp("made"))


@pytest.fixture
def cache(images, vae_path, tmp_path, capsys):
    """A function that caches images, its own copy of them at first, and returns the last line."""
    pictures = Path(shutil.copytree(images, tmp_path / "pictures"))

    def call(layout, *flags, folder=tmp_path / "cache"):
        main_cache.main(command(pictures, vae_path, folder, layout, *flags))
        return capsys.readouterr().out.splitlines()[-1]

    call.pictures, call.folder = pictures, tmp_path / "cache"
    return call


def edit(path):
    Image.new("RGB", (40, 36), "red").save(path)


# ---- the pictures --------------------------------------------------------------------------------


@LAYOUTS
def test_an_edited_picture_is_encoded_anew(cache, layout):
    """And the shard that it is in; a picture that was touched, not."""
    assert "8 written, 0 there already" in cache(layout)
    before = contents(cache.folder)
    os.utime(cache.pictures / "train/cat/0.jpg")
    assert "0 written, 8 there already" in cache(layout)
    assert contents(cache.folder) == before
    edit(cache.pictures / "train/dog/0.jpg")
    new = 1 if layout == "images" else 3
    assert f"{new} written, {8 - new} there already" in cache(layout)
    changed = {name for name, content in contents(cache.folder).items() if content != before[name]}
    assert not any("shard-00000" in name or "cat" in name for name in changed)
    assert any("shard-00001.moments" in name or "dog/0.jpg" in name for name in changed)
    assert "0 written, 8 there already" in cache(layout)


@LAYOUTS
def test_pictures_added_and_removed_are_named(cache, layout):
    """Latents of a removed picture are not kept silently; those of an added one are made."""
    cache(layout)
    shutil.copy(cache.pictures / "train/cat/0.jpg", cache.pictures / "train/cat/9.jpg")
    if layout == "images":
        assert "1 written, 8 there already" in cache(layout)
    else:
        with pytest.raises(ValueError, match=r"changed: .* added: cat/9\.jpg"):
            cache(layout)
        (cache.pictures / "train/cat/9.jpg").unlink()
    (cache.pictures / "train/dog/3.jpg").unlink()
    with pytest.raises(ValueError, match=r"data set has changed: .*dog/3\.jpg"):
        cache(layout)


@LAYOUTS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda train: edit(train / "cat/1.jpg"), "1 differ: cat/1.jpg (edited)"),
        (lambda train: gone(train / "cat/1.jpg"), "1 differ: cat/1.jpg (no such picture)"),
        (
            lambda t: shutil.copy(t / "cat/1.jpg", t / "dog/9.jpg"),
            "1 differ: dog/9.jpg (not cached)",
        ),
        (lambda t: swap(t / "cat", t / "dog"), "8 differ: cat/0.jpg (edited)"),
        (lambda t: swap(t / "cat/1.jpg", t / "cat/2.jpg"), "2 differ: cat/1.jpg (edited), cat/2"),
        (lambda t: (t / "dog").rename(t / "emu"), "8 differ: emu/0.jpg (not cached), emu/1"),
    ],
)
def test_verify_compares_pictures(images, made, tmp_path, capsys, layout, change, message):
    """With --data_path: content and names, whatever their times."""
    pictures = Path(shutil.copytree(images, tmp_path / "pictures", copy_function=shutil.copy))
    flags = ("--verify", "--cached_path", made / layout, "--data_path", pictures)
    main_cache.main(list(map(str, (*flags, "--num_workers", 0))))
    assert "all names, and the content of 8 pictures" in capsys.readouterr().out
    change(pictures / "train")
    assert message in complain(capsys, main_cache.main, *flags)


def test_training_compares_classes(made, images, tmp_path):
    """With the folders of --data_path, if it has as many: another data set is not meant."""
    pictures = Path(shutil.copytree(images, tmp_path / "pictures"))
    open_as = ((32, 2, 2), 2, None, pictures)
    cached.open_cache(made / "shards", *open_as)
    (pictures / "train/emu").mkdir()
    cached.open_cache(made / "shards", *open_as)
    (pictures / "train/emu").rmdir()
    swap(pictures / "train/dog", pictures / "train/cat")
    with pytest.raises(ValueError, match=r"classes are not .*: cat/0.jpg is a picture of dog;"):
        cached.open_cache(made / "shards", *open_as)
    edit(pictures / "train/cat/0.jpg")
    edit(pictures / "train/dog/0.jpg")
    cached.open_cache(made / "shards", *open_as)  # edited pictures are found by --verify
    (pictures / "train/dog").rename(pictures / "train/eel")
    with pytest.raises(ValueError, match="pictures: its classes are not those .*: dog, eel"):
        cached.open_cache(made / "shards", *open_as)


# ---- called again --------------------------------------------------------------------------------


@pytest.mark.parametrize("part", shards.PARTS)
@pytest.mark.parametrize("change", [bit, cut, gone, exchanged])
def test_shards_are_repaired(images, vae_path, made, tmp_path, part, change):
    """Whatever happened to a part: afterwards all bytes are what they were."""
    folder = Path(shutil.copytree(made / "shards", tmp_path / "shards"))
    change(folder / f"shard-00000.{part}.npy")
    main_cache.main(command(images, vae_path, folder, "shards"))
    assert contents(folder) == contents(made / "shards")


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: bit(folder / "cat/1.jpg.npz", 400),
        lambda folder: empty(folder / "cat/1.jpg.npz"),
        lambda folder: gone(folder / "cat/1.jpg.npz"),
        lambda folder: swap(folder / "cat", folder / "dog"),
        lambda folder: shutil.copy(folder / "cat/1.jpg.npz", folder / "dog/1.jpg.npz"),
        lambda folder: latents(folder / "cat/1.jpg.npz", lambda values: values * np.nan),
        lambda folder: bit(folder / "cache.checksums.npy"),
        lambda folder: gone(folder / "cache.sources.npy"),
    ],
)
def test_files_are_repaired(images, vae_path, made, tmp_path, change):
    """Likewise of single images."""
    folder = Path(shutil.copytree(made / "images", tmp_path / "images"))
    change(folder)
    main_cache.main(command(images, vae_path, folder, "images", "--batch_size", "8"))
    convert.verify(folder)
    again, before = contents(folder), contents(made / "images")
    assert again.keys() == before.keys()
    for name in (name for name in again if name.endswith(".npz")):
        one, other = (read_moments(f / name) for f in (folder, made / "images"))
        for view in cached.VIEWS:
            np.testing.assert_allclose(one[view], other[view], atol=1e-4)  # of other batches


def test_older_caches_learn_what_they_are(images, vae_path, made, tmp_path):
    """Called again, shards without checksums and files without an index get them, and no others."""
    for layout in ("images", "shards"):
        folder = Path(shutil.copytree(made / layout, tmp_path / layout))
        facts = {
            n: v
            for n, v in read_manifest(folder).items()
            if n in (*convert.FACTS, "reading", "vae_path")
        }
        if layout == "images":
            for path in folder.glob("cache.*.npy"):
                path.unlink()
            manifest.write_manifest(folder, facts)
        else:
            make_old(folder)
        main_cache.main(command(images, vae_path, folder, layout))
        assert contents(folder) == contents(made / layout)


def test_older_shards_are_read_once(made, tmp_path, monkeypatch):
    """Before training; then --output_dir has their checksums, which spawned workers are sent."""
    folder = Path(shutil.copytree(made / "shards", tmp_path / "shards"))
    make_old(folder)
    record, before = tmp_path / "out" / "cache_checked.npz", contents(folder)
    dataset = ShardedCache(folder, None, record)
    assert np.array_equal(dataset.checksums, ShardedCache(made / "shards").checksums)
    assert contents(folder) == before  # a data set is not written to
    with monkeypatch.context() as patch:
        patch.setattr(shards, "damaged_parts", None)
        again = ShardedCache(folder, None, record)
        with pytest.raises(TypeError):
            ShardedCache(folder)
    bit(folder / "shard-00001.flips.npy")
    for opened in (again, pickle.loads(pickle.dumps(again))):
        with pytest.raises(ValueError, match=r"flips.npy: damaged: the latents of dog/1\.jpg"):
            opened.views(5)
    bit(record)
    with pytest.raises(ValueError, match=r"damaged: shard-00001.flips.npy \(not the sha256"):
        ShardedCache(folder, None, record)


# ---- stopped -------------------------------------------------------------------------------------


def stop_after(monkeypatch, batches):
    """Ask to stop when so many batches have been encoded; returns the list of those."""
    encode, done = caching.moments_and_flips, []

    def spy(tokenizer, images, flip):
        done.append(len(images))
        if len(done) == batches:
            signal.raise_signal(signal.SIGTERM)
        return encode(tokenizer, images, flip)

    monkeypatch.setattr(caching, "moments_and_flips", spy)
    return done


@pytest.fixture
def handlers():
    """The handlers of signals are afterwards what they were."""
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@LAYOUTS
@pytest.mark.parametrize("batches", [1, 2, 3])
def test_stopped_and_called_again(
    images, vae_path, made, tmp_path, monkeypatch, capsys, handlers, layout, batches
):
    """At the next batch, with status 75; nothing is encoded twice, and the bytes are the same."""
    folder = tmp_path / "cache"
    flags = command(images, vae_path, folder, layout)
    done = stop_after(monkeypatch, batches)
    with pytest.raises(SystemExit) as status:
        run(main_cache.main, flags)
    assert status.value.code == stop.STATUS and len(done) == batches
    assert "call the same command again to complete" in capsys.readouterr().err
    with pytest.raises(ValueError, match="as the run that .* was stopped"):
        cached.open_cache(folder, (32, 2, 2), 2)
    main_cache.main(flags)
    assert sum(done) == 8
    assert contents(folder) == contents(made / layout)


def test_a_stopped_shard_goes_on(images, vae_path, tmp_path, monkeypatch, handlers):
    """Pieces of any --batch_size are kept; not damaged ones, nor those of edited pictures."""
    pictures, folder = shutil.copytree(images, tmp_path / "pictures"), tmp_path / "cache"
    flags = command(pictures, vae_path, folder, "shards")
    monkeypatch.setattr(shards, "SHARD_SIZE", 8)
    for batches, change in (
        (2, lambda: None),
        (1, lambda: bit(folder / "shard-00000.00004-00006.piece", 400)),
        (1, lambda: edit(pictures / "train/cat/0.jpg")),
    ):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop_after(patch, batches)
            run(main_cache.main, flags)
        change()
    with monkeypatch.context() as patch:
        done = stop_after(patch, -1)
        main_cache.main([*flags, "--batch_size", "3"])
    assert done == [2, 2]  # of images 0 and 1, 6 and 7
    convert.verify(folder)
    assert not list(folder.glob("*.piece"))


def test_all_processes_share_a_shard(tmp_path, monkeypatch):
    """Batches hold the same images whatever the number of processes, and are dealt evenly."""
    dealt = {
        world: [
            dealt_batches(monkeypatch, tmp_path / f"{world}-{r}", world, r) for r in range(world)
        ]
        for world in (1, 2, 3, 8)
    }
    for batches in dealt.values():
        counts = list(map(len, batches))
        assert max(counts) - min(counts) <= 1
        assert sorted(chain.from_iterable(batches)) == dealt[1][0]
    assert list(map(len, dealt[8])) == [1, 1, 1, 1, 0, 0, 0, 0]


def dealt_batches(monkeypatch, folder, world, rank):
    """The batches of 7 images, of one shard, that a process would encode."""
    folder.mkdir()
    asked = []

    def read(batches):
        asked.extend(batches)
        raise stop.Stopped

    with monkeypatch.context() as patch, pytest.raises(stop.Stopped):
        patch.setattr(shards, "SHARD_SIZE", 100)
        patch.setattr(shard_writer, "world_size", lambda: world)
        patch.setattr(shard_writer, "rank", lambda: rank)
        patch.setattr(shard_writer, "all_gather", lambda value: [value, {0: [range(7)]}])
        names, facts = [f"a/{i}" for i in range(7)], dict.fromkeys(convert.FACTS)
        facts |= {"shape": [1, 1, 1], "dtype": "float16", "classes": ["a"]}
        shard_writer.write(folder, facts, names, [0] * 7, read, 2, None)
    return asked


# ---- several processes ---------------------------------------------------------------------------

TORCHRUN = "-m torch.distributed.run --nnodes=1 --nproc_per_node=2"
TORCHRUN += " --rdzv-backend=c10d --rdzv-endpoint=localhost:0"


def start(*flags, **settings):
    """tests/two_caching.py in two processes; a Popen with the output of both."""
    # as many threads as `made` had here: their count orders the sums of a convolution
    settings |= {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    script = [sys.executable, *TORCHRUN.split(), str(ROOT / "tests/two_caching.py")]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*script, *map(str, flags)], env={**os.environ, **settings}, **how)


def finish(process):
    """(exit status, output) of a process."""
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


@pytest.mark.slow
@LAYOUTS
def test_two_processes_write_the_same_bytes(images, vae_path, made, tmp_path, layout):
    """As one process, also where they continue what one began; they verify it together."""
    flags = command(images, vae_path, tmp_path / layout, layout)
    status, output = finish(start(*flags))
    assert status == 0 and "8 written, 0 there already" in output, output
    assert {"encoded 2 by 0", "encoded 2 by 1"} <= {*output.splitlines()}
    assert same_latents(tmp_path / layout, made / layout)
    for name in ("shard-00000.moments.npy", "shard-00001.names.npy", "cat/1.jpg.npz"):
        (tmp_path / layout / name).unlink(missing_ok=True)
    status, output = finish(start(*flags))
    new = 6 if layout == "shards" else 1
    assert status == 0 and f"{new} written, {8 - new} there already" in output, output
    assert same_latents(tmp_path / layout, made / layout)
    # which rank 1 reads
    path = "shard-00001.flips.npy" if layout == "shards" else "cat/1.jpg.npz"
    bit(tmp_path / layout / path, 400)
    status, output = finish(start("--verify", "--cached_path", tmp_path / layout))
    assert status != 0 and f"1 damaged files: {path}" in output, output


def same_latents(folder, other):
    """Whether two caches have the same bytes; single images, encoded with others, nearly."""
    found, expected = contents(folder), contents(other)
    if layout_of(folder) == "shards":
        return found == expected
    files = [name for name in expected if name.endswith(".npz")]
    pairs = [[read_moments(f / name)["moments"] for f in (folder, other)] for name in files]
    return found.keys() == expected.keys() and all(np.allclose(*pair, atol=1e-4) for pair in pairs)


@pytest.mark.slow
@LAYOUTS
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_are_stopped(images, vae_path, made, tmp_path, layout, number):
    """By torchrun, which is asked to: both end at their next batch, and one alone goes on."""
    flags = command(images, vae_path, tmp_path / layout, layout, "--batch_size", 1)
    process = start(*flags, SLOW="2", SHARD="100")
    for line in process.stdout:
        if line.startswith("encoded 1 by"):
            break
    process.send_signal(number)
    begun = time.monotonic()
    status, output = finish(process)
    assert status != 0 and time.monotonic() - begun < 25
    assert output.count("stopped: ") == 1, output  # what all processes say is said once
    assert "call the same command again" in output and 'caching.py", line' not in output
    done = len(list((tmp_path / layout).rglob("*.piece" if layout == "shards" else "*/*.npz")))
    assert 2 <= done < 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_SIZE", 100)
        left = stop_after(patch, -1)
        main_cache.main(flags)
    assert sum(left) == 8 - done
    convert.verify(tmp_path / layout)


# ---- the folder ----------------------------------------------------------------------------------


@LAYOUTS
def test_leftovers_of_dead_runs_are_removed(cache, layout):
    """By the next run."""
    cache(layout)
    path = cache.folder / "cat/.3.jpg.npz.999999999.part"
    if layout == "shards":
        path = cache.folder / ".shard-00000.moments.npy.999999999.part"
    path.write_bytes(b"half")
    os.utime(path, (1, 1))
    cache(layout)
    assert not list(cache.folder.rglob("*.part"))


def test_two_runs_in_one_folder(cache, vae_path, capsys):
    """The second is refused."""
    cache("images")
    flags = command(cache.pictures, vae_path, cache.folder, "images")
    with lock.folder(cache.folder, "--cached_path"):
        line = complain(capsys, main_cache.main, *flags)
    assert f"--cached_path {cache.folder}: in use by another run" in line


@LAYOUTS
def test_a_cache_without_room_is_not_begun(cache, monkeypatch, layout):
    """One line with path, needed and free; nothing is encoded."""
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    monkeypatch.setattr(caching, "moments_and_flips", None)
    with pytest.raises(ValueError, match=r"cache: .*kB needed, 1 kB free"):
        cache(layout)
