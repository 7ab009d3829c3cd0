"""The process of one optimizer: load, fine-tune, measure."""

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
from examples.llm.optimizers import build_optimizer
from examples.llm.text import train_and_held_out_windows
from examples.llm.tokenizer import read_tokenizer
from examples.llm.training import (
    TrainState,
    abstract_decoder,
    build_model,
    held_out_loss,
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
    """Fine-tune the model with one optimizer, from its newest checkpoint if asked to resume."""
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
        self.train_windows, held_out = train_and_held_out_windows(
            self.tokenizer, settings.sequence_length, settings.seed
        )
        self.held_out = [
            held_out.batch(index, settings.batch_size) for index in range(settings.eval_batches)
        ]
        self.graph, self.abstract_parameters = abstract_decoder(self.model.config)
        self.optimizer = build_optimizer(
            job.optimizer, settings.learning_rate_of(job.optimizer), settings.steps
        )

    def start(self) -> tuple[TrainState, Progress]:
        parameters = self.model.parameters()
        progress = Progress(loss_before=self._held_out_loss(parameters))
        return TrainState(parameters, jax.jit(self.optimizer.init)(parameters)), progress

    def restore(self, checkpoints: Checkpoints) -> tuple[TrainState, Progress]:
        self.report(Stage("restoring the checkpoint"))
        abstract_state = jax.eval_shape(self.optimizer.init, self.abstract_parameters)
        return checkpoints.restore(TrainState(self.abstract_parameters, abstract_state))

    def train(self, state: TrainState, progress: Progress, checkpoints: Checkpoints) -> TrainState:
        self.report(Stage("compiling the step"))
        del self.model  # its memory map must not count
        settings = self.settings
        windows = jax.ShapeDtypeStruct(
            (settings.batch_size, settings.sequence_length + 1), jnp.int32
        )
        train_step = make_train_step(self.graph, self.optimizer).lower(state, windows).compile()
        for step in range(len(progress.losses), settings.steps):
            batch = jnp.asarray(self.train_windows.batch(step, settings.batch_size))
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
        return RunResult(
            optimizer=self.job.optimizer,
            loss_before=progress.loss_before,
            loss_after=self._held_out_loss(state.parameters),
            losses=progress.losses,
            step_seconds=progress.step_seconds,
            state_bytes=buffer_bytes(state.optimizer_state),
            peak_bytes=progress.peak_bytes,
            continuation=continuation,
        )

    def _held_out_loss(self, parameters) -> float:
        self.report(Stage("measuring the held-out loss"))
        return held_out_loss(self.graph, parameters, self.held_out)
