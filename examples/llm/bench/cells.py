"""One method under one scheme of tuning on one task, in a process of its own."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from examples.llm.bench.search import FinalRun, Trial, search
from examples.llm.bench.settings import BenchSettings
from examples.llm.errors import UsageError
from examples.llm.events import Stage
from examples.llm.gguf_files import GGUFModel
from examples.llm.memory import buffer_bytes
from examples.llm.methods import EPS, METHODS, Hyperparameters
from examples.llm.problems import Evaluation, OptionProblem, encoded_parts, make_judge
from examples.llm.processes import Tell
from examples.llm.tasks.loading import load_task, task_path
from examples.llm.tokenizer import read_tokenizer
from examples.llm.training import TrainState, abstract_decoder, make_train_step, measured_step
from examples.llm.tuning import Tuning, tuned

ZERO_SHOT = "zero-shot"


@dataclass(frozen=True)
class Cell:
    """A cell of the benchmark's table.

    Attributes:
      task: name or file.
      tuning: scheme; none for `ZERO_SHOT`.
      method: name in `METHODS`, or `ZERO_SHOT`: the model as it is.
      settings: the benchmark's.
      model: the GGUF file.
    """

    task: str
    tuning: str
    method: str
    settings: BenchSettings
    model: Path

    @property
    def name(self) -> str:
        """What it is called in results."""
        return " ".join(filter(None, (self.task, self.tuning, self.method)))


@dataclass(frozen=True)
class Cost:
    """What the final runs took.

    Attributes:
      steps: of each.
      trainable: numbers that train.
      forward_passes: evaluations of the loss in a run.
      derivative: how the loss was differentiated as well, see `Method`.
      step_seconds: median wall time of a step.
      state_bytes: bytes in the buffers of the optimizer state.
      peak_bytes: highest resident memory of the process during a step.
    """

    steps: int
    trainable: int
    forward_passes: int
    derivative: str
    step_seconds: float
    state_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class CellResult:
    """What a cell measured.

    Attributes:
      trials: learning rates that were tried.
      runs: final runs; of `ZERO_SHOT` one.
      learning_rate: the one chosen.
      eps: how far the method probed.
      cost: what the runs took.
    """

    trials: list[Trial]
    runs: list[FinalRun]
    learning_rate: float | None = None
    eps: float | None = None
    cost: Cost | None = None


def run_cell(cell: Cell, tell: Tell) -> CellResult:
    """Search and repeat, as :mod:`examples.llm.bench.search` says."""
    bench = _Bench(cell)

    def say(text: str) -> None:
        tell(Stage(f"{cell.name}: {text}"))

    if cell.method == ZERO_SHOT:
        model = bench.tuned("full", 0)
        run = FinalRun(0, bench.judge(model, "dev"), bench.judge(model, "test"))
        say(f"accuracy {100 * run.test.scores['accuracy']:.1f}% on test")
        return CellResult([], [run])
    own = METHODS[cell.method].learning_rates[cell.tuning]
    rates = [own * factor for factor in cell.settings.rate_factors]
    trials, runs = search(bench.train, bench.judge, rates, cell.settings.seeds, say)
    return CellResult(trials, runs, bench.final_rate, EPS[cell.tuning], bench.cost())


class _Bench:
    def __init__(self, cell: Cell):
        settings = self.settings = cell.settings
        self.cell = cell
        model = GGUFModel(cell.model)
        if settings.sequence_length > model.config.context_length:
            raise UsageError(
                f"--sequence-length: the model takes at most {model.config.context_length} "
                f"tokens, got {settings.sequence_length}"
            )
        sizes = (settings.train_examples, settings.dev_examples, settings.test_examples)
        path = task_path(cell.task, settings.data)
        task = load_task(path, sizes, aligned=settings.template)
        train, dev, test = encoded_parts(
            task, read_tokenizer(model), settings.sequence_length, settings.batch_size
        )
        self.train_batches = train
        self.parts = {"dev": dev, "test": test}
        self.objective = settings.objective or task.format.objective
        self.graph, _ = abstract_decoder(model.config)
        self.judge_model: Any = None
        self.seconds: list[float] = []
        self.peak_bytes = self.state_bytes = self.trainable = 0
        self.final_rate: float | None = None

    def tuned(self, scheme: str, seed: int) -> Tuning:
        # Read again for every run: a copy to start from would count as memory of the method.
        return tuned(scheme, self.graph, GGUFModel(self.cell.model).parameters(), seed)

    def judge(self, tuning: Tuning, part: str) -> Evaluation:
        batches = self.parts[part]
        if self.judge_model is None:  # once, so that it compiles once
            problem = OptionProblem(self.train_batches, batches, self.objective, 0)
            self.judge_model = make_judge(tuning.model, problem)
        return self.judge_model(tuning.trainable, tuning.frozen, batches.all())

    @property
    def steps_of_final_runs(self) -> int:
        settings = self.settings
        is_backward = METHODS[self.cell.method].derivative == "backward"
        return settings.first_order_steps if is_backward else settings.steps

    def train(self, rate: float, seed: int, is_final: bool) -> Tuning:
        settings, method = self.settings, METHODS[self.cell.method]
        steps = self.steps_of_final_runs
        if not is_final:
            steps = max(1, steps * settings.search_steps // settings.steps)
        optimizer = method.build(Hyperparameters(rate, EPS[self.cell.tuning], steps))
        tuning = self.tuned(self.cell.tuning, seed)
        problem = OptionProblem(self.train_batches, self.train_batches, self.objective, seed)

        def loss(trainable, frozen, batch):
            return problem.loss(tuning.model(trainable, frozen), batch)

        opt_state = jax.jit(optimizer.init, static_argnums=1)(tuning.trainable, seed)
        state = TrainState(tuning.trainable, opt_state)
        tuning = tuning._replace(trainable=None)  # the first step consumes it
        train_step = make_train_step(loss, optimizer)
        train_step = train_step.lower(state, tuning.frozen, problem.batch(0)).compile()
        for step in range(steps):
            batch = jax.tree.map(jnp.asarray, problem.batch(step))
            state, measured = measured_step(train_step, state, tuning.frozen, batch)
            if is_final:
                self.seconds.append(measured.seconds)
                self.peak_bytes = max(self.peak_bytes, measured.peak_bytes)
        if is_final:
            self.final_rate = rate
            self.state_bytes = buffer_bytes(state.optimizer_state)
            self.trainable = sum(leaf.size for leaf in jax.tree.leaves(state.parameters))
        return tuning._replace(trainable=state.parameters)

    def cost(self) -> Cost:
        method, steps = METHODS[self.cell.method], self.steps_of_final_runs
        return Cost(
            steps=steps,
            trainable=self.trainable,
            forward_passes=steps * method.forward_passes,
            derivative=method.derivative,
            step_seconds=statistics.median(self.seconds),
            state_bytes=self.state_bytes,
            peak_bytes=self.peak_bytes,
        )
