"""Comparisons between optimizers, and the page that shows them."""

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.quality.figures import shown, summary
from benchmarks.quality.optimizers import ABLATION, DEFAULT, GROUPS, VARIANTS
from benchmarks.quality.tasks import higher_is_better


def difference(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Summary of ``a - b``, seed by seed."""
    pairs = zip(a["values"], b["values"])
    return summary([math.nan if x is None or y is None else x - y for x, y in pairs])


def compare(task: dict) -> dict[str, dict[str, Any]]:
    """Every other kind of 4-bit AdamW against the default one, by the task's metric.

    Of each: ``gain`` (summary of the seed-by-seed differences, positive where it is better than the
    default), ``std`` (the larger of the two standard deviations over seeds) and ``better``: whether
    the mean gain is more than that.
    """
    metric = task["metric"]
    sign = 1 if higher_is_better(metric) else -1
    default = task["optimizers"][DEFAULT]["metrics"][metric]
    comparison = {}
    for optimizer in (*ABLATION, *VARIANTS):
        if optimizer.name not in task["optimizers"]:
            continue
        variant = task["optimizers"][optimizer.name]["metrics"][metric]
        gain = difference(variant, default)
        stds = [spread["std"] for spread in (variant, default)]
        std = None if None in stds else max(stds)
        gain = summary([math.nan if value is None else sign * value for value in gain["values"]])
        better = gain["mean"] is not None and std is not None and gain["mean"] > std
        comparison[optimizer.name] = {"gain": gain, "std": std, "better": better}
    return comparison


def winners(comparisons: Sequence[dict[str, dict[str, Any]]]) -> list[str]:
    """The kinds of 4-bit AdamW that are better than the default on every task."""
    return [name for name in comparisons[0] if all(each[name]["better"] for each in comparisons)]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def task_section(name: str, task: dict) -> str:
    """What was done in a task, and a table of its optimizers."""
    metric, optimizers = task["metric"], task["optimizers"]
    first = next(iter(optimizers))
    metrics = list(optimizers[first]["metrics"])
    order = [metric, *(other for other in metrics if other != metric)]
    rows = []
    for group in GROUPS:
        members = [optimizer.name for optimizer in group if optimizer.name in optimizers]
        for member in members:
            measured = optimizers[member]["metrics"]
            own = next(o.family for o in group if o.name == member)
            float32 = next(o.name for g in GROUPS for o in g if o.family == own)
            change = difference(measured[metric], optimizers[float32]["metrics"][metric])
            rows.append(
                [
                    member,
                    f"{optimizers[member]['state bytes a parameter']:.2f}",
                    *(shown(measured[other]) for other in order),
                    "" if member == float32 else shown(change, "+"),
                ]
            )
    head = ["optimizer", "state, bytes a parameter", *order, f"{metric}, change from float32"]
    rates = [
        f"{family} {rate['best']:g} (validation {metric} by rate: "
        + ", ".join(f"{tried}: {value:.4g}" for tried, value in rate["tried"].items())
        + ")"
        for family, rate in task["rates"].items()
    ]
    text = (
        f"{task['about']} {task['steps']} steps of {task['batch']}. Peak learning rates: "
        f"{'; '.join(rates)}."
    )
    return f"## {name.capitalize()}\n\n{text}\n\n{markdown_table(head, rows)}"


def comparison_section(tasks: dict[str, dict], comparisons: dict[str, dict]) -> str:
    """Whether anything is better than the default."""
    rows = []
    for variant in next(iter(comparisons.values())):
        for task, comparison in comparisons.items():
            each = comparison[variant]
            std = "" if each["std"] is None else f"{each['std']:.4f}"
            gain = shown(each["gain"], "+")
            better = "yes" if each["better"] else "no"
            rows.append([variant, f"{task}, {tasks[task]['metric']}", gain, std, better])
    head = ["4-bit AdamW with", "task", "gain over the default", "std over seeds", "more than it?"]
    found = winners(list(comparisons.values()))
    answer = (
        f"Better on every task by more than the standard deviation over seeds: {', '.join(found)}."
        if found
        else "None is better than the default on every task by more than the standard deviation "
        "over seeds."
    )
    return (
        f"## Is anything better than the default?\n\n**{answer}** The gain is the mean ± standard "
        "deviation of the differences seed by seed, positive where the default is beaten; it is "
        "held against the larger of the two standard deviations over seeds.\n\n"
        + markdown_table(head, rows)
    )


def page(results: dict) -> str:
    """``docs/quality.md``."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    intro = f"""# Quality

What low-bit moments cost, measured on small tasks with {len(results["seeds"])} seeds: mean ± sample
standard deviation. For each seed all optimizers start from the same parameters and see the same
batches. The learning rate is the one that is best for the float32 optimizer of the family (AdamW,
or SGD with momentum 0.9) in a sweep with a seed of its own, scored on validation data. It is
reached after a tenth of the steps and then follows a cosine to 0. The train loss is the mean over
the batches of the last tenth of the steps. Changes from float32 are taken seed by seed.

All other arguments are the defaults. 4-bit AdamW then has `mu` in signed dynamic exponent, blocks
of 128, and `nu` in linear without zero, rank-1. Rows that begin with `mu:` or `nu:` are 4-bit AdamW
with that change alone. Moments of leaves with 4096 elements or fewer stay in float32.

```sh
{results["command"]}
```

{results["date"]}; {results["machine"]}; {results["seconds"]} s.
{versions}.
The numbers of every seed are in `benchmarks/results/quality.json`."""
    sections = [task_section(name, task) for name, task in results["tasks"].items()]
    return (
        "\n\n".join(
            [intro, *sections, comparison_section(results["tasks"], results["comparisons"])]
        )
        + "\n"
    )
