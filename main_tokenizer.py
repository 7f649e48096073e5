"""Measure a tokenizer on a data set, or train one first. `python main_tokenizer.py --help`.

With --epochs a kl or a vq network is trained from scratch and written to tokenizer.ckpt, weights
and scale, which --tokenizer kl (or vq, vq_latent) --vae_path tokenizer.ckpt then takes in every
script. The losses are those of `losses` in models/vae.py and models/vq.py: absolute error and what
the kind needs. LDM's perceptual and adversarial losses, which make the images sharp, are not there
yet.

Measuring prints and adds to results.jsonl: the Fréchet distance of decoded images to the same
images (rFID), PSNR, SSIM, and the mean and deviation of the latents, one over which is the scale to
use, or the share of the codes that are in use. Writes reconstructions.png, images above their
decodings.
"""

from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset

import engine_mar as engine
from models import TOKENIZERS, build_tokenizer
from models.vae import AutoencoderKL
from models.vq import Reviver, VQModel
from util import data, dist
from util.dist import print0
from util.evaluation import few_images, report
from util.features import Extractor, pick_extractor
from util.files import make_folder, replacing
from util.flags import (
    Parser,
    add_extractor_flags,
    add_machine_flags,
    add_tokenizer_flags,
    nonnegative,
    nonnegative_int,
    positive_int,
    run,
)
from util.images import grid, save_image
from util.logger import Logger
from util.precision import pick_precision
from util.weights import digest

TRAINABLE = ("kl", "vq", "vq_latent")
TRAINING = ("lr", "ch", "ch_mult", "num_codes")  # flags that say nothing without --epochs
EMBED_DIM = 4  # of a network that is trained, unless --vae_embed_dim says otherwise


def get_parser():
    parser = Parser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path",
        default="./data/imagenet",
        metavar="DIR",
        help="a folder with train/class/image files, or 'digits': the built-in 8×8 digits",
    )
    group.add_argument(
        "--split",
        default="train",
        help="the folder below it, such as val; of the digits train or test",
    )
    group.add_argument(
        "--num_images",
        type=positive_int,
        metavar="N",
        help="measure N images, evenly spread over the data set (default: all)",
    )
    group.add_argument(
        "--batch_size", type=positive_int, default=64, help="images at once, a process"
    )
    group.add_argument("--output_dir", default="./output_dir", metavar="DIR", help="the results")
    add_tokenizer_flags(parser, TOKENIZERS)
    add_training_flags(parser)
    add_extractor_flags(parser.add_argument_group("figures"))
    add_machine_flags(parser, num_workers=10)
    return parser


def add_training_flags(parser):
    group = parser.add_argument_group(
        "training",
        f"of a {', '.join(TRAINABLE)} network on train/ with random flips, or on the digits' "
        "train; --batch_size and --vae_embed_dim (here 4 if not given) count as well",
    )
    group.add_argument(
        "--epochs", type=nonnegative_int, default=0, help="train for so many first; 0: only measure"
    )
    group.add_argument(
        "--lr", type=nonnegative, default=1e-3, help="at the start, then half a cosine"
    )
    group.add_argument(
        "--ch", type=positive_int, default=32, help="base width (LDM's networks: 128)"
    )
    group.add_argument(
        "--ch_mult",
        default="1,2",
        metavar="M,M,…",
        help="widths of the levels in base widths, full resolution first; each level but the "
        "first halves the image, so 1,2 has stride 2 and LDM's 1,1,2,2,4 stride 16",
    )
    group.add_argument(
        "--num_codes", type=positive_int, default=256, metavar="K", help="of a vq network"
    )


def main(argv=None):
    args, given = get_parser().parse_given(argv)
    check(args, given)
    device = dist.init(args.device, args.dist_on_itp, args.dist_url)
    precision = pick_precision(args.precision, device)  # also of the convolutions measured
    make_folder(args.output_dir, "--output_dir")
    dataset = get_images(args)
    channels, _, side = dataset[0][0].shape
    name = pick_extractor(args.extractor, args.data_path)
    extractor = Extractor(name, args.inception_weights, device, side)
    if args.epochs:
        args.vae_path = Path(args.output_dir) / "tokenizer.ckpt"
        train(args, channels, side, device, precision)
    own = {"channels": channels} if args.tokenizer == "pixels" else {"vae_path": args.vae_path}
    tokenizer = build_tokenizer(args.tokenizer, scale=args.vae_scale, **own).to(device)
    if not args.epochs and args.vae_embed_dim not in (None, tokenizer.channels):
        raise ValueError(
            f"--vae_embed_dim {args.vae_embed_dim}: {args.tokenizer} has {tokenizer.channels}"
        )
    print0(f"{len(dataset)} images, {args.tokenizer} on {device}")

    figures, pairs = engine.evaluate_tokenizer(
        tokenizer,
        dataset,
        extractor,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        device=device,
        seed=args.seed,
    )
    if not dist.is_main():
        return
    settings = {"images": len(dataset), "data_path": args.data_path, "split": args.split}
    settings |= {"img_size": side, "tokenizer": args.tokenizer, "scale_used": tokenizer.scale}
    settings |= {"weights_sha256": digest(tokenizer.state_dict()), "seed": args.seed}
    settings |= {"extractor": name, "extractor_sha256": extractor.sha256}
    if args.epochs:
        settings["epochs"] = args.epochs
    report(figures, settings, few_images(len(dataset), extractor), output_dir=args.output_dir)
    path = Path(args.output_dir) / "reconstructions.png"
    save_image(path, grid(pairs, len(pairs) // 2, min_side=64))
    print0(f"in {args.output_dir}: results.jsonl, {path.name} (images above, decoded below)")


def check(args, given):
    """What the flags ask for together. Raises ValueError."""
    if args.epochs and args.tokenizer not in TRAINABLE:
        raise ValueError(
            f"--epochs {args.epochs}: expected 0 for the tokenizer {args.tokenizer}; what can be "
            f"trained: {', '.join(TRAINABLE)}"
        )
    if args.data_path == data.DIGITS and "img_size" in given and args.img_size != 8:
        raise ValueError(f"--img_size {args.img_size}: the digits are 8×8, expected 8")
    for name in ("vae_path", "vae_scale"):
        if args.epochs and name in given:
            raise ValueError(
                f"--{name} {getattr(args, name)}: with --epochs the network is trained from "
                "scratch and its scale measured; leave the flag out"
            )
    idle = [name for name in TRAINING if name in given and not args.epochs]
    if idle:
        raise ValueError(f"--{idle[0]} {getattr(args, idle[0])}: is for training, pass --epochs")
    if args.tokenizer in TRAINABLE and not args.epochs and "vae_path" not in given:
        raise ValueError(
            f"--tokenizer {args.tokenizer}: expected --epochs to train one, or a --vae_path"
        )


def train(args, channels, side, device, precision):
    """Train a network on images (channels, side, side) and write it to args.vae_path."""
    if args.data_path == data.DIGITS:
        dataset = data.digits("train")
    else:
        record = Path(args.output_dir) / "data_checked_train.txt"
        dataset = data.image_folder(args.data_path, args.img_size, args.num_workers, record)
    torch.manual_seed(args.seed)  # the weights, the same on every process
    network = new_network(args, channels).to(device)
    if side % network.stride:
        raise ValueError(
            f"--ch_mult {args.ch_mult}: images of {side} pixels, expected a multiple of the "
            f"stride {network.stride}"
        )
    pin = args.pin_mem and device.type == "cuda"
    loader = data.training_loader(dataset, args.batch_size, args.num_workers, args.seed, pin)
    parallel = network
    if dist.world_size() > 1:
        ids = [device.index] if device.type == "cuda" else None
        parallel = DistributedDataParallel(network, device_ids=ids)
    total = args.batch_size * dist.world_size()
    size = sum(p.numel() for p in network.parameters())
    print0(f"{len(dataset)} images, {len(loader)} steps of {total} an epoch, {size:,} parameters")

    reviver = None
    if network.num_codes:
        reviver = Reviver(network, torch.Generator(device).manual_seed(args.seed))
    logger = Logger(args.output_dir)
    engine.train_tokenizer(
        parallel,
        loader,
        reviver,
        epochs=args.epochs,
        lr=args.lr,
        device=device,
        precision=precision,
        seed=args.seed,
        logger=logger,
    )
    logger.close()
    scale = engine.latent_scale(
        network,
        dataset,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        device=device,
        seed=args.seed,
    )
    if dist.is_main():
        recipe = {name: getattr(args, name) for name in ("epochs", "lr", "batch_size", "seed")}
        config = {"network": network.config, "data_path": args.data_path, "img_size": side}
        content = {"model": network.state_dict(), "scale": scale, "config": {**config, **recipe}}
        with replacing(args.vae_path) as beside:
            torch.save(content, beside)
        print0(f"{args.vae_path}: scale {scale:.4f}")
    dist.barrier()


def new_network(args, channels):
    """The network that the flags describe, its weights random. Attention is in the middle only."""
    shared = {
        "embed_dim": args.vae_embed_dim or EMBED_DIM,
        "ch": args.ch,
        "ch_mult": parse_ch_mult(args.ch_mult),
        "encoder_attention": False,
        "decoder_attention": False,
        "in_channels": channels,
    }
    if args.tokenizer == "kl":
        return AutoencoderKL(**shared)
    return VQModel(num_codes=args.num_codes, **shared)


def parse_ch_mult(text):
    """Such as "1,2,4" to (1, 2, 4). Raises ValueError."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise ValueError(f"--ch_mult {text!r}: expected whole numbers, at least 1, such as 1,2,4")
    return tuple(int(part) for part in parts)


def get_images(args):
    """The images to measure, (image in [−1, 1], label) each. Raises ValueError."""
    if args.data_path == data.DIGITS:
        dataset = data.digits(args.split)
    else:
        record = Path(args.output_dir) / f"data_checked_{args.split}.txt"
        dataset = data.image_folder(
            args.data_path, args.img_size, args.num_workers, record, flip=False, split=args.split
        )
    count = min(args.num_images or len(dataset), len(dataset))
    return Subset(dataset, [i * len(dataset) // count for i in range(count)])


if __name__ == "__main__":
    run(main)
