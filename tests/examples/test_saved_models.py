"""Models that runs write as folders, opened again."""

import dataclasses
import json
import shutil

import pytest

from examples.llm.errors import UsageError
from examples.llm.models.huggingface_files import HuggingFaceModel
from examples.llm.models.opening import open_model
from examples.llm.program.events import Job
from examples.llm.program.settings import Settings
from examples.llm.program.worker import fine_tune
from examples.llm.training.problems import build_problem, classes_of
from examples.llm.training.trainer import Trainer

pytest.importorskip("safetensors", reason="safetensors is missing")


pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "messages.tsv"
    path.write_text("".join(f"{('ham', 'spam')[n % 2]}\tnumber {n}\n" for n in range(40)))
    return Settings(
        task=str(path), steps=3, train_examples=16, eval_examples=8, sequence_length=32,
        save_model=True,
    )  # fmt: skip


def run(settings, model, output, **changes):
    job = Job("sgd", dataclasses.replace(settings, output=output, **changes), model)
    return fine_tune(job, lambda _: None), job


def loss_of(folder, job):
    """Of the model in a folder that `--model` names, by the task of a run."""
    stored, settings = open_model(folder), job.settings
    head = settings.head_of(stored.config)
    problem = build_problem(settings, stored.tokenizer(), stored.special_tokens(), head)
    recipe = dataclasses.replace(
        dataclasses.replace(settings, tuning="full").recipe_of("sgd"),
        num_classes=classes_of(problem),
    )
    trainer = Trainer(folder, recipe, problem)
    return trainer.judge(trainer.parameters(0), problem, problem.held_out()).loss


def test_what_did_best_is_saved_of_a_run_that_has_ended(settings, tiny_gguf, tmp_path):
    """From its checkpoint, and once; the model has the same numbers."""
    diverging = {"learning_rate": 10.0, "eval_every": 1, "keep_best": True}
    without = {"save_model": False, "checkpoint_every": 3, **diverging}
    result, job = run(settings, tiny_gguf, tmp_path, **without)
    folder = job.folder / "model"
    assert result.kept_step < 3 and not folder.exists()
    again, _ = run(settings, tiny_gguf, tmp_path, resume=True, **diverging)
    assert again.loss_after == result.loss_after == loss_of(folder, job)
    assert not folder.with_suffix(".new").exists()

    written = (folder / "model.safetensors").stat().st_mtime_ns
    run(settings, tiny_gguf, tmp_path, resume=True, **diverging)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written

    for name in ("model", "checkpoints"):
        shutil.rmtree(job.folder / name)
    with pytest.raises(UsageError, match="seed-0 has ended without it, and has no checkpoint"):
        run(settings, tiny_gguf, tmp_path, resume=True, **diverging)


def test_adapters_and_a_head_are_in_the_model_of_an_encoder(settings, tiny_bert, tmp_path):
    """A second run in the same folder writes in place of the first."""
    (tmp_path / "sgd" / "seed-0" / "adapter").mkdir(parents=True)
    (tmp_path / "sgd" / "seed-0" / "adapter" / "adapter_config.json").touch()
    result, job = run(settings, tiny_bert, tmp_path, tuning="lora", learning_rate=0.1)
    assert json.loads((job.folder / "adapter" / "adapter_config.json").read_text())["r"] == 8
    folder = job.folder / "model"
    config = HuggingFaceModel(folder).config
    assert (config.head, config.num_classes) == ("classes", 2)
    assert (folder / "vocab.txt").read_text() == (tiny_bert / "vocab.txt").read_text()
    assert result.loss_after < result.loss_before
    # What is added to a sum beside a matrix is rounded otherwise than what is added to the matrix.
    assert loss_of(folder, job) == pytest.approx(result.loss_after, rel=1e-6)
