"""Runs one job: ``python -m benchmarks.speed.worker ANSWER``, the job as JSON on standard input."""

import json
import os
import sys
from pathlib import Path

from benchmarks.speed.jobs import Job


def main() -> None:
    """Runs the job and writes its answer."""
    job = Job.from_json(sys.stdin.read())
    os.sched_setaffinity(0, job.cores)
    # Only now: JAX and PyTorch make as many threads as they find processors.
    from benchmarks.speed.measure import measure

    Path(sys.argv[1]).write_text(json.dumps(measure(job), allow_nan=False))


if __name__ == "__main__":
    main()
