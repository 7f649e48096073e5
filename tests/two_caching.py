"""Run by torchrun from test_shards.py and test_caching.py: main_cache.py with small shards.

In the environment: SHARD, images per shard (3); SLOW, seconds that a batch takes longer (0).
"""

import os
import sys
import time

import main_cache
from util import dist
from util.data import caching, shards
from util.flags import run

shards.SHARD_SIZE = int(os.environ.get("SHARD", 3))
encode, encoded = caching.moments_and_flips, []


def slowly(tokenizer, images, flip):
    """Encode a batch, note how many images it has, and take as long as the test wants."""
    time.sleep(float(os.environ.get("SLOW", 0)))
    encoded.append(len(images))
    print(f"encoded {sum(encoded)} by {dist.rank()}", flush=True)
    return encode(tokenizer, images, flip)


caching.moments_and_flips = slowly
run(main_cache.main, sys.argv[1:])
