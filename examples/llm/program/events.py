"""What the process of one run is asked to do and what it tells meanwhile."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.llm.program.settings import Settings


@dataclass(frozen=True)
class Job:
    """One run of a comparison.

    Attributes:
      method: name in `METHODS`.
      settings: the comparison's settings, with one seed.
      model: the model's file or folder.
    """

    method: str
    settings: Settings
    model: Path

    @property
    def name(self) -> str:
        """What the run is called where there are several."""
        return f"{self.method} seed {self.settings.seed}"

    @property
    def folder(self) -> Path:
        """Where this run's results and checkpoints go."""
        return self.settings.output.absolute() / self.method / f"seed-{self.settings.seed}"


@dataclass(frozen=True)
class Stage:
    """The process begins something that takes a while."""

    text: str


@dataclass(frozen=True)
class DataRead:
    """The data are read; `text` says as what, and how much is in each part."""

    text: str


@dataclass(frozen=True)
class Accepted:
    """Nothing in the settings was refused: the model and the data are read and go together."""


@dataclass(frozen=True)
class StepDone:
    """A training step has ended; `step` counts from 1."""

    step: int
    loss: float


@dataclass(frozen=True)
class RunResult:
    """What one run measured.

    Attributes:
      method: its name.
      seed: of the run.
      loss_before: held-out loss of the weights it started from.
      loss_after: held-out loss at the end.
      scores_before: held-out accuracy and F1 of the weights it started from, for a task with
        options.
      scores_after: the same at the end.
      losses: training loss of every step.
      step_seconds: wall time of every step.
      state_bytes: bytes in the buffers of the optimizer state.
      peak_bytes: highest resident memory of the process during its training steps.
      evaluations: by development data: `step`, `loss` and `scores` of each.
      kept_step: after how many steps the parameters were as they are judged at the end.
      continuation: the model's continuation of the prompt, empty without a prompt.
    """

    method: str
    seed: int
    loss_before: float
    loss_after: float
    scores_before: dict[str, float]
    scores_after: dict[str, float]
    losses: list[float]
    step_seconds: list[float]
    state_bytes: int
    peak_bytes: int
    evaluations: list[dict[str, Any]]
    kept_step: int
    continuation: str


Report = Callable[[Accepted | Stage | DataRead | StepDone], None]
