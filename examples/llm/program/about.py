"""When, where and with what a result was made."""

import datetime
import importlib.metadata
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

_PACKAGES = ("jax", "jaxlib", "optax", "flax", "optax-lowbit")


def about_this_run() -> dict[str, Any]:
    """Return the date, the machine, the versions of packages and the command."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "command": shlex.join(["python", *_program(), *sys.argv[1:]]),
    }


def _program() -> list[str]:
    """What was run: a script as it was called, or the module that a package is."""
    path = Path(sys.argv[0])
    return ["-m", "examples.llm"] if path.name == "__main__.py" else [sys.argv[0]]
