"""Names of the files in --stats_dir: results for data sets, kept under all that they depend on."""

import glob
import hashlib
import re
from pathlib import Path


def kept_path(cache, source, what, depends, suffix):
    """The cache file of a result for a data set. depends: text of all that it depends on.

    Its name begins with that of the data set for readers only: one of the same data under another
    name is found, too.
    """
    key = hashlib.sha256(depends.encode()).hexdigest()[:16]
    end = f"-{re.sub(r'[/:]+', '-', what)}-{key}.{suffix}"  # of timm:NAME
    found = sorted(Path(cache).glob(f"[!.]*{glob.escape(end)}"))
    return found[0] if found else Path(cache) / f"{Path(source).name or 'data'}{end}"
