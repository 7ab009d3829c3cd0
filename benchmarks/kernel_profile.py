"""Where the time of a step of `adamw4bit` goes on a CPU.

python -m benchmarks.kernel_profile                # tables in Markdown; writes nothing
python -m benchmarks.kernel_profile --only tree    # or matrix, large, functions
python -m benchmarks.kernel_profile --quick        # a smoke test: tiny sizes

Its parts are timed in turns: each alone, all that they read and write without their arithmetic, and
the same work on a leaf that stays in the processor's cache. `functions` are samples of Linux's
`perf` in the C++ kernels.
"""

import argparse
import collections
import dataclasses
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import optax

import optax_lowbit
from benchmarks.quality.report import markdown_table
from benchmarks.records import run_record
from benchmarks.speed.contestants import ADAM, BASELINE, DECAY, RATE
from benchmarks.speed.jax_steps import ORDERS, Bandwidth, JaxOptimizer, JaxStep, from_optax
from benchmarks.speed.plan import FULL, QUICK
from benchmarks.speed.rounds import Rounds, interleave
from benchmarks.speed.workloads import Workload
from optax_lowbit.kernels.adam import coefficients
from optax_lowbit.kernels.cpu import ops
from optax_lowbit.kernels.cpu.library import target_name

WORKLOADS = ("matrix", "large", "tree")
BLOCKS = optax_lowbit.QuantSpec(codebook="linear", bits=4, signed=False, scaling="block")
SECOND_MOMENTS: dict[str, dict[str, Any]] = {"rank 1": {}, "blocks": {"nu_spec": BLOCKS}}
# By itself XLA finds the new scales of all leaves, then makes the updates of all, then adds them.
# In this order a leaf is done with while it is in the cache.
LEAF_BY_LEAF = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
# Bytes of the parts that are timed in the same rounds, about.
MEMORY = 8 * 10**9
IN_CACHE = Workload("in cache", ((256, 512),))
TURNS = 50
# The first that is found in the name of a function.
FUNCTIONS = {
    "thresholds between codes": r"step_blocks<[^>]*, 4>",
    "the step": r"step_vectors|step_blocks",
    "new maxima of rank 1": r"maxima",
    "codes by the scale of a block": r"store_blocks|OneScale",
    "codes by scales of rank 1": r"LesserScale|store_rank1",
    "rows that end within a block": r"repack|buffered|copied|fill_up|operands",
}
REST = "the rest"


@dataclasses.dataclass(frozen=True)
class Part:
    """A program that does a part of a step.

    Attributes:
      optimizer: What is compiled.
      floats: How many float32 numbers it reads and writes for each parameter.
      passes: How often it reads or writes the state.
      order, options: As in `JaxStep`.
      turns: How often it does it.
    """

    optimizer: JaxOptimizer
    floats: int
    passes: int
    order: tuple[str, ...] = ORDERS[1]
    options: dict[str, Any] | None = None
    turns: int = 1

    def start(self, workload: Workload) -> JaxStep:
        """A runner; in the cache if it has several turns."""
        workload = IN_CACHE if self.turns > 1 else workload
        return JaxStep(self.optimizer, workload, self.order, self.options)


def parts(second: dict[str, Any]) -> dict[str, Part]:
    """`optax.adamw`, the parts of `adamw4bit`, and how it is put together."""
    tx = optax_lowbit.adamw4bit(RATE, **ADAM, **second)
    rates = {name: value for name, value in ADAM.items() if name != "weight_decay"}
    kernel = optax_lowbit.scale_by_adam4bit(**rates, **second)

    def fused(grads: Any, state: Any, params: Any) -> Any:
        return optax_lowbit.fused_apply(tx, grads, state, params)

    def updates(grads: Any, state: Any, params: Any) -> Any:
        return kernel.update(grads, state, params)

    def bytes_alone(grads: Any, state: Any, params: Any) -> Any:
        return jax.tree.map(lambda x: x + 1, (grads, state))

    def descent(grads: Any, state: Any, params: Any) -> Any:
        return jax.tree.map(lambda p, u: p - RATE * (u + DECAY * p), params, grads), state

    found = {
        BASELINE: Part(from_optax(optax.adamw(RATE, **ADAM)), 3, 2, ORDERS[0]),
        "two parts": Part(from_optax(tx), 5, 2),
        "two parts, leaf by leaf": Part(from_optax(tx), 5, 2, options=LEAF_BY_LEAF),
        "updates alone": Part(JaxOptimizer(kernel.init, updates), 2, 2),
        "their bytes alone": Part(JaxOptimizer(kernel.init, bytes_alone), 2, 2),
        "updates alone, in cache": Part(
            JaxOptimizer(kernel.init, again(updates)), 2, 2, turns=TURNS
        ),
        "apply_updates alone": Part(JaxOptimizer(lambda params: (), descent), 3, 0),
        "fused_apply": Part(JaxOptimizer(tx.init, fused), 3, 2, ORDERS[0]),
        "fused_apply, leaf by leaf": Part(
            JaxOptimizer(tx.init, fused), 3, 2, ORDERS[0], LEAF_BY_LEAF
        ),
    }
    if not second:
        found["new maxima alone"] = Part(JaxOptimizer(kernel.init, maxima), 1, 1, ORDERS[0])
    return found


def again(apply: Callable[..., Any]) -> Callable[..., Any]:
    """`apply`, its updates for gradients, many times."""

    def repeated(grads: Any, state: Any, params: Any) -> Any:
        return jax.lax.fori_loop(0, TURNS, lambda _, both: apply(*both, params), (grads, state))

    return repeated


def maxima(grads: Any, state: Any, params: Any) -> Any:
    """The pass of a rank-1 second moment that finds its new scales."""
    c = coefficients(ADAM["b1"], ADAM["b2"], ADAM["eps"], 0.0, state.count + 1, nesterov=False)

    def rescaled(grad: jax.Array, nu: Any) -> Any:
        if not optax_lowbit.is_quantized(nu) or not isinstance(nu.scales, tuple):
            return nu
        return dataclasses.replace(nu, scales=ops.adam_rank1_maxima(grad, nu, c))

    return params, state._replace(nu=jax.tree.map(rescaled, grads, state.nu))


def timed(workload: Workload, second: dict[str, Any], rounds: Rounds, bandwidth_bytes: int) -> str:
    """A table of the parts, against the bandwidth of memory in the same rounds.

    They are in groups that fit into memory, each after `optax.adamw`.
    """
    first, *chosen = parts(second).items()
    if len(workload.shapes) == 1:
        chosen = [(name, part) for name, part in chosen if part.options is None]
    size = max(MEMORY // (10 * workload.elements), 1)
    rows = []
    for start in range(0, len(chosen), size):
        group = dict([first, *chosen[start : start + size]])
        rows += timed_group(workload, group, rounds, bandwidth_bytes)
    head = ["", "ns/element, min", "median", "bytes", "ns of the bytes"]
    return markdown_table(head, rows)


def timed_group(
    workload: Workload, chosen: dict[str, Part], rounds: Rounds, bandwidth_bytes: int
) -> list[list[str]]:
    """Rows of the table."""
    memory = Bandwidth(bandwidth_bytes)
    runners = {name: part.start(workload) for name, part in chosen.items()}
    seconds = interleave({"memory": memory, **runners}, rounds)
    bandwidth = sum(memory.nbytes.values()) / min(seconds.pop("memory"))
    rows = []
    for name, samples in seconds.items():
        part, state = chosen[name], runners[name].nbytes["state"]
        own = IN_CACHE if part.turns > 1 else workload
        times = [1e9 * x / (own.elements * part.turns) for x in samples]
        moved = 4 * part.floats + part.passes * state / own.elements
        least = "" if part.turns > 1 else f"{1e9 * moved / bandwidth:.2f}"
        numbers = [f"{min(times):.2f}", f"{statistics.median(times):.2f}", f"{moved:.1f}", least]
        rows.append([name, *numbers])
    return rows


def functions(second: str, names: Sequence[str], quick: bool) -> str:
    """A table of shares of the kernels' time, by what their functions do, in `fused_apply`."""
    if shutil.which("perf") is None:
        return "perf is not installed"
    shares = [sampled(second, name, quick) for name in names]
    kinds = [kind for kind in (*FUNCTIONS, REST) if any(kind in each for each in shares)]
    rows = [[kind, *(f"{100 * each.get(kind, 0):.0f}" for each in shares)] for kind in kinds]
    return markdown_table(["% of the kernels", *names], rows)


def sampled(second: str, name: str, quick: bool) -> dict[str, float]:
    """The shares in one workload."""
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples"
        worker = [sys.executable, "-m", "benchmarks.kernel_profile", "--worker", second, name]
        record = ["perf", "record", "-q", "-F", "999", "-o", str(samples), *worker]
        subprocess.run([*record, "--quick"] if quick else record, check=True)
        report = ["perf", "report", "-q", "--stdio", "--sort", "dso,symbol", "-i", str(samples)]
        lines = subprocess.run(report, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = collections.defaultdict(float)
    for share, function in re.findall(r"([\d.]+)%\s+_native\S*\s+\[\.\] (.*)", lines):
        marks = (kind for kind, mark in FUNCTIONS.items() if re.search(mark, function))
        found[next(marks, REST)] += float(share)
    return {kind: share / sum(found.values()) for kind, share in found.items()}


def work(second: str, workload: Workload, seconds: float) -> None:
    """What `functions` takes samples of."""
    runner = parts(SECOND_MOMENTS[second])["fused_apply"].start(workload)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        runner.fill()
        runner.step()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--only", choices=(*WORKLOADS, "functions"), help="this table")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Prints the tables that are asked for."""
    arguments = parse_arguments()
    plan = QUICK if arguments.quick else FULL
    if arguments.worker:
        second, name = arguments.worker
        work(second, getattr(plan, name), 0.2 if arguments.quick else 20)
        return
    print(run_record("benchmarks.kernel_profile"), f"native kernels: {target_name()}", sep="\n")
    for name in [arguments.only] if arguments.only else [*WORKLOADS, "functions"]:
        for second, options in SECOND_MOMENTS.items():
            if name == "functions":
                title, table = name, functions(second, ("matrix", "tree"), arguments.quick)
            else:
                title = getattr(plan, name).name
                table = timed(getattr(plan, name), options, plan.rounds, plan.bandwidth_bytes)
            print(f"\n{title}, second moment in scales of {second}\n\n{table}", flush=True)


if __name__ == "__main__":
    main()
