"""What a comparison shows at its end: tables, files of numbers and a page."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from examples.llm.program import page
from examples.llm.program.about import about_this_run
from examples.llm.program.configuration import settings_as_json
from examples.llm.program.events import RunResult
from examples.llm.program.figures import Figure, bars, curves, points
from examples.llm.program.rendering import write_picture
from examples.llm.program.results import write_json
from examples.llm.program.settings import Settings
from examples.llm.program.spreads import Spread, spread_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_MEBIBYTE = 2**20
_TITLE = "Held-out loss, optimizer state, peak memory, time of a step"
_COSTS_AND_GAINS: Mapping[str, tuple[str, Callable[[RunResult], float]]] = {
    "loss before": (".4f", lambda run: run.loss_before),
    "loss after": (".4f", lambda run: run.loss_after),
    "state MiB": (",.1f", lambda run: run.state_bytes / _MEBIBYTE),
    "peak MiB": (",.0f", lambda run: run.peak_bytes / _MEBIBYTE),
    "step s": (".3g", lambda run: statistics.median(run.step_seconds)),
    "training s": (",.0f", lambda run: sum(run.step_seconds)),
}


def by_method(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Return the runs of each method, which differ in their seeds."""
    methods = dict.fromkeys(run.method for run in results)
    return {method: [run for run in results if run.method == method] for method in methods}


def comparison_table(results: Sequence[RunResult]) -> Table:
    """Return one row per method: held-out loss, memory and time."""
    return _rich_table(_TITLE, *_comparison(results), texts=1)


def scores_table(results: Sequence[RunResult]) -> Table:
    """Return one row per held-out score and method."""
    return _rich_table("Held-out data", *_scores(results), texts=2)


def _comparison(results: Sequence[RunResult]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [method, *(spread_of(map(of, runs)).words(form) for form, of in _COSTS_AND_GAINS.values())]
        for method, runs in by_method(results).items()
    ]
    return ["method", *_COSTS_AND_GAINS], rows


def _scores(results: Sequence[RunResult]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [score, method, *(_score(runs, when, score).words(".3f") for when in ("before", "after"))]
        for score in results[0].scores_after
        for method, runs in by_method(results).items()
    ]
    return ["score", "method", "before", "after"], rows


def _score(runs: Sequence[RunResult], when: str, score: str) -> Spread:
    return spread_of(getattr(run, f"scores_{when}")[score] for run in runs)


def _rich_table(title: str, headings: list[str], rows: list[list[str]], *, texts: int) -> Table:
    table = Table(title=title)
    for place, heading in enumerate(headings):
        justify = "left" if place < texts else "right"
        table.add_column(heading, no_wrap=heading == "method", justify=justify)
    for row in rows:
        table.add_row(*row)
    return table


def write_report(settings: Settings, results: Sequence[RunResult], folder: Path) -> None:
    """Write the results as a page of HTML, `report.html`, and its figures as `report.png`."""
    figures = _figures(results)
    write_picture(figures, folder / "report.png")
    about = about_this_run()
    seeds = f"seed{'s' if len(settings.seeds) > 1 else ''} {' '.join(map(str, settings.seeds))}"
    sections = [
        page.Section(_TITLE, page.table(*_comparison(results))),
        page.Section("Held-out scores", page.table(*_scores(results), texts=2)),
        page.Section("Curves and costs", page.figures(figures)),
    ]
    texts = [
        f"{run.method}, seed {run.seed}: {settings.prompt}{run.continuation}\n" for run in results
    ]
    if settings.prompt:
        sections.append(page.Section("Continuations", page.preformatted("\n".join(texts))))
    sections += [
        page.Section("Command", page.preformatted(about.pop("command"))),
        page.Section("Settings", page.pairs(settings_as_json(settings))),
        page.Section("Versions", page.pairs(about.pop("versions"))),
    ]
    title = f"{settings.model}, {settings.tuning} tuning on {settings.task}"
    whole = page.page(title, " · ".join([*about.values(), seeds]), sections)
    (folder / "report.html").write_text(whole)


def _figures(results: Sequence[RunResult]) -> list[Figure]:
    methods = by_method(results)

    def spreads(of: Callable[[RunResult], float]) -> dict[str, Spread]:
        return {method: spread_of(map(of, runs)) for method, runs in methods.items()}

    losses = {
        method: (range(1, len(runs[0].losses) + 1), np.array([run.losses for run in runs]))
        for method, runs in methods.items()
    }
    drawn = [
        curves("losses", "Training loss", "loss", losses),
        points(
            "held-out", "Held-out loss", "loss", {"after": spreads(lambda run: run.loss_after)},
            {"before": results[0].loss_before},
        ),
    ]  # fmt: skip
    drawn += _development(methods)
    if "accuracy" in results[0].scores_after:
        drawn.append(
            points(
                "accuracy", "Held-out accuracy", "accuracy, %",
                {"after": spreads(lambda run: 100 * run.scores_after["accuracy"])},
                {"before": 100 * results[0].scores_before["accuracy"]},
            )
        )  # fmt: skip
    memory = {
        "optimizer state": spreads(lambda run: run.state_bytes / _MEBIBYTE),
        "peak of the process": spreads(lambda run: run.peak_bytes / _MEBIBYTE),
    }
    times = {"median step": spreads(lambda run: statistics.median(run.step_seconds))}
    return [
        *drawn,
        bars("memory", "Memory", "MiB", memory),
        bars("time", "Time of a step", "s", times),
    ]


def _development(methods: Mapping[str, Sequence[RunResult]]) -> list[Figure]:
    """How the runs did by development data, if they were judged by it."""
    first = next(iter(methods.values()))[0].evaluations
    if not first:
        return []
    kinds = {"loss": lambda found: found["loss"]}
    if "accuracy" in first[0]["scores"]:
        kinds["accuracy"] = lambda found: found["scores"]["accuracy"]

    def series(of: Callable[[dict[str, Any]], float]) -> dict[str, tuple[list[int], np.ndarray]]:
        steps = [found["step"] for found in first]
        return {
            method: (steps, np.array([[*map(of, run.evaluations)] for run in runs]))
            for method, runs in methods.items()
        }

    return [
        curves(f"development-{name}", f"Development {name}", name, series(of))
        for name, of in kinds.items()
    ]


def write_metrics(settings: Settings, results: Sequence[RunResult], path: Path) -> None:
    """Write the settings and every run's numbers as JSON."""
    runs = [asdict(run) for run in results]
    write_json(path, {"settings": settings_as_json(settings), **about_this_run(), "runs": runs})


def write_settings(settings: "DataclassInstance", path: Path) -> None:
    """Write what `--config` takes."""
    write_json(path, settings_as_json(settings))
