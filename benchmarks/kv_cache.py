"""The savings of the key/value cache: python -m benchmarks.kv_cache

A causal model samples sequences of growing length with and without it, in turns, in one process,
with the L2 head, so that the backbone is measured. First the largest difference of the samples
is printed, then medians: with the cache, the time of one token hardly grows with the length.
"""

import statistics

from util.flags import Parser, positive_int, run


def main(argv=None):
    """Run the script."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sides", type=positive_int, nargs="+", default=[8, 16, 32], help="sides of the token grid"
    )
    parser.add_argument("--width", type=positive_int, default=256, help="width of the model")
    parser.add_argument("--depth", type=positive_int, default=6, help="number of blocks")
    parser.add_argument("--batch_size", type=positive_int, default=4, help="images per batch")
    parser.add_argument(
        "--rounds", type=positive_int, default=5, help="rounds counted, after a cold one"
    )
    args = parser.parse_args(argv)

    import torch

    print(f"{torch.get_num_threads()} threads, width {args.width}, {args.depth} blocks, float32")
    print("tokens  difference  cached ms/token  plain ms/token  plain/cached")
    for side in args.sides:
        model = build(side, args.width, args.depth)
        difference, cached, plain = measure(model, args.batch_size, args.rounds)
        print(
            f"{model.seq_len:6d}  {difference:10.1e}  {cached:15.2f}  {plain:14.2f}  "
            f"{plain / cached:12.1f}",
            flush=True,
        )


def build(side, width, depth):
    """A causal model of side × side tokens with random weights."""
    import torch

    from models.ar import AR

    torch.manual_seed(0)
    return AR(img_size=side, vae_stride=1, embed_dim=width, depth=depth, head="l2").eval()


def measure(model, count, rounds):
    """The largest relative difference of `count` samples, and the median ms per token of each way.

    Returns (difference, with the cache, without).
    """
    from benchmarks.timing import in_turns

    starts = {"cached": model.start_cache, "plain": lambda sampling: None}
    samples = {}

    def way(name):
        def run():
            model.start_cache = starts[name]
            samples[name] = sample(model, count)

        return run

    seconds = in_turns({name: way(name) for name in starts}, rounds)
    del model.start_cache  # the class's is there again
    cached, plain = samples.values()
    difference = (cached - plain).abs().max() / plain.abs().max()
    return difference, *(1e3 * statistics.median(s) / model.seq_len for s in seconds.values())


def sample(model, count):
    """Latents (count, C, h, w), one token per step, guided."""
    import torch

    from util.rng import image_generators

    return model.sample_tokens(
        count,
        num_iter=model.seq_len,
        labels=torch.arange(count),
        generator=image_generators(0, range(count)),
        cfg=2.0,
    )


if __name__ == "__main__":
    run(main)
