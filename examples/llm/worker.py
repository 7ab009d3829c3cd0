"""The process of one method: load, fine-tune, measure."""

import time
from multiprocessing.connection import Connection

import jax
import jax.numpy as jnp

from examples.llm.checkpoints import Checkpoints, Progress, run_identity
from examples.llm.errors import UsageError
from examples.llm.events import Job, Report, RunResult, Stage, StepDone
from examples.llm.generate import continue_greedily
from examples.llm.gguf_files import GGUFModel
from examples.llm.memory import buffer_bytes, peak_memory_bytes, reset_peak_memory
from examples.llm.methods import METHODS
from examples.llm.problems import Evaluation, build_problem
from examples.llm.tokenizer import read_tokenizer
from examples.llm.training import (
    TrainState,
    abstract_decoder,
    build_model,
    make_train_step,
)

_CONTINUATION_TOKENS = 24


def run_job(job: Job, connection: Connection) -> None:
    """Run `job` and send its `Stage`s, `StepDone`s and at last its `RunResult` or `UsageError`."""
    try:
        connection.send(fine_tune(job, connection.send))
    except UsageError as error:
        connection.send(error)
    except BrokenPipeError:
        raise SystemExit(1) from None  # nobody listens any more: the comparison was killed


def fine_tune(job: Job, report: Report) -> RunResult:
    """Fine-tune the model with one method, from its newest checkpoint if asked to resume."""
    settings = job.settings
    with Checkpoints(job.folder / "checkpoints", run_identity(job)) as checkpoints:
        resume = settings.resume and checkpoints.newest_step is not None
        if resume:
            checkpoints.check_identity()
        elif settings.checkpoint_every and checkpoints.newest_step is not None:
            raise UsageError(
                f"--output: {job.folder} already holds checkpoints: "
                "add --resume to go on from them, or choose another folder"
            )
        run = _Run(job, report)
        state, progress = run.restore(checkpoints) if resume else run.start()
        state = run.train(state, progress, checkpoints)
        return run.result(state, progress)


class _Run:
    def __init__(self, job: Job, report: Report):
        settings = job.settings
        report(Stage("reading the model"))
        self.job, self.settings, self.report = job, settings, report
        self.model = GGUFModel(job.model)
        if settings.sequence_length > self.model.config.context_length:
            raise UsageError(
                f"--sequence-length: the model takes at most {self.model.config.context_length} "
                f"tokens, got {settings.sequence_length}"
            )
        self.tokenizer = read_tokenizer(self.model)
        self.problem = build_problem(settings, self.tokenizer)
        self.graph, self.abstract_parameters = abstract_decoder(self.model.config)
        self.optimizer = METHODS[job.method].build(settings.hyperparameters_of(job.method))

    def start(self) -> tuple[TrainState, Progress]:
        parameters = self.model.parameters()
        before = self._evaluate(parameters)
        state = jax.jit(self.optimizer.init, static_argnums=1)(parameters, self.settings.seed)
        return TrainState(parameters, state), Progress(before.loss, before.scores)

    def restore(self, checkpoints: Checkpoints) -> tuple[TrainState, Progress]:
        self.report(Stage("restoring the checkpoint"))
        like = self.abstract_parameters
        state = jax.eval_shape(lambda like: self.optimizer.init(like, self.settings.seed), like)
        return checkpoints.restore(TrainState(like, state))

    def train(self, state: TrainState, progress: Progress, checkpoints: Checkpoints) -> TrainState:
        self.report(Stage("compiling the step"))
        del self.model  # its memory map must not count
        settings = self.settings
        batch = self.problem.batch(0)
        train_step = make_train_step(self._loss, self.optimizer).lower(state, batch).compile()
        for step in range(len(progress.losses), settings.steps):
            batch = jax.tree.map(jnp.asarray, self.problem.batch(step))
            reset_peak_memory()
            started = time.perf_counter()
            state, loss = train_step(state, batch)
            progress.losses.append(float(loss))
            progress.step_seconds.append(time.perf_counter() - started)
            progress.peak_bytes = max(progress.peak_bytes, peak_memory_bytes())
            self.report(StepDone(step + 1, progress.losses[-1]))
            if settings.checkpoint_due(step + 1):
                self.report(Stage("saving a checkpoint"))
                checkpoints.save(state, progress)
        return state

    def result(self, state: TrainState, progress: Progress) -> RunResult:
        continuation = ""
        if self.settings.prompt:
            self.report(Stage("continuing the prompt"))
            continuation = continue_greedily(
                build_model(self.graph, state.parameters),
                self.tokenizer,
                self.settings.prompt,
                _CONTINUATION_TOKENS,
            )
        after = self._evaluate(state.parameters)
        return RunResult(
            method=self.job.method,
            loss_before=progress.loss_before,
            loss_after=after.loss,
            scores_before=progress.scores_before,
            scores_after=after.scores,
            losses=progress.losses,
            step_seconds=progress.step_seconds,
            state_bytes=buffer_bytes(state.optimizer_state),
            peak_bytes=progress.peak_bytes,
            continuation=continuation,
        )

    def _loss(self, parameters, batch) -> jax.Array:
        return self.problem.loss(build_model(self.graph, parameters), batch)

    def _evaluate(self, parameters) -> Evaluation:
        self.report(Stage("judging by held-out data"))

        @jax.jit
        def measure(parameters, batch):
            return self.problem.measure(build_model(self.graph, parameters), batch)

        return self.problem.evaluation(
            [measure(parameters, batch) for batch in self.problem.held_out()]
        )
