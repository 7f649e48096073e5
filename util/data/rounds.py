"""Work on a cache in rounds of a batch per process, so that all stop in the same one."""

from util import dist
from util.run import stop


def in_rounds(items, common, folder):
    """Yield a process's items; after each of the first `common`, all agree whether to stop.

    common: the number of items that every process has at least: none waits for one that has more.
    folder: the cache, for the message. Raises stop.Stopped, on all processes after as many items.
    """
    agree = dist.Agreement()
    for done, item in enumerate(items, 1):
        yield item
        if done <= common and any(agree(bool(stop.reason()))):
            agree.close()
            raise requested(folder)
    agree.close()


def check(folder):
    """Raises stop.Stopped, on all processes, if any was asked to stop. A collective call."""
    if any(dist.all_gather(bool(stop.reason()))):
        raise requested(folder)


def requested(folder):
    """The exception that ends caching."""
    reason = stop.reason() or "another process was asked to"
    return stop.Stopped(f"{reason}; call the same command again to complete {folder}")
