"""Cache the tokenizer's latents of a folder of images. `python main_cache.py --help`.

Training with --use_cached then needs no encoder. For each image class/name.ext a file
class/name.ext.npz is written, with the moments of the image and of its mirror image; a run that was
stopped goes on where it was.
"""

from pathlib import Path

import engine_mar as engine
from models import TOKENIZERS, build_tokenizer
from util import data, dist
from util.dist import print0
from util.files import make_folder
from util.flags import Parser, add_machine_flags, add_tokenizer_flags, count, run
from util.weights import digest


def get_parser():
    parser = Parser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path",
        default="./data/imagenet",
        metavar="DIR",
        help="a folder with train/class/image files",
    )
    group.add_argument("--cached_path", required=True, metavar="DIR", help="where the latents go")
    group.add_argument("--batch_size", type=count, default=128, help="images at once, a process")
    add_tokenizer_flags(parser, [name for name in TOKENIZERS if name != "pixels"])
    add_machine_flags(parser, num_workers=10, precision=False)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    device = dist.init(args.device, args.dist_on_itp, args.dist_url)
    tokenizer = build_tokenizer(args.tokenizer, args.vae_path, scale=args.vae_scale).to(device)
    if args.vae_embed_dim not in (None, tokenizer.channels):
        raise ValueError(
            f"--vae_embed_dim {args.vae_embed_dim}: {args.tokenizer} has {tokenizer.channels}"
        )
    folder = Path(args.cached_path)
    make_folder(args.cached_path, "--cached_path")
    data.check_cache(folder, digest(tokenizer.state_dict()), args.img_size, write=dist.is_main())
    dataset = data.image_folder(
        args.data_path, args.img_size, args.num_workers, folder / "data_checked.txt", flip=False
    )
    print0(f"{len(dataset)} images of {len(dataset.classes)} classes, {args.tokenizer} on {device}")
    written, skipped = engine.cache_latents(
        tokenizer,
        dataset,
        folder,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        device=device,
    )
    print0(f"{written} written, {skipped} there already: {folder}")


if __name__ == "__main__":
    run(main)
