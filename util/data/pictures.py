"""How one picture is read, by every script alike: a file to pixels of 8 bits, in mode L or RGB.

A picture is used as its owner sees it, or refused with its path. What a `Reading` decides and a
picture makes use of, such as its EXIF orientation, is counted by `probe` and said by `sentences`.

Read as elsewhere: a file is what its content says, whatever its name; colour profiles are not
applied; of 16 bits per colour the upper 8 are used, as PIL does.
"""

import os
import re
import stat
import threading
import warnings
from collections import Counter, namedtuple
from contextlib import contextmanager
from functools import partial
from itertools import chain
from multiprocessing.pool import ThreadPool

import numpy as np
from PIL import Image, ImageColor, PngImagePlugin
from torchvision.transforms import functional

from util.data.classes import are_imagenet
from util.dist import all_gather, rank, world_size
from util.files import first_line

LARGEST = 200_000_000  # pixels: those of the largest cameras; read and cropped they take 1.4 GB
STRIP = 1024  # rows that are composed at once, to spare memory
SAMPLE = 256  # pictures that are looked at before all are, for their channels

# PIL's own limits, 90 million pixels and texts of 1 MB, make way for LARGEST
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = 1 << 26
PngImagePlugin.MAX_TEXT_MEMORY = 1 << 28
warnings.filterwarnings("ignore", module=r"PIL\.")  # they name no path; `warned` does

# a kind of picture that a Reading decides about -> what the data check says of it
KINDS = {
    "turned": "pictures with an EXIF orientation: {}, turned upright (--orientation stored leaves "
    "them)",
    "stored": "pictures with an EXIF orientation: {}, left as they are stored (--orientation exif "
    "turns them)",
    "transparent": "partly transparent pictures: {}, shown over {background} (--background)",
    "deep": "grey pictures of more than 8 bits: {}, scaled to 8",
    "frames": "pictures with several frames or pages: {}, of which the first is used",
    "grey": "colour pictures: {}, made grey (--channels 1)",
}

# first bytes of files that PIL does not read -> what they are
FOREIGN = {
    rb"\Z": "an empty file",
    rb"....ftyp(heic|heix|heim|hevc|mif1|msf1)": "HEIC, as phones write it: convert it to JPEG",
    rb"....ftypavi[fs]": "AVIF, which this Pillow was built without: update it, or convert to PNG",
    rb"\xff\x0a|\0\0\0\x0cJXL ": "JPEG XL: convert it to JPEG or PNG",
    rb"\s*(<!doctype html|<html|<head)": "a page of HTML, as of a failed download",
    rb"\s*(<\?xml.*)?<svg": "SVG, a drawing: convert it to PNG",
    rb"version https://git-lfs": "a pointer of Git LFS: call git lfs pull",
    rb"%PDF": "PDF: convert its pages to PNG",
    rb"\x93NUMPY": "an array of NumPy: save it as PNG",
    rb".{128}DICM": "DICOM: convert it to PNG",
    rb"(....ftyp|RIFF....AVI|\x1a\x45\xdf\xa3)": "a video: extract its frames",
    rb"(PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!)": "an archive: unpack it",
}
NUMBERS = {"I": "32-bit integers", "F": "floats"}
ORIENTATION, BITS, PHOTOMETRIC = 274, 258, 262  # tags of EXIF and TIFF
_T = Image.Transpose
TURNS = {  # by the orientation; 1 is upright
    **{2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE},
    **{6: _T.ROTATE_270, 7: _T.TRANSVERSE, 8: _T.ROTATE_90},
}
SIDEWAYS = [TURNS[5], TURNS[6], TURNS[7], TURNS[8]]  # width and height change places

CHANGED = ("turned", "transparent", "deep")  # those that earlier versions read otherwise

Probe = namedtuple("Probe", "size problem kinds")  # kinds: of KINDS
_now = threading.local()  # its name: the picture that this thread reads


class Refused(ValueError):
    """A picture that is not used; the message says why, but not which one."""


# ---- one picture ---------------------------------------------------------------------------------


def read_picture(source, reading, name=None):
    """A picture as a PIL image, in mode RGB, or L if reading.channels is 1.

    source: its path, or an open binary file; `name` is what messages call it, if not by its path.
    reading: a Reading as `resolved` returns it. Raises ValueError that names the picture.
    """
    with opened(source, name) as image:
        picture = flattened(pixels(image), reading.background)
        turn = _turn(image) if reading.orientation == "exif" else None
        mode = "L" if reading.channels == 1 else "RGB"
        picture = picture if picture.mode == mode else picture.convert(mode)
        return picture if turn is None else picture.transpose(turn)


def to_pixels(picture):
    """A picture as a tensor (C, H, W), uint8."""
    return functional.pil_to_tensor(picture).contiguous()  # as convolutions sum in this order


def to_range(pixels):
    """Pixels of 8 bits in [-1, 1], float32, by the arithmetic of the published code."""
    return pixels.float().div(255) * 2 - 1


def size_of(source, reading):
    """(height, width) of a picture as `read_picture` returns it; only its header is read.

    Raises ValueError that names the picture.
    """
    with opened(source) as image:
        turns = reading.orientation == "exif" and _turn(image) in SIDEWAYS
        return image.size if turns else image.size[::-1]


def probe(source, reading, name=None):
    """The Probe of a picture: its size, what is wrong with it or None, and names of KINDS.

    It is read but for JPEGs, which are decoded at 1/8: that still detects truncation. Arguments as
    those of `read_picture`.
    """
    try:
        with opened(source, name) as image:
            size = image.size
            image.draft("RGB", (1, 1))
            picture, turn = pixels(image), _turn(image)
            turns = reading.orientation == "exif" and turn is not None
            clear = "A" in picture.mode and picture.getchannel("A").getextrema()[0] < 255
            kinds = {
                "turned": turns,
                "stored": turn is not None and not turns,
                "transparent": clear,
                "deep": white_of(image) is not None,
                "frames": _has_frames(image),
                "grey": reading.channels == 1 and picture.mode.startswith("RGB"),
            }
            size = size[::-1] if turns and turn in SIDEWAYS else size
            return Probe(size, None, [kind for kind, found in kinds.items() if found])
    except ValueError as error:
        return Probe(None, str(error), [])


def _has_frames(image):
    """Whether there are frames or pages besides the first; a phone's second view (MPO) is none."""
    try:
        return image.format != "MPO" and getattr(image, "is_animated", False)
    except Exception:  # a second frame that is damaged is not used
        return True


@contextmanager
def opened(source, name=None):
    """A picture whose header is read and found usable. Whatever is raised inside names it."""
    is_path = not hasattr(source, "read")
    name = name or (source if is_path else getattr(source, "name", "picture"))
    _now.name = name
    try:
        if is_path:
            _check_file(source)
        with Image.open(source) as image:
            _check_header(image)
            yield image
    except Refused as error:
        raise ValueError(f"{name}: {error}") from error
    except Exception as error:  # PIL can raise nearly anything for a damaged file
        reason = getattr(error, "strerror", None) or kind_of_file(source) or first_line(error)
        reason = re.sub(r" (<_io\..*>|'.*')$", "", reason)  # how PIL calls the file
        raise ValueError(f"{name}: not a readable image ({reason})") from error
    finally:
        _now.name = None


def _check_file(path):
    kind = os.stat(path).st_mode
    if stat.S_ISDIR(kind):
        raise Refused("a folder, expected a picture")
    if not stat.S_ISREG(kind):  # reading a pipe would wait forever
        raise Refused("a pipe, socket or device, expected a picture")


def _check_header(image):
    width, height = image.size
    if width * height > LARGEST:
        raise Refused(
            f"{width}×{height} pixels, expected at most {LARGEST // 10**6} million; make it smaller"
        )
    if image.format in ("EPS", "WMF"):  # EPS would start Ghostscript
        raise Refused(f"{image.format} holds drawings, expected pixels; save it as PNG")
    if image.mode in ("I", "F") and white_of(image) is None:
        raise Refused(
            f"mode {image.mode}, {NUMBERS[image.mode]} of an unknown range; expected 8 or 16 bits, "
            "unsigned: scale it from black to white, and save it as PNG"
        )


# ---- its pixels ----------------------------------------------------------------------------------


def white_of(image):
    """The number that stands for white in a grey picture of more than 8 bits, or None."""
    if image.mode.startswith("I;16"):  # 12 bits are not spread over 16, unlike those of JPEG 2000
        bits = getattr(image, "tag_v2", {}).get(BITS, (16,))[0]
        return 2 ** min(bits, 16) - 1
    # PIL spreads all PPMs of more than 8 bits over 16; earlier versions open such PNGs like this
    return 65535 if image.mode == "I" and image.format in ("PPM", "PNG") else None


def is_grey(image):
    """Whether the header of a picture says that it has no colour."""
    return image.mode in ("1", "L", "LA", "La") or white_of(image) is not None


def pixels(image):
    """An open picture decoded to 8 bits: in mode L or RGB, or in LA or RGBA if it says alpha."""
    if image.format == "PNG" and "transparency" in image.info:
        _scale_transparency(image)
    image.load()
    if white := white_of(image):
        return _scaled(image, white)
    clear = "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa")
    mode = ("L" if is_grey(image) else "RGB") + "A" * clear
    return image if image.mode == mode else image.convert(mode)


def _scale_transparency(image):
    """Give a PNG's transparent colour the 8 bits that PIL will give its pixels, but not this."""
    raw, value = image.tile[0][3], image.info["transparency"]
    if raw in ("L;2", "L;4"):
        image.info["transparency"] = value * 255 // (2 ** int(raw[-1]) - 1)
    elif raw == "RGB;16B":
        image.info["transparency"] = tuple(part >> 8 for part in value)


def _scaled(image, white):
    """A grey picture of more than 8 bits, as 8: v·255/white, rounded; in mode L or LA."""
    values = np.asarray(image)
    table = (np.arange(65536, dtype=np.int64) * 255 + white // 2) // white
    table = table.clip(0, 255).astype(np.uint8)
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0:  # white is 0, which PIL does not heed
        table = table[white - np.arange(65536).clip(0, white)]
    grey = Image.fromarray(table[values])
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.uint8(255) * (values != image.info["transparency"])))
    return grey


def flattened(picture, background):
    """A picture of `pixels` without transparency: shown over a background, a colour as text."""
    if "A" not in picture.mode:
        return picture
    colour = ImageColor.getrgb(background)
    mode = picture.mode[:-1] if len({*colour}) == 1 else "RGB"
    flat = Image.new(mode, picture.size, colour if mode == "RGB" else colour[0])
    width, height = picture.size
    for top in range(0, height, STRIP):
        part = picture.crop((0, top, width, min(top + STRIP, height)))
        flat.paste(part.convert(mode), (0, top), part.getchannel("A"))
    return flat


def _turn(image):
    """How a picture is to be turned according to EXIF, of Image.Transpose; None if not.

    PIL turns TIFFs, whose format has an orientation of its own, and opens them with upright sizes.
    """
    if image.format == "TIFF":
        return None
    try:
        return TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # damaged EXIF data say nothing
        return None


def kind_of_file(source):
    """What a file that PIL does not read is, in words; "" if that is not known."""
    try:
        if hasattr(source, "read"):
            source.seek(0)
            start = source.read(256)
        else:
            with open(source, "rb") as file:
                start = file.read(256)
    except Exception:
        return ""
    flags = re.DOTALL | re.IGNORECASE
    found = (words for known, words in FOREIGN.items() if re.match(known, start, flags))
    return next(found, "")


# ---- all pictures of a data set ------------------------------------------------------------------


def resolved(reading, classes, sources):
    """The Reading of a data set, with what it leaves to the data decided.

    orientation: as stored for ImageNet, whose published crops ignore EXIF, else upright. channels:
    1 if all pictures are grey by their headers, and the background is, else 3.

    classes: their names. sources: as those of `read_picture`, a sequence.
    """
    ours = {} if are_imagenet(classes) else {"orientation": "exif"}
    known = {"orientation": "stored", "channels": 3, **ours}
    if reading.orientation != "auto":
        known["orientation"] = reading.orientation
    if reading.channels:
        known["channels"] = reading.channels
    elif not are_imagenet(classes) and all_grey(sources, reading.background):
        known["channels"] = 1
    return reading.but(**known)


def all_grey(sources, background="white", workers=16):
    """Whether all pictures are grey by their headers: some, spread evenly, and if so, the others.

    What cannot be read does not count. False if nothing can be.
    """
    first = range(0, len(sources), max(1, len(sources) // SAMPLE))
    others = [i for i in range(len(sources)) if i not in first]
    coloured = len({*ImageColor.getrgb(background)}) > 1

    def look(index):
        try:
            with opened(sources[index]) as image:
                clear = "A" in image.mode or "a" in image.mode or "transparency" in image.info
                return is_grey(image) and not (clear and coloured)
        except ValueError:
            return None

    seen = set()
    with ThreadPool(workers) as pool:
        for part in (first, others):
            for it_is in pool.imap_unordered(look, part, 16):
                if it_is is False:
                    return False
                seen.add(it_is)
    return True in seen


def count_kinds(sources, reading, workers=16):
    """A Counter of the KINDS of pictures, found by reading all of them. A collective call."""
    mine = sources[rank() :: world_size()]
    with ThreadPool(max(1, workers)) as pool:
        found = pool.imap_unordered(partial(probe, reading=reading), mine, 16)
        kinds = [kind for each in found for kind in each.kinds]
    return Counter(chain.from_iterable(all_gather(kinds)))


def sentences(counts, total, reading, kinds=KINDS):
    """What a Counter of KINDS says of a data set of `total` pictures, a line for each kind."""
    for kind in kinds:
        if counts[kind]:
            yield KINDS[kind].format(f"{counts[kind]} of {total}", background=reading.background)


def pixel_settings(reading):
    """What of a resolved Reading changes pixels: name of the flag -> value."""
    colour = "#{:02x}{:02x}{:02x}".format(*ImageColor.getrgb(reading.background))
    return {"orientation": reading.orientation, "background": colour, "channels": reading.channels}


def described(reading):
    """A resolved Reading as text; "" for what earlier versions did."""
    before = {"orientation": "stored", "background": "#ffffff", "channels": 3}
    found = pixel_settings(reading).items()
    return "".join(f" {name} {value}" for name, value in found if value != before[name])


@contextmanager
def warned():
    """PIL's warnings about pictures, with their paths: a list, which grows inside."""
    found, show = [], warnings.showwarning
    with warnings.catch_warnings():
        warnings.filterwarnings("always", module=r"PIL\.")
        warnings.showwarning = lambda message, *where, **more: (
            found.append(f"{name} ({first_line(message)})")
            if (name := getattr(_now, "name", None))
            else show(message, *where, **more)
        )
        yield found
