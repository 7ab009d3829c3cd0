"""Runs the methods one after the other, each in its own process, and shows how far they are."""

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.llm.program.events import Job, Report, RunResult, Stage
from examples.llm.program.processes import run_in_process
from examples.llm.program.report import write_run_metrics
from examples.llm.program.settings import Settings
from examples.llm.program.worker import fine_tune


def compare(settings: Settings, model: Path, console: Console) -> list[RunResult]:
    """Fine-tune `model` with every method of `settings`.

    Args:
      settings: checked settings.
      model: the GGUF file or folder.
      console: where the progress is shown.

    Returns:
      One result per method, in their order; each is also written to the method's folder.
    """
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
    )
    results = []
    with Progress(*columns, console=console) as progress:
        rows = {
            method: progress.add_task(method, total=settings.steps, status="waiting", start=False)
            for method in settings.method
        }
        for method, row in rows.items():
            job = Job(method, settings, model)
            progress.start_task(row)
            result = run_in_process(fine_tune, job, method, _show_on(progress, row))
            progress.update(
                row, completed=settings.steps, status=f"held-out loss {result.loss_after:.3f}"
            )
            progress.stop_task(row)
            write_run_metrics(result, job.folder)
            results.append(result)
    return results


def _show_on(progress: Progress, row) -> Report:
    def show(event):
        if isinstance(event, Stage):
            progress.update(row, status=event.text)
        else:
            progress.update(row, completed=event.step, status=f"loss {event.loss:.3f}")

    return show
