"""Runs methods and seeds one by one, each in its own process, and shows how far they are."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from examples.llm.program.events import Accepted, DataRead, Job, Report, RunResult, Stage, StepDone
from examples.llm.program.processes import run_in_process
from examples.llm.program.settings import Settings
from examples.llm.program.worker import fine_tune


def compare(
    settings: Settings, model: Path, console: Console, accepted: Callable[[], None]
) -> list[RunResult]:
    """Fine-tune `model` with every method of `settings`, once for each seed.

    Args:
      settings: checked settings.
      model: the model's file or folder.
      console: where the progress is shown.
      accepted: is called when a run has begun that refuses nothing in the settings.

    Returns:
      One result per method and seed, in their order; each is also in the run's folder.
    """
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
    )
    jobs = [
        Job(method, replace(settings, seeds=(seed,)), model)
        for method in settings.method
        for seed in settings.seeds
    ]
    results, told = [], set()
    with Progress(*columns, console=console) as progress:
        rows = [
            progress.add_task(job.name, total=settings.steps, status="waiting", start=False)
            for job in jobs
        ]
        for job, row in zip(jobs, rows, strict=True):
            progress.start_task(row)
            show = _show_on(progress, row, told, accepted)
            result = run_in_process(fine_tune, job, job.name, show)
            progress.update(
                row, completed=settings.steps, status=f"held-out loss {result.loss_after:.3f}"
            )
            progress.stop_task(row)
            results.append(result)
    return results


def _show_on(
    progress: Progress, row: TaskID, told: set[DataRead], accepted: Callable[[], None]
) -> Report:
    """Show a run on its row; what the data are, which is the same for all runs, above them once."""

    def show(event: Accepted | Stage | DataRead | StepDone) -> None:
        if isinstance(event, Accepted):
            accepted()
        elif isinstance(event, Stage):
            progress.update(row, status=event.text)
        elif isinstance(event, StepDone):
            progress.update(row, completed=event.step, status=f"loss {event.loss:.3f}")
        elif event not in told:
            told.add(event)
            progress.console.print(event.text, markup=False, soft_wrap=True)

    return show
