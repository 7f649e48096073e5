"""Inpainting, variations, outpainting, and edit.py. Run: python -m pytest tests/test_editing.py"""

from argparse import Namespace
from functools import cache

import numpy as np
import pytest
import torch
from cli import ROOT, complain
from PIL import Image
from rule import by_rule, rule_input

import edit
from models import build_model, build_tokenizer
from models.editing import border_first, extended, inpaint, inpaint_steps, outpaint, vary
from models.pca import PatchPCA
from models.settings import Sampling
from util.data.settings import Reading
from util.images import to_uint8
from util.rng import image_generators, randn

FIXTURES = ROOT / "tests" / "fixtures"
DIGITS = ("--device", "cpu", "--ckpt", FIXTURES / "checkpoint.pth", "--num_iter", "3")
KINDS = {
    "pixels": {"name": "pixels"},
    "kl": {"name": "kl", "vae_path": FIXTURES / "kl.ckpt"},
    "vq": {"name": "vq", "vae_path": FIXTURES / "vq.ckpt"},
    "vq_latent": {"name": "vq_latent", "vae_path": FIXTURES / "vq.ckpt"},
    "pca": {"name": "pca", "scale": 1.0, "shift": 0.0},
}
SMALLER = {"mar_tiny": {"buffer_size": 4}}  # so that tests are fast
SAMPLING = Sampling(num_iter=3, cfg=2.0)
LABELS = [0, 1, 2]
RANDOM = {"order": "random"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function that makes a model of 4×4 tokens and its tokenizer, of images of 16×16 pixels."""
    path = tmp_path_factory.mktemp("pca") / "pca.ckpt"
    torch.manual_seed(0)
    torch.save(PatchPCA(12, 4).state_dict(), path)
    KINDS["pca"]["vae_path"] = path

    @cache
    def make(kind="pixels", backbone="mar_tiny", **options):
        tokenizer = build_tokenizer(**KINDS[kind])
        fitting = {} if tokenizer.num_codes else {"num_sampling_steps": "2", "max_timestep": 950}
        shape = {"vae_stride": tokenizer.stride, "patch_size": tokenizer.patch_size}
        shape |= {"vae_embed_dim": tokenizer.channels, "num_codes": tokenizer.num_codes}
        shape = {name: value for name, value in shape.items() if value is not None}
        options |= {**shape, **fitting, **SMALLER.get(backbone, {})}
        model = build_model(backbone, img_size=16, class_num=3, **options)
        return by_rule(model), tokenizer

    return make


@pytest.fixture
def drawn():
    """Three images of 16×16 pixels."""
    return np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


def generators(n=3):
    return image_generators(0, range(n))


def encoded(tokenizer, images):
    """Latents of images, as the tokenizer's evaluation normalizes them, without a draw."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 255 * 2 - 1
    with torch.no_grad():
        moments = tokenizer.encode(pixels)
    means = moments.chunk(2, 1)[0] if tokenizer.gaussian else moments
    return means if tokenizer.num_codes else tokenizer.to_latents(means)


def watch(tokenizer, monkeypatch):
    """A list that grows by the latents that the tokenizer decodes."""
    found, decode = [], tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda x, g=None: [found.append(x), decode(x, g)][1])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_known_tokens_and_known_pixels_stay(kind, made, drawn, monkeypatch):
    """Tokens without a pixel of the mask are the tokenizer's encoding, to the bit, and pixels
    outside of it are the originals; the others are drawn. Each image has a mask of its own."""
    model, tokenizer = made(kind)
    mask = np.zeros((3, 16, 16))
    mask[0, 5:7, 5], mask[1, :, 8:] = 1, 255  # one token, a half, none
    decoded, latents = watch(tokenizer, monkeypatch), encoded(tokenizer, drawn)
    images = inpaint(model, tokenizer, drawn, mask, LABELS, SAMPLING, generators())
    assert (images[mask == 0] == drawn[mask == 0]).all()
    changed = (model.patchify(decoded[-1]) != model.patchify(latents)).any(2)
    hidden = torch.zeros(3, 4, 4, dtype=torch.bool)
    hidden[0, 1, 1] = hidden[1, :, 2:] = True
    assert not changed[~hidden.flatten(1)].any()
    if not tokenizer.num_codes:  # a code may be drawn again
        assert changed[hidden.flatten(1)].all()


@pytest.mark.parametrize("kind", KINDS)
def test_all_known_gives_the_reconstruction(kind, made, drawn):
    """Without blending, what the tokenizer makes of the images; with it, the images."""
    model, tokenizer = made(kind)
    given = model, tokenizer, drawn, np.zeros((3, 16, 16)), LABELS, SAMPLING, generators()
    with torch.no_grad():
        expected = to_uint8(tokenizer.decode(encoded(tokenizer, drawn)))
    assert np.array_equal(inpaint(*given, blend=False), expected)
    assert np.array_equal(inpaint(*given), drawn)


def test_steps_end_with_the_result(made, drawn):
    """The last of inpaint_steps is inpaint's, and tokens become known one step after the other."""
    model, tokenizer = made()
    mask = np.ones((3, 16, 16))
    mask[1:, :8], mask[2, :15] = 0, 0
    given = model, tokenizer, drawn, mask, LABELS, SAMPLING
    steps = list(inpaint_steps(*given, generators()))
    assert np.array_equal(steps[-1][0], inpaint(*given, generators()))
    assert [hidden.flatten(1).sum(1).tolist() for _, hidden in steps] == [
        [13, 6, 3], [8, 4, 2], [0, 0, 0],
    ]  # fmt: skip


def test_a_decoder_that_draws_changes_no_token(made, drawn, monkeypatch):
    """Its draws, as of the Consistency Decoder, do not depend on which steps are shown, and leave
    the generators as they are for the next step."""
    model, tokenizer = made()
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda x, g: decode(x) + randn(x.shape, g, x.device))
    given = model, tokenizer, drawn, np.ones((3, 16, 16)), LABELS, SAMPLING
    steps = list(inpaint_steps(*given, generators()))
    assert np.array_equal(steps[-1][0], inpaint(*given, generators()))


@pytest.mark.parametrize(
    ("backbone", "options", "sampling"),
    [
        ("mar_tiny", {}, {"num_iter": 3}),
        ("mar_tiny", {}, {"num_iter": 3, "refresh_every": 2}),
        ("ar_tiny", {"order": "random"}, {"num_iter": 5}),
        ("ar_tiny", {}, {"num_iter": 5}),
    ],
)
def test_images_with_other_masks_do_not_matter(backbone, options, sampling, made):
    """In a batch with 5, 2, 0, 3 and 2 unknown tokens each image is what it is in a batch of those
    with as many, and the number of steps is that of the first."""
    model, _ = made("pixels", backbone, **options)
    latents, mask = rule_input("ragged", (5, 3, 16, 16)), torch.zeros(5, 16)
    for row, count in enumerate((5, 2, 0, 3, 2)):
        mask[row, 16 - count :] = 1
    settings = {"cfg": 2.0, "max_timestep": 950, **sampling}

    def sample(*rows):
        rows, own = list(rows), [image_generators(0, [row])[0] for row in rows]
        steps = min(settings["num_iter"], int(mask[rows].sum(1).max()) or 1)
        how = {**settings, "num_iter": steps, "labels": torch.tensor(rows) % 3, "generator": own}
        return list(model.sample_steps(len(rows), latents=latents[rows], mask=mask[rows], **how))

    together = sample(0, 1, 2, 3, 4)
    assert len(together) == sampling["num_iter"]
    for rows in ([0], [1, 4], [2], [3]):
        alone = sample(*rows)
        assert torch.equal(together[-1][0][rows], alone[-1][0])
        assert torch.equal(together[0][1][rows], alone[0][1])
    assert torch.equal(together[-1][0][2], latents[2])
    assert not together[-1][1].any()


def test_strength_is_the_share_of_tokens_drawn(made, drawn):
    """A quarter of 16 tokens, others in other images; none at 0, all at 1."""
    model, tokenizer = made()

    def changed(strength):
        images = vary(model, tokenizer, drawn, LABELS, SAMPLING, generators(), strength=strength)
        return (images != drawn).reshape(3, 4, 4, 4, 4, 3).any((2, 4, 5)).reshape(3, 16)

    quarter = changed(0.25)
    assert quarter.sum(1).tolist() == [4, 4, 4] and len({*map(tuple, quarter)}) == 3
    assert (changed(0.0).sum(), changed(0.01).sum(), changed(1.0).sum()) == (0, 3, 48)


def test_border_first(made, drawn):
    """The end of an order is generated first: there are the known tokens, then those beside them.
    At random among equals."""
    hidden = torch.ones(2, 4, 4)
    hidden[:, :, 0] = 0
    orders = border_first(hidden, generators(2))
    assert torch.equal(orders.sort(1).values, torch.arange(16).expand(2, -1))
    columns = [3] * 4 + [2] * 4 + [1] * 4 + [0] * 4
    assert (orders % 4).tolist() == [columns, columns]
    assert not torch.equal(*orders)
    model, tokenizer = made()
    mask = np.repeat(np.repeat(hidden.numpy(), 4, 1), 4, 2)
    given = model, tokenizer, drawn[:2], mask, LABELS[:2], SAMPLING.but(num_iter=12), generators(2)
    states = [left.float().mean((0, 1)) for _, left in inpaint_steps(*given, order="border")]
    assert states[3].tolist() == [0, 0, 1, 1] and states[7].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("kind", ["pixels", "vq"])
def test_windows_agree_where_they_overlap(kind, made, drawn, monkeypatch):
    """Each window holds the tokens of the panorama, those that it was given among them, and half of
    it or more was known; the picture's own pixels stay."""
    model, tokenizer = made(kind)
    windows, decoded = [], watch(tokenizer, monkeypatch)
    original = model.sample_steps

    def sample_steps(*args, **kwargs):
        steps = list(original(*args, **kwargs))
        windows.append((steps[-1][0], kwargs["mask"]))
        return iter(steps)

    monkeypatch.setattr(model, "sample_steps", sample_steps)
    given, more = (LABELS, SAMPLING.but(num_iter=2)), {"left": 8, "right": 9, "top": 3}
    images = outpaint(model, tokenizer, drawn, *given, generators(), **more)
    assert images.shape == (3, 4 + 16, 8 + 16 + 12, 3)
    assert np.array_equal(images[:, 4:, 8:24], drawn)
    parts = decoded[0].unfold(2, latents := 16 // tokenizer.stride, 1).unfold(3, latents, 1)
    parts = parts.permute(2, 3, 0, 1, 4, 5).flatten(0, 1)  # all places of a window
    for window, mask in windows:
        assert mask.float().mean() <= 0.5
        assert (parts == window).flatten(1).all(1).any()
    assert len(windows) == 3 + 4  # beside the picture, then above


@pytest.mark.parametrize("backbone", ["mar_tiny", "ar_tiny"])
def test_large_images_with_other_masks_do_not_matter(backbone, made):
    """Windows begin at each image's own known tokens, and an image takes part in those alone that
    have something to fill in: it is what it is by itself."""
    model, tokenizer = made("pixels", backbone, **(RANDOM if backbone == "ar_tiny" else {}))
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 32, 3), dtype=np.uint8)
    mask = np.zeros((3, 24, 32))
    mask[0, :, :12], mask[1, 16:, 20:], mask[2, :4, :8] = 1, 1, 1

    def fill(*rows):
        own = [image_generators(0, [row])[0] for row in rows]
        return inpaint(model, tokenizer, images[[*rows]], mask[[*rows]], None, SAMPLING, own)

    together = fill(0, 1, 2)
    for row in range(3):
        assert np.array_equal(together[[row]], fill(row))


def test_panorama_from_nothing(made):
    """Without images, the first window is generated like any image, and stays."""
    model, tokenizer = made()
    given = LABELS, SAMPLING, generators()
    wide = outpaint(model, tokenizer, None, *given, right=24)
    assert wide.shape == (3, 16, 40, 3)
    latents = model.sample_tokens(
        3, labels=torch.tensor(LABELS), generator=generators(), **SAMPLING.asdict()
    )
    assert np.array_equal(wide[:, :, :16], to_uint8(tokenizer.decode(latents)))


def test_the_seam_fades(made, monkeypatch):
    """A tokenizer that darkens by 40 is corrected beside the known pixels, ever less away from
    them, and not beyond the seam; known pixels are not touched."""
    model, tokenizer = made()
    images, mask = np.full((1, 16, 16, 3), 140, np.uint8), np.zeros((1, 16, 16))
    mask[:, :, 8:] = 1
    monkeypatch.setattr(tokenizer, "decode", lambda x, g=None: torch.full_like(x, 100 / 127.5 - 1))
    given = model, tokenizer, images, mask, None, SAMPLING, generators(1)
    row = inpaint(*given, seam=0.75)[0, 5, :, 0]
    assert row.tolist() == [140] * 8 + [130, 120, 110] + [100] * 5
    assert inpaint(*given, seam=0.0)[0, 5, :, 0].tolist() == [140] * 8 + [100] * 8


def test_what_a_model_cannot_is_said(made, drawn):
    """A raster model fills in the lower rows, and extends at the bottom; DiT nothing."""
    mask = np.zeros((3, 16, 16))
    mask[:, 8:] = 1
    rest = LABELS, SAMPLING, generators()
    raster = made("pixels", "ar_tiny")
    assert np.array_equal(inpaint(*raster, drawn, mask, *rest)[:, :8], drawn[:, :8])
    assert outpaint(*raster, drawn, *rest, bottom=8).shape == (3, 24, 16, 3)
    only = "learned the raster order only, and fills in .* the rows at the bottom"
    with pytest.raises(ValueError, match=only):
        inpaint(*raster, drawn, mask[:, ::-1], *rest)
    with pytest.raises(ValueError, match=only):
        outpaint(*raster, drawn, *rest, right=8)
    with pytest.raises(ValueError, match=f"^fill border: this model {only}"):
        inpaint(*raster, drawn, mask, *rest, order="border")
    with pytest.raises(ValueError, match="DiT generates all tokens at once and cannot keep any"):
        inpaint(*made("pixels", "dit_tiny"), drawn, mask, *rest)
    with pytest.raises(ValueError, match="fill border: DiT generates all tokens at once"):
        inpaint(*made("pixels", "dit_tiny"), drawn, mask, *rest, order="border")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((3, 16, 16, 3))}, "type float64: expected uint8"),
        ({"images": np.zeros((3, 12, 16, 3), np.uint8)}, "12×16 pixels: expected 16×16, .* of 4"),
        ({"mask": np.zeros((16, 16))}, r"mask of shape \(16, 16\): expected \(3, 16, 16\)"),
        ({"labels": [1]}, r"labels of shape \(1,\): expected one for each of 3 images"),
        ({"generators": generators(2)}, r"generators of shape \(2,\): expected one for each"),
        ({"generators": None}, r"generators of shape \(\): expected one for each"),
        ({"strength": 2}, "strength 2: expected a number from 0 to 1"),
        ({"order": "spiral"}, "fill 'spiral': expected one of random, border"),
        ({"sigma": 1}, "sigma: no such setting of Editing"),
    ],
)
def test_wrong_arguments(changes, message, made, drawn):
    """What does not fit is named, with what was expected."""
    given = {"images": drawn, "mask": np.ones((3, 16, 16)), "labels": LABELS}
    given |= {"sampling": SAMPLING, "generators": generators()}
    with pytest.raises(ValueError, match=message):
        inpaint(*made(), **{**given, **changes})


# ---- edit.py -------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with a.png and b.png, of 16×16 pixels, and mask.png, its right half white."""
    draw, mask = np.random.default_rng(0), np.zeros((16, 16), np.uint8)
    for name in ("a", "b"):
        pixels = draw.integers(0, 256, (16, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    mask[:, 8:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(text):
    edit.main([*map(str, DIGITS), *text.split()])


def read(path):
    return np.asarray(Image.open(path))


def test_edit_with_a_mask_and_a_box(files, capsys):
    """A mask and the same box do the same; what is outside of them stays, in every result."""
    call("--image a.png b.png --mask mask.png --labels 3,4 --per_image 2 --out one --compare c.png")
    call("--image a.png b.png --box 8,0,8,9999999999 --labels 3,4 --per_image 2 --out two grid.png")
    names = ["0000-a.png", "0001-a.png", "0002-b.png", "0003-b.png"]
    assert sorted(path.name for path in (files / "one").iterdir()) == names
    one, two = ([read(files / folder / name) for name in names] for folder in ("one", "two"))
    assert np.array_equal(one, two)
    assert np.array_equal(one[0][:, :4], one[1][:, :4])
    assert not np.array_equal(one[0], one[1])
    assert read("c.png").shape == (2 * 66 + 2, 4 * 66 + 2, 3)
    assert read("grid.png").shape == (2 * 66 + 2, 2 * 66 + 2, 3)  # enlarged to 64
    assert "4 results" in capsys.readouterr().out


def test_results_have_their_own_seeds_and_classes(files):
    """Whatever the size of a batch; classes go to pictures in order, or all to a single one."""
    for size, out in ((64, "one"), (3, "two")):
        more = f"--labels 3,4 --per_image 2 --batch_size {size} --out {out}"
        call(f"--image a.png b.png --box 8,0,8,16 {more}")
    one, two = ([read(path) for path in sorted((files / out).iterdir())] for out in ("one", "two"))
    assert np.abs(np.subtract(one, two, dtype=int)).max() <= 1
    assert len({image.tobytes() for image in one}) == 4
    args = Namespace(per_image=2, labels="3,4")
    assert edit.plan(args, 2, [3, 4]) == [(0, 3), (0, 3), (1, 4), (1, 4)]
    assert edit.plan(args, 1, [3, 4]) == [(0, 3), (0, 3), (0, 4), (0, 4)]
    assert edit.plan(args, 2, [None]) == [(0, None), (0, None), (1, None), (1, None)]


def test_boxes_and_masks_are_where_one_sees_them(files):
    """In pixels of the upright picture, 16×32 of which the middle is cropped and halved; upright
    also if the model's data were read as they are stored."""
    pixels = np.zeros((32, 16), np.uint8)
    pixels[8:16, :8] = 255
    exif = Image.Exif()
    exif[274] = 6  # stored a quarter turn to the left
    for name in ("picture", "mask"):
        Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90).save(f"{name}.png", exif=exif)
    expected = np.zeros((8, 8), bool)
    expected[:4, :4] = True
    Image.fromarray(expected).save("small.png")
    reading = Reading(orientation="exif", channels=1)
    for mask, boxes in (
        *((None, [(0, 8, 8, 8)]), (None, [(0, 0, 8, 16)])),
        *(("mask.png", []), ("small.png", [])),
    ):
        seen, part = edit.read_one("picture.png", mask, Namespace(box=boxes), (8, 8), reading)
        assert np.array_equal(seen[..., 0] > 127, expected) and np.array_equal(part, expected)
    config = {"model": {"img_size": 8}, "data": {"reading": {"orientation": "stored"}}}
    args = Namespace(image=["picture.png"], mask=["mask.png"], box=[], outpaint=[])
    seen, part = edit.read(args, config, Namespace(image_channels=1), 2)
    assert np.array_equal(seen[0, ..., 0] > 127, expected) and np.array_equal(part[0], expected)


def test_edit_varies_and_extends(files, capsys):
    """One picture: a result for each label. Without a picture, new ones are extended; without a
    label, it is said that there is no guidance."""
    call("--image a.png --strength 0.5 --labels 0-2 --out three")
    assert len(list((files / "three").iterdir())) == 3
    call("--outpaint right=7 left=2 --per_image 2 --out wide.v2")
    assert read("wide.v2/0001.png").shape == (8, 8 + 8 + 2, 3)
    assert read("wide.v2/0001.png")[:, 2:10].std() > 0  # the new picture itself
    out = capsys.readouterr().out
    assert out.count("batch 1 of 1: 1/1 window") == 1
    assert out.count("batch 1 of 1: 4/4 window") == 1
    assert "NOTE: --outpaint right=7: 8 pixels" in out and "NOTE: no --labels" in out
    assert "cfg 1.0" in out.splitlines()[-3]


def test_a_box_that_is_cropped_away(files, capsys):
    """It is said which of several boxes the model does not see, and of which picture."""
    Image.new("L", (64, 16)).save("wide.png")
    call("--image b.png wide.png --box 0,0,8,16 8,0,24,16 --out folder --num_iter 1")
    notes = [line for line in capsys.readouterr().out.splitlines() if "--box" in line]
    assert notes == ["NOTE: --box 0,0,8,16: marks nothing of what the model sees of wide.png"]


def test_pictures_are_opened_before_the_model(files, capsys):
    """What is wrong with them is said at once, and so are boxes outside of them."""
    (files / "words.png").write_text("words")
    for text, message in (
        ("--image nope.png --strength 1", "nope.png: not a readable image"),
        ("--image a.png --mask words.png", "words.png: not a readable image"),
        ("--image a.png --box 16,0,4,4", "--box 16,0,4,4: outside of a.png, which is 16×16"),
    ):
        flags = "--ckpt", "not/there.pth", *text.split()
        assert message in complain(capsys, edit.main, *flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--image a.png --box 16,0,4,4", "--box 16,0,4,4: outside of a.png, which is 16×16"),
        ("--image a.png --mask nope.png", "nope.png: not a readable image"),
        ("--image a.png b.png --labels 1,2,3 --strength 1", "3 classes for 2 pictures"),
        ("--image a.png --mask black.png", "--mask black.png: marks nothing"),
        ("--image a.png --mask wide.png", "--mask wide.png: 64×16 pixels, expected 16×16"),
        ("--outpaint left=2 left=4", "--outpaint left: given twice"),
        ("--outpaint right=999999999999", "8×1000000000008 pixels: expected at most 200 million"),
        ("--outpaint left=2 --out a.npz", "--out a.npz: expected a .png or a folder"),
        ("--outpaint left=2 --out a.JPG", "--out a.JPG: expected a .png or a folder"),
        ("--outpaint left=2 --ckpt not/there.pth", "not/there.pth"),
        ("--outpaint left=2 --ckpt no/model", "no/model: no such file or folder"),
    ],
)
def test_edit_says_what_is_wrong(text, message, files, capsys):
    """In one line, before anything is sampled."""
    Image.new("L", (16, 16)).save("black.png")
    Image.new("L", (64, 16)).save("wide.png")
    assert message in complain(capsys, edit.main, *DIGITS, *text.split())


def test_extended_rounds_up_to_tokens(drawn):
    """Margins are whole tokens, and are what is to be filled in."""
    images, mask = extended(drawn, 4, left=1, bottom=5)
    assert images.shape == (3, 24, 20, 3)
    assert np.array_equal(images[~mask].reshape(drawn.shape), drawn)
