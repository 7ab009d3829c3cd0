"""What a job's process does: times contestants in turns, or finds the peak memory of one."""

import gc
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.contestants import BASELINE, BY_NAME, Contestant
from benchmarks.speed.jax_steps import Bandwidth
from benchmarks.speed.jobs import Job
from benchmarks.speed.rounds import Runner, interleave
from benchmarks.speed.workloads import Workload
from optax_lowbit.kernels.cpu.library import target_name

BANDWIDTH = "bandwidth"


def measure(job: Job) -> dict[str, Any]:
    """Runs ``job`` in this process.

    Returns:
      ``workload``, ``elements``, ``leaves``, ``cores`` (their number), ``instructions`` as asked
      for and ``native kernels``, those that there are (or None); and, of a timing job,
      ``groups`` as of `time_group`; of a memory job ``contestant`` and what `peak_memory` returns.
      ``refused`` has a peer's error by its name.
    """
    refused: dict[str, str] = {}
    answer = {
        "workload": job.workload.name,
        "elements": job.workload.elements,
        "leaves": len(job.workload.shapes),
        "cores": len(job.cores),
        "instructions": job.instructions,
        "native kernels": target_name(),
        "refused": refused,
    }
    contestants = [BY_NAME[name] for name in job.contestants]
    if job.kind == "memory":
        (contestant,) = contestants
        return answer | {"contestant": contestant.name} | peak_memory(job, contestant, refused)
    members = groups(contestants, job.workload, job.memory_limit)
    return answer | {"groups": [time_group(job, group, refused) for group in members]}


def groups(
    contestants: Sequence[Contestant], workload: Workload, limit: int
) -> list[list[Contestant]]:
    """Splits contestants into groups that fit into memory.

    Each group has the baseline, and the float32 references of its members, in front.

    Args:
      contestants: With the baseline among them.
      workload: What they step over.
      limit: Bytes that a group may take, by an estimate of 12 for a parameter: as much as
        parameter, gradient and one moment in float32. A group of the least size may take more.
    """
    by_name = {contestant.name: contestant for contestant in contestants}
    references = {BASELINE} | {
        each.reference for each in contestants if each.reference != each.name
    }
    room = limit // (12 * workload.elements)
    found: list[dict[str, Contestant]] = []
    for contestant in [c for c in contestants if c.name not in references] or contestants:
        names = [n for n in (BASELINE, contestant.reference, contestant.name) if n in by_name]
        needed = {name: by_name[name] for name in names}
        if not found or len(found[-1] | needed) > room:
            found.append({})
        found[-1] |= needed
    return [
        sorted(group.values(), key=lambda member: member.name not in references) for group in found
    ]


def time_group(
    job: Job, contestants: Sequence[Contestant], refused: dict[str, str]
) -> dict[str, Any]:
    """Times the group in turns, together with the bandwidth of memory.

    Returns:
      ``bandwidth``: ``bytes`` that move and ``seconds`` by sample with their ``minimum`` and
      ``median``; ``contestants``: by name, the same of a step, its ``first_step`` in seconds and
      the ``details`` of its runner.
    """
    runners: dict[str, Runner] = {BANDWIDTH: Bandwidth(job.bandwidth_bytes)}
    for contestant in contestants:
        print(f"{job.workload.name}: {contestant.name}", file=sys.stderr, flush=True)
        runner = start(job, contestant, refused)
        if runner is not None:
            runners[contestant.name] = runner
    seconds = interleave(runners, job.rounds)
    bandwidth = {"bytes": sum(runners[BANDWIDTH].nbytes.values()), **summary(seconds[BANDWIDTH])}
    timed = {
        name: {
            **summary(seconds[name]),
            "first_step": runner.first_step,
            "bytes": runner.nbytes,
            "details": runner.details,
        }
        for name, runner in runners.items()
        if name != BANDWIDTH
    }
    return {"bandwidth": bandwidth, "contestants": timed}


def start(job: Job, contestant: Contestant, refused: dict[str, str]) -> Runner | None:
    """The contestant's runner; None, and a word in ``refused``, where a peer raises an error."""
    try:
        return contestant.start(job.workload, job.trial_size)
    except Exception as error:
        if not contestant.peers:
            raise
        refused[contestant.name] = f"{type(error).__name__}: {error}".splitlines()[0]
        return None


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Samples, their minimum and their median."""
    return {
        "minimum": min(seconds),
        "median": statistics.median(seconds),
        "seconds": [float(f"{value:.4g}") for value in seconds],
    }


def peak_memory(job: Job, contestant: Contestant, refused: dict[str, str]) -> dict[str, Any]:
    """Resident memory of this process at most, while it steps.

    Everything is compiled and run once before, so that what is counted is what a later step needs.

    Returns:
      ``bytes`` of parameters, gradients and state; ``above`` the memory before there were any of
      these and the parameters: gradients, state and temporaries at the peak; ``growth`` above the
      memory right before the step: temporaries. Nothing if a peer raises an error.
    """
    print(f"memory: {contestant.name}", file=sys.stderr, flush=True)
    runner = start(job, contestant, refused)
    if runner is None:
        return {}
    runner.fill()
    runner.step()
    del runner
    gc.collect()
    empty = _resident("VmRSS")
    runner = contestant.start(job.workload, job.trial_size)
    runner.fill()
    runner.step()
    runner.fill()
    gc.collect()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    runner.step()
    peak = _resident("VmHWM")
    return {
        "bytes": runner.nbytes,
        "above": peak - empty - runner.nbytes["params"],
        "growth": peak - before,
        "details": runner.details,
    }


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError(f"no {field} in /proc/self/status")
    return int(found.group(1)) * 1024
