"""One of two processes of test_heartbeat.py: reduces, says so, and waits for the other.

waiting.py WHAT: what process 1 does before: "busy" for longer than the timeout, also before
"objects" are gathered, in "c" code that keeps the GIL, or "late" to a collective, which has the
timeout; the test does other things to it.
"""

import ctypes
import sys
import time

from util.flags import run

TIMEOUT = 6.0  # seconds


def main(argv):
    import torch

    from util import dist

    dist.init("cpu", timeout=TIMEOUT / 60)
    dist.all_reduce(torch.ones(3))
    print("met", flush=True)
    if dist.rank() == 1 and argv[0] in ("busy", "objects", "late"):
        time.sleep(2 * TIMEOUT)
    elif dist.rank() == 1 and argv[0] == "c":
        ctypes.PyDLL(None).usleep(int(0.6e6 * TIMEOUT))  # PyDLL keeps the GIL
    elif dist.rank() == int(argv[1]):
        time.sleep(1000)
    if argv[0] == "late":
        dist.all_reduce(torch.ones(3))
    if argv[0] == "objects":
        assert dist.all_gather(dist.rank()) == [0, 1]
    dist.barrier()
    print("waited", flush=True)


if __name__ == "__main__":
    run(main, sys.argv[1:])
