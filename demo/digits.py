"""Show images and metrics of a model of the digits. Run by `make demo` after training.

    python -m demo.digits --ckpt output_dir/digits/checkpoint-last.pth

Writes, beside the checkpoint: samples.png, ten per class; strip.png, images as their tokens become
known; loss.png; table.md, metrics of samples at three guidance scales and of real training images.
"""

import shlex
import sys
from functools import partial
from pathlib import Path

from models.settings import Sampling
from util import jsonl
from util.evaluation.settings import Evaluation
from util.files import replacing
from util.flags import Parser, nonnegative_int, positive_int, run

CLASSES = 10
METRICS = ("frechet_distance", "pixel_distance", "accuracy")
GUIDANCE = (1.0, 1.5, 2.0)
STRIP_STEPS = (0, 1, 2, 4, 8, 12, 16)  # of 16: one token per step


def main(argv=None):
    """Run the script."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", required=True, help="a checkpoint trained on the digits")
    parser.add_argument(
        "--num_images", type=positive_int, default=1000, help="samples per row of the table"
    )
    parser.add_argument("--seed", type=nonnegative_int, default=0, help="seed of the samples")
    args = parser.parse_args(argv)

    from util.evaluation.evaluator import open_evaluator

    model, tokenizer, config = open_checkpoint(args.ckpt)
    folder, sampling = Path(args.ckpt).parent, Sampling.of(**config["sampling"])
    draw = partial(sample, model, tokenizer, seed=args.seed, latent_range=config["latent_range"])
    write_samples(folder / "samples.png", draw, sampling)
    write_strip(folder / "strip.png", model, tokenizer, sampling, args.seed)
    write_loss(folder / "loss.png", folder / "log.jsonl")
    evaluation = Evaluation(reference="digits", metrics=METRICS, stats_dir=folder / "fid_stats")
    evaluator = open_evaluator(evaluation, img_size=8, num_images=args.num_images)
    labels = [i % CLASSES for i in range(args.num_images)]  # as sample.py has them
    found = {}
    for cfg in GUIDANCE:
        images = draw(labels, sampling.but(cfg=cfg), f"guidance {cfg:g}")
        found[cfg] = measure(evaluator, images, labels)
    table = describe(found, evaluator)
    with replacing(folder / "table.md") as beside:
        beside.write_text(table)
    print(f"\n{table}\nin {folder}: samples.png, strip.png, loss.png, table.md\n\n{advise(folder)}")


def open_checkpoint(path):
    """(model, tokenizer, configuration). Raises ValueError for a model of other data."""
    import models

    model, tokenizer, config = models.load(path)
    if config["model"]["img_size"] != 8 or config["model"]["class_num"] != CLASSES:
        raise ValueError(f"{path}: expected a model of 8×8 images of {CLASSES} classes")
    return model, tokenizer, config


def sample(model, tokenizer, labels, sampling, progress, **generation):
    """Images uint8 (N, 8, 8, 3) for these labels. progress: name of the progress bar."""
    import numpy as np
    import torch

    import engine_mar as engine

    batches = engine.generate_images(
        model,
        tokenizer,
        labels,
        sampling,
        batch_size=250,
        device=torch.device("cpu"),
        progress=progress,
        **generation,
    )
    return np.concatenate([images for _, images in batches])


def measure(evaluator, images, labels):
    """Metrics of images, with how many there are."""
    measurement = evaluator.start(len(images))
    measurement.add(range(len(images)), images, labels)
    return {"images": len(images), **evaluator.metrics(measurement.summary())}


def write_samples(path, draw, sampling):
    """Write a grid with a row of ten images per class. draw: see `sample`."""
    from util.images import grid, save_image

    labels = [digit for digit in range(CLASSES) for _ in range(CLASSES)]
    save_image(path, grid(draw(labels, sampling, path.name), CLASSES, min_side=48))


def write_strip(path, model, tokenizer, sampling, seed):
    """Write a row per class: the image after 0, 1, 2, 4, … steps; unknown tokens are gray."""
    import numpy as np

    from util.images import grid, save_image

    states = strip_states(model, sampling.but(num_iter=model.seq_len), seed)
    columns = [show_state(model, tokenizer, *states[step]) for step in STRIP_STEPS]
    strip = np.stack(columns, axis=1).reshape(-1, *columns[0].shape[1:])
    save_image(path, grid(strip, len(STRIP_STEPS), min_side=48))


def strip_states(model, sampling, seed):
    """(latents, mask) of an image of each class after every step, the start among them."""
    import torch

    from util.rng import image_generators

    start = torch.zeros(CLASSES, 1, 8, 8), torch.ones(CLASSES, model.seq_len)
    steps = model.sample_steps(
        CLASSES,
        labels=torch.arange(CLASSES),
        generator=image_generators(seed, range(CLASSES)),
        **sampling.asdict(),
    )
    return [start, *steps]


def show_state(model, tokenizer, latents, mask):
    """Images uint8 (N, 8, 8, 3) with the unknown tokens in gray."""
    from util.images import hide_unknown, to_uint8

    return hide_unknown(
        to_uint8(tokenizer.decode(latents)), mask.view(-1, model.seq_h, model.seq_w)
    )


def write_loss(path, log):
    """Plot the training loss against steps, from the log beside the checkpoint."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    losses = {line["step"]: line["loss"] for line in jsonl.read(log) if line.get("loss")}
    figure = Figure((6, 3.5))
    axes = figure.subplots()
    axes.plot(losses.keys(), losses.values(), linewidth=1)
    axes.set(xlabel="step", ylabel="Diffusion Loss", yscale="log", title="Training on the digits")
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(ScalarFormatter())
    axes.tick_params(which="both", labelsize=7)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    with replacing(path) as beside:
        figure.savefig(beside, dpi=150, format="png")


def describe(found, evaluator):
    """A Markdown table of the metrics of samples, and of real training images.

    found: guidance scale -> the numbers of `measure`.
    """
    lines = [
        "| images | number | accuracy | Fréchet, features | Fréchet, pixels |",
        "| --- | --- | --- | --- | --- |",
    ]

    def row(name, images, accuracy, frechet_distance, pixel_distance):
        distances = f"{frechet_distance:.2f} | {pixel_distance:.2f}"
        lines.append(f"| {name} | {images} | {accuracy:.1%} | {distances} |")

    real, count = evaluator.baseline
    row("real, for training", count, **real)
    for cfg, numbers in found.items():
        row(f"sampled, guidance {cfg:g}", **numbers)
    held_out = evaluator.reference.num_images
    note = (
        "Accuracy is that of a classifier trained on the real training images; for real images it "
        f"is measured on the {held_out} held-out ones. Both distances are to the latter, in the "
        "classifier's 64 features and in the 64 pixels in [−1, 1].\n"
    )
    return "\n".join([*lines, "", note])


def advise(folder):
    """Lines that say what to look at next, and what to call."""
    page = folder / "index.html"
    own = [tool("python"), "main_tokenizer.py", "--preset", "small", "--data_path", "FOLDER"]
    lines = {
        "the training's curves and pictures": [tool("tensorboard"), "--logdir", str(folder)],
        "the same in one file, for a browser": [str(page)] if page.exists() else [],
        "guidance and temperature compared": ["make", "demo-sweep"],
        "a page that draws digits": ["make", "app"],
        'your own pictures, the first of the four commands in "Your own data" of README.md': own,
    }
    return "\n".join(f"{what}:\n    {shlex.join(call)}" for what, call in lines.items() if call)


def tool(name):
    """Path of a program that is installed beside this Python, as short as it runs from here."""
    path = Path(sys.executable).with_name(name)
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


if __name__ == "__main__":
    run(main)
