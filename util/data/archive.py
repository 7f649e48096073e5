"""Pictures inside other files: zips, tars, data sets of Hugging Face."""

import io
import os
import posixpath
from collections import OrderedDict
from functools import cached_property, partial
from threading import Lock

import numpy as np

from util.data.folder import PictureSet, say_once

OPEN = 64  # files of an archive that a process holds open at once


class Files:
    """The files of an archive, of which parts are read: by many threads, and after a fork.

    paths: of them. In each process, files are opened when they are first read.
    """

    def __init__(self, paths):
        self.paths, self.opened, self.lock = [str(path) for path in paths], OrderedDict(), Lock()

    def __reduce__(self):
        return Files, (self.paths,)

    def read(self, number, start, count):
        """Bytes of the file of a number; fewer at its end."""
        file = self._open(number)
        if hasattr(os, "pread"):  # has no position, which processes would share
            return os.pread(file.fileno(), count, start)
        with self.lock:
            file.seek(start)
            return file.read(count)

    def _open(self, number):
        with self.lock:
            file = self.opened.pop(number, None)
            file = file or open(self.paths[number], "rb", buffering=0)  # noqa: SIM115
            self.opened[number] = file  # the one used last
            while len(self.opened) > OPEN:
                self.opened.popitem(last=False)  # closed once nobody reads it
        return file

    def time(self, number):
        """When a file was written last, in ns."""
        return os.stat(self.paths[number]).st_mtime_ns


class Member:
    """A picture in an archive as an open file, whose bytes are got when they are first needed.

    load: function that gives them.
    """

    def __init__(self, name, load):
        self.name, self.load = name, load

    @cached_property
    def file(self):
        """The bytes, as a file in memory."""
        return io.BytesIO(self.load())

    def read(self, *arguments):
        """As of a file."""
        return self.file.read(*arguments)

    def __getattr__(self, name):
        return getattr(self.file, name)


class ArchiveImages(PictureSet):
    """The pictures of an archive, an object with

    read(row)   the bytes of a picture; raises ValueError if they are damaged
    size(row)   the number of bytes
    time(row)   when the file was written that it is in, in ns

    rows: path of each picture of the Listing -> its row.
    """

    def __init__(self, listing, archive, rows, img_size, reading):
        self.archive, self.rows = archive, np.array([rows[path] for path in listing.paths])
        super().__init__(listing, img_size, reading)

    def follow(self, classes):
        """Take another order of the same classes."""
        rows = dict(zip(self.listing.paths, self.rows.tolist(), strict=True))
        super().follow(classes)
        self.rows = np.array([rows[path] for path in self.listing.paths])

    def where(self, index):
        """The path of a picture, below that of the archive."""
        return posixpath.join(self.root, self.listing.paths[index])

    def source(self, index):
        """A picture as an open file."""
        return Member(self.where(index), partial(self.read, index))

    def stat(self, index):
        """(size, time) of a picture."""
        row = int(self.rows[index])
        return self.archive.size(row), self.archive.time(row)

    def read(self, index):
        """The bytes of a picture."""
        return self.archive.read(int(self.rows[index]))


def open_members(listing, *members):
    """The ArchiveImages of a Listing, whose sentences are said. members: its other arguments."""
    for sentence in listing.sentences():
        say_once(sentence)
    return ArchiveImages(listing, *members)
