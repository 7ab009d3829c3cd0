"""What goes with the numbers of a benchmark, so that another can be set beside it."""

import datetime
import platform
import shlex
import sys
from typing import Any

from benchmarks.speed.__main__ import machine
from benchmarks.speed.contestants import installed_version


def run_record(module: str, *libraries: str) -> dict[str, Any]:
    """Command, date, machine and versions of this run of ``python -m module``.

    Args:
      module: The benchmark.
      libraries: Distributions beside optax_lowbit and JAX; None stands for one that is missing.
    """
    names = ("optax-lowbit", "jax", "jaxlib", "numpy", *libraries)
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": {
            "Python": platform.python_version(),
            **{name: installed_version(name) for name in names},
        },
    }
