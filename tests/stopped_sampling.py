"""Run from test_outputs.py: sample.py that sends a signal to itself after some batches.

Arguments: name of the signal; the rank that receives it; how many batches are kept by then; flags.
"""

import os
import signal
import sys

import sample
from util.flags import run
from util.outputs import Outputs

name, rank, left = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
keep = Outputs.keep


def kept(outputs, indices, images):
    global left
    keep(outputs, indices, images)
    left -= len(indices) > 0
    if not left and int(os.environ.get("RANK", 0)) == rank:
        os.kill(os.getpid(), getattr(signal, name))


Outputs.keep = kept
run(sample.main, sys.argv[4:])
