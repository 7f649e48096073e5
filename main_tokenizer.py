"""Measure a tokenizer on a data set. `python main_tokenizer.py --help`.

Prints and adds to results.jsonl: the Fréchet distance of decoded images to the same images (rFID),
PSNR, SSIM, and the mean and deviation of the latents, one over which is the scale to use. Writes
reconstructions.png, images above their decodings.
"""

from pathlib import Path

from torch.utils.data import Subset

import engine_mar as engine
from models import TOKENIZERS, build_tokenizer
from util import data, dist
from util.dist import print0
from util.evaluation import few_images, report
from util.features import Extractor, pick_extractor
from util.flags import (
    Parser,
    add_extractor_flags,
    add_machine_flags,
    add_tokenizer_flags,
    count,
    run,
)
from util.images import grid, save_image
from util.weights import digest


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
        type=count,
        metavar="N",
        help="measure N images, evenly spread over the data set (default: all)",
    )
    group.add_argument("--batch_size", type=count, default=64, help="images at once, a process")
    group.add_argument("--output_dir", default="./output_dir", metavar="DIR", help="the results")
    add_tokenizer_flags(parser, TOKENIZERS)
    add_extractor_flags(parser.add_argument_group("figures"))
    add_machine_flags(parser, num_workers=10)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    device = dist.init(args.device, args.dist_on_itp, args.dist_url)
    dataset = get_images(args)
    channels, _, side = dataset[0][0].shape
    own = {"channels": channels} if args.tokenizer == "pixels" else {"vae_path": args.vae_path}
    tokenizer = build_tokenizer(args.tokenizer, scale=args.vae_scale, **own).to(device)
    if args.vae_embed_dim not in (None, tokenizer.channels):
        raise ValueError(
            f"--vae_embed_dim {args.vae_embed_dim}: {args.tokenizer} has {tokenizer.channels}"
        )
    name = pick_extractor(args.extractor, args.data_path)
    extractor = Extractor(name, args.inception_weights, device, side)
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
    report(figures, settings, few_images(len(dataset), extractor), output_dir=args.output_dir)
    path = Path(args.output_dir) / "reconstructions.png"
    save_image(path, grid(pairs, len(pairs) // 2, min_side=64))
    print0(f"in {args.output_dir}: results.jsonl, {path.name} (images above, decoded below)")


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
