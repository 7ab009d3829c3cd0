import dataclasses
import functools
import pathlib
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from examples.llm.errors import UsageError
from examples.llm.models.building import abstract_model, build_model
from examples.llm.models.tiny import TINY
from examples.llm.program.events import Accepted, Job, StepDone
from examples.llm.program.metrics_log import read_metrics
from examples.llm.program.settings import Settings
from examples.llm.program.worker import fine_tune
from examples.llm.training.memory import buffer_bytes, peak_memory_bytes, reset_peak_memory
from examples.llm.training.methods import (
    EPS,
    METHODS,
    FirstOrder,
    Hyperparameters,
    learning_rate_schedule,
)
from examples.llm.training.steps import TrainState, next_token_loss, take_step

pytestmark = pytest.mark.usefixtures("standard_promotion")


def tiny_job(model, output):
    settings = Settings(
        steps=4, sequence_length=16, learning_rate=1e-3, eval_batches=1, output=output
    )
    return Job("adamw", settings, model)


@pytest.fixture
def job(tiny_gguf, tmp_path):
    return tiny_job(tiny_gguf, tmp_path)


@pytest.fixture(scope="module")
def saved_run(tiny_gguf, tmp_path_factory):
    job = changed(tiny_job(tiny_gguf, tmp_path_factory.mktemp("saved")), checkpoint_every=2)
    with jax.numpy_dtype_promotion("standard"):
        return job, fine_tune(job, lambda _: None)


def changed(job, **changes):
    return dataclasses.replace(job, settings=dataclasses.replace(job.settings, **changes))


def test_the_step_donates_parameters_and_optimizer_state():
    graph, parameters = abstract_model(TINY)
    optimizer = optax.adamw(1e-3)
    state = TrainState(parameters, jax.eval_shape(optimizer.init, parameters))
    windows = jax.ShapeDtypeStruct((2, 17), jnp.int32)

    def loss(parameters, windows):
        return next_token_loss(build_model(graph, parameters), windows)

    train_step = jax.jit(
        functools.partial(take_step, loss, FirstOrder(optimizer)), donate_argnums=0
    )
    memory = train_step.lower(state, windows).compile().memory_analysis()
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes == state_bytes


def test_fine_tuning_lowers_the_held_out_loss(job):
    events = []
    result = fine_tune(changed(job, steps=30, learning_rate=1e-2), events.append)
    assert result.loss_after < result.loss_before - 0.1
    assert [event.step for event in events if isinstance(event, StepDone)] == list(range(1, 31))
    assert len(result.losses) == len(result.step_seconds) == 30
    parameter_count = sum(leaf.size for leaf in jax.tree.leaves(abstract_model(TINY)[1]))
    assert result.state_bytes >= 8 * parameter_count
    assert result.peak_bytes > 0
    assert result.continuation == ""


def test_the_prompt_is_continued(job):
    assert fine_tune(changed(job, steps=1, prompt="We"), lambda _: None).continuation


@pytest.mark.parametrize(
    "name", [name for name in METHODS if METHODS[name].derivative == "backward"]
)
def test_every_first_order_method_descends(name):
    optimizer = METHODS[name].build(Hyperparameters(1e-3, 1e-3, 10))
    parameters = {"kernel": jnp.ones((16, 32), jnp.float32)}
    moved, _, info = optimizer.step(
        lambda x: jnp.sum(x["kernel"]), parameters, optimizer.init(parameters, 0)
    )
    assert np.all(np.asarray(moved["kernel"]) < 1)
    assert float(info.loss) == 16 * 32


@pytest.mark.parametrize("scheme", ["full", "lora", "prefix", "prompt"])
def test_settings_of_every_method_are_complete(scheme):
    for name, method in METHODS.items():
        assert method.learning_rates.keys() == method.forward_passes.keys(), name
        if scheme in method.learning_rates:
            rate = method.learning_rates[scheme]
            method.build(Hyperparameters(rate, EPS[scheme], 10, scheme))


@pytest.mark.parametrize(
    "name", [name for name in METHODS if METHODS[name].derivative != "backward"]
)
def test_every_other_method_steps_with_a_rate_that_is_traced(name):
    leaf = jax.ShapeDtypeStruct((2, 8), jnp.float32)
    parameters = {
        part: {"kernel": leaf} for part in ("embedding", "attention", "feed_forward", "final_norm")
    }

    def loss(parameters):
        return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(parameters))

    def step(parameters, rate):
        optimizer = METHODS[name].build(Hyperparameters(rate, 1e-3, 10))
        return optimizer.step(loss, parameters, optimizer.init(parameters, 0))

    moved, _, info = jax.eval_shape(step, parameters, jnp.float32(1e-3))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), moved) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), parameters
    )
    assert info.loss.shape == ()


def test_checkpoints_are_not_overwritten_without_resume(saved_run):
    events = []
    with pytest.raises(UsageError, match="already holds checkpoints: add --resume"):
        fine_tune(saved_run[0], events.append)
    assert Accepted() not in events


def test_resuming_a_finished_run_gives_its_result_again(saved_run):
    job, result = saved_run
    events = []
    assert fine_tune(changed(job, resume=True), events.append) == result
    assert events == [Accepted()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 3}, "made with batch-size 2, this run has 3"),
        ({"learning_rate": 2e-3}, "made with learning-rate 0.001, this run has 0.002"),
        ({"steps": 8}, "made with steps 4, this run has 8"),
        ({"prompt": "We"}, "made with prompt , this run has We"),
        ({"top_p": 0.5}, "made with top-p 1.0, this run has 0.5"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(saved_run, changes, message):
    with pytest.raises(UsageError, match=message):
        fine_tune(changed(saved_run[0], resume=True, **changes), lambda _: None)


def test_the_best_parameters_by_development_data_are_kept(job, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text(" ".join(f"the number {n} and then" for n in range(400)))
    # After a few of such steps the loss goes up.
    rising = changed(
        job, task=str(text), steps=6, eval_every=2, keep_best=True, checkpoint_every=1,
        learning_rate=0.3, schedule="constant", output=tmp_path / "whole",
    )  # fmt: skip

    def stop(event):
        if isinstance(event, StepDone) and event.step == 4:
            raise StoppedError

    whole = fine_tune(rising, lambda _: None)
    losses = {found["step"]: found["loss"] for found in whole.evaluations}
    assert list(losses) == [2, 4, 6] and len(set(losses.values())) == 3
    assert whole.kept_step == min(losses, key=losses.get) < 6
    shorter = changed(rising, steps=whole.kept_step, output=tmp_path / "shorter")
    assert fine_tune(shorter, lambda _: None).loss_after == whole.loss_after
    stopped = changed(rising, output=tmp_path / "stopped")
    with pytest.raises(StoppedError):
        fine_tune(stopped, stop)
    resumed = fine_tune(changed(stopped, resume=True), lambda _: None)
    assert resumed.evaluations == whole.evaluations and resumed.loss_after == whole.loss_after


def test_a_sequence_longer_than_the_context_is_refused(job):
    with pytest.raises(UsageError, match="--sequence-length: the model takes at most 64 tokens"):
        fine_tune(changed(job, sequence_length=65), lambda _: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 60, "tuning": "prefix"}, "tokens, got 60 and 5 virtual ones of pref"),
        ({"prompt": "We", "max_new_tokens": 65}, "--max-new-tokens: after the .* at most 6., got"),
        ({"prompt": "We " * 99}, "--prompt the model takes at most 0, got 24"),
    ],
)
def test_what_does_not_fit_into_the_context_is_refused_before_training(job, changes, message):
    with pytest.raises(UsageError, match=message):
        fine_tune(changed(job, **changes), lambda _: None)


def test_the_schedule_warms_up_and_decays():
    rates = [float(learning_rate_schedule(1.0, 20)(step)) for step in range(20)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[2] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1, abs=0.02)
    METHODS["adamw"].build(Hyperparameters(1.0, 1e-3, 1))


def test_buffer_bytes_counts_what_is_allocated():
    assert buffer_bytes({"a": jnp.zeros((3, 5), jnp.float32), "b": jnp.zeros(7, jnp.uint8)}) == 67


def test_peak_memory_sees_an_allocation():
    reset_peak_memory()
    before = peak_memory_bytes()
    block = np.ones(2**26, np.uint8)
    assert peak_memory_bytes() - before > 2**25
    del block


@pytest.fixture
def mezo_job(tiny_gguf, tmp_path):
    lines = [f"{('ham', 'spam')[n % 2]}\tnumber {n}\n" for n in range(40)]
    path = tmp_path / "messages.tsv"
    path.write_text("".join(lines))
    settings = Settings(
        task=str(path), tuning="prompt", steps=4, checkpoint_every=2, train_examples=16,
        eval_examples=8, sequence_length=48, learning_rate=1e-2, output=tmp_path / "run",
    )  # fmt: skip
    return Job("mezo", settings, tiny_gguf)


class StoppedError(Exception):
    pass


def test_a_stopped_zeroth_order_run_goes_on_bit_for_bit(mezo_job, tmp_path):
    def stop(event):
        if isinstance(event, StepDone) and event.step == 3:
            raise StoppedError

    whole = fine_tune(changed(mezo_job, output=tmp_path / "whole"), lambda _: None)
    with pytest.raises(StoppedError):
        fine_tune(mezo_job, stop)
    resumed = fine_tune(changed(mezo_job, resume=True), lambda _: None)
    assert len(set(whole.losses)) == 4
    assert resumed.losses == whole.losses
    assert resumed.loss_before != resumed.loss_after == whole.loss_after
    assert resumed.scores_after == whole.scores_after
    states = [saved_state(tmp_path / name / "mezo" / "seed-0") for name in ("whole", "run")]
    assert states[0].keys() == states[1].keys() and states[0]
    for path, leaf in states[0].items():
        np.testing.assert_array_equal(leaf, states[1][path])


FULL_DISK = """
import pickle, resource, sys
from examples.llm.program.events import StepDone
from examples.llm.program.worker import fine_tune

def fill_up(event):
    if isinstance(event, StepDone) and event.step == 4:  # before the second checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

try:
    fine_tune(pickle.load(sys.stdin.buffer), fill_up)
except OSError as error:
    print(error.filename, error.strerror)
"""


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_one_before(mezo_job, tmp_path):
    folder = tmp_path / "run" / "mezo" / "seed-0"
    mezo_job = changed(mezo_job, tuning="full")  # whose arrays are written at the same time
    found = subprocess.run(
        [sys.executable, "-c", FULL_DISK], input=pickle.dumps(mezo_job), capture_output=True,
        cwd=pathlib.Path(__file__).parents[2], timeout=300,
    )  # fmt: skip
    assert found.stdout.decode() == f"{folder / 'checkpoints'} File too large\n", found.stderr
    assert b"Traceback" not in found.stderr
    whole = fine_tune(changed(mezo_job, output=tmp_path / "whole"), lambda _: None)
    events = []
    resumed = fine_tune(changed(mezo_job, resume=True), events.append)
    assert [event.step for event in events if isinstance(event, StepDone)] == [3, 4]
    assert resumed.losses == whole.losses and resumed.loss_after == whole.loss_after
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [0, 1, 2, 3, 4, 4]


def saved_state(folder):
    with ocp.CheckpointManager(folder / "checkpoints", item_names=("state",)) as manager:
        restored = manager.restore(4, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(restored["state"])
    }
