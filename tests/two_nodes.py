"""Run twice from test_resume_files.py: main_mar.py on nodes without a common disk.

NODE in a flag is the number of the node, of which each has one process.
"""

import os
import sys

import main_mar
from util.flags import run

if __name__ == "__main__":
    run(main_mar.main, [flag.replace("NODE", os.environ["RANK"]) for flag in sys.argv[1:]])
