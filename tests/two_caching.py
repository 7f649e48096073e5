"""Run by torchrun from test_shards.py: main_cache.py with shards of three images."""

import sys

import main_cache
from util.data import shards
from util.flags import run

shards.SHARD_SIZE = 3
run(main_cache.main, sys.argv[1:])
