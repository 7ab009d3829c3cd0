"""Runs the methods one after the other, each in its own process, and shows how far they are."""

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.llm.errors import UsageError
from examples.llm.events import Job, Report, RunResult, Stage
from examples.llm.report import write_run_metrics
from examples.llm.settings import Settings
from examples.llm.worker import run_job


def compare(settings: Settings, model: Path, console: Console) -> list[RunResult]:
    """Fine-tune `model` with every method of `settings`.

    Args:
      settings: checked settings.
      model: the GGUF file.
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
            result = run_in_process(job, _show_on(progress, row))
            progress.update(
                row, completed=settings.steps, status=f"held-out loss {result.loss_after:.3f}"
            )
            progress.stop_task(row)
            write_run_metrics(result, job.folder)
            results.append(result)
    return results


def run_in_process(job: Job, report: Report) -> RunResult:
    """Run `job` in a new process, pass on what it reports, and return its result.

    Raises:
      UsageError: the process found something that the user can put right.
      ChildProcessError: the process died.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_job, args=(job, sender), name=job.method)
    with _ctrl_c_ignored():  # the parent hears it and ends the process
        process.start()
    sender.close()
    try:
        while True:
            event = receiver.recv()
            if isinstance(event, RunResult):
                return event
            if isinstance(event, UsageError):
                raise event
            report(event)
    except EOFError:
        process.join()
        raise ChildProcessError(f"the {job.method} run {_ending(process.exitcode)}") from None
    finally:
        process.terminate()
        process.join()


def _show_on(progress: Progress, row) -> Report:
    def show(event):
        if isinstance(event, Stage):
            progress.update(row, status=event.text)
        else:
            progress.update(row, completed=event.step, status=f"loss {event.loss:.3f}")

    return show


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Ignore Ctrl-C until the block ends; a process started in it ignores it all its life."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _ending(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        return f"was killed by {name}" + (", out of memory?" if name == "SIGKILL" else "")
    return f"failed with exit code {exit_code}"
