"""Evaluate a tokenizer on a data set, or train one first. `python main_tokenizer.py --help`.

With --epochs, a KL or VQ network is trained from scratch. It is written to tokenizer.ckpt, with the
scale (and with --per_channel the shift) of its latents; every script takes it by --tokenizer kl (or
vq, vq_latent) --vae_path tokenizer.ckpt. The losses are those of `losses` in models/vae.py and
models/vq.py, without LDM's perceptual and adversarial losses, which make images sharp.

Evaluation prints, and appends to results.jsonl, the Fréchet distance between reconstructed and
original images (rFID), PSNR, SSIM, and the mean and standard deviation of the latents; --vae_scale
is one over the latter. For a discrete tokenizer it gives the fraction of codes in use instead. It
writes reconstructions.png, images above their reconstructions.
"""

from dataclasses import dataclass
from pathlib import Path

from models import fitting, presets
from models.settings import TOKENIZERS
from util.data import describe_paths, has_images, kind_or_folder
from util.data.settings import Reading
from util.evaluation.settings import NETWORK, Evaluation
from util.files import make_folder
from util.flags import (
    Parser,
    add_machine_flags,
    add_tokenizer_flags,
    machine,
    nonnegative,
    nonnegative_int,
    positive_int,
    run,
)
from util.run import last_words
from util.run.tracker import add_tracker_flag
from util.settings import Settings, add_flags, from_flags, setting
from util.sizes import plain, shown, sides

# what can be trained -> channels of its latents, unless --vae_embed_dim is given
TRAINABLE = {"kl": 4, "vq": 4, "vq_latent": 4, "pca": 24}


@dataclass(frozen=True)
class Training(Settings):
    """Settings of the training of a network."""

    epochs: int = setting(0, "train for this many epochs; 0: only evaluate", type=nonnegative_int)
    lr: float = setting(
        1e-3, "initial learning rate, decayed to 0 over half a cosine", type=nonnegative
    )
    ch: int = setting(32, "base width (LDM's networks: 128)", type=positive_int)
    ch_mult: str = setting(
        "1,2",
        "width of each level in base widths, full resolution first; each level but the first "
        "halves the image, so 1,2 has stride 2 and LDM's 1,1,2,2,4 stride 16",
        metavar="M,M,…",
    )
    num_codes: int = setting(256, "number of codes of a vq network", type=positive_int, metavar="K")
    stride: int = setting(
        8, "side in pixels of the patches of a pca network, which one pass fits", type=positive_int
    )


def get_parser():
    parser = Parser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path",
        default="./data/imagenet",
        metavar="PATH",
        help=describe_paths(),
    )
    group.add_argument(
        "--split",
        default="train",
        help="split to evaluate: train, or another one of the data set, such as val or test",
    )
    group.add_argument(
        "--num_images",
        type=positive_int,
        metavar="N",
        help="evaluate N images, spread evenly over the data set (default: all)",
    )
    add_flags(group, Reading)
    group.add_argument(
        "--batch_size", type=positive_int, default=64, help="images per batch and process"
    )
    group.add_argument("--output_dir", default="./output_dir", metavar="DIR", help="the results")
    add_tracker_flag(group)
    add_tokenizer_flags(parser, TOKENIZERS)
    group = parser.add_argument_group(
        "training",
        f"of a {', '.join(TRAINABLE)} network on the train split, with random flips if the data "
        "set has them; --batch_size and --vae_embed_dim (here 4, for pca 24) apply as well",
    )
    group.add_argument(
        "--preset",
        choices=presets.FITTED,
        metavar="NAME",
        help="small: a tokenizer for a small data set that fits the size and number of its "
        "pictures; flags on the command line override it (default: none)",
    )
    add_flags(group, Training)
    group = parser.add_argument_group("metrics")
    group.add_argument(
        "--per_channel",
        action="store_true",
        help="one scale and shift per channel of the latents, which then has mean 0 and standard "
        "deviation 1; off: one scale for all, no shift",
    )
    add_flags(group, Evaluation, only=NETWORK)
    add_machine_flags(parser, num_workers=10)
    return parser


def main(argv=None):
    args, given = get_parser().parse_given(argv)
    if "img_size" not in given:
        args.img_size = kind_or_folder(args.data_path).defaults.get("img_size", args.img_size)
    if not args.preset:
        check(args, given)

    from models.found import complete
    from util import dist
    from util.data import match_channels
    from util.evaluation.features import Extractor, pick_extractor
    from util.precision import pick_precision

    device = dist.init(**machine(args))
    if args.preset:
        fit(args, given)
    elif not args.epochs:
        complete(args, given)
    training = from_flags(Training, args)
    precision = pick_precision(args.precision, device)  # also affects convolutions in evaluation
    make_folder(args.output_dir, "--output_dir")
    last_words.set_folder(args.output_dir, "main_tokenizer")
    dataset = get_images(args)
    channels, *size = dataset[0][0].shape
    tokenizer = None if training.epochs else get_tokenizer(args, channels)
    name = pick_extractor(args.extractor, args.data_path)
    extractor = Extractor(name, args.inception_weights, device, size)
    if not tokenizer:
        args.vae_path = Path(args.output_dir) / "tokenizer.ckpt"
        train(args, training, plain(size), device, precision)
        tokenizer = get_tokenizer(args, channels)
    match_channels(dataset.dataset, tokenizer, args.channels)
    measure(args, training, tokenizer.to(device), dataset, extractor, device)


def fit(args, given):
    """Set the flags that --preset chooses for the pictures. Raises ValueError."""
    from models.found import of_pictures
    from util.data import open_data
    from util.dist import print0

    reading = from_flags(Reading, args)
    if "img_size" not in given:
        args.img_size = of_pictures(args.data_path, reading).get("img_size", args.img_size)
    data = open_data(args.data_path, "train", args.img_size, reading)
    own = {name: getattr(args, name) for name in {"tokenizer", "batch_size", "epochs"} & given}
    chosen = fitting.small_tokenizer(len(data), data.channels, args.img_size, **own)
    print0(f"NOTE: {presets.choose(args, given, chosen)} (for {len(data)} images)")
    check(args, given)


def check(args, given):
    """Raises ValueError for flags that contradict each other."""
    training = from_flags(Training, args)
    if training.epochs and args.tokenizer not in TRAINABLE:
        raise ValueError(
            f"--epochs {training.epochs}: expected 0 for the tokenizer {args.tokenizer}; what can "
            f"be trained: {', '.join(TRAINABLE)}"
        )
    for name in ("vae_path", "vae_scale", "vae_shift"):
        if training.epochs and name in given:
            raise ValueError(
                f"--{name} {getattr(args, name)}: with --epochs the network is trained from "
                "scratch and its scale measured; leave the flag out"
            )
    idle = given & set(Training.names()) - {"epochs"}
    if idle and not training.epochs:
        name = min(idle)
        raise ValueError(f"--{name} {getattr(args, name)}: is for training, pass --epochs")
    if args.tokenizer in TRAINABLE and not training.epochs and "vae_path" not in given:
        raise ValueError(
            f"--tokenizer {args.tokenizer}: expected --epochs to train one, or a --vae_path"
        )


# ---- measuring ------------------------------------------------------------------------------


def get_tokenizer(args, channels):
    """The tokenizer to measure. Raises ValueError for flags that do not fit it."""
    from models import arguments_of_tokenizer, build_tokenizer

    own = arguments_of_tokenizer(args.tokenizer, channels=channels, vae_path=args.vae_path)
    own |= {"scale": args.vae_scale, "shift": args.vae_shift}
    tokenizer = build_tokenizer(args.tokenizer, **own)
    if args.epochs:  # the flags were those of the trained network
        return tokenizer
    if args.vae_embed_dim not in (None, tokenizer.channels):
        raise ValueError(
            f"--vae_embed_dim {args.vae_embed_dim}: {args.tokenizer} has {tokenizer.channels}"
        )
    if args.per_channel and tokenizer.num_codes:
        raise ValueError(f"--per_channel: the code indices of {args.tokenizer} have no scale")
    return tokenizer


def measure(args, training, tokenizer, dataset, extractor, device):
    """Evaluate a tokenizer on a data set; report metrics and write reconstructions."""
    import engine_tokenizer as engine
    from util.dist import is_main, print0
    from util.evaluation.reports import few_images, report
    from util.images import grid, save_image

    print0(f"{len(dataset)} images, {args.tokenizer} on {device}")
    metrics, pairs = engine.evaluate_tokenizer(
        tokenizer,
        dataset,
        extractor,
        **loading(args, device),
        per_channel=args.per_channel and not tokenizer.num_codes,
    )
    if not is_main():
        return
    lists = {name: value for name, value in metrics.items() if isinstance(value, list)}
    metrics = {name: value for name, value in metrics.items() if name not in lists}
    settings = stated(args, training, tokenizer, dataset, extractor) | lists
    report(metrics, settings, few_images(len(dataset), extractor), output_dir=args.output_dir)
    path = Path(args.output_dir) / "reconstructions.png"
    save_image(path, grid(pairs, len(pairs) // 2, min_side=64))
    if lists and not training.epochs:  # otherwise they are in the file
        print0(f"--vae_scale={joined(lists['scale_per_channel'])}")
        print0(f"--vae_shift={joined(lists['shift_per_channel'])}")
    print0(f"in {args.output_dir}: results.jsonl, {path.name} (images above, decoded below)")


def stated(args, training, tokenizer, dataset, extractor):
    """All that the metrics depend on, for the report."""
    from util.weights import digest

    settings = {"images": len(dataset), "data_path": args.data_path, "split": args.split}
    settings |= {"img_size": plain(dataset[0][0].shape[1:]), "tokenizer": args.tokenizer}
    settings |= {"scale_used": tokenizer.scale}
    settings |= {"shift_used": tokenizer.shift} if tokenizer.shift else {}
    settings |= {"weights_sha256": digest(tokenizer.state_dict()), "seed": args.seed}
    settings |= {"extractor": extractor.name, "extractor_sha256": extractor.sha256}
    return settings | ({"epochs": training.epochs} if training.epochs else {})


def joined(numbers):
    """A list of numbers in the format of a flag, to six digits."""
    return ",".join(f"{number:.6g}" for number in numbers)


def loading(args, device):
    """Arguments of engine_tokenizer for reading a data set in evaluation."""
    how = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    return {**how, "device": device, "seed": args.seed}


def get_images(args):
    """The images to evaluate, (image in [−1, 1], label) each. Raises ValueError."""
    from torch.utils.data import Subset

    dataset = open_split(args, args.split, flip=False)
    if not has_images(args.data_path):
        raise ValueError(f"--data_path {args.data_path}: a stream, expected images to measure")
    count = min(args.num_images or len(dataset), len(dataset))
    return Subset(dataset, [i * len(dataset) // count for i in range(count)])


def open_split(args, split, flip):
    """A split of the data set, its images checked. Raises ValueError."""
    from util.data import open_data

    record = Path(args.output_dir) / f"data_checked_{split}.txt"
    reading = from_flags(Reading, args)
    reading = reading.but(flip=reading.flip and flip)
    how = {"workers": args.num_workers, "record": record}
    return open_data(args.data_path, split, args.img_size, reading, **how)


# ---- training -------------------------------------------------------------------------------


def train(args, training, img_size, device, precision):
    """Train a network on images of this size, and write it to args.vae_path."""
    import torch

    import engine_tokenizer as engine
    from util import dist

    dataset = open_split(args, "train", flip=True)
    torch.manual_seed(args.seed)  # initial weights, the same on every process
    network = new_network(args, training, dataset.channels).to(device)
    fitted = hasattr(network, "fit")
    if any(side % network.stride for side in sides(img_size)):
        flag = f"--stride {training.stride}" if fitted else f"--ch_mult {training.ch_mult}"
        raise ValueError(
            f"{flag}: images of {shown(img_size)} pixels, expected a multiple of the stride "
            f"{network.stride}"
        )
    if fitted:
        engine.fit_patches(network, dataset, **loading(args, device))
    else:
        optimize(args, training, network, dataset, device, precision)
    scale, shift = engine.latent_scale(
        network, dataset, **loading(args, device), per_channel=args.per_channel or fitted
    )
    if dist.is_main():
        save(args, training, network, img_size, scale, shift)
    dist.barrier()


def optimize(args, training, network, dataset, device, precision):
    """Train a KL or VQ network by gradients, and log."""
    import engine_tokenizer as engine
    from util import dist
    from util.logger import Logger
    from util.run.tracker import open_trackers

    trackers = open_trackers(args.tracker, args.output_dir, vars(args))
    logger = Logger(args.output_dir, trackers=trackers)
    engine.train_tokenizer(
        dist.wrap(network, device),
        get_loader(args, dataset, network, device),
        get_reviver(args, network, device),
        epochs=training.epochs,
        lr=training.lr,
        device=device,
        precision=precision,
        seed=args.seed,
        logger=logger,
    )
    logger.close()


def get_loader(args, dataset, network, device):
    """The loader of the training images."""
    from util import dist
    from util.data.loader import open_loader
    from util.dist import print0

    pin = args.pin_mem and device.type == "cuda"
    loader = open_loader(dataset, args.batch_size, args.num_workers, args.seed, pin)
    total = args.batch_size * dist.world_size()
    size = sum(p.numel() for p in network.parameters())
    print0(
        f"{loader.images} images, {loader.steps} steps of {total} per epoch, {size:,} parameters"
    )
    return loader


def get_reviver(args, network, device):
    """The Reviver of a VQModel's codes, or None."""
    import torch

    from models.vq import Reviver

    if not network.num_codes:
        return None
    return Reviver(network, torch.Generator(device).manual_seed(args.seed))


def new_network(args, training, channels):
    """A network with random weights, configured by the flags, with attention only in the middle."""
    from models.pca import PatchPCA
    from models.vae import AutoencoderKL
    from models.vq import VQModel

    embed_dim = args.vae_embed_dim or TRAINABLE[args.tokenizer]
    if args.tokenizer == "pca":
        return PatchPCA(embed_dim, training.stride, channels)
    shared = {
        "embed_dim": embed_dim,
        "ch": training.ch,
        "ch_mult": parse_ch_mult(training.ch_mult),
        "encoder_attention": False,
        "decoder_attention": False,
        "in_channels": channels,
    }
    if args.tokenizer == "kl":
        return AutoencoderKL(**shared)
    return VQModel(num_codes=training.num_codes, **shared)


def parse_ch_mult(text):
    """A text such as "1,2,4" to (1, 2, 4). Raises ValueError."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise ValueError(f"--ch_mult {text!r}: expected integers, at least 1, such as 1,2,4")
    return tuple(int(part) for part in parts)


def save(args, training, network, img_size, scale, shift):
    """Write a trained network to args.vae_path, for `build_tokenizer`."""
    from util.checkpoint import write_content
    from util.dist import print0

    config = {"network": network.config, "data_path": args.data_path, "img_size": img_size}
    config |= {"tokenizer": args.tokenizer}
    config |= {"epochs": training.epochs, "lr": training.lr}
    config |= {"batch_size": args.batch_size, "seed": args.seed}
    content = {"model": network.state_dict(), "scale": scale, "config": config}
    if shift:
        content["shift"] = shift
    write_content(args.vae_path, content)
    shown = f"{scale:.4f}" if not shift else f"{joined(scale)}, shift {joined(shift)}"
    print0(f"{args.vae_path}: scale {shown}")


if __name__ == "__main__":
    run(main)
