"""Files of every kind that may lie in a folder of images, as functions that write them."""

import os
import struct
import zlib

import numpy as np
from PIL import Image, PngImagePlugin

SIDE = 16
ORIENTATION = 274  # tag of EXIF
RAMP = np.linspace(0, 65535, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)


def colours(mode="RGB", seed=0):
    """A picture of a mode; with alpha, the left half is transparent."""
    draw = np.random.default_rng(seed)
    image = Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    if mode in ("LA", "RGBA", "PA"):
        image = image.convert("RGBA")
        image.paste(0, (0, 0, SIDE // 2, SIDE))
    return image.convert(mode)


def saved(mode="RGB", *args, **more):
    """A function that writes a picture of a mode to a path."""
    return lambda path: colours(mode).save(path, *args, **more)


def deep(dtype, mode=None, **more):
    """A function that writes a grey ramp of this dtype."""
    return lambda path: Image.fromarray(RAMP.astype(dtype)).save(path, **more)


def chunk(name, content):
    """The bytes of a chunk of a PNG."""
    check = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + check


def png(width, height, bits, colour, rows, before=b""):
    """The bytes of a PNG. rows: of the pixels, each with its filter byte. before: more chunks."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    body = before + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def deep_png(channels, colour):
    """A function that writes a PNG with 16 bits per channel."""
    values = np.repeat(RAMP[:, :, None], channels, 2).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    return content(png(SIDE, SIDE, 16, colour, rows))


def content(data):
    """A function that writes bytes."""
    return lambda path: path.write_bytes(data)


def cut(mode="RGB", share=0.95):
    """A function that writes the first part of a picture's file."""

    def write(path):
        colours(mode).save(path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return write


def turned(orientation, mode="RGB", **more):
    """A function that writes a picture with an EXIF orientation."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return lambda path: colours(mode).save(path, exif=exif, **more)


def frames(**more):
    """A function that writes two frames or pages."""
    return lambda path: colours().save(path, save_all=True, append_images=[colours(seed=1)], **more)


def long_text(path):
    text = PngImagePlugin.PngInfo()
    text.add_text("notes", "x" * 3_000_000, zip=True)
    colours().save(path, pnginfo=text)


def named(path, name):
    """Write a picture to a path and rename it."""
    colours().save(path.with_name(name))
    os.replace(path.with_name(name), path)


def linked(target):
    return lambda path: path.symlink_to(target(path))


def elsewhere(path):
    place = path.parents[2] / "elsewhere.png"
    colours().save(place)
    return place


def with_picture(path):
    """A folder with a picture in it."""
    path.mkdir()
    colours().save(path / "inside.png")


HTML = b"<!DOCTYPE html><html><body>404</body></html>"
# what it is -> (its place in the folder of a class, how it is written)
FILES = {
    "JPEG": ("x.jpg", saved()),
    "JPEG, progressive": ("x.jpeg", saved(progressive=True)),
    "JPEG, grey, beside colour": ("x.jpg", saved("L")),
    "JPEG, CMYK as Adobe writes it": ("x.jpg", saved("CMYK")),
    "JPEG with EXIF orientation 6": ("x.jpg", turned(6)),
    "JPEG with damaged EXIF data": ("x.jpg", saved(exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\1")),
    "PNG": ("x.png", saved()),
    "PNG, black and white (1 bit)": ("x.png", saved("1")),
    "PNG, grey": ("x.png", saved("L")),
    "PNG, grey with alpha": ("x.png", saved("LA")),
    "PNG, grey, 16 bits": ("x.png", deep(np.uint16)),
    "PNG, palette": ("x.png", saved("P")),
    "PNG, palette with transparency (tRNS)": (
        "x.png",
        lambda path: colours("P").save(path, transparency=bytes(range(256))),
    ),
    "PNG with a transparent colour (tRNS)": (
        "x.png",
        lambda path: colours().save(path, transparency=colours().getpixel((0, 0))),
    ),
    "PNG with alpha": ("x.png", saved("RGBA")),
    "PNG with alpha, opaque": ("x.png", lambda path: colours().convert("RGBA").save(path)),
    "PNG, RGB, 16 bits": ("x.png", deep_png(3, 2)),
    "PNG with alpha, 16 bits": ("x.png", deep_png(4, 6)),
    "PNG with EXIF orientation 3": ("x.png", turned(3)),
    "PNG with a text of 3 MB": ("x.png", long_text),
    "PNG, animated": ("x.png", frames()),
    "GIF": ("x.gif", saved()),
    "GIF, animated": ("x.gif", frames()),
    "WebP": ("x.webp", saved(lossless=True)),
    "WebP with alpha": ("x.webp", saved("RGBA", lossless=True)),
    "WebP, animated": ("x.webp", frames(lossless=True)),
    "BMP": ("x.bmp", saved()),
    "PPM": ("x.ppm", saved()),
    "PGM, 16 bits": ("x.pgm", deep(np.uint16)),
    "TIFF": ("x.tif", saved()),
    "TIFF with alpha": ("x.tiff", saved("RGBA")),
    "TIFF, CMYK": ("x.tif", saved("CMYK")),
    "TIFF, YCbCr, with Pillow 13": ("x.tif", saved("YCbCr")),
    "TIFF, LAB": ("x.tif", lambda path: Image.new("LAB", (SIDE, SIDE), (120, 9, 9)).save(path)),
    "TIFF, grey, 16 bits": ("x.tif", deep(np.uint16)),
    "TIFF, grey, 16 bits, white is 0": ("x.tif", deep(np.uint16, tiffinfo={262: 0})),
    "TIFF, grey, 32-bit integers": ("x.tif", deep(np.int32)),
    "TIFF, grey, floats": ("x.tif", deep(np.float32)),
    "TIFF of two pages": ("x.tif", frames()),
    "TIFF with orientation 6": ("x.tif", lambda path: colours().save(path, tiffinfo={274: 6})),
    "JPEG 2000": ("x.jp2", saved()),
    "AVIF": ("x.avif", saved()),
    "HEIC named .jpg": ("x.jpg", content(b"\0\0\0\x18ftypheic" + bytes(99))),
    "JPEG XL named .png": ("x.png", content(b"\xff\x0a" + bytes(99))),
    "PNG named .jpg": ("x.jpg", lambda path: named(path, "y.png")),
    "file ending in .PNG": ("x.PNG", saved()),
    "name with spaces, umlauts, emoji": ("ä ö — 猫🐈.png", saved()),
    "name with a line break": ("a\nb.png", saved()),
    "picture of more than 200 million pixels": ("x.png", content(png(20000, 10001, 8, 2, b"\0"))),
    "JPEG, truncated": ("x.jpg", cut()),
    "PNG, truncated": ("x.png", cut()),
    "empty file": ("x.jpg", content(b"")),
    "HTML named .jpg": ("x.jpg", content(HTML)),
    "text named .png": ("x.png", content(b"not a picture")),
    "pointer of Git LFS": ("x.png", content(b"version https://git-lfs.github.com/spec/v1\n")),
    "SVG named .png": ("x.png", content(b'<svg xmlns="http://www.w3.org/2000/svg"/>')),
    "EPS named .png": ("x.png", content(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")),
    "link to a picture": ("x.png", linked(elsewhere)),
    "link to nothing": ("x.png", linked(lambda path: path.with_name("nowhere.png"))),
    "link to itself": ("x.png", linked(lambda path: path)),
    "pipe (fifo)": ("x.png", os.mkfifo),
    "folder named x.png, with a picture": ("x.png", with_picture),
    "folder in a class's folder": ("more", with_picture),
    "hidden picture": (".x.png", saved()),
    "macOS's ._x.png": ("._x.png", content(b"\0\5\x16\7" + bytes(99))),
    "__MACOSX beside the classes": ("../__MACOSX", with_picture),
    ".ipynb_checkpoints in a class's folder": (".ipynb_checkpoints", with_picture),
    ".ipynb_checkpoints beside the classes": ("../.ipynb_checkpoints", with_picture),
    "Thumbs.db": ("Thumbs.db", content(b"\xd0\xcf\x11\xe0")),
    ".DS_Store": (".DS_Store", content(b"\0\0\0\1Bud1")),
    "notes.txt": ("notes.txt", content(b"notes")),
    "SVG": ("x.svg", content(b"<svg/>")),
    "PDF": ("x.pdf", content(b"%PDF-1.7")),
    "latents (.npz)": ("x.npz", content(b"PK\3\4")),
    "video": ("x.mp4", content(b"\0\0\0\x20ftypisom")),
    "zip archive": ("x.zip", content(b"PK\3\4")),
    "picture beside the classes": ("../x.png", saved()),
}
