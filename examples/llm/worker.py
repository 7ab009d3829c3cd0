"""The process of one method: load, fine-tune, measure."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from examples.llm.checkpoints import Checkpoints, Progress, run_identity
from examples.llm.errors import UsageError
from examples.llm.events import Job, Report, RunResult, Stage, StepDone
from examples.llm.generate import continue_greedily
from examples.llm.gguf_files import GGUFModel
from examples.llm.memory import buffer_bytes
from examples.llm.methods import METHODS
from examples.llm.problems import Evaluation, build_problem, make_judge
from examples.llm.tokenizer import read_tokenizer
from examples.llm.training import (
    TrainState,
    abstract_decoder,
    make_train_step,
    measured_step,
)
from examples.llm.tuning import tuned

_CONTINUATION_TOKENS = 24


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
        graph, _ = abstract_decoder(self.model.config)
        self.tuning = tuned(settings.tuning, graph, self.model.parameters(), settings.seed)
        self.judge = make_judge(self.tuning.model, self.problem)
        self.optimizer = METHODS[job.method].build(settings.hyperparameters_of(job.method))

    def start(self) -> tuple[TrainState, Progress]:
        trainable = self._take_trainable()
        before = self._evaluate(trainable)
        state = jax.jit(self.optimizer.init, static_argnums=1)(trainable, self.settings.seed)
        return TrainState(trainable, state), Progress(before.loss, before.scores)

    def restore(self, checkpoints: Checkpoints) -> tuple[TrainState, Progress]:
        self.report(Stage("restoring the checkpoint"))
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._take_trainable()
        )
        state = jax.eval_shape(lambda like: self.optimizer.init(like, self.settings.seed), like)
        return checkpoints.restore(TrainState(like, state))

    def _take_trainable(self) -> Any:
        """What training starts from; it is not held here any longer, since steps consume it."""
        trainable = self.tuning.trainable
        self.tuning = self.tuning._replace(trainable=None)
        return trainable

    def train(self, state: TrainState, progress: Progress, checkpoints: Checkpoints) -> TrainState:
        self.report(Stage("compiling the step"))
        del self.model  # its memory map must not count
        settings = self.settings
        train_step = make_train_step(self._loss, self.optimizer)
        arguments = (state, self.tuning.frozen, self.problem.batch(0))
        train_step = train_step.lower(*arguments).compile()
        del arguments  # the state is to be consumed
        for step in range(len(progress.losses), settings.steps):
            batch = jax.tree.map(jnp.asarray, self.problem.batch(step))
            state, measured = measured_step(train_step, state, self.tuning.frozen, batch)
            progress.losses.append(measured.loss)
            progress.step_seconds.append(measured.seconds)
            progress.peak_bytes = max(progress.peak_bytes, measured.peak_bytes)
            self.report(StepDone(step + 1, progress.losses[-1]))
            if settings.checkpoint_due(step + 1):
                self.report(Stage("saving a checkpoint"))
                checkpoints.save(state, progress)
        return state

    def result(self, state: TrainState, progress: Progress) -> RunResult:
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
            continuation=self._continuation(state.parameters),
        )

    def _loss(self, trainable: Any, frozen: Any, batch: Any) -> jax.Array:
        return self.problem.loss(self.tuning.model(trainable, frozen), batch)

    def _evaluate(self, trainable: Any) -> Evaluation:
        self.report(Stage("judging by held-out data"))
        return self.judge(trainable, self.tuning.frozen, self.problem.held_out())

    def _continuation(self, trainable: Any) -> str:
        prompt = self.settings.prompt
        if not prompt:
            return ""
        self.report(Stage("continuing the prompt"))
        logits = partial(jax.jit(self.tuning.logits), trainable, self.tuning.frozen)
        return continue_greedily(logits, self.tokenizer, prompt, _CONTINUATION_TOKENS)
