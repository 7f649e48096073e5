"""CUDA graphs: many small kernels in one launch, where the device supports it."""

import os

import torch

from util.dist import print0
from util.files import first_line

enabled = os.environ.get("MAR_GRAPHS") != "0"  # a switch, for the user and for benchmarks
MOST = 64  # recordings held: sampling needs one for each number of tokens predicted per step


class Graphs:
    """Records functions of tensors on a CUDA device and replays them; elsewhere just calls them.

    A function is recorded once per key and shapes of its inputs. It must not wait for the device,
    and all else that it reads must stay at the same address. A copy of this object, pickled or not,
    starts without recordings.
    """

    def __init__(self):
        self.recorded, self.pool, self.possible = {}, None, True
        # one for all recordings: they share memory only on the same stream, and what a library
        # stores per stream may end with a recording made on it, so nothing else records there
        self.stream = None

    def __reduce__(self):
        return Graphs, ()

    def usable(self, device):
        """Whether functions are recorded on this device."""
        return enabled and self.possible and device.type == "cuda"

    def __call__(self, key, function, *inputs):
        """function(*inputs), a tensor. key: names the function and all else that it depends on."""
        if not self.usable(inputs[0].device):
            return function(*inputs)
        key = (key, *((x.shape, x.dtype) for x in inputs))
        with torch.cuda.device(inputs[0].device):
            if key not in self.recorded:
                if len(self.recorded) == MOST:
                    self.recorded, self.pool = {}, None
                try:
                    self.recorded[key] = self._record(function, inputs)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    self.possible = False
                    print0(
                        "NOTE: no CUDA graphs here: sampling is slower at small batches "
                        f"({first_line(error)})"
                    )
                    return function(*inputs)
            graph, held, output, _ = self.recorded[key]
            torch._foreach_copy_(held, list(inputs))
            graph.replay()
            return output.clone()  # the next replay of any graph of the pool overwrites it

    def _record(self, function, inputs):
        held = [x.clone() for x in inputs]
        self.stream, before = self.stream or torch.cuda.Stream(), torch.cuda.current_stream()
        self.stream.wait_stream(before)
        with torch.cuda.stream(self.stream):  # libraries initialize themselves at the first call
            function(*held)
        before.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads, such as a watchdog or a loader, may go on using CUDA
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                output = function(*held)
        finally:
            torch.cuda.set_stream(before)  # a recording that fails does not do so itself
        self.pool = graph.pool()
        return graph, held, output, function  # the function holds what it reads


def padded(count):
    """`count` rounded up to one of a few sizes, by at most a quarter above 32."""
    step = max(8, 1 << max(0, count.bit_length() - 3))
    return -(-count // step) * step
