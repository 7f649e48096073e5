"""Shared by the benchmarks: timing calls in turns, counting operations, printing tables."""

import statistics
import time
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# of the rows of `compare`
TITLES = ["", "ours", "min", "max", "plain", "min", "max", "plain / ours"]


def timed(function, device=None):
    """(seconds, result) of a call. device: the device to wait for, if it is a GPU."""
    wait(device)
    begin = time.perf_counter()
    result = function()
    wait(device)
    return time.perf_counter() - begin, result


def wait(device):
    """Wait until all work on a device is done."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def cudnn_attention(enabled):
    """Whether torch may take cuDNN's attention, which prepares itself for each new shape."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(enabled)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def in_turns(functions, rounds, device=None):
    """Seconds of the calls of some functions, in turns: name -> list of `rounds` numbers.

    functions: name -> function. A first call of each, cold, is not counted.
    """
    seconds = {name: [] for name in functions}
    for _ in range(1 + rounds):
        for name, function in functions.items():
            seconds[name].append(timed(function, device)[0])
    return {name: values[1:] for name, values in seconds.items()}


def compare(what, ours, plain, rounds, device, unit=1e3):
    """A row of text: median, minimum, maximum of ours and of plain in ms, the ratio of medians."""
    seconds = in_turns({"ours": ours, "plain": plain}, rounds, device)
    of = statistics.median, min, max
    numbers = [f(values) * unit for values in seconds.values() for f in of]
    ratio = statistics.median(seconds["plain"]) / statistics.median(seconds["ours"])
    return [what, *(f"{x:.4g}" for x in numbers), f"{ratio:.2f}"]


def table(titles, rows):
    """Print rows of text as a table in Markdown, each as soon as it is there."""
    for line in table_lines(titles, rows):
        print(line, flush=True)


def table_lines(titles, rows):
    """The lines of a table in Markdown."""
    yield "| " + " | ".join(titles) + " |"
    yield "|" + " --- |" * len(titles)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def count_launches(function, device):
    """(kernels or graphs launched, host-to-device copies) of a call on a GPU."""
    from torch.profiler import ProfilerActivity, profile

    function()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        timed(function, device)
    names = [event.name for event in profiler.events()]
    launches = sum("LaunchKernel" in name or "GraphLaunch" in name for name in names)
    return launches, sum("Memcpy HtoD" in name for name in names)


class Counter(TorchDispatchMode):
    """Counts operations that compute (not views), and tensors made from Python or NumPy."""

    def __init__(self):
        super().__init__()
        self.operations = self.made = 0

    def __enter__(self):
        self.makers = torch.tensor, torch.from_numpy
        torch.tensor, torch.from_numpy = map(self._counted, self.makers)
        return super().__enter__()

    def __exit__(self, *args):
        torch.tensor, torch.from_numpy = self.makers
        return super().__exit__(*args)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        views = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
        self.operations += not views
        return function(*args, **(kwargs or {}))

    def _counted(self, function):
        def call(*args, **kwargs):
            self.made += 1
            return function(*args, **kwargs)

        return call
