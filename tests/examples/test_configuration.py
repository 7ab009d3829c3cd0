"""Settings from files and flags, and back."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from examples.llm.bench.settings import BenchSettings
from examples.llm.program.command import main
from examples.llm.program.configuration import read_settings, settings_as_json
from examples.llm.program.settings import DEFAULTS, QLORA_RECIPE


@pytest.fixture
def file(tmp_path):
    def write(content, name="a.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def test_flags_override_the_file_and_the_file_the_recipe(file):
    toml = 'method = ["mezo", "adam"]\nbatch-size = 4\nlearning_rate = 1\ntemplate = false\n'
    path = file(toml, "a.toml")
    settings = read_settings(["--batch-size", "8", "--config", path], QLORA_RECIPE)
    assert settings == replace(
        QLORA_RECIPE, method=("mezo", "adam"), batch_size=8, learning_rate=1.0, template=False,
        config=Path(path),
    )  # fmt: skip


@pytest.mark.parametrize("settings", [DEFAULTS, QLORA_RECIPE, BenchSettings()])
def test_what_is_written_gives_the_same_settings(file, settings):
    content = settings_as_json(settings)
    assert {field.name for field in fields(settings)} >= content.keys()
    path = file(content)
    again = read_settings([f"--config={path}"], type(settings)())
    assert again == replace(settings, config=Path(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"stepz": 3}, "stepz is unknown, choose from method, task, dev"),
        ({"resume": True}, "resume is unknown"),
        ({"steps": "3"}, 'steps must be an integer, is "3"'),
        ({"steps": True}, "steps must be an integer, is true"),
        ({"steps": 3.0}, "steps must be an integer, is 3.0"),
        ({"learning_rate": "fast"}, 'learning_rate must be a number, is "fast"'),
        ({"method": "adam"}, 'method must be an array, each a string, is "adam"'),
        ({"seeds": [0, "1"]}, 'seeds must be an integer, is "1"'),
        ({"tuning": "half"}, 'tuning must be one of full, lora, qlora, prefix, prompt, is "half"'),
        ({"template": 1}, "template must be true or false, is 1"),
        ({"output": None}, "output must be a string, is null"),
        ([1], "must hold one object, is list"),
        ("{", "cannot read"),
    ],
)
def test_a_wrong_file_is_one_line(file, content, message, capsys):
    path = file(content)
    assert main(["--config", path]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: --config: ") and errors.count("\n") == 1
    assert message in errors and path in errors


def test_a_file_that_is_missing_or_no_toml(file, tmp_path, capsys):
    assert main(["--config", str(tmp_path / "none.toml")]) == 2
    assert "none.toml: No such file or directory" in capsys.readouterr().err
    assert main(["qlora", "--config", file("a = [", "a.toml")]) == 2
    assert "a.toml: " in capsys.readouterr().err
