"""`--extractor classifier`: a small network fitted on a data set's own labelled training images.

It is fitted once for a data set and an image size, and kept in --stats_dir.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Subset

from util import dist
from util.data import has_images, is_reference_set
from util.data.classes import are_none
from util.data.loader import plain_loader
from util.evaluation.kept import kept_path
from util.logger import Progress
from util.weights import load_strictly, read_metadata, read_weights, write_safetensors

FEATURES = 128
SIDE = 64  # larger images are shrunk to it
FEWEST, MOST = 20, 50_000  # images that are read
HELD_OUT = 10  # one of so many is not fitted, but measures the accuracy
BATCH, EPOCHS, STEPS, RATE = 128, 20, 2000, 5e-3
SEED = 0
WORKERS = 4  # loader processes
# what the weights depend on, beside the data; a change of the code below is another number
RECIPE = (1, FEATURES, SIDE, MOST, HELD_OUT, BATCH, EPOCHS, STEPS, RATE, SEED)


@dataclass(frozen=True)
class Labelled:
    """A data set with labels, whose training images a classifier is fitted on."""

    source: str
    open: Callable  # its path -> image_sets.RealImages of the train split
    cache: str  # folder of the fitted network

    @classmethod
    def of(cls, reference, data_path, open_set, cache):
        """That of the reference, or else of the data; None if neither is a data set."""
        if is_reference_set(reference):
            return cls(str(reference), open_set, cache)
        return cls(str(data_path), open_set, cache) if has_images(data_path) else None


class FittedClassifier(nn.Module):
    """The network fitted on a Labelled data set. A collective call; raises ValueError."""

    needs = ("data", "device")

    def __init__(self, data, device):
        super().__init__()
        if data is None:
            raise ValueError(
                "--extractor classifier: is fitted on labelled images, expected a data set as "
                "--reference or --data_path"
            )
        self.network, self.names = fitted(data, device)

    def forward(self, images):
        """Images uint8 (N, 3, H, W) to features (N, 128) and logits (N, classes)."""
        features = self.network.features(images)
        return features, self.network.head(features)


class Network(nn.Module):
    """Four convolutions. Images uint8 (N, 3, H, W) to logits (N, classes); features are (N, 128).

    large: whether images have more than 32 pixels: one more convolution then has a stride.
    """

    def __init__(self, classes, large=False):
        super().__init__()
        widths, strides = (3, 32, 64, 128, FEATURES), (2, 2, 2 if large else 1, 2)
        layers = []
        for before, width, stride in zip(widths, widths[1:], strides, strict=False):
            layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(FEATURES, classes)
        self.to(memory_format=torch.channels_last)  # less time on a CPU

    def features(self, images):
        images = shrunk(images).float().contiguous(memory_format=torch.channels_last)
        return self.body(images / 127.5 - 1)

    def forward(self, images):
        return self.head(self.features(images))


def shrunk(images):
    """Images uint8 (N, 3, H, W), with at most SIDE pixels on the smaller side."""
    height, width = images.shape[-2:]
    factor = SIDE / min(height, width)
    if factor >= 1:
        return images
    size = round(height * factor), round(width * factor)
    smaller = F.interpolate(images.float(), size=size, mode="bilinear", antialias=True)
    return smaller.round().to(torch.uint8)


def fitted(data, device):
    """(Network, names of its classes) of a Labelled data set, kept or fitted now, by rank 0.

    Raises ValueError for data without classes, or of too few images.
    """
    dataset = data.open(data.source)
    classes = [str(name) for name in dataset.classes]
    if are_none(classes) or len(classes) < 2:
        raise ValueError(
            f"--extractor classifier: {data.source} has no classes, expected labelled images"
        )
    if len(dataset) < FEWEST:
        raise ValueError(
            f"--extractor classifier: {data.source} has {len(dataset)} images, expected {FEWEST}"
        )
    network = Network(len(classes), large=min(dataset[0][0].shape[:2]) > 32)
    depends = f"{dataset.description}|{classes}|{RECIPE}"  # a collective call
    state = _kept_or_fitted(network, dataset, data, device, depends) if dist.is_main() else None
    network.load_state_dict(dist.broadcast(state))
    return network.to(device).eval().requires_grad_(False), classes


def _kept_or_fitted(network, dataset, data, device, depends):
    """The state of a network: name -> tensor, on the CPU. depends: text of what it depends on."""
    path = kept_path(data.cache, data.source, "classifier", depends, "safetensors")
    try:
        if path.is_file():
            load_strictly(network, read_weights(path), path)
            said = f"{float(read_metadata(path)['accuracy']):.1%}"
            dist.print0(f"classifier of {data.source}: {said} of held-out images, {path}")
            return network.state_dict()
    except (ValueError, KeyError) as error:
        dist.print0(f"NOTE: {error}: fitted again")
    images, labels = read(dataset, f"images of {data.source}")
    accuracy = fit(network, images.to(device), labels.to(device), "classifier")
    state = {name: value.cpu() for name, value in network.state_dict().items()}
    write_safetensors(path, state, {"depends": depends, "accuracy": f"{accuracy}"})
    dist.print0(f"classifier of {data.source}: {accuracy:.1%} of held-out images, now in {path}")
    return state


def read(dataset, label):
    """(images uint8 (N, 3, H, W), labels (N,)) of a data set, shrunk, in a random order.

    At most MOST of them, drawn at random.
    """
    order = torch.randperm(len(dataset), generator=_generator())[:MOST].tolist()
    workers = min(WORKERS, getattr(dataset, "workers", WORKERS))
    progress, parts = Progress(len(order), label, "img"), []
    for images, labels in plain_loader(Subset(dataset, order), 64, workers):
        parts.append((shrunk(images.permute(0, 3, 1, 2)), labels))
        progress.update(len(images))
    progress.close()
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def fit(network, images, labels, label):
    """Fit a network on images (N, 3, H, W) with labels (N,); returns its accuracy on held-out ones.

    Those are the first tenth. label: name of the progress bar.
    """
    held = -(-len(images) // HELD_OUT)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        for module in network.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    network.to(images.device).train()
    batches = list(_batches(len(images) - held))
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, len(batches))
    progress = Progress(len(batches), label, "step")
    for batch in batches:
        chosen = (batch + held).to(images.device)
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images[chosen]), labels[chosen], label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update()
    progress.close()
    return _accuracy(network.eval(), images[:held], labels[:held])


def _batches(count):
    """The indices of each batch of a fit on `count` images: EPOCHS epochs, or STEPS steps."""
    generator, size = _generator(), min(BATCH, count)
    steps = min(STEPS, EPOCHS * (count // size))
    while steps > 0:
        for batch in torch.randperm(count, generator=generator).split(size)[:steps]:
            if len(batch) == size:
                yield batch
                steps -= 1


@torch.no_grad()
def _accuracy(network, images, labels):
    pairs = zip(images.split(BATCH), labels.split(BATCH), strict=True)
    return sum((network(x).argmax(1) == y).sum().item() for x, y in pairs) / len(labels)


def _generator():
    return torch.Generator().manual_seed(SEED)
