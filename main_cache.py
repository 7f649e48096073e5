"""Cache the tokenizer's latents of a folder of images. `python main_cache.py --help`.

Training with --use_cached then needs no encoder. For each image class/name.ext a file
class/name.ext.npz is written, with the moments of the image and of its mirror image, or with
--layout shards a few large files for all; a run that was stopped goes on where it was. --verify and
--convert_from need no tokenizer.
"""

from pathlib import Path

import engine_mar as engine
from models import TOKENIZERS, build_tokenizer
from util import caches, data, dist
from util.dist import print0
from util.files import make_folder
from util.flags import Parser, add_machine_flags, add_tokenizer_flags, positive_int, run
from util.shards import layout_of
from util.weights import digest

CROP = "center_crop_arr (ADM)"


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
    group.add_argument(
        "--batch_size", type=positive_int, default=128, help="images at once, a process"
    )
    group.add_argument(
        "--layout",
        choices=("images", "shards"),
        default="images",
        help="images: a float32 .npz for each, as published; shards: a few large float16 arrays, "
        "which load many times as fast",
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="write nothing: read all of --cached_path, of either layout, and name what is damaged",
    )
    group.add_argument(
        "--convert_from",
        default="",
        metavar="DIR",
        help="take the latents from this cache of the other layout (default: from the images)",
    )
    add_tokenizer_flags(parser, [name for name in TOKENIZERS if name != "pixels"])
    add_machine_flags(parser, num_workers=10, precision=False)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    if args.verify and args.convert_from:
        raise ValueError(f"--convert_from {args.convert_from}: not together with --verify")
    if args.verify:
        dist.init("cpu", args.dist_on_itp, args.dist_url)
        layout, images = caches.verify(args.cached_path, args.num_workers)
        print0(f"{images} images, all whole, in the layout {layout}: {args.cached_path}")
        return
    folder = Path(args.cached_path)
    if args.convert_from and Path(args.convert_from).resolve() == folder.resolve():
        raise ValueError(f"--convert_from {args.convert_from}: expected another than --cached_path")
    written, skipped = (convert if args.convert_from else cache)(args, folder)
    print0(f"{written} written, {skipped} there already: {folder}")


def open_folder(args, folder):
    """Make the folder. Raises ValueError where it holds a cache of the other layout."""
    make_folder(args.cached_path, "--cached_path")
    if (found := layout_of(folder)) not in (None, args.layout):
        raise ValueError(
            f"--cached_path {folder}: holds a cache with --layout {found}, expected another folder "
            f"for {args.layout}"
        )


def convert(args, folder):
    """From the other layout. Returns (written, skipped) images."""
    dist.init("cpu", args.dist_on_itp, args.dist_url)
    open_folder(args, folder)
    return caches.convert(args.convert_from, folder, args.layout, args.num_workers)


def cache(args, folder):
    """From images, by a tokenizer. Returns (written, skipped) images."""
    device = dist.init(args.device, args.dist_on_itp, args.dist_url)
    tokenizer = build_tokenizer(args.tokenizer, args.vae_path, scale=args.vae_scale).to(device)
    if args.vae_embed_dim not in (None, tokenizer.channels):
        raise ValueError(
            f"--vae_embed_dim {args.vae_embed_dim}: {args.tokenizer} has {tokenizer.channels}"
        )
    if args.img_size % tokenizer.stride:
        raise ValueError(
            f"--img_size {args.img_size}: expected a multiple of {tokenizer.stride}, the stride of "
            f"{args.tokenizer}"
        )
    open_folder(args, folder)
    more = {"tokenizer_name": args.tokenizer, "scale": tokenizer.scale, "crop": CROP}
    facts = {"tokenizer": digest(tokenizer.state_dict()), "img_size": args.img_size, **more}
    write = args.layout == "images" and dist.is_main()
    data.check_cache(folder, facts["tokenizer"], args.img_size, write=write, **more)
    dataset = data.image_folder(
        args.data_path, args.img_size, args.num_workers, folder / "data_checked.txt", flip=False
    )
    print0(f"{len(dataset)} images of {len(dataset.classes)} classes, {args.tokenizer} on {device}")
    how = {"batch_size": args.batch_size, "num_workers": args.num_workers, "device": device}
    if args.layout == "shards":
        return engine.cache_shards(tokenizer, dataset, folder, facts, **how)
    return engine.cache_latents(tokenizer, dataset, folder, **how)


if __name__ == "__main__":
    run(main)
