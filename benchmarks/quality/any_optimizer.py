"""What 4-bit states cost the optimizers of optax that have no transform of their own here.

Each is trained in float32 and under ``quantize_state``, from the same parameters, on the same
batches, at the learning rate that is best for the former.

python -m benchmarks.quality.any_optimizer
python -m benchmarks.quality.any_optimizer --task digits --optimizer lion   # keeps other results
"""

import argparse
import dataclasses
import datetime
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

from benchmarks.quality.figures import shown
from benchmarks.quality.optimizers import Optimizer
from benchmarks.quality.report import difference, markdown_table
from benchmarks.quality.tasks import digits, language
from benchmarks.quality.training import run_task
from optax_lowbit import Policy, quantize_state
from optax_lowbit.moments.presets import FIRST_MOMENT_4BIT, FIRST_MOMENT_8BIT

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
# Other ways to keep the state than by default, as arguments of quantize_state.
EIGHT_BITS = dataclasses.replace(FIRST_MOMENT_8BIT, block_size=128)
STOCHASTIC = dataclasses.replace(FIRST_MOMENT_4BIT, rounding="stochastic")
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "lion": {
        "mu rounded stochastically": {"policy": Policy(rules=(("", {"mu": STOCHASTIC}),))},
        "mu in 8 bits": {"policy": Policy(rules=(("", {"mu": EIGHT_BITS}),))},
    },
    "prodigy": {"grad_sum too": {"fields": {"grad_sum": "signed"}}},
}


def group(name: str) -> tuple[Optimizer, ...]:
    """An optimizer in float32, with a 4-bit state, and with variants of it."""
    factory = FACTORIES[name]

    def low_bit(arguments: dict[str, Any]) -> Callable[..., optax.GradientTransformation]:
        return lambda rate, key: quantize_state(factory(rate), key=key, **arguments)

    return (
        Optimizer(f"{name}, float32", lambda rate, key: factory(rate), name),
        Optimizer(f"quantize_state({name})", low_bit({}), name),
        *(
            Optimizer(f"quantize_state({name}), {label}", low_bit(arguments), name)
            for label, arguments in VARIANTS.get(name, {}).items()
        ),
    )


def table(task: dict[str, Any]) -> str:
    """The optimizers of a task, each beside its float32 form."""
    metric, rows = task["metric"], []
    for name in task["rates"]:
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
    runs = [
        f"`{run['command']}` ({run['date']}, {run['seconds']} s, jax {run['jax']}, "
        f"optax {run['optax']})"
        for run in task["runs"]
    ]
    return (
        f"**{name.capitalize()}**, {task['steps']} steps of {task['batch']}; mean ± sample "
        "standard deviation over the seeds, changes seed by seed; the rate is the best for "
        "float32 of a coarse sweep. Task and schedule: [Quality](quality.md).\n\n"
        f"{table(task)}\n\n" + "; ".join(runs) + ".\n"
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
    parser.add_argument(
        "--optimizer", nargs="+", choices=FACTORIES, default=list(FACTORIES), help="only these"
    )
    arguments = parser.parse_args()
    groups = [group(name) for name in arguments.optimizer]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in arguments.task:
        started = time.perf_counter()
        task = dataclasses.replace(TASKS[name](), sweeps=RATES)
        measured = run_task(task, groups, range(arguments.seeds))
        before = results.get(name, {"rates": {}, "optimizers": {}, "runs": []})
        run = {
            "command": shlex.join([*COMMAND, *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "seconds": round(time.perf_counter() - started),
            "jax": jax.__version__,
            "optax": optax.__version__,
        }
        results[name] = {
            **measured,
            "rates": before["rates"] | measured["rates"],
            "optimizers": before["optimizers"] | measured["optimizers"],
            "runs": [*before["runs"], run],
        }
        RESULTS.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
        write_page(results)
        print(section(name, results[name]))


if __name__ == "__main__":
    main()
