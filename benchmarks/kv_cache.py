"""The savings of the key/value cache: python -m benchmarks.kv_cache

A causal model samples sequences of growing length with and without it, in turns, in one process,
with the L2 head, so that the backbone is measured. First the largest difference of the samples
is printed, then medians: with the cache, the time of one token hardly grows with the length.
"""

import statistics
import time

import torch

from models.ar import AR
from util.flags import Parser, positive_int, run
from util.rng import image_generators


def main(argv=None):
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
    print(f"{torch.get_num_threads()} threads, width {args.width}, {args.depth} blocks, float32")
    print("tokens  difference  cached ms/token  plain ms/token  plain/cached")
    for side in args.sides:
        torch.manual_seed(0)
        model = AR(
            img_size=side, vae_stride=1, embed_dim=args.width, depth=args.depth, head="l2"
        ).eval()
        start_cache = model.start_cache
        sides = {"cached": start_cache, "plain": lambda sampling: None}
        seconds, samples = {name: [] for name in sides}, {}
        for _ in range(1 + args.rounds):
            for name, start in sides.items():
                model.start_cache = start
                begin = time.perf_counter()
                samples[name] = sample(model, args.batch_size)
                seconds[name].append(time.perf_counter() - begin)
        difference = (samples["cached"] - samples["plain"]).abs().max() / samples[
            "plain"
        ].abs().max()
        cached, plain = (
            1000 * statistics.median(seconds[name][1:]) / model.seq_len for name in sides
        )
        print(
            f"{model.seq_len:6d}  {difference:10.1e}  {cached:15.2f}  {plain:14.2f}  "
            f"{plain / cached:12.1f}",
            flush=True,
        )


def sample(model, count):
    return model.sample_tokens(
        count,
        num_iter=model.seq_len,
        labels=torch.arange(count),
        generator=image_generators(0, range(count)),
        cfg=2.0,
    )


if __name__ == "__main__":
    run(main)
