"""What helps a tokenizer: python -m benchmarks.tokenizers --data_path DIR --split test ...

Trains a network for each row of ROWS, with the same data, steps and seed, and measures it on
held-out images; then, on the latents of the rows in MODELS, a MAR for each seed, whose samples are
compared with the held-out images, without and with guidance. All by the scripts as they are.
Finished runs are reused and stopped ones resumed, so that a command may be repeated with other
--rows or --seeds. Writes to --output_dir: TABLE.md, reconstructions.png and samples of each MAR.
"""

import json
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import main_cache
import main_mar
import main_tokenizer
import sample
from models.autoencoder_settings import Losses
from reproduce import call, spread
from util import jsonl
from util.evaluation.settings import NETWORK, Evaluation
from util.evaluation.sweep import markdown
from util.files import replacing
from util.flags import (
    Parser,
    add_device_flag,
    add_precision_flag,
    add_size_flag,
    nonnegative_int,
    positive_int,
    run,
)
from util.settings import add_flags

GUIDANCE = (1.0, 3.0)
DONE = "done.json"  # the flags of a run that is done
SHOWN = 4  # samples of a class in a grid
LABEL = 310  # pixels, of the words beside reconstructions


@dataclass(frozen=True)
class Row:
    """A tokenizer to train: with which losses, and how much latent noise."""

    tokenizer: str
    discrete: bool = False
    perceptual: bool = False
    disc_weight: float = 0.0
    noise: float = 0.0

    @property
    def label(self):
        parts = [self.tokenizer.upper(), "L1"]
        parts[1] += " + perceptual" if self.perceptual else ""
        parts[1] += " + adversarial" if self.disc_weight else ""
        return ", ".join(parts + [f"noise {self.noise:g}"] * bool(self.noise))

    def flags(self, args):
        """Those of main_tokenizer.py that are this row's."""
        own = {"tokenizer": self.tokenizer}
        own |= {"num_codes": args.num_codes} if self.discrete else {}
        if self.perceptual:
            names = ("perceptual", "perceptual_weights", "perceptual_weight")
            own |= {name: getattr(args, name) for name in names}
        if self.disc_weight:
            own |= {"disc_weight": self.disc_weight, "disc_start": args.disc_start}
            own |= {"disc_layers": 2, "disc_ch": 16}
        return own | ({"latent_noise": self.noise} if self.noise else {})


VQ = partial(Row, "vq", discrete=True)

# in the order in which they are run; the weights of the discriminator are LDM's
ROWS = {
    "kl-l1": Row("kl"),
    "kl-perceptual": Row("kl", perceptual=True),
    "kl-adversarial": Row("kl", perceptual=True, disc_weight=0.5),
    "kl-adversarial-noise": Row("kl", perceptual=True, disc_weight=0.5, noise=3.0),
    "kl-perceptual-noise": Row("kl", perceptual=True, noise=3.0),
    "kl-l1-noise": Row("kl", noise=3.0),
    "kl-adversarial-noise1": Row("kl", perceptual=True, disc_weight=0.5, noise=1.0),
    "vq-l1": VQ(),
    "vq-perceptual": VQ(perceptual=True),
    "vq-adversarial": VQ(perceptual=True, disc_weight=0.75),
    "vq-adversarial-noise": VQ(perceptual=True, disc_weight=0.75, noise=3.0),
}
# rows on whose latents a MAR is trained
MODELS = ("kl-adversarial", "kl-adversarial-noise1", "kl-adversarial-noise")


def get_parser():
    """The parser of all flags."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data_path", required=True, metavar="DIR", help="folder with train/class/image files"
    )
    parser.add_argument(
        "--split", default="test", help="folder of held-out images beside train (default: test)"
    )
    add_size_flag(parser, "side of the images in pixels, or their height and width", 32)
    parser.add_argument("--class_num", type=positive_int, default=10, metavar="N", help="classes")
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help="rows to run"
    )
    parser.add_argument("--ch", type=positive_int, default=16, help="base width of the networks")
    parser.add_argument("--ch_mult", default="1,2", help="width of each level in base widths")
    parser.add_argument(
        "--vae_embed_dim", type=positive_int, default=8, metavar="D", help="channels of the latents"
    )
    parser.add_argument(
        "--num_codes", type=positive_int, default=1024, metavar="N", help="codes of VQ networks"
    )
    parser.add_argument(
        "--perceptual", default="lpips", metavar="NAME", help="perceptual loss: lpips or timm:NAME"
    )
    add_flags(parser, Losses, ["perceptual_weights", "perceptual_weight"])
    parser.add_argument(
        "--disc_start", type=nonnegative_int, default=0, help="steps before the discriminator"
    )
    parser.add_argument(
        "--tokenizer_epochs", type=positive_int, default=2, help="epochs per tokenizer"
    )
    parser.add_argument(
        "--patch_size", type=positive_int, default=1, help="side in latents of a MAR's tokens"
    )
    parser.add_argument("--epochs", type=positive_int, default=4, help="epochs per MAR")
    parser.add_argument(
        "--seeds", type=nonnegative_int, nargs="*", default=[1, 2, 3], help="seeds of the MARs"
    )
    parser.add_argument(
        "--num_images", type=positive_int, metavar="N", help="images to reconstruct (default: all)"
    )
    parser.add_argument(
        "--per_class", type=positive_int, default=100, metavar="N", help="samples of each class"
    )
    parser.add_argument("--num_workers", type=nonnegative_int, default=0, help="loader workers")
    parser.add_argument(
        "--output_dir", default="./output_dir/tokenizers", help="folder of all outputs"
    )
    add_device_flag(parser)
    add_precision_flag(parser)  # of the tokenizers' training
    add_flags(parser, Evaluation, only=NETWORK)
    return parser


def main(argv=None):
    """Run the script."""
    args = get_parser().parse_args(argv)
    folder = Path(args.output_dir)
    for name in args.rows:
        train_tokenizer(args, name)
        write_table(args)
    for seed in args.seeds:  # seed by seed, so that an interrupted run gives a smaller table
        for name in (name for name in MODELS if name in args.rows):
            evaluate_model(args, name, seed)
            write_table(args)
    print((folder / "TABLE.md").read_text())
    print(f"in {folder}: TABLE.md, reconstructions.png, models/*/samples.png")


def hold_out(args):
    """A data set whose training images are the held-out ones, so that their statistics are kept."""
    folder = Path(args.output_dir) / "held-out"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "train").exists():
        (folder / "train").symlink_to((Path(args.data_path) / args.split).absolute())
    return folder


def train_tokenizer(args, name):
    """Train and measure a row's network, unless that is done."""
    folder = row_folder(args, name)
    flags = {
        **data_flags(args),
        **ROWS[name].flags(args),
        "epochs": args.tokenizer_epochs,
        "batch_size": 16,
        "lr": 2e-3,
        "ch": args.ch,
        "ch_mult": args.ch_mult,
        "res_blocks": 1,
        "vae_embed_dim": args.vae_embed_dim,
        "split": args.split,
        "num_images": args.num_images,
        "eval_freq": args.tokenizer_epochs,
        "precision": args.precision,
        **network_flags(args),
    }
    once(folder, main_tokenizer.main, flags)


def evaluate_model(args, name, seed):
    """Train a MAR on a row's latents, and compare its samples with the held-out images."""
    folder = train_model(args, name, seed)
    sampling = {
        "ckpt": folder / "checkpoint-last.pth",
        "labels": "all",
        "num_sampling_steps": 50,
        "batch_size": 250,
        "device": args.device,
    }
    measured = {
        "per_class": args.per_class,
        "reference": hold_out(args),
        "data_path": args.data_path,
        "stats_dir": Path(args.output_dir) / "stats",
        "output_dir": folder,
        **network_flags(args),
    }
    cfg = f"cfg={','.join(map(str, GUIDANCE))}"
    call(sample.main, {**sampling, **measured}, "--sweep", cfg)
    grid = folder / "samples.png"
    if not grid.is_file():
        call(sample.main, {**sampling, "per_class": SHOWN, "cfg": GUIDANCE[-1], "out": grid})


def train_model(args, name, seed):
    """The folder of a MAR on a row's latents, which are cached first."""
    folder, tokenizer = model_folder(args, name, seed), row_folder(args, name)
    latents = tokenizer / "latents"
    own = {**data_flags(args), "tokenizer": "kl", "vae_path": tokenizer / "tokenizer.ckpt"}
    if not (folder / DONE).is_file():
        call(main_cache.main, {**own, "cached_path": latents}, "--layout", "shards")
    model = {
        "preset": "small",
        "model": "mar_mini",
        "patch_size": args.patch_size,
        "epochs": args.epochs,
        "class_num": args.class_num,
        "seed": seed,
        "cached_path": latents,
        "eval_freq": args.epochs,
    }
    once(folder, main_mar.main, {**own, **model}, "--use_cached")
    return folder


def once(folder, main, flags, *more):
    """Call a training script unless it is done; resumes one that was stopped.

    Raises ValueError if the run in the folder had other flags.
    """
    done, flags = folder / DONE, {k: v for k, v in flags.items() if v is not None}
    used = {name: str(value) for name, value in flags.items()}
    if not done.is_file():
        call(main, {**flags, "output_dir": folder, "resume": folder}, *more)
        with replacing(done) as beside:
            beside.write_text(json.dumps(used))
    elif json.loads(done.read_text()) != used:
        raise ValueError(f"{folder}: made with other flags; pass another --output_dir")


def row_folder(args, name):
    return Path(args.output_dir) / "tokenizers" / name


def model_folder(args, name, seed):
    return Path(args.output_dir) / "models" / f"{name}-seed{seed}"


def data_flags(args):
    own = {"data_path": args.data_path, "img_size": args.img_size, "device": args.device}
    return {**own, "num_workers": args.num_workers}


def network_flags(args):
    """The flags that choose the network in whose features images are compared."""
    return {name: getattr(args, name) for name in NETWORK}


# ---- the table ------------------------------------------------------------------------------


def write_table(args):
    """Write the table and the pictures of all that is there, whatever --rows says."""
    folder = Path(args.output_dir)
    found = {name: jsonl.read(row_folder(args, name) / "results.jsonl")[-1:] for name in ROWS}
    found = {name: records[0] for name, records in found.items() if records}
    text = table(found, {name: seeds_of(folder / "models", name) for name in MODELS})
    with replacing(folder / "TABLE.md") as beside:
        beside.write_text(text)
    strips = {ROWS[name].label: row_folder(args, name) / "reconstructions.png" for name in found}
    draw(folder / "reconstructions.png", strips)


def seeds_of(folder, name):
    """Seed -> records of a row's MARs, those with a record for each guidance."""
    paths = {int(path.name.rpartition("seed")[2]): path for path in folder.glob(f"{name}-seed*")}
    records = {seed: jsonl.read(path / "results.jsonl") for seed, path in sorted(paths.items())}
    return {
        seed: {line["cfg"]: line for line in lines}
        for seed, lines in records.items()
        if {line.get("cfg") for line in lines} >= {*GUIDANCE}
    }


def table(tokenizers, models):
    """The text of both tables.

    tokenizers: name of a row -> record of main_tokenizer.py. models: name of a row -> seed ->
    guidance -> record of sample.py.
    """
    first = next(iter(tokenizers.values()))
    text = "## Tokenizers\n\n"
    text += markdown([cells(ROWS[name], record) for name, record in tokenizers.items()])
    text += f"\n{first['images']} images of the split {first['split']}, features of "
    text += f"{first['extractor']}.\n"
    rows = [cell for name in MODELS for cell in model_cells(ROWS[name], models.get(name, {}))]
    if not rows:
        return text
    line = next(records for seeds in models.values() for records in seeds.values())[GUIDANCE[0]]
    text += f"\n## A MAR on their latents\n\n{markdown(rows)}\n{line['images']} samples; "
    return text + f"as many real training images have a distance of {distance(line['real']):.1f}.\n"


def cells(row, record):
    """A row of the table of tokenizers."""
    cell = {"tokenizer": row.label, "Fréchet distance": record.get("rfd", record.get("rfid"))}
    cell |= {"PSNR": record["psnr"], "SSIM": record.get("ssim")}
    names = {"latent mean": "latent_mean", "latent std": "latent_std"}
    names |= {"codes used": "codes_used", "perplexity": "code_perplexity"}
    return cell | {words: record.get(name) for words, name in names.items()}


def model_cells(row, seeds):
    """Rows of the table of MARs: one for each guidance, of all seeds; none if there is no seed."""
    for cfg in GUIDANCE if seeds else ():
        found = [records[cfg] for records in seeds.values()]
        values = [distance(record) for record in found]
        cell = {"tokenizer": row.label, "guidance": cfg, "Fréchet distance": spread(values, 1)}
        cell["of each seed"] = ", ".join(f"{value:.1f}" for value in values)
        for name in ("precision", "recall"):
            cell[name] = statistics.mean(record[name] for record in found)
        yield cell


def distance(record):
    return record["fid"] if "fid" in record else record["frechet_distance"]


def draw(path, strips):
    """Draw images and, below, each row's reconstructions. strips: words -> a script's picture."""
    from PIL import Image, ImageDraw, ImageFont

    halves = {}
    for words, strip in strips.items():
        with Image.open(strip) as image:
            top, bottom = (0, image.height // 2), (image.height // 2, image.height)
            halves.setdefault("original", image.crop((0, top[0], image.width, top[1])))
            halves[words] = image.crop((0, bottom[0], image.width, bottom[1]))
    if not halves:
        return
    width, height = next(iter(halves.values())).size
    sheet = Image.new("RGB", (LABEL + width, height * len(halves)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, (words, half) in enumerate(halves.items()):
        pen.text((8, (i + 0.5) * height), words, fill="black", font=font, anchor="lm")
        sheet.paste(half, (LABEL, i * height))
    with replacing(path) as beside:
        sheet.save(beside, format="png")


if __name__ == "__main__":
    run(main)
