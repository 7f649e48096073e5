"""Pictures in a zip: a packed folder, or a data set of StyleGAN or EDM."""

import struct
import zipfile
import zlib

import numpy as np

from util.data.archive import Files, open_members
from util.data.member_names import clean, list_members
from util.files import first_line

HEADER = struct.Struct("<26xHH")  # of a member: the lengths of its name and of what else follows
STORED, DEFLATED, ENCRYPTED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, 1


def open_zip(path, split, img_size, reading):
    """Open the images of a zip, for a row of DATASETS. Raises ValueError."""
    paths, archive = read_directory(path)
    rows = {name: row for row, name in enumerate(paths)}
    listing, top = list_members(
        path, paths, split, reading.label_file, lambda name: archive.read(rows[name])
    )
    rows = {name: rows[top + name] for name in listing.paths}
    archive.check([top + name for name in listing.paths], [rows[name] for name in listing.paths])
    return open_members(listing, archive, rows, img_size, reading)


def read_directory(path):
    """(the paths of the files in a zip, a ZipMembers with a row for each). Raises ValueError."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = [info for info in archive.infolist() if not info.is_dir()]
    except Exception as error:  # zipfile raises several types
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ValueError(f"{path}: not a readable zip ({reason})") from None
    paths = [clean(path, info.filename) for info in found]
    return paths, ZipMembers(path, found)


class ZipMembers:
    """The files in a zip, by row, in the order of its directory."""

    def __init__(self, path, found):
        self.files = Files([path])
        columns = ("header_offset", "compress_size", "file_size", "CRC", "compress_type")
        columns = [[getattr(info, name) for info in found] for name in columns]
        self.starts, self.packed, self.sizes, self.crcs, self.methods = map(np.array, columns)
        self.locked = np.array([info.flag_bits & ENCRYPTED for info in found], bool)

    def check(self, paths, rows):
        """Raises ValueError for a file, of these rows, that cannot be read."""
        for path, row in zip(paths, rows, strict=True):
            if self.locked[row] or self.methods[row] not in (STORED, DEFLATED):
                kind = "encrypted" if self.locked[row] else f"packed by method {self.methods[row]}"
                raise ValueError(
                    f"{self.files.paths[0]}: {path} is {kind}, expected stored or deflated files: "
                    "unpack it, and pack it again with zip"
                )

    def read(self, row):
        """The bytes of a file. Raises ValueError if they are damaged."""
        start, size = int(self.starts[row]), int(self.packed[row])
        lengths = HEADER.unpack(self.files.read(0, start, HEADER.size))
        content = self.files.read(0, start + HEADER.size + sum(lengths), size)
        if self.methods[row] == DEFLATED:
            content = zlib.decompressobj(-15).decompress(content)
        if zlib.crc32(content) != self.crcs[row]:
            raise ValueError("damaged: its checksum in the zip is another")
        return content

    def size(self, row):
        """The number of bytes of a file."""
        return int(self.sizes[row])

    def time(self, row):
        """When the zip was written last, in ns."""
        return self.files.time(0)
