"""How long steps of optimizers take on a CPU: optax, optax_lowbit and the low-bit ones of others.

python -m benchmarks.speed                # all; results/speed.json, docs/speed.md and its figure
python -m benchmarks.speed --only tree    # one part; the results of the others are kept
python -m benchmarks.speed --quick        # a smoke test: tiny sizes, the page on the screen
"""

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.speed.contestants import CONTESTANTS, installed_version
from benchmarks.speed.page import RESULTS, page, write_page
from benchmarks.speed.plan import FULL, PARTS, QUICK, Plan

LIBRARIES = ("optax-lowbit", "jax", "jaxlib", "optax", "numpy")
PEERS = tuple(dict.fromkeys(peer for each in CONTESTANTS for peer in each.peers))


def machine() -> str:
    """Processor, number of processors and memory."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    total = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    name = cpu.group(1).strip() if cpu else platform.machine()
    memory = f", {int(total.group(1)) / 2**20:.0f} GiB" if total else ""
    return f"{name}, {len(os.sched_getaffinity(0))} processors{memory}"


def run_part(plan: Plan, part: str) -> dict[str, Any]:
    """Runs the jobs of a part.

    Returns:
      ``run``, with command, date, machine and versions; ``seconds`` that it took; ``not
      installed``, names of peers; and ``jobs``, what `measure` returned for each.
    """
    started = time.perf_counter()
    jobs = [job.run() for job in plan.jobs(part)]
    return {
        "run": {
            "command": shlex.join(["python", "-m", "benchmarks.speed", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": machine(),
            "versions": {
                "Python": platform.python_version(),
                **{name: installed_version(name) for name in (*LIBRARIES, *PEERS)},
            },
        },
        "seconds": round(time.perf_counter() - started, 1),
        "not installed": [peer for peer in PEERS if installed_version(peer) is None],
        "jobs": jobs,
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test that writes no files")
    parser.add_argument("--only", choices=PARTS, help="this part; the results of others are kept")
    return parser.parse_args()


def main() -> None:
    """Runs everything that is asked for and writes the results."""
    arguments = parse_arguments()
    plan = QUICK if arguments.quick else FULL
    results = {}
    if not arguments.quick and RESULTS.exists():
        results = json.loads(RESULTS.read_text())
    for part in [arguments.only] if arguments.only else PARTS:
        results[part] = run_part(plan, part)
        if not arguments.quick:
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    if not arguments.quick:
        write_page(results)
    print(page(results))


if __name__ == "__main__":
    main()
