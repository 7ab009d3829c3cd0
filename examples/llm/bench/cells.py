"""One method under one scheme of tuning on one task, in a process of its own."""

import statistics
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
from examples.llm.tasks.loading import known_format, load_task, read_data
from examples.llm.tasks.problem import OptionProblem, decoder_reading
from examples.llm.tasks.scoring import option_scores, token_log_likelihoods
from examples.llm.tasks.sources import find_source
from examples.llm.training.judging import Evaluation, Part, make_judge
from examples.llm.training.memory import buffer_bytes
from examples.llm.training.methods import EPS, METHODS, Hyperparameters, Optimizer
from examples.llm.training.problems import encoded_parts
from examples.llm.training.steps import (
    StepMeasurement,
    TrainState,
    abstract_decoder,
    measured_step,
    take_step,
)
from examples.llm.training.tuning import Tuning, tuned

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
        run = _untrained(cell)
        say(f"accuracy {100 * run.test.scores['accuracy']:.1f}% on test")
        return CellResult([], [run])
    trainer = _Trainer(cell)
    own = METHODS[cell.method].learning_rates[cell.tuning]
    rates = [own * factor for factor in cell.settings.rate_factors]
    trials, rate, runs = search(trainer.train, trainer.judge, rates, cell.settings.seeds, say)
    return CellResult(trials, runs, rate, EPS[cell.tuning], trainer.cost())


def _untrained(cell: Cell) -> FinalRun:
    bench = Bench(cell)
    model = bench.tuned(0)
    if cell.method == CALIBRATED:
        problem = replace(bench.problem, offsets=bench.mean_scores(model, "dev"))
        bench.judge_model = make_judge(bench.model, problem)
    return FinalRun(0, bench.judge(model, "dev"), bench.judge(model, "test"))


class Bench:
    """A model and a task, ready to be judged."""

    def __init__(self, cell: Cell):
        settings = self.settings = cell.settings
        self.cell = cell
        model = open_model(cell.model)
        if settings.sequence_length > model.config.context_length:
            raise UsageError(
                f"--sequence-length: the model takes at most {model.config.context_length} "
                f"tokens, got {settings.sequence_length}"
            )
        self.graph, _ = abstract_decoder(model.config)
        sizes = (settings.train_examples, settings.dev_examples, settings.test_examples)
        data, tokenizer = read_data(find_source(cell.task, settings.data)), model.tokenizer()
        special, length = model.special_tokens(), settings.sequence_length
        reading = decoder_reading(
            known_format(data), tokenizer, special, length, aligned=settings.template
        )
        task = load_task(data, sizes, reading.template)
        if task.format.answers:
            raise UsageError(f"--task: {cell.task} is answered freely, but must have options")
        parts = encoded_parts(task, reading.encode, settings.batch_size)
        objective = settings.objective or task.format.objective
        self.problem = OptionProblem(*parts, objective, SEARCH_SEED)
        # Functions without arrays, the same for every run: so each compiles once.
        self.model = self.tuned(0).model
        self.judge_model = make_judge(self.model, self.problem)
        self.costs: list[StepMeasurement] = []

    def tuned(self, seed: int) -> Tuning:
        """The model as it is, for a run with this seed."""
        # Read again for every run: a copy to start from would count as memory of the method.
        parameters = open_model(self.cell.model).parameters()
        return tuned(self.cell.tuning, self.graph, parameters, seed)

    def judge(self, tuning: Tuning, part: Part) -> Evaluation:
        """How well a model does on a part of the task."""
        return self.judge_model(tuning.trainable, tuning.frozen, self.problem.held_out(part))

    def mean_scores(self, tuning: Tuning, part: Part) -> tuple[float, ...]:
        """The mean score of each option over a part."""

        @jax.jit
        def totals(trainable, frozen, batch):
            likelihoods = token_log_likelihoods(self.model(trainable, frozen), batch)
            scores = option_scores(likelihoods, batch.mask)
            present = (batch.weights[:, None] > 0) & jnp.isfinite(scores)
            return jnp.sum(jnp.where(present, scores, 0), axis=0)

        batches = [*self.problem.held_out(part)]
        sums = [totals(tuning.trainable, tuning.frozen, batch) for batch in batches]
        count = sum(batch.weights.sum() for batch in batches)
        return tuple((np.sum(sums, axis=0) / count).tolist())


class _Trainer(Bench):
    def __init__(self, cell: Cell):
        super().__init__(cell)
        self.method, settings = METHODS[cell.method], cell.settings
        is_backward = self.method.derivative == "backward"
        self.steps = settings.first_order_steps if is_backward else settings.steps
        # Trials are the beginnings of runs.
        self.trial_steps = -(-self.steps * settings.search_steps // settings.steps)
        self.train_step = None
        self.trainable = self.state_bytes = 0

    def optimizer(self, rate: Any) -> Optimizer:
        tuning = self.cell.tuning
        return self.method.build(Hyperparameters(rate, EPS[tuning], self.steps, tuning))

    def train(self, rate: float, seed: int, is_final: bool) -> Tuning:
        tuning = self.tuned(seed)
        frozen, learning_rate = tuning.frozen, jnp.float32(rate)
        state = TrainState(tuning.trainable, self.optimizer(rate).init(tuning.trainable, seed))
        tuning = tuning._replace(trainable=None)  # the first step consumes it
        batches = replace(self.problem, seed=seed).batches
        if self.train_step is None:
            self.train_step = self.compiled(state, learning_rate, frozen, batches[0])
        for step in range(self.steps if is_final else self.trial_steps):
            batch = jax.tree.map(jnp.asarray, batches[step])
            state, cost = measured_step(self.train_step, state, learning_rate, frozen, batch)
            if is_final:
                self.costs.append(cost)
        self.state_bytes = buffer_bytes(state.optimizer_state)
        self.trainable = sum(leaf.size for leaf in jax.tree.leaves(state.parameters))
        return tuning._replace(trainable=state.parameters)

    def compiled(self, state: TrainState, *args: Any) -> Any:
        def loss(trainable, frozen, batch):
            return self.problem.loss(self.model(trainable, frozen), batch)

        def step(state, rate, frozen, batch):
            return take_step(loss, self.optimizer(rate), state, frozen, batch)

        return jax.jit(step, donate_argnums=0).lower(state, *args).compile()

    def cost(self) -> Cost:
        return Cost(
            steps=self.steps,
            trainable=self.trainable,
            forward_passes=self.steps * self.method.forward_passes[self.cell.tuning],
            derivative=self.method.derivative,
            step_seconds=statistics.median(cost.seconds for cost in self.costs),
            state_bytes=self.state_bytes,
            peak_bytes=max(cost.peak_bytes for cost in self.costs),
        )
