"""Run by torchrun from test_restarts.py: processes that reduce and wait, and are killed doing so.

In every attempt but the last, a process kills itself at a moment that the seed decides: while
torch is loaded, while the processes meet, within a collective or within dist.wait.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

from util.flags import run
from util.run import launch

KILLS = 2  # attempts that end so
LONGEST = {"started": 6, "joined": 2}  # seconds until then, counted from two places


def arm(seed, folder, where):
    """Have this process killed, if it is its turn; the moment is written into the folder."""
    draw = random.Random(f"{seed} {launch.attempt()}")
    turn, place = draw.randrange(int(os.environ["WORLD_SIZE"])), draw.choice([*LONGEST])
    seconds = draw.uniform(0, LONGEST[place])
    mine = turn == int(os.environ["RANK"]) and place == where
    if mine and launch.attempt() < KILLS:
        file = folder / f"killed{launch.attempt()}"
        command = f"sleep {seconds}; date +%s.%N > {file}; kill -9 {os.getpid()}"
        subprocess.Popen(["sh", "-c", command], stdout=subprocess.DEVNULL)


def main(argv):
    folder = Path(argv[1])
    arm(argv[0], folder, "started")

    import torch

    from util import dist
    from util.run import stop

    dist.init("cpu")
    arm(argv[0], folder, "joined")
    with stop.deferred():  # as in training: a signal is only noted
        last = max(dist.all_gather(launch.attempt())) >= KILLS  # launchers may count differently
        for step in range(20 if last else 10**9):
            total = dist.all_reduce(torch.full((100_000,), float(step)))
            assert total[0] == step * dist.world_size()
            if step == 0 and dist.is_main():
                (folder / f"joined{launch.attempt()}").write_text(str(time.time()))
            if step % 10 == 0:
                dist.wait()
    (folder / f"done{dist.rank()}").touch()


if __name__ == "__main__":
    run(main, sys.argv[1:])
