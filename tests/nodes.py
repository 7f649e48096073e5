"""Two machines for tests: network namespaces, joined by a link that can be cut.

Linux and root only. Commands of a node see its addresses alone; files are shared.
"""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack, contextmanager

import pytest
from cli import ROOT
from test_launch import plain_environment

ADDRESSES = "10.99.7.1", "10.99.7.2"


def _ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


def need_namespaces():
    """Skip a test that cannot make them."""
    if sys.platform != "linux" or os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs Linux, root and iproute2")
    if subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        pytest.skip("no network namespaces here")


class Nodes:
    """Made by `two_nodes`."""

    def __init__(self):
        self.names = [f"mar{os.getpid()}{side}" for side in "ab"]
        self.links = [f"mv{os.getpid()}{side}" for side in "ab"]

    def start(self, node, command, **environ):
        """A process on node 0 or 1; its output is in `stdout`."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[node], *command],
            cwd=ROOT,
            env=plain_environment(PATH=_path(), **environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def cut(self):
        """Take the link away: no packet arrives any more, and nobody is told."""
        _ip("-n", self.names[0], "link", "set", self.links[0], "down")


@contextmanager
def two_nodes():
    """Two nodes with ADDRESSES."""
    need_namespaces()
    nodes = Nodes()
    with ExitStack() as stack:
        for name in nodes.names:
            _ip("netns", "add", name)
            stack.callback(_remove, name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("link", "add", nodes.links[0], "type", "veth", "peer", "name", nodes.links[1])
        for name, link, address in zip(nodes.names, nodes.links, ADDRESSES, strict=True):
            _ip("link", "set", link, "netns", name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            _ip("-n", name, "link", "set", link, "up")
        yield nodes


def _remove(name):
    """A node, with what still runs there."""
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    for pid in found.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    _ip("netns", "del", name)


def _path():
    """With torchrun and python of this environment first."""
    return os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
