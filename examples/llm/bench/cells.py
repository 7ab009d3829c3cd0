"""One method under one scheme of tuning on one task, in a process of its own."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.llm.bench.search import SEARCH_SEED, FinalRun, Trial, search
from examples.llm.bench.settings import BenchSettings
from examples.llm.errors import UsageError
from examples.llm.models.opening import open_model
from examples.llm.program.events import Stage
from examples.llm.program.processes import Tell
from examples.llm.tasks.encoders import head_for
from examples.llm.tasks.loading import known_format, read_data, summary
from examples.llm.tasks.scoring import option_scores
from examples.llm.tasks.sources import find_source
from examples.llm.training.judging import Evaluation, Part
from examples.llm.training.memory import buffer_bytes
from examples.llm.training.methods import EPS, METHODS, Hyperparameters
from examples.llm.training.problems import classes_of, option_problem
from examples.llm.training.steps import StepMeasurement
from examples.llm.training.trainer import Recipe, Trainer
from examples.llm.training.tuning import check_context

# The model as it is; and with each option's mean score on the development examples, whose labels
# are not looked at, taken away from its score: a bias that training would first of all remove.
ZERO_SHOT, CALIBRATED = UNTRAINED = ("zero-shot", "zero-shot calibrated")


@dataclass(frozen=True)
class Cell:
    """A cell of the benchmark's table.

    Attributes:
      task: name or file.
      tuning: scheme of tuning.
      method: name in `METHODS` or `UNTRAINED`.
      settings: the benchmark's.
      model: the GGUF file or folder.
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
      runs: final runs; of `UNTRAINED` one.
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
    """Search and repeat, see `search`, and measure what that takes."""

    def say(text: str) -> None:
        tell(Stage(f"{cell.name}: {text}"))

    if cell.method in UNTRAINED:
        run = _untrained(cell, say)
        say(f"accuracy {100 * run.test.scores['accuracy']:.1f}% on test")
        return CellResult([], [run])
    runs = _Runs(cell)
    own = METHODS[cell.method].learning_rates[cell.tuning]
    rates = [own * factor for factor in cell.settings.rate_factors]
    trials, rate, finals = search(
        runs.train, runs.judge, rates, cell.settings.seeds, say, cell.settings.objective
    )
    return CellResult(trials, finals, rate, EPS[cell.tuning], runs.cost())


def _untrained(cell: Cell, say: Callable[[str], None]) -> FinalRun:
    bench = Bench(cell, "adam")  # it takes no step
    if cell.method == ZERO_SHOT:  # the first of a task
        say(bench.summary)
    parameters = bench.trainer.parameters(0)
    if cell.method == CALIBRATED:
        bench.problem = replace(bench.problem, offsets=bench.mean_scores(parameters, "dev"))
    return FinalRun(0, bench.judge(parameters, "dev"), bench.judge(parameters, "test"))


class Bench:
    """A model and a task, ready to be trained and judged."""

    def __init__(self, cell: Cell, method: str):
        settings, model = cell.settings, open_model(cell.model)
        for tuning in settings.tuning:
            check_context(model.config, settings.sequence_length, tuning)
        data = read_data(find_source(cell.task, settings.data))
        if known_format(data).answers:
            raise UsageError(f"--task: {cell.task} is answered freely, but must have options")
        self.problem = option_problem(
            data,
            (settings.train_examples, settings.dev_examples, settings.test_examples),
            model.tokenizer(),
            model.special_tokens(),
            head_for(model.config, settings.head),
            sequence_length=settings.sequence_length,
            batch_size=settings.batch_size,
            objective=settings.objective,
            aligned=settings.template,
            seed=SEARCH_SEED,
        )
        self.summary = summary(
            known_format(data).name, self.problem.parts, settings.sequence_length
        )
        is_backward = METHODS[method].derivative == "backward"
        self.steps = settings.first_order_steps if is_backward else settings.steps
        rate = METHODS[method].learning_rates[cell.tuning]
        chosen = Hyperparameters(rate, EPS[cell.tuning], self.steps, cell.tuning)
        recipe = Recipe(method, chosen, num_classes=classes_of(self.problem))
        self.trainer = Trainer(cell.model, recipe, self.problem)

    def judge(self, parameters: Any, part: Part) -> Evaluation:
        """How well a model does on a part of the task."""
        return self.trainer.judge(parameters, self.problem, self.problem.held_out(part))

    def mean_scores(self, parameters: Any, part: Part) -> tuple[float, ...]:
        """The mean score of each option over a part."""
        problem, model, frozen = self.problem, self.trainer.tuning.model, self.trainer.tuning.frozen

        @jax.jit
        def totals(trainable, frozen, batch):
            likelihoods = problem.log_likelihoods(model(trainable, frozen), batch)
            scores = option_scores(likelihoods, batch.mask)
            present = (batch.weights[:, None] > 0) & jnp.isfinite(scores)
            return jnp.sum(jnp.where(present, scores, 0), axis=0)

        batches = [*self.problem.held_out(part)]
        sums = [totals(parameters, frozen, batch) for batch in batches]
        count = sum(batch.weights.sum() for batch in batches)
        return tuple((np.sum(sums, axis=0) / count).tolist())


class _Runs(Bench):
    def __init__(self, cell: Cell):
        super().__init__(cell, cell.method)
        self.method, self.tuning, settings = METHODS[cell.method], cell.tuning, cell.settings
        # Trials are the beginnings of runs.
        self.trial_steps = -(-self.steps * settings.search_steps // settings.steps)
        self.costs: list[StepMeasurement] = []
        self.trainable = self.state_bytes = 0

    def train(self, rate: float, seed: int, is_final: bool) -> Any:
        trainer = self.trainer
        # Read again for every run: a copy to start from would count as memory of the method.
        state = trainer.start(trainer.parameters(seed), seed)
        trainer.learn(replace(self.problem, seed=seed))
        for number in range(self.steps if is_final else self.trial_steps):
            state, cost = trainer.step(state, number, rate)
            if is_final:
                self.costs.append(cost)
        self.state_bytes = buffer_bytes(state.optimizer_state)
        self.trainable = sum(leaf.size for leaf in jax.tree.leaves(state.parameters))
        return state.parameters

    def cost(self) -> Cost:
        return Cost(
            steps=self.steps,
            trainable=self.trainable,
            forward_passes=self.steps * self.method.forward_passes[self.tuning],
            derivative=self.method.derivative,
            step_seconds=statistics.median(cost.seconds for cost in self.costs),
            state_bytes=self.state_bytes,
            peak_bytes=max(cost.peak_bytes for cost in self.costs),
        )
