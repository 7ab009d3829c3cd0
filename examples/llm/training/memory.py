"""Memory, measured: bytes in real buffers and the peak of the process."""

import resource
import sys
from pathlib import Path
from typing import Any

import jax

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def buffer_bytes(tree: Any) -> int:
    """Return the bytes that the device buffers of a pytree of `jax.Array`s take."""
    return sum(
        shard.data.on_device_size_in_bytes()
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
    )


def reset_peak_memory() -> None:
    """Forget the highest resident memory so far, where the platform allows (Linux)."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        pass  # the peak then covers the whole life of the process


def peak_memory_bytes() -> int:
    """Return the highest resident memory of this process since the last reset."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
