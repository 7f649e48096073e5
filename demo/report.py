"""The page of demo/pipeline.py: pictures, metrics, times and commands of all stages.

    python -m demo.report output_dir/pipeline

Writes report.md and report.html from what the stages wrote into the folder.
"""

import math
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from demo.decode import decode, open_latents
from demo.document import Document
from demo.pipeline import GUIDANCE, PLAN, Run, stages
from util import jsonl, provenance
from util.data import open_data
from util.data.settings import PLAIN
from util.flags import Parser, run
from util.images import grid, save_image, to_uint8
from util.run.page import points, read_log

PARTS = ("summary", "pictures", "tokenizer", "cache", "model", "samples", "metrics", "stages")
SHOWN = 12  # pictures of a class
CLASSES = 20  # that are shown at most
NEAREST = 3
SIDE = 48  # pixels of a picture on the page, at least
METRICS = {"frechet_distance": "Fréchet distance", "precision": "precision", "recall": "recall"}


def main(argv=None):
    """Run the script."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="the --output_dir of demo.pipeline")
    folder = Path(parser.parse_args(argv).folder)
    if not (folder / PLAN).is_file():
        raise ValueError(f"{folder}: expected the --output_dir of demo.pipeline, with {PLAN}")
    report = Report(Run(**jsonl.parse((folder / PLAN).read_text("utf-8"))))
    for part in PARTS:
        getattr(report, part)()
    report.page.write(folder)
    print(f"\nin {folder}: report.html, report.md, and folders of every stage")


class Report:
    """The parts of the page, each of which reads what its stages wrote."""

    def __init__(self, plan):
        self.plan, self.out = plan, Path(plan.out)
        self.page = Document("From a folder of pictures to samples")
        self.train = Pictures(plan.data, "train", plan.size)
        self.samples_of = {cfg: read_samples(self.out / f"guidance{cfg}") for cfg in GUIDANCE}
        self.seconds, self.commands = Counter(), {}
        for record in jsonl.read(self.out / "stages.jsonl"):
            self.seconds[record["stage"]] += record["seconds"]
            self.commands[record["stage"]] = record["command"]

    def took(self, *names):
        """A sentence on the time of some stages."""
        return f"Took {clock(sum(self.seconds[name] for name in names))}."

    def picture(self, name, images, columns, caption):
        """A grid of images uint8 (N, H, W, 3)."""
        path = self.out / "pictures" / f"{name}.png"
        save_image(path, grid(images, columns, min_side=SIDE))
        self.page.picture(path.relative_to(self.out), caption, self.out)

    # ---- stages --------------------------------------------------------------------------------

    def summary(self):
        """Number of stages, and the total time."""
        total, cores = sum(self.seconds.values()), torch.get_num_threads()
        self.page.text(
            f"{len(self.seconds)} stages, each one command of this library, took {clock(total)} "
            f"with {cores} threads. The commands are at the end of this page."
        )

    def pictures(self):
        """The data set, by class."""
        names, counts = self.train.classes, Counter(self.train.labels)
        self.page.section("Pictures")
        source = (
            "Emoji (Twemoji, © Twitter, Inc and others, CC-BY 4.0)"
            if self.plan.emoji
            else "Pictures"
        )
        held_out = f"; {self.plan.held_out} is held out" if self.plan.held_out != "train" else ""
        self.page.text(
            f"{source}: {len(self.train.labels)} for training at {self.plan.size} pixels"
            f"{held_out}. One row per class."
        )
        rows = [spread(self.train.of(i), SHOWN) for i in range(min(len(names), CLASSES))]
        self.picture("data", np.concatenate(rows), SHOWN, ", ".join(names[: len(rows)]))
        self.page.table(
            ["class", "training pictures"], [[n, counts[i]] for i, n in enumerate(names)]
        )

    def tokenizer(self):
        """Reconstructions, their metrics, and curves."""
        self.page.section("Tokenizer")
        folders = {"training": "tokenizer"}
        folders |= {"held out": "held_out"} if self.plan.held_out != "train" else {}
        self.page.text(
            f"A KL autoencoder, trained from scratch. {self.took('tokenizer')} All of it: "
            "tokenizer/index.html. Originals above, reconstructions below."
        )
        rows = []
        for name, folder in folders.items():
            path = Path(folder, "reconstructions.png")
            self.page.picture(path, f"{name} pictures", self.out)
            found = jsonl.read(self.out / folder / "results.jsonl")[-1]
            rows.append([name, found["images"], *(found.get(k) for k in ("psnr", "ssim", "rfd"))])
        self.page.table(["pictures", "number", "PSNR, dB", "SSIM", "Fréchet distance"], rows)
        self.latents()
        self.curves("tokenizer", ("loss", "l1", "kl"))

    def latents(self):
        """A few decoded pictures, each with the channels of its latents."""
        cache, tokenizer = open_latents(self.out / "cache")
        count = len(cache)
        latents, images = decode(cache, tokenizer, [i * count // 6 for i in range(6)], seed=0)
        zoom = images.shape[1] // latents.shape[2]
        channels = to_uint8(latents.flatten(0, 1)[:, None] / 3)
        channels = channels.repeat(zoom, axis=1).repeat(zoom, axis=2)
        rows = np.concatenate([images[:, None], channels.reshape(6, -1, *images.shape[1:])], axis=1)
        _, depth, height, width = latents.shape
        self.picture(
            "latents",
            rows.reshape(-1, *images.shape[1:]),
            1 + depth,
            f"decoded pictures, and the {depth} channels of their {height}×{width} latents, "
            "black to white for −3 to 3",
        )

    def cache(self):
        """Shape, size and time of the cache of latents."""
        folder = self.out / "cache"
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        cache, _ = open_latents(folder)
        shape = "×".join(map(str, cache[0][0].shape))
        self.page.section("Cache")
        self.page.text(
            f"Moments of {len(cache)} pictures and of their mirror images, {shape} each: "
            f"{size / 2**20:.1f} MiB. {self.took('cache')}"
        )

    def model(self):
        """Time and curves of MAR's training."""
        self.page.section("MAR")
        self.page.text(f"{self.took('MAR')} All of the run is in mar/index.html.")
        self.curves("mar", ("loss", "grad_norm"))

    def samples(self):
        """Samples by class, and the training pictures nearest to some."""
        self.page.section("Samples")
        names = self.train.classes
        for cfg, samples in self.samples_of.items():
            rows = [pad(samples.of(i)[:SHOWN], SHOWN) for i in range(min(len(names), CLASSES))]
            self.picture(f"guidance{cfg}", np.concatenate(rows), SHOWN, f"guidance {cfg}")
        took = self.took(*(f"samples, guidance {cfg}" for cfg in GUIDANCE))
        self.page.text(f"{self.plan.samples} for each scale of guidance. {took}")
        self.nearest()

    def nearest(self):
        """Whether the model memorized training pictures: the nearest ones, and distances."""
        samples = self.samples_of[GUIDANCE[-1]]
        first = np.concatenate([samples.of(i)[:1] for i in range(len(self.train.classes))][:SHOWN])
        _, found = self.train.nearest(first, NEAREST)
        rows = np.stack([first, *found.swapaxes(0, 1)])
        self.picture(
            "nearest",
            rows.reshape(-1, *first.shape[1:]),
            len(first),
            f"samples, guidance {GUIDANCE[-1]}, above the {NEAREST} training pictures nearest to "
            "each, as they are or mirrored",
        )
        sets = {f"samples, guidance {cfg}": each.images for cfg, each in self.samples_of.items()}
        if self.plan.held_out != "train":
            held_out = Pictures(self.plan.data, self.plan.held_out, self.plan.size)
            sets = {"held-out pictures": held_out.images} | sets
        distances = {name: self.train.nearest(each, 1)[0] for name, each in sets.items()}
        self.page.table(
            ["pictures", "median distance to the nearest training picture", "below 10"],
            [[n, np.median(d), f"{(d < 10).mean():.0%}"] for n, d in distances.items()],
        )
        self.page.text(
            "Distances are root mean squares over pixels of 0 to 255. Samples much nearer than "
            "held-out pictures are memorized training pictures."
        )

    def metrics(self):
        """The metrics that python -m util.evaluation computed."""
        self.page.section("Metrics")
        found = jsonl.read(self.out / "metrics" / "results.jsonl")
        latest = {record["source"]: record for record in found}
        rows = []
        for stage in stages(self.plan):
            if stage.startswith("metrics of "):
                record = latest[self.plan.command(stage)[2]]
                numbers = [record.get(name) for name in METRICS]
                rows.append([stage.removeprefix("metrics of "), record["images"], *numbers])
        self.page.table(["images", "number", *METRICS.values()], rows)
        against = "training" if self.plan.held_out == "train" else "held-out"
        self.page.text(
            f"Compared with the {against} pictures by the mean colors of 8×8 parts "
            "(coarse-pixels), which need no pretrained network and see no detail: compare rows of "
            "this table only. "
            "Training pictures have the distance of a perfect model, decoded ones that of a "
            "perfect model with this tokenizer."
        )

    def stages(self):
        """Time and command of each stage."""
        self.page.section("Times and commands")
        total = sum(self.seconds.values())
        rows = [[name, clock(seconds)] for name, seconds in self.seconds.items()]
        self.page.table(["stage", "time"], [*rows, ["all", clock(total)]])
        for name, words in self.commands.items():
            self.page.command(name, shlex.join(["python", *words]))

    def curves(self, folder, names):
        """A chart of each of these entries of a log."""
        records = read_log(self.out / folder / "log.jsonl")
        found = {name: points(records, name) for name in names}
        charts = {
            Path("pictures", f"{folder}_{name}.svg"): (f"{name}, by step", {name: curve})
            for name, curve in found.items()
            if curve
        }
        self.page.curves(charts, self.out)


# ---- sets of images ------------------------------------------------------------------------------


class Labelled:
    """images: uint8 (N, H, W, 3). labels: a list of N class indices."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def of(self, label):
        """The images of a class."""
        return self.images[np.array(self.labels) == label]


class Pictures(Labelled):
    """A split of the data, and the names of its classes."""

    def __init__(self, path, split, size):
        data = open_data(path, split, size, PLAIN.but(flip=False))
        images = [to_uint8(data[i][0][None])[0] for i in range(len(data))]
        super().__init__(np.stack(images), list(data.targets))
        self.classes = [str(name) for name in data.classes]

    def nearest(self, images, count):
        """(root mean square of the differences (N, count), pictures (N, count, H, W, 3)) of the
        pictures that are nearest, as they are or mirrored, to images uint8 (N, H, W, 3)."""
        there = flat(self.images)
        distances = torch.minimum(
            torch.cdist(flat(images), there), torch.cdist(flat(images[:, :, ::-1]), there)
        )
        distances, places = distances.topk(count, largest=False)
        return distances.numpy() / math.sqrt(there.shape[1]), self.images[places.numpy()]


def flat(images):
    """Images uint8 (N, H, W, 3) as float32 (N, D)."""
    return torch.from_numpy(images.astype(np.float32)).flatten(1)


def read_samples(folder):
    """The Labelled images of a folder of sample.py."""
    paths = sorted(folder.glob("*.png"))
    images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    made = [provenance.read(path) for path in paths]
    return Labelled(np.stack(images), [each["labels"][each["index"]] for each in made])


def spread(images, count):
    """`count` of the images, evenly spaced, then white ones if there are fewer."""
    return pad(images[[i * len(images) // count for i in range(min(count, len(images)))]], count)


def pad(images, count):
    """Images (n, H, W, 3) followed by white ones: (count, H, W, 3)."""
    more = ((0, count - len(images)), (0, 0), (0, 0), (0, 0))
    return np.pad(images, more, constant_values=255)


def clock(seconds):
    """A time in words."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


if __name__ == "__main__":
    run(main)
