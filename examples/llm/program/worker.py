"""The process of one run: load, fine-tune, measure."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.experimental import multihost_utils

from examples.llm.errors import UsageError
from examples.llm.models.generation import continue_text, generate
from examples.llm.models.huggingface_writing import FolderWriter
from examples.llm.models.opening import open_model
from examples.llm.models.tokenizer import plain_tokens
from examples.llm.program.events import Accepted, DataRead, Job, Report, RunResult, Stage, StepDone
from examples.llm.program.metrics_log import MetricsLog
from examples.llm.program.processes import StoppedError
from examples.llm.program.results import finished_result, whole_folder, write_result
from examples.llm.program.stopping import StopRequestedError, StopSwitch
from examples.llm.training.checkpoints import (
    BestParameters,
    Checkpoints,
    Progress,
    result_identity,
    run_identity,
)
from examples.llm.training.judging import Evaluation
from examples.llm.training.memory import buffer_bytes
from examples.llm.training.problems import build_judges, build_problem, classes_of
from examples.llm.training.steps import TrainState
from examples.llm.training.trainer import Trainer, abstract
from examples.llm.training.tuning import check_context, save_adapter, virtual_tokens, whole_model

_MODEL = "model"  # what the folder of a whole model is called


def fine_tune(job: Job, report: Report) -> RunResult:
    """Fine-tune the model with one method.

    If asked to resume, go on from the newest checkpoint, or give the result that is there.

    Raises:
      StoppedError: the process was asked to end; what was trained is saved.
    """
    with job.settings.cluster.joined():
        result = _fine_tune(job, report)
    if isinstance(result, StoppedError):
        raise result
    return result


def _fine_tune(job: Job, report: Report) -> RunResult | StoppedError:
    result = finished_result(job.folder, result_identity(job)) if job.settings.resume else None
    model_is_due = job.settings.save_model and not (job.folder / _MODEL).exists()
    if result is not None and not model_is_due:
        report(Accepted())
        return result
    with (
        StopSwitch() as switch,
        Checkpoints(job.folder / "checkpoints", run_identity(job)) as checkpoints,
    ):
        resume = job.settings.resume and checkpoints.newest_step is not None
        if result is not None and not resume:
            raise UsageError(
                f"--save-model: {job.folder} has ended without it, and has no checkpoint to go on "
                "from: choose another folder"
            )
        if resume:
            checkpoints.check_identity()
        elif checkpoints.newest_step is not None:
            raise UsageError(
                f"--output: {job.folder} already holds checkpoints: "
                "add --resume to go on from them, or choose another folder"
            )
        run = _Run(job, report, switch, checkpoints)
        try:
            is_first = job.settings.cluster.is_first
            path = job.folder / "metrics.jsonl" if is_first else None
            with MetricsLog(path, checkpoints.newest_step or 0) as log:
                result = run.whole(log)
        except StopRequestedError:
            return StoppedError(run.save_if_trained())
    if is_first:
        write_result(result, result_identity(job), job.folder)
    return result


class _Run:
    def __init__(self, job: Job, report: Report, switch: StopSwitch, checkpoints: Checkpoints):
        settings = job.settings
        report(Stage("reading the model"))
        self.job, self.settings, self.report, self.switch = job, settings, report, switch
        self.checkpoints = checkpoints
        model = open_model(job.model)
        self.config = model.config
        check_context(self.config, settings.sequence_length, settings.tuning)
        self.tokenizer, self.special = model.tokenizer(), model.special_tokens()
        head = settings.head_of(self.config)
        self.problem = build_problem(
            settings, self.tokenizer, self.special, head, lambda text: report(DataRead(text))
        )
        room = self.config.context_length - virtual_tokens(settings.tuning)
        judges = build_judges(settings, self.tokenizer, self.special, room)
        self.judges = {"": self.problem, **judges}
        self._check_prompt(room)
        self.writer = FolderWriter(job.model, model) if settings.save_model else None
        recipe = replace(settings.recipe_of(job.method), num_classes=classes_of(self.problem))
        self.trainer = Trainer(job.model, recipe, self.problem, settings.layout())
        self.state: TrainState | None = None
        self.progress = Progress()

    def _check_prompt(self, room: int) -> None:
        """Before anything is trained; `room` is what virtual tokens leave of the context."""
        settings = self.settings
        if not settings.prompt:
            return
        given = len(self.special.front) + len(plain_tokens(self.tokenizer, settings.prompt))
        if not given:
            raise UsageError(f"--prompt: {settings.prompt!r} has no tokens")
        most = room + 1 - given  # the last one is not read
        if settings.max_new_tokens > most:
            raise UsageError(
                f"--max-new-tokens: after the {given} tokens of --prompt the model takes at most "
                f"{max(most, 0)}, got {settings.max_new_tokens}"
            )

    def whole(self, log: MetricsLog) -> RunResult:
        """Start or go on, train and judge."""
        if self.checkpoints.newest_step is None:
            self._start()
        else:
            self._restore()
        self.report(Accepted())
        before = Evaluation(self.progress.loss_before, self.progress.scores_before)
        log.write(0, part="held-out", **before._asdict())
        self._train(log)
        result = self._result()
        after = Evaluation(result.loss_after, result.scores_after)
        log.write(self.settings.steps, part="held-out", **after._asdict())
        return result

    def save_if_trained(self) -> int:
        """Save what is not saved yet, and return how many steps are."""
        done = len(self.progress.losses)
        if self.state is not None and done > (self.checkpoints.newest_step or 0):
            self._save(self.state)
        return self.checkpoints.newest_step or 0

    def _start(self) -> None:
        seed = self.settings.seed
        parameters = self.trainer.parameters(seed)
        before = self._evaluate(parameters)
        self.progress = Progress(before.loss, before.scores)
        self.state = self.trainer.start(parameters, seed)

    def _restore(self) -> None:
        self.report(Stage("restoring the checkpoint"))
        seed = self.settings.seed
        like = self.trainer.abstract_start(self.trainer.parameters(seed), seed)
        self.state, self.progress = self.checkpoints.restore(like)

    def _train(self, log: MetricsLog) -> None:
        self.report(Stage("compiling the step"))
        settings, progress = self.settings, self.progress
        self._judge_if_due(log)
        for number in range(len(progress.losses), settings.steps):
            self.switch.check()
            assert self.state is not None
            self.state, measured = self.trainer.step(self.state, number)
            progress.losses.append(measured.loss)
            progress.step_seconds.append(measured.seconds)
            progress.peak_bytes = max(progress.peak_bytes, measured.peak_bytes)
            log.write(number + 1, loss=measured.loss, seconds=measured.seconds)
            self.report(StepDone(number + 1, measured.loss))
            self._judge_if_due(log)
            if settings.checkpoint_due(number + 1):
                self._save(self.state)

    def _judge_if_due(self, log: MetricsLog) -> None:
        """Judge by development data, unless that was done before a stop."""
        evaluations, step = self.progress.evaluations, len(self.progress.losses)
        done = evaluations[-1]["step"] if evaluations else 0
        if step == done or not self.settings.evaluation_due(step):
            return
        assert self.state is not None
        self.report(Stage("judging by development data"))
        batches = self.switch.checked(self.problem.held_out("dev"))
        found = self.trainer.judge(self.state.parameters, self.problem, batches)._asdict()
        evaluations.append({"step": step, **found})
        log.write(step, part="development", **found)
        if self.settings.keep_best and self.progress.best_step(self.settings.objective) == step:
            with BestParameters(self.job.folder / "best") as best:
                best.save(step, self.state.parameters)

    def _kept(self) -> tuple[int, Any]:
        """The parameters that the run ends with, and after how many steps they were such."""
        assert self.state is not None
        if not self.settings.keep_best:
            return self.settings.steps, self.state.parameters
        step = self.progress.best_step(self.settings.objective)
        with BestParameters(self.job.folder / "best") as best:
            return step, best.restore(step, abstract(self.state.parameters))

    def _save(self, state: TrainState) -> None:
        self.report(Stage("saving a checkpoint"))
        self.checkpoints.save(state, self.progress)

    def _result(self) -> RunResult:
        assert self.state is not None
        state_bytes, progress = buffer_bytes(self.state.optimizer_state), self.progress
        kept_step, parameters = self._kept()
        after = self._evaluate(parameters)
        self._save_adapter(parameters)
        self._save_model(parameters)
        return RunResult(
            method=self.job.method,
            seed=self.settings.seed,
            loss_before=progress.loss_before,
            loss_after=after.loss,
            scores_before=progress.scores_before,
            scores_after=after.scores,
            losses=progress.losses,
            step_seconds=progress.step_seconds,
            state_bytes=state_bytes,
            peak_bytes=progress.peak_bytes,
            evaluations=progress.evaluations,
            kept_step=kept_step,
            continuation=self._continuation(parameters),
        )

    def _save_adapter(self, parameters: Any) -> None:
        if self.trainer.tuning.lora is None:
            return
        parameters = _gathered(parameters)
        if self.settings.cluster.is_first:
            with whole_folder(self.job.folder / "adapter") as folder:
                save_adapter(folder, self.trainer.tuning, parameters)

    def _save_model(self, parameters: Any) -> None:
        if self.writer is None:
            return
        self.report(Stage("saving the model"))
        model = whole_model(self.trainer.tuning, parameters)
        whole = _gathered(nnx.to_pure_dict(nnx.state(model)))
        if self.settings.cluster.is_first:
            with whole_folder(self.job.folder / _MODEL) as folder:
                self.writer.write(folder, model.config, whole)

    def _evaluate(self, parameters: Any) -> Evaluation:
        self.report(Stage("judging by held-out data"))
        found = {
            name: self.trainer.judge(parameters, problem, self.switch.checked(problem.held_out()))
            for name, problem in self.judges.items()
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
        settings, special, tuning = self.settings, self.special, self.trainer.tuning
        everywhere = None if self.trainer.layout is None else self.trainer.layout.everywhere

        @partial(jax.jit, out_shardings=everywhere)
        def continued(trainable, frozen, prompts, lengths):
            return generate(
                tuning.model(trainable, frozen),
                prompts,
                lengths,
                count=settings.max_new_tokens,
                end=special.end,
                temperature=settings.temperature,
                top_p=settings.top_p,
                key=jax.random.key(settings.seed),
            )

        run = partial(continued, trainable, tuning.frozen)
        return continue_text(run, self.tokenizer, prompt, special)


def _gathered(tree: Any) -> Any:
    """All of the arrays that processes have parts of, for each of these."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.process_allgather(tree, tiled=True)
