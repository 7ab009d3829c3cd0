"""Runs over a mesh of devices, in one process and in two, are those of one device."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import chex
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from examples.llm.errors import UsageError
from examples.llm.models.building import abstract_model
from examples.llm.models.gguf_files import GGUFModel
from examples.llm.models.huggingface_files import HuggingFaceModel
from examples.llm.models.huggingface_names import module_names
from examples.llm.models.tiny import TINY, write_tiny_gguf
from examples.llm.program.command import main
from examples.llm.program.events import Job, StepDone
from examples.llm.program.settings import Settings
from examples.llm.program.worker import fine_tune
from examples.llm.training.layout import make_layout
from examples.llm.training.methods import METHODS, Hyperparameters
from optax_lowbit import qlora

ROOT = Path(__file__).resolve().parents[2]
RATE = {"learning_rate": 1e-3}
CASES = {
    "adamw": Settings(method=("adamw",), **RATE),
    "adamw4bit": Settings(method=("adamw4bit",), fsdp=True, **RATE),
    # A difference of two losses, divided by twice 0.001, has 500 times their rounding.
    "mezo": Settings(method=("mezo",), learning_rate=1e-5),
    "lora": Settings(method=("adam",), tuning="lora", accumulate=2, lora_dropout=0.1, **RATE),
}


# Eight devices have whole blocks of its matrices.
WIDE = dataclasses.replace(
    TINY, hidden_size=512, feed_forward_size=512, num_layers=1, num_key_value_heads=4, head_size=128
)


pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "a.txt"
    path.write_text(" ".join(f"the number {n} and then" for n in range(400)))
    return path


def job_of(settings, text, model, output, **changes):
    settings = dataclasses.replace(
        settings, task=str(text), steps=3, batch_size=8, sequence_length=16, eval_batches=1,
        output=output, **changes,
    )  # fmt: skip
    settings.check()
    return Job(settings.method[0], settings, model)


def assert_same(result, expected):
    # Sums over devices are of another order.
    for name in ("loss_before", "losses", "loss_after"):
        np.testing.assert_allclose(getattr(result, name), getattr(expected, name), rtol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_eight_devices_have_the_losses_of_one(name, text, tiny_gguf, tmp_path):
    case = CASES[name]
    alone = dataclasses.replace(case, fsdp=False)
    expected = fine_tune(job_of(alone, text, tiny_gguf, tmp_path / "one"), lambda _: None)
    job = job_of(case, text, tiny_gguf, tmp_path / "eight", mesh="data=4,model=2")
    assert_same(fine_tune(job, lambda _: None), expected)
    assert expected.losses[0] != expected.losses[2]


def test_a_base_in_4_bits_has_the_losses_of_one_device(text, tmp_path):
    model = write_tiny_gguf(tmp_path / "wide.gguf", config=WIDE)
    case = Settings(method=("adamw4bit",), tuning="qlora", rank=8, **RATE)
    expected = fine_tune(job_of(case, text, model, tmp_path / "one"), lambda _: None)
    assert expected.losses[0] != expected.losses[2]
    for name, fsdp in (("tp", False), ("fsdp", True)):
        job = job_of(case, text, model, tmp_path / name, mesh="data=2,model=4", fsdp=fsdp)
        assert_same(fine_tune(job, lambda _: None), expected)


class KilledError(Exception):
    pass


def test_a_killed_run_goes_on_over_a_mesh(text, tiny_gguf, tmp_path):
    def kill(event):
        if isinstance(event, StepDone) and event.step == 2:
            raise KilledError

    mesh = {"mesh": "data=2,model=2", "checkpoint_every": 1}
    case = CASES["adamw4bit"]
    whole = fine_tune(job_of(case, text, tiny_gguf, tmp_path / "a", **mesh), lambda _: None)
    with pytest.raises(KilledError):
        fine_tune(job_of(case, text, tiny_gguf, tmp_path / "b", **mesh), kill)
    job = job_of(case, text, tiny_gguf, tmp_path / "b", resume=True, **mesh)
    resumed = fine_tune(job, lambda _: None)
    assert resumed.losses == whole.losses and resumed.loss_after == whole.loss_after


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(text, tiny_gguf, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "examples.llm", "--model", tiny_gguf, "--task", text,
        "--method", "adamw4bit", "mezo", "--tuning", "lora", "--steps", 3, "--batch-size", 8,
        "--sequence-length", 16, "--eval-batches", 1, "--learning-rate", 1e-3,
        "--mesh", "data=2,model=2", "--checkpoint-every", 2, "--output", tmp_path / "two",
        "--coordinator", f"127.0.0.1:{port}", "--num-processes", 2, "--save-model",
    ]  # fmt: skip
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    processes = [
        subprocess.Popen(
            [*map(str, command), "--process-id", str(number)], cwd=ROOT, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        alone = {}
        for name in ("adamw4bit", "mezo"):
            case = Settings(method=(name,), tuning="lora", **RATE)
            alone[name] = fine_tune(job_of(case, text, tiny_gguf, tmp_path / name), lambda _: None)
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    for run in json.loads((tmp_path / "two" / "metrics.json").read_text())["runs"]:
        expected = alone[run["method"]]
        for name in ("loss_before", "losses", "loss_after"):
            np.testing.assert_allclose(run[name], getattr(expected, name), rtol=2e-6)
        folder = tmp_path / "two" / run["method"] / "seed-0"
        names = module_names(TINY)
        lora, leaves = qlora.from_peft(qlora.read_adapter(folder / "adapter"), names)
        merged = lora.merge(GGUFModel(tiny_gguf).parameters(), leaves)
        found = HuggingFaceModel(folder / "model").parameters()
        chex.assert_trees_all_close(found, merged, rtol=1e-6, atol=1e-7)
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 5


def test_layers_are_parted_as_they_follow_each_other():
    parameters = abstract_model(TINY)[1]
    layout = make_layout({"data": 2, "model": 2}, fully=False)
    found = layout.of_parameters(parameters)
    assert found["layers"]["attention"]["query"]["kernel"].spec == P(None, None, "model")
    assert found["layers"]["attention"]["output"]["kernel"].spec == P(None, "model", None)
    assert found["layers"]["feed_forward"]["down"]["kernel"].spec == P(None, "model", None)
    assert found["embedding"]["embedding"].spec == P("model", None)
    assert found["final_norm"]["scale"].is_fully_replicated
    optimizer = METHODS["adamw4bit"].build(Hyperparameters(1.0, 1e-3, 1))
    state = layout.of_state(lambda tree: optimizer.init(tree, 0), parameters)
    codes = state[0].mu["layers"]["feed_forward"]["down"]["kernel"].codes
    assert tuple(codes.spec)[:2] == (None, "model")


def test_codes_are_parted_as_the_floats_would_be():
    down = {"feed_forward/down/kernel": qlora.abstract_matrix((1, 512, 512), "float32")}
    found = make_layout({"data": 2, "model": 4}, fully=True).of_parameters(down)
    rows = found["feed_forward/down/kernel"].rows
    assert rows.codes.spec == rows.scales.codes.spec == P(None, None, ("model", "data"))


def test_axes_that_the_mesh_does_not_divide_are_named():
    layout = make_layout({"model": 3}, fully=False)
    with pytest.raises(UsageError, match="--mesh: model=3 does not divide the 32 of axis 2 of lay"):
        layout.of_parameters(abstract_model(TINY)[1])
    with pytest.raises(UsageError, match="--mesh: data=3,model=3 is for 9 devices, there are 8"):
        make_layout({"data": 3, "model": 3}, fully=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "data"], "--mesh: must be such as data=2,model=4, got data"),
        (["--mesh", "data=0"], "--mesh: must be such as"),
        (["--mesh", "data=2,data=2"], "--mesh: must be such as"),
        (["--mesh", "pipe=2"], "--mesh: must be such as"),
        (["--mesh", "data=4"], "--mesh: data=4 does not divide --batch-size 2"),
        (["--mesh", "data=2", "--method", "paged-adamw"], "--mesh: paged-adamw is for one device"),
        (["--fsdp"], "--fsdp: needs --mesh"),
        (["--process-id", "0"], "--coordinator: must be given with --num-processes"),
        (["--coordinator", "here"], "--coordinator: must be such as 10.0.0.1:1234, got here"),
        (["--coordinator", "a:1"], "--num-processes: must be given with --coordinator"),
        (
            ["--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id: must be from 0 to 1, got 2",
        ),
        (
            ["--coordinator", "a:1", "--num-processes", "2", "--process-id", "1"],
            "--mesh: must be given for several processes",
        ),
    ],
)
def test_bad_meshes_are_one_line(arguments, message, tiny_gguf, capsys):
    assert main(["--model", str(tiny_gguf), *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.startswith("error: ") and errors.count("\n") == 1
