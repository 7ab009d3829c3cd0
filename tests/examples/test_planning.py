"""What runs need, from shapes: as the runs themselves have it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from examples.llm.models.tiny import TINY
from examples.llm.program.command import main
from examples.llm.program.planning import abstract_tuning, plan_run, read_shape
from examples.llm.program.settings import Settings, target_of
from examples.llm.training.problems import TextProblem
from examples.llm.training.trainer import Trainer

SETTINGS = Settings(plan=True, method=("adamw4bit",), sequence_length=16, dtype="float32")


pytestmark = pytest.mark.usefixtures("standard_promotion")


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("tuning", ["full", "lora", "qlora", "prefix"])
def test_bytes_are_those_of_the_arrays_that_a_run_has(tuning, tiny_gguf):
    settings = dataclasses.replace(SETTINGS, tuning=tuning)
    found = plan_run(settings, TINY, "adamw4bit")
    problem = TextProblem(None, None, None, 2, 1)
    trainer = Trainer(tiny_gguf, settings.recipe_of("adamw4bit"), problem)
    state = trainer.start(trainer.parameters(0), 0)
    frozen = trainer.tuning.frozen
    parts = (state.parameters, frozen) if tuning == "full" else (frozen, state.parameters)
    assert (found.parameters, found.adapters) == (nbytes(parts[0]), nbytes(parts[1]))
    assert found.state == nbytes(state.optimizer_state)
    assert found.gradients == nbytes(state.parameters)
    assert found.total > found.parameters + found.adapters + found.state + found.temporaries
    trainable = abstract_tuning(TINY, settings.recipe_of("adamw4bit")).trainable
    like = jax.tree.map(lambda x: (x.shape, x.dtype), state.parameters)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), trainable) == like


def test_mezo_needs_no_gradient_and_less_memory():
    first, zeroth = (plan_run(SETTINGS, TINY, method) for method in ("adamw", "mezo"))
    assert zeroth.gradients == 0 < first.gradients
    assert zeroth.total < first.total and first.state > 100 * zeroth.state


def test_a_device_of_a_mesh_has_its_part():
    settings = dataclasses.replace(SETTINGS, batch_size=4, mesh="data=2,model=2", fsdp=True)
    alone, spread = (plan_run(s, TINY, "adamw") for s in (SETTINGS, settings))
    assert spread.devices == 4
    # Norms are whole on every device, and so are both steps' counters.
    norms = 4 * (2 * TINY.num_layers + 1) * TINY.hidden_size
    assert spread.parameters == (alone.parameters - norms) // 4 + norms
    assert spread.trainable == alone.trainable


@pytest.mark.parametrize(
    ("name", "count"),
    [("llama-7b", 6_738_415_616), ("mistral-7b", 7_241_732_096), ("opt-13b", 12_853_473_280)],
)
def test_published_models_have_their_number_of_parameters(name, count, tmp_path):
    config = read_shape(name, tmp_path)
    recipe = dataclasses.replace(SETTINGS, dtype="bfloat16").recipe_of("mezo")
    trainable = abstract_tuning(config, recipe).trainable
    assert sum(leaf.size for leaf in jax.tree.leaves(trainable)) == count
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype("bfloat16")}


def test_a_configuration_alone_is_enough(tmp_path, capsys):
    fields = {
        "model_type": "llama", "hidden_size": 64, "vocab_size": 264, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "tie_word_embeddings": True, "max_position_embeddings": TINY.context_length,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    assert read_shape(str(path), tmp_path) == read_shape(str(tmp_path), tmp_path)
    output = tmp_path / "run"
    arguments = ["--plan", "--model", path, "--method", "mezo", "--sequence-length", 16]
    assert main([*map(str, arguments), "--output", str(output)]) == 0
    assert "MiB of a device" in capsys.readouterr().out
    content = json.loads((output / "plan.json").read_text())
    assert content["plans"] == [dataclasses.asdict(plan_run(SETTINGS, TINY, "mezo"))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "opt-13b", "--sequence-length", "2040", "--tuning", "prompt"],
            "--sequence-length: the model takes at most 2048 tokens, got 2040 and 10 virtual ones",
        ),
        (["--plan-for", "abacus"], "--plan-for: target must be one of cpu, tpu v4"),
        (["--model", "gpt2"], "--model: gpt2 is neither a file, nor a folder, nor one of smollm2"),
        (
            ["--model", "nowhere.json"],
            "--model: cannot read nowhere.json: No such file",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments, message, tmp_path, capsys):
    assert main(["--plan", "--output", str(tmp_path), *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.startswith("error: ") and errors.count("\n") == 1


def test_targets_have_short_names():
    assert [target_of(name) for name in ("cpu", "v5p", "v5e:4x4", "h100:2", "tpu v4")] == [
        "cpu", "tpu v5p", "tpu v5e:4x4", "h100:2", "tpu v4",
    ]  # fmt: skip
