"""Where a training step goes: the section `profile` of `benchmarks.speed`."""

import json
import re
import tempfile
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from benchmarks.timing import table, timed

STEPS = 4  # that are followed
SHOWN = 15  # kernels, those that take longest
# part of a step -> what its kernels are called, on a GPU or a CPU; the first that fits
PARTS = {
    "fused by --compile": "triton",
    "attention": "sdpa|fmha|flash|attention|dot_product|dot_do_o|convert_dq",
    "matrix products": "gemm|nvjet|cutlass|cublas|splitk|linear|addmm|bmm|::mm|: mmbackward",
    "optimizer, EMA, clipping": "multi_tensor|adam|foreach|lerp|lpnorm",
    "dropout, random draws": "dropout|philox|bernoulli|distribution|aten::rand",
    "norms": "layer_?norm|gammabeta",
    "sums": "reduce|aten::sum|aten::mean",
    "copies, casts, fills": "copy|memcpy|memset|cat|fill|zero|index|gather|scatter",
    "elementwise": "elementwise|add|mul|div|sub|silu|gelu|pow|tanh|exp|where",
}
WORK = {"kernel", "gpu_memcpy", "gpu_memset", "cpu_op"}  # categories of a trace's events


def profile(run, device):
    """Print where the time of a training step goes. run: does a step; all its shapes have been."""
    wall = sum(timed(run, device)[0] for _ in range(STEPS)) / STEPS
    spans = record(lambda: [run() for _ in range(STEPS)], device)
    busy = busy_ms(spans) / STEPS
    print(
        f"\n{1e3 * wall:.4g} ms a step when not followed; {busy:.4g} ms of work on the device, so "
        f"{max(0.0, 1 - busy / (1e3 * wall)):.0%} idle; {len(spans) / STEPS:.0f} kernels and copies"
    )
    print("\nBy parts, of the names of kernels:\n")
    table(["part", "ms", "share", "kernels"], shares(spans, part_of))
    print(f"\nThe {SHOWN} kernels that take longest:\n")
    table(["kernel", "ms", "share", "times"], shares(spans, short)[:SHOWN])


def record(function, device):
    """(name, begin, end) in ms of each kernel or copy of a call; on a CPU of each operation."""
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        timed(function, device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    spans = [
        (event["name"], event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3)
        for event in events
        if event.get("ph") == "X" and event.get("cat") in WORK
    ]
    return spans if gpu else outermost(spans)


def outermost(spans):
    """Those that are not within another."""
    found, until = [], float("-inf")
    for span in sorted(spans, key=lambda span: (span[1], -span[2])):
        if span[2] > until:
            found.append(span)
            until = span[2]
    return found


def busy_ms(spans):
    """Milliseconds in which at least one is under way."""
    total, until = 0.0, float("-inf")
    for _, begin, end in sorted(spans, key=lambda span: span[1]):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def shares(spans, group):
    """Rows of text, the longest first: group, ms a step, share of all, times a step."""
    spent, times = Counter(), Counter()
    for name, begin, end in spans:
        spent[group(name)] += end - begin
        times[group(name)] += 1
    whole = sum(spent.values())
    return [
        [name, f"{ms / STEPS:.3g}", f"{ms / whole:.0%}", f"{times[name] / STEPS:.0f}"]
        for name, ms in spent.most_common()
    ]


def part_of(name):
    """The part of a step that a kernel of this name does."""
    parts = (part for part, names in PARTS.items() if re.search(names, name.lower()))
    return next(parts, "other")


def short(name):
    """The name of a kernel without namespaces, cut."""
    name = re.sub(r"void |at::native::|\(anonymous namespace\)::|c10::|std::", "", name)
    return name.replace("|", "/")[:72]
