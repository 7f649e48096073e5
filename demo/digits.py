"""Look at a model of the digits: pictures and figures. Run by `make demo` after the training.

    python -m demo.digits --ckpt output_dir/digits/checkpoint-last.pth

Writes beside the checkpoint: samples.png, ten of each class; strip.png, images as their tokens
become known; loss.png; table.md, samples and real training images judged by the same figures;
sweep.csv, sweep.md, sweep_temperature.png and sweep_guidance.png, those figures at several
guidance scales and temperatures.
"""

import itertools
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen is needed

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import ScalarFormatter

import engine_mar as engine
from models import build_tokenizer, load_model
from util.data import DIGITS
from util.evaluation import Accumulator, open_judge
from util.files import replacing
from util.flags import Parser, nonnegative_int, positive_int, run
from util.images import grid, save_image, to_uint8
from util.logger import Stopwatch
from util.metrics import frechet_distance
from util.rng import image_generators
from util.sweep import write_sweep

CLASSES = 10
GUIDANCE = (1.0, 1.5, 2.0)
TEMPERATURE = (0.9, 0.95, 1.0)
STRIP_STEPS = (0, 1, 2, 4, 8, 12, 16)  # of 16: one token a step


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", required=True, help="a checkpoint that was trained on digits")
    parser.add_argument(
        "--num_images", type=positive_int, default=1000, help="samples a row of the table"
    )
    parser.add_argument("--seed", type=nonnegative_int, default=0, help="of the samples")
    args = parser.parse_args(argv)
    model, config = load_model(args.ckpt)
    tokenizer = build_tokenizer(**config["tokenizer"])
    if config["model"]["img_size"] != 8 or config["model"]["class_num"] != CLASSES:
        raise ValueError(f"{args.ckpt}: expected a model of 8×8 images of {CLASSES} classes")
    folder = Path(args.ckpt).parent

    judge = {"img_size": 8, "num_images": args.num_images, "cache": folder / "fid_stats"}
    judges = {
        "frechet_distance": open_judge(DIGITS, **judge),
        "pixel_distance": open_judge(DIGITS, extractor="grey-pixels", **judge),
    }
    labels = [i * CLASSES // args.num_images for i in range(args.num_images)]
    sampling = {**config["sampling"], "latent_range": config["latent_range"], "seed": args.seed}
    real = {name: judge.floor[0]["frechet_distance"] for name, judge in judges.items()}
    real["accuracy"] = judges["frechet_distance"].floor[0]["accuracy"]
    points, records = [], []
    for cfg, temperature in itertools.product(GUIDANCE, TEMPERATURE):
        points.append({"cfg": cfg, "temperature": temperature})
        images, seconds = sample(model, tokenizer, labels, **{**sampling, **points[-1]})
        figures = measure(images, labels, judges)
        records.append({**points[-1], **figures, "images": len(images), "real": real})
        records[-1]["seconds_per_image"] = seconds / len(images)
        if all(config["sampling"][name] == value for name, value in points[-1].items()):
            write_samples(folder / "samples.png", images, labels)
    files = write_sweep(records, points, folder)
    write_strip(folder / "strip.png", model, tokenizer, config["sampling"], args.seed)
    write_loss(folder / "loss.png", folder / "log.jsonl")
    table = describe(records, judges, real)
    with replacing(folder / "table.md") as beside:
        beside.write_text(table)
    names = ["samples.png", "strip.png", "loss.png", "table.md", *(file.name for file in files)]
    print(f"\n{table}\nin {folder}: {', '.join(names)}")


def sample(model, tokenizer, labels, **settings):
    """(images uint8 (N, 8, 8, 3), the seconds they took) of these classes."""
    clock = Stopwatch()
    batches = engine.generate_images(
        model,
        tokenizer,
        labels,
        batch_size=250,
        device=torch.device("cpu"),
        progress=f"guidance {settings['cfg']:g}, temperature {settings['temperature']:g}",
        **settings,
    )
    images = np.concatenate([images for _, images in clock.timed(batches)])
    return images, clock.seconds


def measure(images, labels, judges):
    """Accuracy of images, and for each of the judges (name -> Judge) their Fréchet distance."""
    figures = {}
    for name, judge in judges.items():
        accumulator = Accumulator(judge.extractor, len(images))
        accumulator.add(range(len(images)), images, labels)
        summary = accumulator.summary()
        figures[name] = frechet_distance(summary.statistics, judge.reference.statistics)
        if summary.accuracy is not None:
            figures["accuracy"] = summary.accuracy
    return figures


def write_samples(path, images, labels):
    """A row of ten for each class."""
    rows = [images[np.array(labels) == digit][:CLASSES] for digit in range(CLASSES)]
    save_image(path, grid(np.concatenate(rows), CLASSES, min_side=48))


def write_strip(path, model, tokenizer, sampling, seed):
    """A row for each class: the image after 0, 1, 2, 4, … steps; grey is not yet known."""
    states = [(torch.zeros(CLASSES, 1, 8, 8), torch.ones(CLASSES, model.seq_len))]
    settings = {k: v for k, v in sampling.items() if k != "num_iter"}
    states += model.sample_steps(
        CLASSES,
        num_iter=model.seq_len,
        labels=torch.arange(CLASSES),
        generator=image_generators(seed, range(CLASSES)),
        **settings,
    )
    columns = []
    for step in STRIP_STEPS:
        latents, mask = states[step]
        images = to_uint8(tokenizer.decode(latents)).copy()
        side = images.shape[1] // model.seq_w
        hidden = mask.view(CLASSES, model.seq_h, model.seq_w).numpy() > 0
        images[hidden.repeat(side, 1).repeat(side, 2)] = (110, 120, 140)
        columns.append(images)
    strip = np.stack(columns, axis=1).reshape(-1, *columns[0].shape[1:])
    save_image(path, grid(strip, len(STRIP_STEPS), min_side=48))


def write_loss(path, log):
    """Training loss against steps, from the log beside the checkpoint."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines}  # a resumed run may repeat some
    figure, axes = plt.subplots(figsize=(6, 3.5))
    axes.plot(losses.keys(), losses.values(), linewidth=1)
    axes.set(xlabel="step", ylabel="Diffusion Loss", yscale="log", title="Training on the digits")
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(ScalarFormatter())
    axes.tick_params(which="both", labelsize=7)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    with replacing(path) as beside:
        figure.savefig(beside, dpi=150, format="png")
    plt.close(figure)


def describe(records, judges, real):
    """A table in Markdown: samples at several guidance values, beside real training images."""
    lines = [
        "| images | number | accuracy | Fréchet, features | Fréchet, pixels |",
        "| --- | --- | --- | --- | --- |",
    ]

    def row(name, images, accuracy, frechet_distance, pixel_distance, **more):
        distances = f"{frechet_distance:.2f} | {pixel_distance:.2f}"
        lines.append(f"| {name} | {images} | {accuracy:.1%} | {distances} |")

    row("real, for training", judges["frechet_distance"].floor[1], **real)
    for record in records:
        if record["temperature"] == 1.0:
            row(f"sampled, guidance {record['cfg']:g}", **record)
    held_out = judges["frechet_distance"].reference.count
    note = (
        "Accuracy is that of a classifier fitted on the real training images; for real images it "
        f"is measured on the {held_out} held-out ones. Both distances are to those, of the "
        "classifier's 64 features and of the 64 pixels in [−1, 1].\n"
    )
    return "\n".join([*lines, "", note])


if __name__ == "__main__":
    run(main)
