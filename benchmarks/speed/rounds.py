"""Timing in turns: every contestant once a round, so that all see the same busy machine."""

import abc
import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

SAMPLE = 0.02  # seconds, at least


class Runner(abc.ABC):
    """Something to time, with its arrays.

    Attributes:
      nbytes: Of the parts of what it works on.
      first_step: Seconds until the first step was done, compiling included.
      details: What else is worth a record.
    """

    nbytes: dict[str, int]
    first_step: float = 0.0
    details: dict[str, Any]

    @abc.abstractmethod
    def fill(self) -> None:
        """What must come before a step and isn't timed."""

    @abc.abstractmethod
    def step(self) -> None:
        """What is timed; has finished when it returns."""


@dataclasses.dataclass(frozen=True)
class Rounds:
    """How long to measure.

    Attributes:
      seconds: What a contestant gets, at the speed of its second step.
      least, most: Bounds for its number of samples.
    """

    seconds: float
    least: int
    most: int


def sample(runner: Runner, steps: int) -> float:
    """Seconds that a step takes, mean of ``steps``."""
    seconds = 0.0
    for _ in range(steps):
        runner.fill()
        start = time.perf_counter()
        runner.step()
        seconds += time.perf_counter() - start
    return seconds / steps


def interleave(runners: Mapping[str, Runner], rounds: Rounds) -> dict[str, list[float]]:
    """Times ``runners`` in turns, in one order and the opposite in turns too.

    Slow ones sit out some of the rounds, evenly.

    Returns:
      Of each, the seconds of a step in each of its samples.
    """
    steps, samples = {}, {}
    for name, runner in runners.items():
        estimate = sample(runner, 1)
        steps[name] = min(max(math.ceil(SAMPLE / estimate), 1), 100)
        wanted = int(rounds.seconds / (estimate * steps[name]))
        samples[name] = min(max(wanted, rounds.least), rounds.most)
    total = max(samples.values())
    seconds = {name: [] for name in runners}
    for number in range(total):
        for name in list(runners)[:: -1 if number % 2 else 1]:
            if (number + 1) * samples[name] // total > number * samples[name] // total:
                seconds[name].append(sample(runners[name], steps[name]))
    return seconds
