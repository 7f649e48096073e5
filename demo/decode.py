"""The latents of a cache, decoded: what a perfect model of them would sample.

    python -m demo.decode --cached_path output_dir/cache --out decoded.npz

`python -m util.evaluation` takes the .npz as generated images.
"""

from util.flags import Parser, nonnegative_int, run

BATCH = 64


def main(argv=None):
    """Run the script."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--cached_path", required=True, metavar="DIR", help="folder of the cache")
    parser.add_argument("--out", required=True, metavar="FILE.npz", help="where to write them")
    parser.add_argument("--seed", type=nonnegative_int, default=0, help="seed of the latents")
    args = parser.parse_args(argv)

    from util.images import NpzWriter

    cache, tokenizer = open_latents(args.cached_path)
    with NpzWriter(args.out, len(cache), img_size_of(args.cached_path)) as writer:
        for start in range(0, len(cache), BATCH):
            indices = range(start, min(start + BATCH, len(cache)))
            _, images = decode(cache, tokenizer, indices, args.seed)
            writer.add(indices, images)
    print(f"{len(cache)} pictures: {args.out}")


def open_latents(folder):
    """(cache without mirror images, its tokenizer). Raises ValueError."""
    from models import arguments_of_tokenizer, build_tokenizer
    from models.found import of_cache
    from util.data.cached import open_cache

    said = of_cache(folder)
    own = arguments_of_tokenizer(said["tokenizer"], channels=3, vae_path=said.get("vae_path"))
    return open_cache(folder, flip=False), build_tokenizer(said["tokenizer"], **own).eval()


def img_size_of(folder):
    """The side of the cached pictures, or [height, width]."""
    from models.found import of_cache

    return of_cache(folder)["img_size"]


def decode(cache, tokenizer, indices, seed):
    """(latents (N, C, h, w), images uint8 (N, H, W, 3)) of some pictures of a cache."""
    import torch

    from util.images import to_uint8
    from util.rng import image_generators

    with torch.no_grad():
        moments = torch.stack([torch.as_tensor(cache[i][0]).float() for i in indices])
        latents = tokenizer.sample(moments, image_generators(seed, indices))
        return latents, to_uint8(tokenizer.decode(latents))


if __name__ == "__main__":
    run(main)
