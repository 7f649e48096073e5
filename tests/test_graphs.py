"""Recording and replaying, on a played device. Run: python -m pytest tests/test_graphs.py"""

import contextlib
import copy
import pickle
import runpy
from unittest.mock import MagicMock

import pytest
import torch
from rule import by_rule, rule_input
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.diffloss import DiffLoss
from models.fast import graphs as module
from models.fast import products
from models.fast.graphs import Graphs, padded


class Played(TorchDispatchMode):
    """A CUDAGraph on the CPU: remembers each operation, and does them again on the same tensors."""

    def __init__(self):
        super().__init__()
        self.operations, self.replays = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        output = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, output))
        return output

    def replay(self):
        self.replays += 1
        for function, args, kwargs, output in self.operations:
            again = tree_leaves(function(*args, **kwargs))
            for place, value in zip(tree_leaves(output), again, strict=True):
                if place.data_ptr() != value.data_ptr():  # neither a view nor in place
                    place.copy_(value)

    def pool(self):
        return "pool"


@pytest.fixture
def device(monkeypatch):
    """torch.cuda as the recorder uses it. Gives the graphs made, whether the stream of before was
    set again after each, and (stream, pool) of each."""
    made, restored, used, before = [], [], [], MagicMock(name="before")

    @contextlib.contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        made.append(graph)
        used.append((stream, pool))
        with graph:
            yield

    fakes = {
        "device": lambda device: contextlib.nullcontext(),
        "Stream": MagicMock,
        "current_stream": lambda: before,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": Played,
        "graph": capture,
        "set_stream": lambda stream: restored.append(stream is before),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Graphs, "usable", lambda self, device: self.possible)
    monkeypatch.setattr(products, "mode", "torch")  # of a CPU alone
    return made, restored, used


def test_replays_what_it_recorded(device):
    """Once for each key and shape; a replay sees new inputs, and its result is the caller's own."""
    graphs, calls = Graphs(), []

    def double(x):
        calls.append(len(x))
        return 2 * x

    first = graphs("double", double, torch.tensor([1.0]))
    second = graphs("double", double, torch.tensor([5.0]))
    assert (first.item(), second.item()) == (2, 10)
    assert graphs("double", double, torch.ones(3)).tolist() == [2, 2, 2]
    assert graphs("add", lambda x: x + 1, torch.ones(3)).tolist() == [2, 2, 2]
    assert calls == [1, 1, 3, 3]  # to warm up and to record
    assert [graph.replays for graph in device[0]] == [2, 1, 1] and all(device[1])
    streams, pools = zip(*device[2], strict=True)
    assert len(set(streams)) == 1 and pools == (None, "pool", "pool")  # so they share memory


def test_keeps_a_limited_number(device, monkeypatch):
    """All are dropped at once: they share their memory."""
    monkeypatch.setattr(module, "MOST", 2)
    graphs = Graphs()
    for n in (1, 2, 3):
        assert graphs("double", lambda x: 2 * x, torch.ones(n)).sum() == 2 * n
    assert len(graphs.recorded) == 1


def test_what_cannot_be_recorded(device, capsys):
    """The function is called as it is, which is said once; the stream is that of before."""
    graphs = Graphs()
    for _ in range(2):
        assert graphs("waits", lambda x: x * x.max().item(), torch.ones(2)).tolist() == [1, 1]
    assert capsys.readouterr().out.count("NOTE: no CUDA graphs here") == 1
    assert device[1] == [True]


def test_the_reason_is_one_line(device, capsys):
    """Errors of CUDA have several."""

    def fails(x):
        if len(device[0]):  # while it is recorded
            raise RuntimeError("CUDA error\nCompile with TORCH_USE_CUDA_DSA")
        return 2 * x

    graphs = Graphs()
    device[0].clear()
    with pytest.raises(RuntimeError):  # also without a graph, as `fails` has seen one
        graphs("fails", fails, torch.ones(2))
    assert capsys.readouterr().out.splitlines() == [
        "NOTE: no CUDA graphs here: sampling is slower at small batches (CUDA error)"
    ]


def test_switch(monkeypatch):
    """MAR_GRAPHS=0 in the environment, read once: nothing is recorded on a GPU either."""
    gpu = torch.device("cuda")
    assert Graphs().usable(gpu)
    monkeypatch.setattr(module, "enabled", False)
    assert not Graphs().usable(gpu)
    for value, expected in (("0", False), ("1", True)):
        monkeypatch.setenv("MAR_GRAPHS", value)
        assert runpy.run_path(module.__file__)["enabled"] is expected


def test_no_memory_is_no_reason(device):
    """To do without graphs would need as much."""

    def too_much(x):
        raise torch.OutOfMemoryError("too much")

    graphs = Graphs()
    with pytest.raises(torch.OutOfMemoryError):
        graphs("large", too_much, torch.ones(2))
    assert graphs.possible


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_diffusion_loss_by_replay(device, monkeypatch, cfg):
    """Other z, noise, rows and weights give what they give without graphs."""
    head = by_rule(DiffLoss(16, 48, depth=2, width=64, num_sampling_steps="10"))

    def sample(rows, seed):
        z, z_uncond = rule_input("z", (rows, 48)) + seed, rule_input("zu", (rows, 48)) + seed
        noise = torch.randn(11, rows, 16, generator=torch.Generator().manual_seed(seed))
        return head.sample(z, 0.9, cfg, z_uncond, noise=noise)

    def both(*args):
        ours = sample(*args)
        with monkeypatch.context() as patch:
            patch.setattr(Graphs, "usable", lambda self, device: False)
            theirs = sample(*args)
        return ((ours - theirs).abs().max() / theirs.abs().max()).item()

    assert both(3, 0) < 1e-5 and both(5, 1) < 1e-5  # padded to the same shape
    assert both(9, 2) < 1e-5
    assert [graph.replays for graph in device[0]] == [2, 1]
    with torch.no_grad():
        head.net.cond_embed.weight.mul_(2.0)
        head.net.res_blocks[0].adaLN_modulation[1].weight.mul_(-1.0)
    assert both(3, 3) < 1e-5 and len(device[0]) == 2
    head.net.cond_embed.weight = torch.nn.Parameter(head.net.cond_embed.weight / 2)
    assert both(3, 4) < 1e-5 and len(device[0]) == 3
    with torch.autocast("cpu", torch.bfloat16):
        assert sample(3, 5).isfinite().all() and len(device[0]) == 4
    assert both(3, 6) < 1e-5 and len(device[0]) == 5
    torch.set_float32_matmul_precision("high")
    try:
        assert both(3, 7) < 1e-5 and len(device[0]) == 6
    finally:
        torch.set_float32_matmul_precision("highest")


def test_recordings_are_not_copied():
    """A copied or pickled head begins without them."""
    graphs = Graphs()
    graphs.recorded["key"] = object()
    assert not copy.deepcopy(graphs).recorded
    assert not pickle.loads(pickle.dumps(graphs)).recorded
    assert graphs("key", lambda x: x + 1, torch.zeros(2)).tolist() == [1, 1]


def test_padded():
    """Never less, at most a quarter more from 32 on, and few sizes."""
    sizes = [padded(n) for n in range(1, 4097)]
    assert all(n <= size for n, size in enumerate(sizes, 1))
    assert all(size <= 1.25 * n for n, size in enumerate(sizes, 1) if n >= 32)
    assert len(set(sizes)) < 40
