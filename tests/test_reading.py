"""How one picture is read: modes, depths, transparency, orientation, limits, channels.

Run: python -m pytest tests/test_reading.py
"""

import io
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kinds import FILES, HTML, ORIENTATION, RAMP, SIDE, chunk, colours, png, turned
from PIL import Image

import main_cache
import main_mar
from models.found import check_noted
from util.data import match_channels, open_data, pictures
from util.data.manifest import read_manifest, write_manifest
from util.data.pictures import KINDS, probe, read_picture, resolved, size_of, to_pixels, to_range
from util.data.settings import PLAIN, Reading

STORED = Reading(flip=False, orientation="stored", channels=3)
EXIF = STORED.but(orientation="exif")


def written(folder, title):
    """The path of a file of a kind."""
    name, write = FILES[title]
    write(folder / name)
    return folder / name


def values(path, reading=STORED):
    return np.asarray(read_picture(path, reading))


def test_plain_pictures_keep_their_bits(tmp_path):
    """RGB, grey and CMYK JPEGs and PNGs are what PIL converts to RGB, to the last bit."""
    for i, title in enumerate(
        ("JPEG", "JPEG, grey, beside colour", "JPEG, CMYK as Adobe writes it")
    ):
        path = tmp_path / f"{i}.jpg"
        FILES[title][1](path)
        with Image.open(path) as image:
            expected = np.asarray(image.convert("RGB"))
        assert np.array_equal(values(path), expected)
        tensor = to_range(to_pixels(read_picture(path, STORED)))
        assert tensor.shape == (3, SIDE, SIDE)
        assert torch.equal(
            tensor, torch.from_numpy(expected / np.float32(255)).movedim(-1, 0) * 2 - 1
        )


@pytest.mark.parametrize(
    "title",
    [t for t in FILES if "grey, 16 bits" in t or t == "PGM, 16 bits"],
)
def test_sixteen_bits_of_grey(tmp_path, title):
    """A ramp from 0 to 65535 is one from 0 to 255, rounded, dark where it was dark."""
    expected = np.round(RAMP / 65535 * 255)
    expected = 255 - expected if "white is 0" in title else expected
    for channels, shape in ((1, ()), (3, (3,))):
        found = values(written(tmp_path, title), STORED.but(channels=channels))
        assert found.shape == (SIDE, SIDE, *shape) and found.dtype == np.uint8
        assert np.array_equal(found[..., 0] if shape else found, expected)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_an_unknown_range_is_refused(tmp_path, mode):
    """With path, mode and what was expected, by reading and by the check alike."""
    path = tmp_path / "x.tif"
    Image.fromarray(RAMP.astype(np.int32 if mode == "I" else np.float32)).save(path)
    expected = rf"x.tif: mode {mode}, .* of an unknown range; expected 8 or 16 bits"
    with pytest.raises(ValueError, match=expected):
        read_picture(path, STORED)
    assert mode in probe(path, STORED).problem


def test_transparency_shows_the_background(tmp_path):
    """Exactly where alpha is 0; opaque pixels are untouched, others blended, in every mode."""
    colour = np.array([255, 0, 0])
    for mode in ("RGBA", "LA", "PA"):
        path = tmp_path / f"{mode}.{'tif' if mode == 'PA' else 'png'}"
        image = Image.new("RGBA", (3, 1), (20, 20, 20, 255))
        image.putpixel((0, 0), (20, 20, 20, 0))
        image.putpixel((1, 0), (20, 20, 20, 128))
        image.convert(mode).save(path)
        white, red = values(path)[0], values(path, STORED.but(background="#f00"))[0]
        assert white[0].tolist() == [255] * 3 and white[2].tolist() == [20] * 3
        assert np.array_equal(red[0], colour) and red[2].tolist() == [20] * 3
        if mode != "PA":  # a palette has no half of a colour
            half = 20 * 128 / 255 + np.array([colour, [255] * 3]) * 127 / 255
            assert np.abs(np.stack([red[1], white[1]]) - half).max() <= 1


def test_a_transparent_colour_shows_the_background(tmp_path, monkeypatch):
    """tRNS, of one colour, of a palette, and of grey of 2 and of 16 bits."""
    path = written(tmp_path, "PNG with a transparent colour (tRNS)")
    monkeypatch.setattr(pictures, "STRIP", 5)
    original, found = np.asarray(colours()), values(path)
    assert found[0, 0].tolist() == [255] * 3
    assert np.array_equal(found.reshape(-1, 3)[1:], original.reshape(-1, 3)[1:])
    Image.fromarray(RAMP).save(path, transparency=int(RAMP[0, 5]))
    assert values(path)[0, 5, 0] == 255 and values(path)[0, 4, 0] == round(RAMP[0, 4] / 257)
    few = png(4, 1, 2, 0, b"\0\x1b", chunk(b"tRNS", b"\0\1"))  # four greys of 2 bits
    path.write_bytes(few)
    assert values(path)[0, :, 0].tolist() == [0, 255, 170, 255]
    of_16 = np.array([[4660, 4660, 4660], [50000, 50000, 50000]], ">u2").tobytes()
    path.write_bytes(png(2, 1, 16, 2, b"\0" + of_16, chunk(b"tRNS", of_16[:6])))
    assert values(path)[0, :, 0].tolist() == [255, 50000 >> 8]
    image = colours("P")
    image.save(path, transparency=image.getpixel((3, 3)))
    clear = np.asarray(image) == image.getpixel((3, 3))
    assert (values(path)[clear] == 255).all()
    assert np.array_equal(values(path)[~clear], np.asarray(image.convert("RGB"))[~clear])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_orientations(tmp_path, orientation, suffix):
    """Each of the eight is turned upright with exif, and left with stored; the check counts it."""
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:, :8, 0], upright[:4, :, 1] = 255, 255  # all four quarters differ
    stored = {  # as a camera held in this way stores it
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif, path = Image.Exif(), tmp_path / f"x.{suffix}"
    exif[ORIENTATION] = orientation
    lossless = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {"lossless": True}
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **lossless)
    for reading, expected in ((EXIF, upright), (STORED, stored)):
        assert np.abs(values(path, reading).astype(int) - expected).max() < 9
        found = probe(path, reading)
        assert found.size == expected.shape[1::-1]
        assert size_of(path, reading) == expected.shape[:2]
        assert found.kinds == ([] if orientation == 1 else [TURN_KIND[reading.orientation]])


@pytest.mark.parametrize("orientation", [1, 6])
def test_tiffs_are_always_upright(tmp_path, orientation):
    """Their header alone gives the same size as their pixels, whatever the reading."""
    Image.new("RGB", (16, 8)).save(tmp_path / "x.tif", tiffinfo={ORIENTATION: orientation})
    for reading in (EXIF, STORED):
        shape = values(tmp_path / "x.tif", reading).shape[:2]
        assert shape == ((8, 16) if orientation == 1 else (16, 8))
        assert size_of(tmp_path / "x.tif", reading) == shape
        assert probe(tmp_path / "x.tif", reading).size == shape[::-1]


TURN_KIND = {"exif": "turned", "stored": "stored"}


def test_limits_are_the_same_in_check_and_training(tmp_path, monkeypatch):
    """PIL's limits are lifted; ours names path, size and limit, before any pixel is decoded."""
    assert Image.MAX_IMAGE_PIXELS is None
    path = written(tmp_path, "PNG")
    monkeypatch.setattr(pictures, "LARGEST", SIDE * SIDE)
    assert not probe(path, STORED).problem
    monkeypatch.setattr(pictures, "LARGEST", SIDE * SIDE - 1)
    with pytest.raises(ValueError, match=rf"x.png: {SIDE}×{SIDE} pixels, expected at most"):
        read_picture(path, STORED)
    assert "pixels, expected at most" in probe(path, STORED).problem


def test_long_texts_and_open_files(tmp_path):
    """A text of 3 MB, which PIL refuses, is no damage; an open file is read, and has a name."""
    path = written(tmp_path, "PNG with a text of 3 MB")
    assert np.array_equal(values(path), np.asarray(colours()))
    stream = io.BytesIO(path.read_bytes())
    assert np.array_equal(np.asarray(read_picture(stream, STORED, "in.zip")), np.asarray(colours()))
    for source in (io.BytesIO(HTML), io.BytesIO(path.read_bytes()[:900])):
        with pytest.raises(ValueError, match=r"^in.zip/x.png: not a readable image"):
            read_picture(source, STORED, "in.zip/x.png")


def test_warnings_name_their_picture(tmp_path):
    """PIL's, in the check, also from several threads; outside of it they are not shown."""
    path = written(tmp_path, "JPEG with damaged EXIF data")
    with warnings.catch_warnings(record=True) as shown, pictures.warned() as found:
        probe(path, EXIF)
    assert [words for words in found if words.startswith(f"{path} (")] == found and not shown
    assert found


# ---- all pictures of a data set ------------------------------------------------------------------


def folder_of(root, *modes):
    """A folder of a class of PNGs with these modes; returns its paths."""
    (root / "train" / "a").mkdir(parents=True)
    paths = [root / "train" / "a" / f"{i:03}.png" for i in range(len(modes))]
    for path, mode in zip(paths, modes, strict=True):
        colours(mode).save(path)
    return paths


def test_channels_are_those_of_the_data(tmp_path, monkeypatch):
    """1 if all are grey; a single one in colour, or a coloured background, makes it 3."""
    monkeypatch.setattr(pictures, "SAMPLE", 2)
    paths = folder_of(tmp_path, "L", "1", "LA", "L", "L", "L", "L")
    assert resolved(PLAIN, ["a"], paths).channels == 1
    assert resolved(PLAIN.but(background="red"), ["a"], paths).channels == 3
    assert resolved(PLAIN.but(background="grey"), ["a"], paths).channels == 1
    assert resolved(PLAIN.but(channels=3), ["a"], paths).channels == 3
    (tmp_path / "x.png").write_bytes(HTML)
    assert resolved(PLAIN, ["a"], [*paths, tmp_path / "x.png"]).channels == 1
    assert resolved(PLAIN, ["a"], [tmp_path / "x.png"]).channels == 3
    for i in range(len(paths)):
        colours("P").save(paths[i])
        assert resolved(PLAIN, ["a"], paths).channels == 3
        colours("L").save(paths[i])


def test_imagenet_is_read_as_published(tmp_path):
    """As stored and in three channels, without a look at any file; a flag still decides."""
    names = [f"n{i:08}" for i in range(1000)]
    found = resolved(PLAIN, names, [tmp_path / "none.jpg"])
    assert (found.orientation, found.channels) == ("stored", 3)
    assert resolved(PLAIN.but(orientation="exif"), names, []).orientation == "exif"
    assert resolved(PLAIN, names[1:], []).orientation == "exif"


class Takes:
    """A tokenizer that takes images with so many channels."""

    def __init__(self, channels):
        self.image_channels = channels


def test_a_tokenizer_decides_between_grey_and_three_equal_channels(tmp_path):
    """Grey data get three; colour is dropped only if asked, or as in the run that is resumed."""
    folder_of(tmp_path / "grey", "L", "L")
    grey = open_data(tmp_path / "grey", "train", SIDE)
    assert grey.channels == 1 and grey[0][0].shape == (1, SIDE, SIDE)
    match_channels(grey, Takes(1), None)
    match_channels(grey, Takes(3), None)
    image = grey[0][0]
    assert grey.channels == 3 and torch.equal(image, image[:1].expand(3, -1, -1))
    folder_of(tmp_path / "colour", "RGB", "L")
    colour = open_data(tmp_path / "colour", "train", SIDE)
    with pytest.raises(ValueError, match="takes grey images, .* pass --channels 1"):
        match_channels(colour, Takes(1), None)
    match_channels(colour, Takes(1), None, follow=True)
    assert colour[0][0].shape == (1, SIDE, SIDE)
    with pytest.raises(ValueError, match="--channels 1: the tokenizer takes .* 3"):
        match_channels(open_data(tmp_path / "grey", "train", SIDE), Takes(3), 1)
    with pytest.raises(ValueError, match="channels: 1, the tokenizer takes 3"):
        match_channels(SimpleNamespace(channels=1), Takes(3), None)  # as of the digits


def cached(root, *more):
    """Call main_cache.py with pixels as latents."""
    flags = ["--data_path", str(root), "--cached_path", str(root / "cache"), "--device", "cpu"]
    flags += ["--tokenizer", "pixels", "--img_size", str(SIDE), "--num_workers", "0"]
    main_cache.main([*flags, *more])


def test_a_cache_is_of_one_reading(tmp_path):
    """It is continued with the same one only; an older one is, if none of its pictures matters."""
    path = folder_of(tmp_path, "L", "RGB")[0]
    cached(tmp_path)
    noted = {"orientation": "exif", "background": "#ffffff", "channels": 3}
    manifest = read_manifest(tmp_path / "cache")
    assert manifest["reading"] == noted
    with pytest.raises(ValueError, match="read with --orientation exif, here it is stored; pass"):
        cached(tmp_path, "--orientation", "stored")
    with pytest.raises(ValueError, match="read with --background #ffffff, here it is #000000"):
        cached(tmp_path, "--background", "black")
    older = {name: value for name, value in manifest.items() if name != "reading"}
    turned(6)(path)
    for layout in ("images", "shards"):
        write_manifest(tmp_path / "cache", older)
        with pytest.raises(ValueError, match="earlier version, .*EXIF orientation: 1 of 2"):
            cached(tmp_path)
        assert "reading" not in read_manifest(tmp_path / "cache"), layout
    cached(tmp_path, "--orientation", "stored")
    assert read_manifest(tmp_path / "cache")["reading"] == {**noted, "orientation": "stored"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--orientation", "stored"), "--orientation stored: .* read with exif; leave the flag"),
        (("--background", "black"), "--background black: .* read with #ffffff; leave the flag"),
        (("--channels", "1"), "--channels 1: .* read with 3; leave the flag"),
        (("--orientation", "auto", "--background", "#FFFFFF", "--channels", "3"), None),
    ],
)
def test_training_on_a_cache_reads_no_pictures(flags, message):
    """A flag for reading them is refused unless the latents are of pictures read so."""
    noted = {"orientation": "exif", "background": "#ffffff", "channels": 3}
    args, given = main_mar.get_parser().parse_given(["--use_cached", *flags])
    check_noted(args, given, {})  # an older cache does not say it
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        check_noted(args, given, noted)


def test_the_check_says_what_was_decided(tmp_path, capsys):
    """A line for each kind that is there, and none for others."""
    paths = folder_of(tmp_path, "RGB", "RGBA", "RGB")
    turned(6)(paths[0])
    open_data(tmp_path, "train", SIDE, record=tmp_path / "record.txt")
    said = [line for line in capsys.readouterr().out.splitlines() if "pictures" in line]
    assert [line.partition(": ")[2] for line in said] == [
        KINDS["turned"].format("1 of 3"),
        KINDS["transparent"].format("1 of 3", background="white"),
    ]


def test_a_background_is_a_colour(capsys):
    """A name or #rrggbb; anything else is refused with the flags."""
    parser = main_mar.get_parser()
    assert parser.parse_args(["--background", "#0a0B0c"]).background == "#0a0B0c"
    for wrong in ("nocolour", "#12345", "#11223344", ""):
        with pytest.raises(SystemExit):
            parser.parse_args(["--background", wrong])
        assert f"--background: {wrong!r}: expected the name of a colour" in capsys.readouterr().err
