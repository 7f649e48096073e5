"""Folders of images. Damaged images are detected before training."""

import hashlib
import os
from functools import cache, cached_property, partial

from torch.utils.data import Dataset
from torchvision import transforms

from util.data.checked import check_pictures, read_crcs
from util.data.crop import center_crop_arr
from util.data.listing import list_data
from util.data.pictures import described, probe, read_picture, resolved, to_tensor
from util.dist import print0
from util.sizes import plain, shown


def open_folder(path, split, img_size, reading):
    """Open the images of a split of `path`, for a row of DATASETS."""
    listing = list_data(path, split, reading.label_file)
    for sentence in listing.sentences():
        say_once(sentence)
    return ImageFolder(listing, img_size, reading)


@cache
def say_once(sentence):
    """Print a sentence on data that a script may open several times."""
    print0(sentence)


class ImageFolder(Dataset):
    """The pictures of a util.data.listing.Listing, center-cropped to img_size: (image, label).

    reading: how pictures are read, a util.data.settings.Reading, with `flip` mirrored at random;
    the attribute is the one that is resolved. `samples` are pairs (path, label), below `root`;
    `targets` are the labels. `crcs` are CRC32s of the files, (N,), once they are known.
    """

    crcs = None

    def __init__(self, listing, img_size, reading):
        self.listing, self.img_size = listing, plain(img_size)
        steps = [partial(center_crop_arr, size=img_size)]
        steps += [transforms.RandomHorizontalFlip()] if reading.flip else []
        self.transform = transforms.Compose([*steps, to_tensor])
        self._take_listing()
        self.reading = resolved(reading, self.classes, [path for path, _ in self.samples])

    def _take_listing(self):
        listing = self.listing
        self.root, self.classes, self.targets = listing.root, listing.classes, listing.labels
        paths = [os.path.join(self.root, path) for path in listing.paths]
        self.samples = list(zip(paths, self.targets, strict=True))

    def follow(self, classes):
        """Take another order of the same classes."""
        self.listing.follow(classes)
        self._take_listing()
        self.crcs = None

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        return self.transform(read_picture(path, self.reading)), label

    @property
    def channels(self):
        return self.reading.channels

    def take_channels(self, channels):
        """Read pictures with so many channels, 1 or 3."""
        self.reading = self.reading.but(channels=channels)

    def name(self, index):
        """The name of an image in a cache, class/name.ext."""
        return self.listing.name(index)

    def path(self, index):
        """The file of an image."""
        return self.samples[index][0]

    @cached_property
    def description(self):
        """A hash of names, labels and content of the pictures, and the crop. A collective call."""
        crcs = (read_crcs(self) if self.crcs is None else self.crcs).tolist()
        rows = zip(self.listing.paths, self.targets, crcs, strict=True)
        text = "\n".join(f"{path} {label} {crc}" for path, label, crc in rows)
        crop = f"ADM centre crop {shown(self.img_size)}"
        return f"{hashlib.sha256(os.fsencode(text)).hexdigest()} {crop}{described(self.reading)}"

    def check(self, workers, record):
        """Find out whether the pictures are whole; see `check_pictures`."""
        check_pictures(self, workers, record)

    def smallest_side(self, looked_at=200):
        """The shorter side of the smallest of some pictures, spread over all. Raises ValueError."""
        some = self.samples[:: len(self) // looked_at + 1]
        sizes = [size for path, _ in some if (size := probe(path, self.reading).size)]
        if not sizes:
            raise ValueError(f"{self.root}: none of {len(some)} pictures can be read")
        return min(map(min, sizes))
