"""Folders of images to evaluate. Run: python -m pytest tests/test_image_sets.py"""

import numpy as np
import pytest
from PIL import Image
from test_metrics import folder, pictures

from util.data.crop import center_crop_arr
from util.data.settings import PLAIN, plain_reading
from util.evaluation.image_sets import open_images


def test_what_is_hidden_is_no_image_of_a_folder(tmp_path, capsys):
    """What macOS and editors leave beside images, at any depth, is left out, and counted; the
    folder itself may be hidden."""
    root = folder(tmp_path / ".hidden" / "a", pictures(3, 0))
    for name in ("._0000.png", ".cache/x.png", "__MACOSX/x.png", "b/._0000.PNG"):
        (root.parent / name).parent.mkdir(exist_ok=True)
        (root.parent / name).write_bytes(b"no image")
    found = open_images(root.parent)
    assert [path.name for path in found.paths] == ["0000.png", "0001.png", "0002.png"]
    said = "2 hidden files, 1 __MACOSX, 1 hidden folder"
    assert capsys.readouterr().out == f"left out of {root.parent}: {said}\n"


def test_photos_of_any_size_are_cropped_like_the_data(tmp_path, capsys):
    """To the known size, which is said; without it, two sizes are named."""
    root = folder(tmp_path / "photos", pictures(3, 0))
    wide = np.concatenate([pictures(2, 1, side=32)] * 2, axis=2)
    Image.fromarray(wide[0]).save(root / "1.png")
    found = open_images(root, 24)
    cropped = np.asarray(center_crop_arr(Image.fromarray(wide[0]), 24))
    assert np.array_equal(found[3][0], cropped) and len(found) == 4
    assert np.array_equal(found[0][0], pictures(3, 0)[0])
    line = f"{root}: 1 of 4 images are not 24×24, such as {root}/1.png of 32×64 pixels: they are"
    assert capsys.readouterr().out == f"{line} cropped like the data\n"
    with pytest.raises(ValueError, match=r"0000.png of 24×24 pixels, but .*1.png of 32×64 .*--img"):
        open_images(root)
    assert open_images(folder(tmp_path / "wide", wide))[0][0].shape == (32, 64, 3)


def test_photos_are_turned_upright_and_grey_ones_are_images(tmp_path):
    """As in training: by EXIF unless told otherwise, before sizes are compared."""
    grey = np.arange(6 * 4, dtype=np.uint8).reshape(6, 4) * 10
    for name, turn in (("a", 1), ("b", 6)):
        pixels = grey if turn == 1 else np.rot90(grey)  # stored lying on its side
        exif = Image.Exif()
        exif[274] = turn
        Image.fromarray(pixels).save(tmp_path / f"{name}.png", exif=exif)
    found = open_images(tmp_path)
    assert all(np.array_equal(found[i][0], np.stack([grey] * 3, 2)) for i in range(2))
    with pytest.raises(ValueError, match="a.png of 6×4 pixels, but .*b.png of 4×6 pixels"):
        open_images(tmp_path, reading=PLAIN.but(orientation="stored"))


def test_reading_of_real_images_is_the_checkpoint_s():
    """Unless a flag says otherwise; they are never mirrored."""
    data = {"classes": ["a"], "reading": {"flip": True, "orientation": "stored", "channels": 1}}
    data["reading"] |= {"label_file": "gone.csv", "check_data": "none"}  # not of these pictures
    said = {"flip": True, "orientation": None, "background": "#000000"}
    expected = PLAIN.but(orientation="stored", channels=1, background="#000000")
    assert plain_reading(data, said) == expected
    assert plain_reading(data, {"orientation": "exif"}).orientation == "exif"
    assert plain_reading(None, {}) == plain_reading({"classes": ["a"]}, {}) == PLAIN
