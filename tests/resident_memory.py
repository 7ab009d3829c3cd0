"""Peak memory of a call, in a process of its own."""

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Arrays above 64 KiB go back to the system when they are freed, and each has its own pages: with
# glibc's own, growing threshold it is chance what a heap keeps.
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
_CODE = """
from tests.resident_memory import measure
{setup}
measure(lambda path: {load}, {path!r})
"""


def peak_of(setup: str, load: str, path: Path) -> tuple[int, int]:
    """Return bytes: those taken at most while ``load`` ran, and those of the arrays it gives.

    Args:
      setup: Statements.
      load: An expression of ``path``, which gives a tree. It is called twice, so that all is
        compiled when it is measured.
      path: A file or folder.
    """
    code = _CODE.format(setup=setup, load=load, path=str(path))
    ran = subprocess.run(
        [sys.executable, "-c", code],
        check=True, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).resolve().parent.parent, env=os.environ | _ENVIRONMENT,
    )  # fmt: skip
    peak, size = json.loads(ran.stdout)
    return peak, size


def measure(load: Callable[[str], Any], path: str) -> None:
    """In the other process: print what :func:`peak_of` returns, as JSON."""
    import jax

    jax.block_until_ready(load(path))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    start, peak, done = _resident(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _resident())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    tree = jax.block_until_ready(load(path))
    done.set()
    watcher.join()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    print(json.dumps([max(peak, _resident()) - start, size]))


def _resident() -> int:
    """Pages that are no file's: those of a mapped file may be dropped at any time."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024
