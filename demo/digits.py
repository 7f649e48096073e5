"""Look at a model of the digits: pictures and figures. Run by `make demo` after the training.

    python -m demo.digits --ckpt output_dir/digits/checkpoint-last.pth

Writes beside the checkpoint: samples.png, ten of each class; strip.png, images as their tokens
become known; loss.png; table.md, samples and real training images judged by the same figures.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen is needed

import matplotlib.pyplot as plt
import numpy as np
import torch

import engine_mar as engine
from models import build_tokenizer, load_model
from models.classifier import fit_classifier
from util.data import digits
from util.flags import Parser, run
from util.images import grid, replacing, save_image, to_uint8
from util.metrics import frechet_distance
from util.random import image_generators

CLASSES = 10
GUIDANCE = (1.0, 1.5, 2.0)
STRIP_STEPS = (0, 1, 2, 4, 8, 12, 16)  # of 16: one token a step


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", required=True, help="a checkpoint that was trained on digits")
    parser.add_argument("--num_images", type=int, default=1000, help="samples a row of the table")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    args = parser.parse_args(argv)
    model, config = load_model(args.ckpt)
    tokenizer = build_tokenizer(**config["tokenizer"])
    if config["model"]["img_size"] != 8 or config["model"]["class_num"] != CLASSES:
        raise ValueError(f"{args.ckpt}: expected a model of 8×8 images of {CLASSES} classes")
    folder = Path(args.ckpt).parent

    sampling = {**config["sampling"], "latent_range": config["latent_range"], "seed": args.seed}
    samples = {
        cfg: sample(model, tokenizer, args.num_images, **{**sampling, "cfg": cfg})
        for cfg in GUIDANCE
    }
    write_samples(folder / "samples.png", *samples[config["sampling"]["cfg"]])
    write_strip(folder / "strip.png", model, tokenizer, config["sampling"], args.seed)
    write_loss(folder / "loss.png", folder / "log.jsonl")
    table = compare(samples)
    with replacing(folder / "table.md") as beside:
        beside.write_text(table)
    print(f"\n{table}\nin {folder}: samples.png, strip.png, loss.png, table.md")


def sample(model, tokenizer, count, **settings):
    """(images uint8 (count, 8, 8, 3), their classes), as many of each class."""
    labels = [i * CLASSES // count for i in range(count)]
    batches = engine.generate_images(
        model,
        tokenizer,
        labels,
        batch_size=250,
        device=torch.device("cpu"),
        label=f"sampling with guidance {settings['cfg']:g}",
        **settings,
    )
    return np.concatenate([images for _, images in batches]), torch.tensor(labels)


def write_samples(path, images, labels):
    """A row of ten for each class."""
    rows = [images[labels.numpy() == digit][:CLASSES] for digit in range(CLASSES)]
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
    axes.grid(alpha=0.3)
    figure.tight_layout()
    with replacing(path) as beside:
        figure.savefig(beside, dpi=150, format="png")
    plt.close(figure)


def compare(samples):
    """A table in Markdown: samples at several guidance values, beside real training images."""
    train, train_labels = digits("train").tensors
    held_out, held_out_labels = digits("test").tensors
    classifier = fit_classifier(train, train_labels, CLASSES)
    lines = [
        "| images | number | accuracy | Fréchet, features | Fréchet, pixels |",
        "| --- | --- | --- | --- | --- |",
    ]

    def row(name, images, accuracy):
        features = (classifier.features(images), classifier.features(held_out))
        in_features = frechet_distance(*features)
        in_pixels = frechet_distance(images.flatten(1), held_out.flatten(1))
        lines.append(
            f"| {name} | {len(images)} | {accuracy:.1%} | {in_features:.2f} | {in_pixels:.2f} |"
        )

    row("real, for training", train, classifier.accuracy(held_out, held_out_labels))
    for cfg, (images, labels) in samples.items():
        images = torch.from_numpy(images[..., :1]).permute(0, 3, 1, 2) / 127.5 - 1
        row(f"sampled, guidance {cfg:g}", images, classifier.accuracy(images, labels))
    note = (
        f"Accuracy is that of a classifier fitted on the {len(train)} real training images; for "
        f"real images it is measured on the {len(held_out)} held-out ones. Both distances are to "
        "those, of the classifier's 64 features and of the 64 pixels in [−1, 1].\n"
    )
    return "\n".join([*lines, "", note])


if __name__ == "__main__":
    run(main)
