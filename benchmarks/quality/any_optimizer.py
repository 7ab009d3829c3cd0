"""What 4-bit states cost the optimizers of optax that have no transform of their own here.

Each is trained in float32 and under ``quantize_state``, from the same parameters, on the same
batches, at the learning rate that is best for the former.

python -m benchmarks.quality.any_optimizer
python -m benchmarks.quality.any_optimizer --task digits   # results of the others are kept
"""

import argparse
import dataclasses
import datetime
import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import optax

import optax_lowbit
from benchmarks.quality.figures import shown
from benchmarks.quality.optimizers import Optimizer
from benchmarks.quality.report import difference, markdown_table
from benchmarks.quality.tasks import digits, language
from benchmarks.quality.training import run_task

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results" / "any_optimizer.json"
PAGE = REPOSITORY / "docs" / "any_optimizer.md"
BEGIN, END = "<!-- benchmarks.quality.any_optimizer -->\n", "<!-- end -->\n"

COMMAND = ("python", "-m", "benchmarks.quality.any_optimizer")
TASKS = {"digits": digits, "language": language}
# The learning rates that are tried.
RATES = {
    "lion": (1e-4, 3e-4, 1e-3),
    "rmsprop": (3e-4, 1e-3, 3e-3),
    "adagrad": (0.01, 0.03, 0.1),
    "lamb": (3e-3, 1e-2, 3e-2),
    "ademamix": (3e-4, 1e-3, 3e-3),
    "muon": (3e-3, 1e-2, 3e-2),
    "prodigy": (1.0,),
}
FACTORIES: dict[str, Callable[..., optax.GradientTransformation]] = {
    "lion": optax.lion,
    "rmsprop": optax.rmsprop,
    "adagrad": optax.adagrad,
    "lamb": optax.lamb,
    "ademamix": optax.contrib.ademamix,
    "muon": optax.contrib.muon,
    "prodigy": optax.contrib.prodigy,
}
# Fields that are quantized beside the moments, to see why they are not by default.
EXTRA_FIELDS = {"prodigy": {"grad_sum": "signed"}}


def _make(name: str, wrap: Callable[[Any], Any], rate: optax.Schedule, key: jax.Array) -> Any:
    del key
    return wrap(FACTORIES[name](rate))


def group(name: str) -> tuple[Optimizer, ...]:
    """An optimizer in float32, with a 4-bit state, and with more fields in 4 bits."""
    kinds: dict[str, Callable[[Any], Any]] = {
        f"{name}, float32": lambda tx: tx,
        f"quantize_state({name})": optax_lowbit.quantize_state,
    }
    for field, kind in EXTRA_FIELDS.get(name, {}).items():
        kinds[f"quantize_state({name}), {field} too"] = functools.partial(
            optax_lowbit.quantize_state, fields={field: kind}
        )
    return tuple(
        Optimizer(label, functools.partial(_make, name, wrap), name)
        for label, wrap in kinds.items()
    )


def table(task: dict[str, Any]) -> str:
    """The optimizers of a task, each beside its float32 form."""
    metric, rows = task["metric"], []
    for name in FACTORIES:
        members = [optimizer.name for optimizer in group(name)]
        float32 = task["optimizers"][members[0]]["metrics"][metric]
        for member in members:
            measured = task["optimizers"][member]
            change = difference(measured["metrics"][metric], float32)
            rows.append(
                [
                    member,
                    f"{task['rates'][name]['best']:g}",
                    f"{measured['state bytes a parameter']:.2f}",
                    shown(measured["metrics"][metric]),
                    shown(measured["metrics"]["train loss"]),
                    "" if member == members[0] else shown(change, "+"),
                ]
            )
    head = [
        "optimizer", "peak rate", "state, bytes a parameter", metric, "train loss",
        f"{metric}, change from float32",
    ]  # fmt: skip
    return markdown_table(head, rows)


def section(name: str, task: dict[str, Any]) -> str:
    """A table of one task, and how it was made."""
    versions = ", ".join(f"{name} {version}" for name, version in task["versions"].items())
    return (
        f"**{name.capitalize()}**, {task['steps']} steps of {task['batch']}; mean ± sample "
        f"standard deviation of {len(task['seeds'])} seeds, changes seed by seed; the rate is the "
        "best for float32 of a coarse sweep. Task and schedule: [Quality](quality.md).\n\n"
        f"{table(task)}\n\n"
        f"{task['date']}, {task['seconds']} s, {versions}: `{task['command']}`\n"
    )


def write_page(results: dict[str, Any]) -> None:
    """Puts the tables in their place on the page."""
    before, rest = PAGE.read_text().split(BEGIN)
    sections = "\n".join(section(name, results[name]) for name in TASKS if name in results)
    PAGE.write_text(before + BEGIN + "\n" + sections + "\n" + END + rest.split(END)[1])


def main() -> None:
    """Runs everything and writes the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS), help="only these")
    arguments = parser.parse_args()
    groups = [group(name) for name in FACTORIES]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in arguments.task:
        started = time.perf_counter()
        task = dataclasses.replace(TASKS[name](), sweeps=RATES)
        measured = run_task(task, groups, range(arguments.seeds))
        results[name] = {
            "command": shlex.join([*COMMAND, *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "seconds": round(time.perf_counter() - started),
            "versions": {"jax": jax.__version__, "optax": optax.__version__},
            "seeds": list(range(arguments.seeds)),
            **measured,
        }
        RESULTS.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
        write_page(results)
        print(section(name, results[name]))


if __name__ == "__main__":
    main()
