"""The command line of the benchmark."""

from pathlib import Path
from tempfile import TemporaryDirectory

from examples.llm.bench.cells import UNTRAINED, Cell, run_cell
from examples.llm.bench.matrix import matrices
from examples.llm.bench.report import Results, markdown_table, read_contents, write_report
from examples.llm.bench.settings import BenchSettings
from examples.llm.models.opening import named_model
from examples.llm.models.tiny import write_tiny_gguf
from examples.llm.program.about import about_this_run
from examples.llm.program.configuration import read_settings
from examples.llm.program.events import Stage
from examples.llm.program.processes import run_in_process
from examples.llm.program.report import write_settings
from examples.llm.program.settings import prepare_output
from examples.llm.training.methods import METHODS


def benchmark(arguments: list[str]) -> None:
    """Run the benchmark that `arguments` ask for; after a stop it goes on after the last result."""
    asked = read_settings(arguments, BenchSettings())
    settings = asked.quickened()
    settings.check()
    prepare_output(settings.output)
    with TemporaryDirectory() as folder:
        if settings.quick and settings.model is None:
            model = write_tiny_gguf(Path(folder) / "tiny.gguf")
        else:
            model = named_model(settings.model or "smollm2-135m", settings.data)
        path = settings.output / "results.json"
        if settings.quick:
            path.unlink(missing_ok=True)
        name, contents = settings.model or model.name, read_contents(settings, model)
        results = Results(path, settings, name, about_this_run(), contents)
        for cell in cells_of(settings, model.absolute()):
            if not results.has(cell):
                results.add(cell, run_in_process(run_cell, cell, cell.name, _show))
                # Once one is accepted: what was refused leaves no trace.
                write_settings(asked, settings.output / "settings.json")
    table = f"{markdown_table(results.cells)}\n{matrices(results.cells)}"
    (settings.output / "results.md").write_text(table)
    write_report(results, settings.output)
    print(table)
    print(
        f"Report in {settings.output / 'report.html'}; its figures, report.png, and numbers, "
        "results.json, beside it"
    )


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
