"""Pictures in tars: WebDataset's shards, or packed folders.

A tar has no directory: the headers of its members are read once, when the data are opened. Members
of one key, the name up to its first dot, belong together: key.jpg, and key.cls, key.json or key.txt
for its class.
"""

import glob
import json
import os
import re
from collections import Counter, namedtuple
from itertools import chain, product
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

from util.data.archive import Files, open_members
from util.data.claims import PACKED
from util.data.classes import in_order
from util.data.label_files import CLASS, class_name
from util.data.listing import PICTURE, Listing, by_labels, of_one
from util.data.member_names import clean, kind_of_member, list_members
from util.files import first_few

THREADS = 16  # that read headers: a file system on a network answers slowly, but many at once
BLOCK = 512  # bytes of a header; contents fill whole blocks
WINDOW = 8 * BLOCK  # bytes that are read at once: headers, and what is small between them
LABELS = ("cls", "json", "txt")  # what says a picture's class, the first one that does
LARGEST = 1 << 20  # bytes of such a file; anything larger is none
MAGIC = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}

Member = namedtuple("Member", "path start size content")  # content: of a file of labels, else None
Found = namedtuple("Found", "tar path start size label kind")  # kind: of LABELS, or None


def open_tars(pattern, split, img_size, reading):
    """Open the images of tars, for a row of DATASETS. Raises ValueError."""
    tars = find_tars(str(pattern))
    files = Files(tars)
    with ThreadPool(min(THREADS, len(tars))) as pool:
        members = pool.map(lambda k: list(read_headers(files, k)), range(len(tars)), 1)
    found = [row for k, part in enumerate(members) for row in _pictures(tars[k], k, part)]
    if any(each.kind for each in found) and not reading.label_file:
        if split != "train":
            raise ValueError(f"{pattern}: its tars are one split, expected train, not {split}")
        rows = _rows(pattern, tars, found)
        listing = _by_labels(pattern, [*rows], found, _left_out(members))
    else:
        listing, rows = _by_names(pattern, tars, found, members, split, reading.label_file)
    return open_members(listing, TarMembers(files, found), rows, img_size, reading)


def find_tars(pattern):
    """The paths of the tars that a pattern names, such as a/{0000..0146}.tar. Raises ValueError."""
    if "://" in pattern or pattern.startswith("pipe:"):
        raise ValueError(f"{pattern}: expected files on a disk; download them first")
    names = expand_braces(os.path.expanduser(pattern))
    tars = list(chain.from_iterable(sorted(glob.glob(n)) or [n] for n in names))
    if gone := [name for name in tars if not os.path.isfile(name)]:
        raise ValueError(f"{pattern}: {len(gone)} of {len(tars)} are no files: {first_few(gone)}")
    if len({*tars}) < len(tars):
        raise ValueError(f"{pattern}: names a file twice")
    return tars


def expand_braces(pattern):
    """What a shell makes of {0000..0146} and {a,b} in a pattern: a list."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    parts = [_alternatives(p) if i % 2 else [p] for i, p in enumerate(pieces)]
    return ["".join(chosen) for chosen in product(*parts)]


def _alternatives(text):
    if not (ends := re.fullmatch(r"(\d+)\.\.(\d+)", text)):
        return text.split(",")
    first, last = int(ends[1]), int(ends[2])
    step = 1 if first <= last else -1
    return [str(n).zfill(len(ends[1])) for n in range(first, last + step, step)]


# ---- headers -------------------------------------------------------------------------------------


def read_headers(files, number):
    """Yield a Member for each file in a tar. Raises ValueError if it is damaged."""
    path, end = files.paths[number], os.stat(files.paths[number]).st_size
    take, position, more = _windowed(files, number), 0, {}
    _check_start(path, take(0, BLOCK))
    while len(block := take(position, BLOCK)) == BLOCK and any(block[:8]):
        kind, start = block[156:157], position + BLOCK
        size = more.get("size", _number(path, position, block))
        position = start + -(-size // BLOCK) * BLOCK
        if start + size > end:
            raise ValueError(f"{path}: ends within a file, at {end} bytes: download it again")
        if kind in (b"x", b"L"):
            more |= _extended(kind, take(start, size))
        elif kind in (b"0", b"\0", b"7"):
            name = clean(path, more.get("path") or _name(block))
            says = size <= LARGEST and name.rpartition(".")[2].lower() in LABELS
            yield Member(name, start, size, take(start, size) if says else None)
        more = more if kind in (b"x", b"L", b"g") else {}


def _windowed(files, number):
    """A function (start, count) that gives bytes of a file, of which it reads some in advance."""
    window, at = b"", 0

    def take(start, count):
        nonlocal window, at
        if start < at or start + count > at + len(window):
            window, at = files.read(number, start, max(count, WINDOW)), start
        return window[start - at : start - at + count]

    return take


def _check_start(path, block):
    kind = next((kind for magic, kind in MAGIC.items() if block.startswith(magic)), None)
    if kind or path.lower().endswith(PACKED):
        raise ValueError(
            f"{path}: compressed{f' by {kind}' if kind else ''}: no picture in it is read without "
            "all before it; expected a plain .tar: decompress it"
        )


def _number(path, position, block):
    """The size in a header, whose checksum is compared."""
    try:
        checksum = int(block[148:156].strip(b"\0 "), 8)
        size = block[124:136]
        found = int.from_bytes(size[1:]) if size[0] & 128 else int(size.strip(b"\0 ") or b"0", 8)
    except ValueError:
        checksum = None
    if checksum != 8 * 32 + sum(block[:148]) + sum(block[156:]):
        raise ValueError(f"{path}: not a tar, or damaged: no header at byte {position}")
    return found


def _name(block):
    name, prefix = (part.partition(b"\0")[0] for part in (block[:100], block[345:500]))
    whole = prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name
    return whole.decode("utf-8", "replace")


def _extended(kind, content):
    """What a header of PAX or GNU says of the next member: its path and size, if any."""
    if kind == b"L":
        return {"path": content.rstrip(b"\0").decode("utf-8", "replace")}
    found = dict(re.findall(rb"(?:^|\n)\d+ (path|size)=([^\n]*)", content))
    path, size = found.get(b"path"), found.get(b"size")
    return ({"path": path.decode("utf-8", "replace")} if path else {}) | (
        {"size": int(size)} if size else {}
    )


# ---- pictures and classes ------------------------------------------------------------------------


def _pictures(tar, number, members):
    """The pictures of a tar, a list of Found. Raises ValueError for two of one key."""
    said, found, keys = {}, [], Counter()
    for member in members:
        key, ending = _key(member.path)
        if member.content is not None and ending in LABELS:
            said.setdefault(key, {})[ending] = member
        elif kind_of_member(member.path) is PICTURE:
            found.append(member)
            keys[key] += 1
    said = {key: members for key, members in said.items() if key in keys}
    if said and (twice := [key for key, count in keys.items() if count > 1]):
        raise ValueError(f"{tar}: two pictures of one key: {first_few(twice)}")
    where = [(m, *_label(tar, said.get(_key(m.path)[0], {}))) for m in found]
    return [Found(number, m.path, m.start, m.size, *label) for m, *label in where]


def _key(path):
    folder, slash, name = path.rpartition("/")
    key, _, ending = name.partition(".")
    return f"{folder}{slash}{key}", ending.lower()


def _label(tar, said):
    """(class, which of LABELS says it) of a key; (None, None). said: ending -> Member."""
    for kind in LABELS:
        if kind in said:
            text = said[kind].content.decode("utf-8", "replace").strip()
            label = _of_record(text) if kind == "json" else text
            if label is not None:
                return label if kind == "txt" else class_name(tar, said[kind].path, label), kind
    return None, None


def _of_record(text):
    try:
        record = json.loads(text)
    except ValueError:
        return None
    names = (*CLASS, "cls") if isinstance(record, dict) else ()
    return next((record[name] for name in names if name in record), None)


def _by_labels(pattern, paths, found, left_out):
    """The Listing of pictures whose classes stand beside them."""
    kinds = Counter(each.kind for each in found)
    if none := [path for path, each in zip(paths, found, strict=True) if not each.kind]:
        raise ValueError(f"{pattern}: {len(none)} pictures have no class: {first_few(none)}")
    texts = {each.label for each in found}
    if kinds["txt"] and 2 * len(texts) > len(found):
        return of_one(str(pattern), paths, left_out, "texts that differ, as captions do")
    classes = in_order({class_name(pattern, "a .txt", text) for text in texts})
    index = {name: i for i, name in enumerate(classes)}
    labels = [index[each.label] for each in found]
    listing = Listing(str(pattern), classes, list(paths), labels, left_out, [])
    listing.follow(classes)
    return listing


def _by_names(pattern, tars, found, members, split, label_file):
    """(Listing, path -> row) where folders, or label_file, say the classes."""
    names = [each.path for each in found]
    if len({*names}) == len(names):
        every = [member.path for part in members for member in part]
        listing, top = list_members(pattern, every, split, label_file)
        inside = ((name, row) for row, name in enumerate(names) if name.startswith(top))
        return listing, {name.removeprefix(top): row for name, row in inside}
    rows, left_out = _rows(pattern, tars, found), _left_out(members)
    if label_file:
        return by_labels(str(pattern), [*rows], left_out, Path(label_file)), rows
    return of_one(str(pattern), [*rows], left_out), rows


def _left_out(members):
    kinds = (kind_of_member(m.path) for part in members for m in part if m.content is None)
    return Counter(kind for kind in kinds if kind is not PICTURE)


def _rows(pattern, tars, found):
    """Path of each picture, below the name of its tar if there are several -> its row."""
    common = os.path.commonpath([os.path.dirname(os.path.abspath(tar)) for tar in tars])
    stems = [os.path.relpath(os.path.abspath(tar), common)[: -len(".tar")] for tar in tars]
    tops = [f"{stem}/".replace(os.sep, "/") if len(tars) > 1 else "" for stem in stems]
    rows = {tops[each.tar] + each.path: row for row, each in enumerate(found)}
    if len(rows) < len(found):
        raise ValueError(f"{pattern}: holds files of one name, {len(found) - len(rows)} of them")
    return rows


class TarMembers:
    """The pictures in tars, by row."""

    def __init__(self, files, found):
        self.files = files
        columns = ([each[k] for each in found] for k in (0, 2, 3))
        self.tars, self.starts, self.sizes = (np.array(column, np.int64) for column in columns)

    def read(self, row):
        """The bytes of a picture."""
        return self.files.read(int(self.tars[row]), int(self.starts[row]), self.size(row))

    def size(self, row):
        """The number of bytes of a picture."""
        return int(self.sizes[row])

    def time(self, row):
        """When its tar was written last, in ns."""
        return self.files.time(int(self.tars[row]))
