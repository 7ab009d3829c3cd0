"""`python -m optax_lowbit.memory`."""

import json
import re
import subprocess
import sys

import pytest

from optax_lowbit.memory import plan
from optax_lowbit.memory.__main__ import main
from optax_lowbit.memory.training import OPTIMIZERS

SMALL = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256,
}  # fmt: skip
LLAMA = ["--model", "llama-7b", "--optimizer", "adamw4bit", "--dtype", "bfloat16"]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    return str(path)


def bytes_in(text, part):
    (line,) = re.findall(rf"^ *{part}  .*$", text, re.MULTILINE)
    return int(re.search(r"[\d,]{2,}|\d+", line.replace(part, ""))[0].replace(",", ""))


@pytest.mark.parametrize(
    ("arguments", "code", "verdict"),
    [
        (["--device", "24GB"], 1, "does not fit in 24.00 GiB"),
        (["--device", "h100"], 0, "fits in 80.00 GiB"),
        (["--device", "24GB", "--devices", "2"], 0, "fits in 24.00 GiB"),
    ],
)
def test_whether_it_fits(arguments, code, verdict, capsys):
    assert main([*LLAMA, *arguments]) == code
    out = capsys.readouterr().out
    assert verdict in out
    assert bytes_in(out, "parameters") == 2 * 6_738_415_616
    assert "without activations" in out


def test_without_a_device_it_is_only_told(capsys):
    assert main(LLAMA) == 0
    assert "fit" not in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(optimizer, config, capsys):
    assert main(["--config", config, "--optimizer", optimizer, "--dtype", "bfloat16"]) == 0
    state = bytes_in(capsys.readouterr().out, "optimizer state")
    assert state == plan(config, OPTIMIZERS[optimizer]("auto")).state.total or optimizer in (
        "adamw", "sgd", "adafactor", "lion",  # whose moments have the dtype of the parameters
    )  # fmt: skip
    if optimizer == "adamw-float32":
        assert state == plan(config, OPTIMIZERS["adamw"]("auto")).state.total


def test_a_step_is_compiled(config, capsys):
    arguments = ["--config", config, "--optimizer", "adamw", "--batch", "2", "--length", "64"]
    assert main(arguments) == 0
    remat = capsys.readouterr().out
    assert bytes_in(remat, "temporaries") > 0
    assert bytes_in(remat, "outputs, not in place") < 1000
    assert main([*arguments, "--no-remat"]) == 0
    assert bytes_in(capsys.readouterr().out, "temporaries") > bytes_in(remat, "temporaries")


def test_a_step_over_devices(config, capsys):
    arguments = ["--config", config, "--optimizer", "adamw", "--dtype", "bfloat16"]
    assert main([*arguments, "--devices", "8", "--batch", "8", "--length", "32"]) == 0
    out = capsys.readouterr().out
    assert "each of 8 devices" in out
    assert "a CPU computes bfloat16 in float32" in out
    # Split: an eighth of parameters and state, and of no more than the small rest all of it.
    whole = bytes_in(out, "parameters") + bytes_in(out, "optimizer state")
    assert whole / 8 <= bytes_in(out, "arguments") < whole / 8 + 20_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llama-8b", "--optimizer", "adamw"], r"one of llama-7b, .*got 'llama-8b'"),
        (
            ["--model", "gpt2", "--optimizer", "adamw2bit"],
            r"invalid choice: 'adamw2bit'.*adamw4bit",
        ),
        ([*LLAMA, "--device", "24XB"], r"'24GB', or one of rtx3090, .*got '24XB'"),
        ([*LLAMA, "--target", "gpu"], r"target must be one of cpu, .*got 'gpu'"),
        ([*LLAMA, "--devices", "0"], r"--devices: must be at least 1, got 0"),
        ([*LLAMA, "--config", "config.json"], r"--config: not allowed with argument --model"),
        (["--optimizer", "adamw"], r"one of the arguments --model --config is required"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)


def test_as_a_program():
    command = [sys.executable, "-m", "optax_lowbit.memory", "--model", "gpt2", "--device", "24GB"]
    done = subprocess.run(
        [*command, "--optimizer", "adamw4bit"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert bytes_in(done.stdout, "parameters") == 4 * 124_439_808
