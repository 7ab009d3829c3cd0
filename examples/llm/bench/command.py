"""The command line of the benchmark."""

import datetime
import importlib.metadata
import platform
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro

from examples.llm.bench.cells import UNTRAINED, Cell, run_cell
from examples.llm.bench.report import Results, draw, markdown_table
from examples.llm.bench.settings import BenchSettings
from examples.llm.models.gguf_files import bundled_model_path
from examples.llm.models.tiny import write_tiny_gguf
from examples.llm.program.command import run_and_report
from examples.llm.program.events import Stage
from examples.llm.program.processes import run_in_process
from examples.llm.program.settings import prepare_output
from examples.llm.training.methods import METHODS

_VERSIONS = ("jax", "optax", "flax", "optax-lowbit")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark that `arguments` (by default the process's) ask for.

    Returns:
      The exit code: 0, 1 if a run died, 2 for a mistake of the user's, 130 after Ctrl-C.
    """
    settings = tyro.cli(BenchSettings, args=arguments).quickened()
    hint = "the same command goes on after the last result"
    return run_and_report(lambda: _run(settings), hint)


def _run(settings: BenchSettings) -> None:
    settings.check()
    prepare_output(settings.output)
    with TemporaryDirectory() as folder:
        if settings.model is not None:
            model = settings.model
        elif settings.quick:
            model = write_tiny_gguf(Path(folder) / "tiny.gguf")
        else:
            model = bundled_model_path()
        about = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, Python {platform.python_version()}",
            "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
        }
        path = settings.output / "results.json"
        if settings.quick:
            path.unlink(missing_ok=True)
        results = Results(path, settings, model.name, about)
        for cell in cells_of(settings, model.absolute()):
            if cell.name not in results.cells:
                results.add(cell, run_in_process(run_cell, cell, cell.name, _show))
    table = markdown_table(results.cells)
    (settings.output / "results.md").write_text(table)
    draw(results.cells, settings.output / "results.png")
    print(table)
    print(f"Numbers in {results.path}, picture in {settings.output / 'results.png'}")


def cells_of(settings: BenchSettings, model: Path) -> list[Cell]:
    """All cells: of each task the untrained model, then every tuning with its methods."""
    cells = []
    for task in settings.task:
        cells += [Cell(task, "full", name, settings, model) for name in UNTRAINED]
        cells += [
            Cell(task, tuning, method, settings, model)
            for tuning in settings.tuning
            for method in settings.method
            if tuning in METHODS[method].learning_rates
        ]
    return cells


def _show(event: Stage) -> None:
    print(event.text, flush=True)
