"""The parts of the benchmark: which jobs, on what, for how long."""

import dataclasses
import functools
import os
from collections.abc import Sequence

from benchmarks.speed.contestants import BASELINE, CONTESTANTS, FUSED_BLOCK, PLAIN, TORCH
from benchmarks.speed.jobs import Job
from benchmarks.speed.rounds import Rounds
from benchmarks.speed.workloads import SMOLLM2, Workload, decoder, perceptron, power_of_two, square

PARTS = ("matrix", "large", "tree", "training", "scaling", "threads", "instructions", "memory")
# Of the native kernels, by the names that they have for themselves.
INSTRUCTION_SETS = ("avx512", "avx2", "generic")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much of everything.

    Attributes:
      matrix, large, tree, training: The workloads of the parts of these names.
      sizes: Exponents of 2, for scaling.
      rounds: For the parts with one workload.
      short_rounds: For scaling and threads, which have many.
      only: Names of contestants, None for all.
      trial_size, bandwidth_bytes: As in `Job`.
    """

    matrix: Workload
    large: Workload
    tree: Workload
    training: Workload
    sizes: Sequence[int]
    rounds: Rounds
    short_rounds: Rounds
    only: frozenset[str] | None = None
    trial_size: int = Job.trial_size
    bandwidth_bytes: int = Job.bandwidth_bytes

    def jobs(self, part: str) -> list[Job]:
        """The jobs of ``part``, one of `PARTS`."""
        cores = tuple(sorted(os.sched_getaffinity(0)))
        names = tuple(
            contestant.name
            for contestant in CONTESTANTS
            if part in contestant.parts
            and not contestant.missing()
            and (self.only is None or contestant.name in self.only)
        )

        job = functools.partial(
            Job,
            contestants=names,
            rounds=self.rounds,
            cores=cores,
            trial_size=self.trial_size,
            bandwidth_bytes=self.bandwidth_bytes,
        )
        if part == "scaling":
            workloads = map(power_of_two, self.sizes)
            return [job(workload, rounds=self.short_rounds) for workload in workloads]
        if part == "threads":
            counts = sorted({1, min(2, len(cores))})
            return [
                job(self.matrix, rounds=self.short_rounds, cores=cores[:count]) for count in counts
            ]
        if part == "instructions":
            return [
                job(self.matrix, rounds=self.short_rounds, instructions=name)
                for name in INSTRUCTION_SETS
            ]
        if part == "memory":
            return [job(self.matrix, kind="memory", contestants=(name,)) for name in names]
        return [job(getattr(self, part))]


FULL = Plan(
    matrix=square(4096),
    large=square(8192),
    tree=SMOLLM2,
    training=perceptron(layers=4, width=2048, batch=8),
    sizes=range(16, 27, 2),
    rounds=Rounds(seconds=6, least=5, most=40),
    short_rounds=Rounds(seconds=3, least=5, most=40),
)
QUICK = Plan(
    matrix=square(128),
    large=square(256),
    tree=decoder("parameters of a tiny decoder", 1, 64, 128, 32, 256),
    training=perceptron(layers=2, width=128, batch=4),
    sizes=(10, 14),
    rounds=Rounds(seconds=0.1, least=2, most=2),
    short_rounds=Rounds(seconds=0.1, least=2, most=3),
    only=frozenset({BASELINE, FUSED_BLOCK, TORCH, *PLAIN.values()}),
    trial_size=64,
    bandwidth_bytes=2**20,
)
