"""What processes send to one another, and on paper what training MAR-L on up to 128 H100s costs."""

from types import SimpleNamespace

from benchmarks.timing import table

NUMBER = 4  # bytes of a weight, a gradient, a moment
# MAR-L on one H100 (RESULTS.md): seconds of the passes over 64 images, and of the rest of a step
MAR_L = SimpleNamespace(parameters=478e6, images=64, passes=0.2143, rest=0.0066)
FEW = 16  # images on each of 128 GPUs: the paper's 2,048 in all
COUNTS = 1, 2, 4, 8, 16, 32, 64, 128
PER_MACHINE = 8
NVLINK = (
    450e9  # bytes per second that an H100 sends over NVLink 4, half of the 900 GB/s of both ways
)
INFINIBAND = 50e9  # of an adapter of 400 Gb/s (NDR)
WAYS = {  # name -> (adapters of each machine, whether weights are sharded)
    f"{kind}, {adapters} × 400 Gb/s": (adapters, kind == "FSDP")
    for adapters in (8, 1)
    for kind in ("DDP", "FSDP")
}


def bytes_sent(parameters, processes, sharded=False):
    """Bytes that each process sends in a training step, in a ring.

    DDP adds up gradients, 2·(P − 1)/P of them. FSDP gathers weights for the forward and again for
    the backward pass, and adds up each gradient where it is kept: 3·(P − 1)/P.
    """
    return (3 if sharded else 2) * (processes - 1) / processes * NUMBER * parameters


def bytes_held(parameters, processes, sharded=False):
    """Bytes of weights, gradients, two moments and EMA on each process."""
    return 5 * NUMBER * parameters / (processes if sharded else 1)


def bandwidth(processes, adapters):
    """Bytes per second of a ring: NVLink's within a machine; else its adapters', if slower."""
    return NVLINK if processes <= PER_MACHINE else min(NVLINK, adapters * INFINIBAND)


def step_seconds(processes, adapters, sharded, images=MAR_L.images, hidden=False):
    """Seconds of a training step of MAR-L with so many images on each H100.

    hidden: whether what fits is sent during the passes, else all of it after them. The backward
    pass, the only one during which DDP sends, is taken as two thirds of them.
    """
    passes = MAR_L.passes * images / MAR_L.images
    sent = bytes_sent(MAR_L.parameters, processes, sharded) / bandwidth(processes, adapters)
    if hidden:
        sent = max(0.0, sent - passes * (1 if sharded else 2 / 3))
    return passes + MAR_L.rest + sent


def on_paper():
    """A panel of how training scales, all sent after the passes. Also prints tables."""
    print(f"\nCalculated: MAR-L, {MAR_L.images} images on each H100, {PER_MACHINE} in a machine\n")
    found = {name: [step_seconds(n, *way) for n in COUNTS] for name, way in WAYS.items()}
    print_counts(found)
    print(f"\n{COUNTS[-1]} GPUs, ms a step: all sent after the passes, or what fits during them\n")
    print_hidden()
    curves = [
        {"name": name, "x": list(COUNTS), "law": [100 * times[0] / x for x in times]}
        for name, times in found.items()
    ]
    title = f"calculated: MAR-L, {MAR_L.images} images on each H100"
    return panel(title, "GPUs, 8 in a machine", "% of linear scaling", curves, "linear")


def print_counts(found):
    """A row for each number of GPUs. found: name -> seconds of a step."""
    titles = [f"GB {what}, {kind}" for what in ("sent", "held") for kind in ("DDP", "FSDP")]
    rows = []
    for i, n in enumerate(COUNTS):
        sizes = (
            size(MAR_L.parameters, n, sharded) / 1e9
            for size in (bytes_sent, bytes_held)
            for sharded in (False, True)
        )
        times = (1e3 * seconds[i] for seconds in found.values())
        rows.append([str(n), *(f"{x:.3g}" for x in sizes), *(f"{x:.4g}" for x in times)])
    table(["GPUs", *titles, *(f"ms, {name}" for name in found)], rows)


def print_hidden():
    """What sending during the passes gains, with many and with few images on each GPU."""
    rows = []
    for images in (MAR_L.images, FEW):
        for name, way in WAYS.items():
            times = (step_seconds(COUNTS[-1], *way, images, hidden) for hidden in (False, True))
            rows.append([f"{images} images each, {name}", *(f"{1e3 * x:.4g}" for x in times)])
    table(["", "after", "during"], rows)


def panel(title, x, y, curves, scale="log"):
    """A panel, see benchmarks/growth_figures.py."""
    return {"title": title, "x": x, "y": y, "scale": scale, "curves": curves}
