"""Cache the tokenizer's latents of a folder of images. `python main_cache.py --help`.

Training with --use_cached then needs no encoder. For each image class/name.ext, a file
class/name.ext.npz holds the moments of the image and, unless --no_flip is given, of its mirror
image; with --layout shards, a few large files hold all. An interrupted run resumes where it
stopped. --verify and --convert_from need no tokenizer.
"""

from contextlib import contextmanager
from pathlib import Path

from models.settings import TOKENIZERS
from util.data import describe_paths
from util.data.settings import Reading
from util.files import make_folder, remove_leftovers
from util.flags import (
    Parser,
    add_machine_flags,
    add_tokenizer_flags,
    machine,
    positive_int,
    run,
)
from util.settings import add_flags, from_flags
from util.sizes import shown, sides

CROP = "center_crop_arr (ADM)"


def get_parser():
    parser = Parser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path",
        default="./data/imagenet",
        metavar="DIR",
        help=describe_paths() + "; with --verify, what to compare the cache with, if given",
    )
    group.add_argument("--cached_path", required=True, metavar="DIR", help="folder of the cache")
    group.add_argument(
        "--batch_size", type=positive_int, default=128, help="images per batch and process"
    )
    group.add_argument(
        "--layout",
        choices=("images", "shards"),
        default="images",
        help="images: a float32 .npz per image, as published; shards: a few large float16 arrays, "
        "which load many times faster",
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="only read all of --cached_path, in either layout, and report damaged files and, if "
        "--data_path is given, pictures that differ from those that were cached",
    )
    group.add_argument(
        "--convert_from",
        default="",
        metavar="DIR",
        help="convert the latents from this cache in the other layout (default: encode images)",
    )
    add_flags(group, Reading)
    add_tokenizer_flags(parser, TOKENIZERS)
    add_machine_flags(parser, num_workers=10, precision=False)
    return parser


def main(argv=None):
    """Run the script."""
    args, given = get_parser().parse_given(argv)
    folder = Path(args.cached_path)
    if args.verify and args.convert_from:
        raise ValueError(f"--convert_from {args.convert_from}: not together with --verify")
    if args.convert_from and Path(args.convert_from).resolve() == folder.resolve():
        raise ValueError(f"--convert_from {args.convert_from}: expected another than --cached_path")
    if args.verify:
        verify_cache(args, "data_path" in given)
        return
    if folder.resolve() in {Path(args.data_path, name).resolve() for name in ("", "train")}:
        raise ValueError(f"--cached_path {folder}: holds the images, expected another folder")
    if args.convert_from:
        written, skipped = convert_cache(args, folder)
    else:
        written, skipped = cache_images(args, given, folder)

    from util.dist import print0

    print0(f"{written} written, {skipped} there already: {folder}")


def verify_cache(args, with_pictures):
    """Read a whole cache. Raises ValueError if it is damaged, or of other pictures."""
    from util import dist
    from util.data import open_data
    from util.data.convert import compare_pictures, describe_checks, verify

    dist.init(**machine(args) | {"device": "cpu"})
    reading = from_flags(Reading, args, flip=False)
    pictures = with_pictures and open_data(args.data_path, "train", args.img_size, reading)
    layout, images = verify(args.cached_path, args.num_workers)
    dist.print0(f"{images} images, all whole, in the layout {layout}: {args.cached_path}")
    dist.print0(f"checked: {describe_checks(args.cached_path)}")
    if pictures:
        count = compare_pictures(args.cached_path, pictures, args.num_workers)
        dist.print0(
            f"compared with {args.data_path}: all names, and the content of {count} pictures"
        )


def convert_cache(args, folder):
    """Write latents from a cache of the other layout. Returns (written, skipped) images."""
    from util import dist
    from util.data.convert import convert

    dist.init(**machine(args) | {"device": "cpu"})
    with held(args, folder):
        return convert(args.convert_from, folder, args.layout, args.num_workers, args.flip)


def cache_images(args, given, folder):
    """Encode images with a tokenizer and write the latents. Returns (written, skipped) images."""
    from models.found import complete
    from util import dist

    device = dist.init(**machine(args))
    complete(args, given)
    dataset = open_images(args)
    tokenizer = open_tokenizer(args, dataset).to(device)
    with held(args, folder):
        return encode_images(args, folder, tokenizer, dataset, device)


def encode_images(args, folder, tokenizer, dataset, device):
    """Write the latents into a folder that is held. Returns (written, skipped) images."""
    from util import dist
    from util.data import caching, check_images, follow_classes
    from util.data.cached import check_cache, check_views
    from util.data.manifest import read_manifest

    facts = describe(args, tokenizer)
    check_views(folder, args.flip)
    facts |= caching.note_reading(dataset, folder, args.num_workers)
    facts |= {} if args.flip else {"flips": False}
    if args.layout == "images" and dist.is_main():
        check_cache(folder, write=True, **facts, finished=False)
    dist.barrier()
    check_cache(folder, **facts)
    follow_classes(dataset, read_manifest(folder).get("classes"), "the cache")
    check_images(dataset, args.num_workers, folder / "data_checked.txt")
    classes = len(dataset.classes)
    dist.print0(f"{len(dataset)} images of {classes} classes, {args.tokenizer} on {device}")
    how = {"batch_size": args.batch_size, "num_workers": args.num_workers, "device": device}
    if args.layout == "shards":
        return caching.cache_shards(tokenizer, dataset, folder, facts, **how)
    return caching.cache_latents(tokenizer, dataset, folder, flip=args.flip, **how)


def open_tokenizer(args, dataset):
    """The tokenizer of the images. Raises ValueError if flags or images do not fit it."""
    from models import arguments_of_tokenizer, build_tokenizer
    from util.data import match_channels

    channels = dataset.channels
    own = arguments_of_tokenizer(args.tokenizer, channels=channels, vae_path=args.vae_path)
    tokenizer = build_tokenizer(args.tokenizer, **own, scale=args.vae_scale, shift=args.vae_shift)
    match_channels(dataset, tokenizer, args.channels)
    if args.vae_embed_dim not in (None, tokenizer.channels):
        raise ValueError(
            f"--vae_embed_dim {args.vae_embed_dim}: {args.tokenizer} has {tokenizer.channels}"
        )
    if any(side % tokenizer.stride for side in sides(args.img_size)):
        raise ValueError(
            f"--img_size {shown(args.img_size)}: expected a multiple of {tokenizer.stride}, the "
            f"stride of {args.tokenizer}"
        )
    return tokenizer


def describe(args, tokenizer):
    """All that the latents depend on, name -> value, for the manifest of the cache."""
    from util.weights import digest

    facts = {"tokenizer": digest(tokenizer.state_dict()), "img_size": args.img_size}
    facts |= {"tokenizer_name": args.tokenizer, "scale": tokenizer.scale, "crop": CROP}
    if tokenizer.vae:
        facts["vae_path"] = str(Path(args.vae_path).absolute())
    if tokenizer.shift:  # absent from older caches
        facts["shift"] = tokenizer.shift
    return facts


@contextmanager
def held(args, folder):
    """Create the folder and hold it, without what dead runs left in it. Raises ValueError.

    Also if another run holds it, or if it holds a cache in the other layout.
    """
    from util import dist
    from util.data.manifest import layout_of
    from util.run import last_words, lock

    make_folder(args.cached_path, "--cached_path")
    if (found := layout_of(folder)) not in (None, args.layout):
        raise ValueError(
            f"--cached_path {folder}: holds a cache with --layout {found}, expected another folder "
            f"for {args.layout}"
        )
    with lock.folder(folder, "--cached_path"):
        last_words.set_folder(folder, "main_cache")
        if dist.is_main():
            remove_leftovers(folder, recursive=args.layout == "images")
        yield


def open_images(args):
    """The images to cache, not yet read. Raises ValueError, also if they have no names."""
    from util.data import open_data

    reading = from_flags(Reading, args, flip=False)
    dataset = open_data(args.data_path, "train", args.img_size, reading)
    if not hasattr(dataset, "name"):
        raise ValueError(
            f"--data_path {args.data_path}: its images have no names for files of latents; "
            "expected pictures in a folder or an archive"
        )
    return dataset


if __name__ == "__main__":
    run(main, resumes=True)
