"""Many small kernels as one launch, where the device can."""

import torch

from util.dist import print0

MOST = 64  # recordings kept: of a sampling there are as many as counts of tokens asked at a step


class Graphs:
    """Records what functions of tensors do on a CUDA device, and replays it; elsewhere calls them.

    A function is recorded once for each key and shapes of its inputs. It must not wait for the
    device, and what else it reads must stay where it is. A copy of this object, or one that was
    written to a file, begins with no recordings.
    """

    def __init__(self):
        self.recorded, self.pool, self.possible = {}, None, True
        # of all its recordings: they share memory only on one, and what a library keeps for a
        # stream may end with a recording made on it, so nobody else records there
        self.stream = None

    def __reduce__(self):
        return Graphs, ()

    def usable(self, device):
        """Whether recordings are made on this device."""
        return self.possible and device.type == "cuda"

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
                        f"NOTE: no CUDA graphs here: sampling is slower at small batches ({error})"
                    )
                    return function(*inputs)
            graph, held, output, _ = self.recorded[key]
            torch._foreach_copy_(held, list(inputs))
            graph.replay()
            return output.clone()  # the next replay, of any graph of the pool, writes over it

    def _record(self, function, inputs):
        held = [x.clone() for x in inputs]
        self.stream, before = self.stream or torch.cuda.Stream(), torch.cuda.current_stream()
        self.stream.wait_stream(before)
        with torch.cuda.stream(self.stream):  # libraries set themselves up at the first call
            function(*held)
        before.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # what other threads do meanwhile, a watchdog or a loader, is theirs
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                output = function(*held)
        finally:
            torch.cuda.set_stream(before)  # a recording that fails does not do it itself
        self.pool = graph.pool()
        return graph, held, output, function  # which holds what it reads


def padded(count):
    """`count` rounded up to one of few sizes, at most a quarter above it beyond 32."""
    step = max(8, 1 << max(0, count.bit_length() - 3))
    return -(-count // step) * step
