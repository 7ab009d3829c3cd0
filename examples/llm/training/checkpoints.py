"""Checkpoints from which a run goes on bit for bit, kept with Orbax."""

import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from examples.llm.errors import UsageError
from examples.llm.models.opening import content_hash
from examples.llm.program.events import Job
from examples.llm.training.judging import Evaluation, merit
from examples.llm.training.steps import TrainState
from examples.llm.training.tuning import base_dtype


@dataclass
class Progress:
    """What a run has measured so far; it is saved with the state.

    Attributes:
      loss_before: held-out loss of the weights that the run started from.
      scores_before: their held-out scores.
      losses: training loss of every step done.
      step_seconds: wall time of every step done.
      peak_bytes: highest resident memory during the training steps.
      evaluations: by development data: `step`, `loss` and `scores` of each.
    """

    loss_before: float = math.nan
    scores_before: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def best_step(self, objective: str | None) -> int:
        """After how many steps the run did best by development data, see `merit`."""

        def quality(evaluation: Mapping[str, Any]) -> tuple[float, float]:
            return merit(Evaluation(evaluation["loss"], evaluation["scores"]), objective)

        return max(self.evaluations, key=quality)["step"]


def run_identity(job: Job) -> dict[str, Any]:
    """Return everything that decides the numbers of a run: two runs that agree are the same."""
    settings = job.settings
    task, hyperparameters = settings.task, settings.hyperparameters_of(job.method)
    return {
        "method": job.method,
        "tuning": settings.tuning,
        "rank": settings.rank,
        "alpha": settings.alpha,
        "lora-dropout": settings.lora_dropout,
        "model": content_hash(job.model),
        "task": task if task == "sotu" else settings.source().identity(),
        "template": settings.template,
        "head": settings.head,
        "objective": settings.objective,
        "train-examples": settings.train_examples,
        "eval-examples": settings.eval_examples,
        "steps": settings.steps,
        "batch-size": settings.batch_size,
        "accumulate": settings.accumulate,
        "train-on-source": settings.train_on_source,
        "pack": settings.pack,
        "judge": [source.identity() for source in settings.judge_sources()],
        "dtype": base_dtype(settings.tuning, settings.dtype),
        "schedule": hyperparameters.schedule,
        "clip-norm": hyperparameters.clip_norm,
        "sequence-length": settings.sequence_length,
        "learning-rate": hyperparameters.learning_rate,
        "eps": hyperparameters.eps,
        "seed": settings.seed,
        "eval-batches": settings.text_batches,
        "eval-every": settings.eval_every,
        "keep-best": settings.keep_best,
    }


def result_identity(job: Job) -> dict[str, Any]:
    """Return everything that decides the result of a run: its numbers, and what it writes."""
    settings = job.settings
    written = {
        "prompt": settings.prompt,
        "max-new-tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top-p": settings.top_p,
    }
    return run_identity(job) | written


def check_same(saved: Mapping[str, Any], identity: Mapping[str, Any], folder: Path) -> None:
    """Raise a `UsageError` naming the first field in which what was saved is of another run."""
    for name, value in identity.items():
        if saved.get(name) != value:
            raise UsageError(
                f"--resume: what is in {folder} was made with {name} {saved.get(name)}, "
                f"this run has {value}"
            )


class Checkpoints:
    """The checkpoints of one run; a context manager that ends their bookkeeping.

    A checkpoint appears under its final name only when it is complete, so a run that is killed
    while it saves leaves the one before.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        self._folder = folder
        self._identity = dict(identity)
        folder.mkdir(parents=True, exist_ok=True)
        self._manager = _manager(folder, "state", "progress", "identity", max_to_keep=2)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.close()

    @property
    def newest_step(self) -> int | None:
        """Number of steps done in the newest checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, progress: Progress) -> None:
        """Save a run after `len(progress.losses)` steps.

        Raises:
          OSError: it can't be written; the checkpoint before is whole.
        """
        parts = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            progress=ocp.args.JsonSave(asdict(progress)),
            identity=ocp.args.JsonSave(self._identity),
        )
        with _told_by_the_system(self._folder):
            self._manager.save(len(progress.losses), args=parts)

    def check_identity(self) -> None:
        """Raise a `UsageError` naming the first field in which the newest checkpoint differs."""
        restored = self._manager.restore(
            self.newest_step, args=ocp.args.Composite(identity=ocp.args.JsonRestore())
        )
        check_same(restored["identity"], self._identity, self._folder)

    def restore(self, like: TrainState) -> tuple[TrainState, Progress]:
        """Return the newest checkpoint; `like` gives shapes, dtypes and places of its state.

        An array of no given place is put on the first device.
        """
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or first), like
        )
        restored = self._manager.restore(
            self.newest_step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(like), progress=ocp.args.JsonRestore()
            ),
        )
        return restored["state"], Progress(**restored["progress"])


class BestParameters:
    """What did best so far, on the disk: it needs no memory; a context manager."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._manager = folder, _manager(folder, "parameters", max_to_keep=1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.close()

    def save(self, step: int, parameters: Any) -> None:
        """Keep the parameters after `step` steps, in place of others."""
        if step not in self._manager.all_steps():
            parts = ocp.args.Composite(parameters=ocp.args.StandardSave(parameters))
            with _told_by_the_system(self._folder):
                self._manager.save(step, args=parts)

    def restore(self, step: int, like: Any) -> Any:
        """Return what was saved after `step` steps; `like` gives shapes, dtypes and places."""
        restored = self._manager.restore(
            step, args=ocp.args.Composite(parameters=ocp.args.StandardRestore(like))
        )
        return restored["parameters"]


def _manager(folder: Path, *items: str, max_to_keep: int) -> ocp.CheckpointManager:
    _silence_what_is_raised()
    return ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep, cleanup_tmp_directories=True, enable_async_checkpointing=False
        ),
        item_names=items,
    )


@cache
def _silence_what_is_raised() -> None:
    """Have nothing said of errors in Orbax, which raises the first, too."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    former = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        # Writes that were under way when another failed find that nobody waits for them.
        if str(unraisable.exc_value) != "Event loop is closed":
            former(unraisable)

    sys.unraisablehook = hook


@contextmanager
def _told_by_the_system(folder: Path) -> Iterator[None]:
    """Raise an `OSError` where TensorStore raises a `ValueError` of what the system says."""
    try:
        yield
    except ValueError as error:
        number = re.search(r"os_error_code='(\d+)'", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(folder)) from error
