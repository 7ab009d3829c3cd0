"""What fine-tuning LLaMA-7B and its like needs, compiled for GPUs and TPUs that are not at hand.

python -m benchmarks.memory                        # all; results/memory.json and docs/memory.md
python -m benchmarks.memory --only llama-h100      # one part; the results of the others are kept
python -m benchmarks.memory --quick                # a smoke test: small models, for a CPU
"""

import argparse
import datetime
import json
import platform
import shlex
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.memory.page import RESULTS, tables, write_page
from benchmarks.memory.steps import LAYERWISE, compiled
from benchmarks.speed.contestants import installed_version

LIBRARIES = (
    "optax-lowbit", "jax", "jaxlib", "optax", "libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt",
)  # fmt: skip

LLAMA = {"dtype": "bfloat16", "remat": True}
LARGEST = {"target": "h100", "dtype": "float32", "devices": 1, "batch": 1, "remat": False}

# The settings of each part's steps, in the order of its table.
PARTS: dict[str, list[dict[str, Any]]] = {
    "llama-h100": [
        {"model": "llama-7b", "optimizer": name, "target": "h100:2", "devices": 2}
        | {"batch": 2, **LLAMA}
        for name in ("adamw-float32", "adamw4bit", "adamw4bit" + LAYERWISE)
    ],
    "llama-v5p": [
        {"model": "llama-7b", "optimizer": name, "target": "tpu v5p:2x2x1", "devices": 4}
        | {"batch": 4, **LLAMA}
        for name in ("adamw-float32", "adamw4bit")
    ],
    "largest": [
        {"model": model, "optimizer": name, **LARGEST}
        for name, models in (
            ("adamw", ("opt-350m", "opt-1.3b", "opt-2.7b", "opt-6.7b")),
            ("adamw4bit", ("opt-1.3b", "opt-2.7b", "opt-6.7b", "llama-7b")),
        )
        for model in models
    ],
}
QUICK = [
    {"model": "opt-125m", "optimizer": name, "target": "cpu"}
    | {"dtype": "float32", "devices": 1, "batch": 1, "remat": True}
    for name in ("adamw", "adamw4bit", "adamw4bit" + LAYERWISE)
]


def run_part(steps: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The part's results after each step: its run, and its steps so far."""
    results: dict[str, Any] = {
        "run": {
            "command": shlex.join(["python", "-m", "benchmarks.memory", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "versions": {
                "Python": platform.python_version(),
                **{name: installed_version(name) for name in LIBRARIES},
            },
        },
        "steps": [],
    }
    for settings in steps:
        results["steps"].append(compiled(**settings))
        print(json.dumps(results["steps"][-1]), flush=True)
        yield results


def main() -> None:
    """Compiles everything that is asked for and writes the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test that writes no files")
    parser.add_argument("--only", choices=PARTS, help="this part; the results of others are kept")
    arguments = parser.parse_args()
    if arguments.quick:
        list(run_part(QUICK))
        return
    for part in [arguments.only] if arguments.only else PARTS:
        for found in run_part(PARTS[part]):
            # Read again: other parts may be compiled beside this one.
            results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            RESULTS.write_text(json.dumps({**results, part: found}, indent=1) + "\n")
    results = json.loads(RESULTS.read_text())
    write_page(results)
    print(tables(results))


if __name__ == "__main__":
    main()
