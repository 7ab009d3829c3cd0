"""The process of one method: load, fine-tune, measure."""

from functools import partial
from typing import Any

import jax

from examples.llm.errors import UsageError
from examples.llm.models.generation import continue_text, generate
from examples.llm.models.opening import open_model
from examples.llm.models.tokenizer import plain_tokens
from examples.llm.program.events import Job, Report, RunResult, Stage, StepDone
from examples.llm.training.accumulation import AccumulatedLoss
from examples.llm.training.checkpoints import Checkpoints, Progress, run_identity
from examples.llm.training.judging import Evaluation, make_judge
from examples.llm.training.memory import buffer_bytes
from examples.llm.training.methods import METHODS
from examples.llm.training.problems import build_judges, build_problem
from examples.llm.training.steps import (
    TrainState,
    abstract_decoder,
    make_train_step,
    measured_step,
)
from examples.llm.training.tuning import base_parameters, save_adapter, tuned

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
        self.model = open_model(job.model)
        if settings.sequence_length > self.model.config.context_length:
            raise UsageError(
                f"--sequence-length: the model takes at most {self.model.config.context_length} "
                f"tokens, got {settings.sequence_length}"
            )
        self.tokenizer = self.model.tokenizer()
        self.special = self.model.special_tokens()
        self.problem = build_problem(settings, self.tokenizer, self.special)
        self.config = self.model.config
        context_length = self.config.context_length
        judges = build_judges(settings, self.tokenizer, self.special, context_length)
        prompt = settings.prompt
        if prompt and self.special.begin is None and not plain_tokens(self.tokenizer, prompt):
            raise UsageError(f"--prompt: {prompt!r} has no tokens")
        graph, _ = abstract_decoder(self.config)
        parameters = base_parameters(self.model.parameters(), settings.tuning, settings.dtype)
        self.tuning = tuned(settings.tuning, graph, parameters, settings.seed)
        self.judges = {
            name: (make_judge(self.tuning.model, problem), problem)
            for name, problem in {"": self.problem, **judges}.items()
        }
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
        init = jax.jit(self.optimizer.init, static_argnums=1)
        # Compiled for where its results are: a paged state is on the host.
        shardings = init.lower(like, self.settings.seed).compile().output_shardings
        state = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            init.eval_shape(like, self.settings.seed),
            shardings,
        )
        return checkpoints.restore(TrainState(like, state))

    def _take_trainable(self) -> Any:
        """What training starts from; it is not held here any longer, since steps consume it."""
        trainable = self.tuning.trainable
        self.tuning = self.tuning._replace(trainable=None)
        return trainable

    def train(self, state: TrainState, progress: Progress, checkpoints: Checkpoints) -> TrainState:
        self.report(Stage("compiling the step"))
        del self.model  # its memory map must not count
        settings, compiled, batches = self.settings, {}, self.problem.batches
        if settings.accumulate > 1:
            batches = batches.batch(settings.accumulate)
        train_step = make_train_step(self._step_loss(), self.optimizer)
        for step in range(len(progress.losses), settings.steps):
            batch = jax.tree.map(jax.numpy.asarray, batches[step])
            shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
            if shapes not in compiled:
                compiled[shapes] = train_step.lower(state, self.tuning.frozen, batch).compile()
            state, measured = measured_step(compiled[shapes], state, self.tuning.frozen, batch)
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
        save_adapter(self.job.folder / "adapter", self.tuning, state.parameters, self.config)
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

    def _step_loss(self) -> Any:
        if self.settings.accumulate == 1:
            return self._loss
        return AccumulatedLoss(self._loss, self.problem.weight)

    def _evaluate(self, trainable: Any) -> Evaluation:
        self.report(Stage("judging by held-out data"))
        frozen = self.tuning.frozen
        found = {
            name: judge(trainable, frozen, problem.held_out())
            for name, (judge, problem) in self.judges.items()
        }
        scores = {
            f"{name} {score}".strip(): value
            for name, evaluation in found.items()
            for score, value in evaluation.scores.items()
        }
        return Evaluation(found[""].loss, scores)

    def _continuation(self, trainable: Any) -> str:
        prompt = self.settings.prompt
        if not prompt:
            return ""
        self.report(Stage("continuing the prompt"))

        @jax.jit
        def continued(trainable, frozen, prompts, lengths):
            model = self.tuning.model(trainable, frozen)
            end, count = self.special.end, _CONTINUATION_TOKENS
            return generate(model, prompts, lengths, count=count, end=end)

        run = partial(continued, trainable, self.tuning.frozen)
        return continue_text(run, self.tokenizer, prompt, self.special)
