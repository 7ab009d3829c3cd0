"""Runs on instructions, with a frozen base in 4 bits, from file to adapter."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import processors

from examples.llm.errors import UsageError
from examples.llm.models.building import abstract_model, build_model
from examples.llm.models.gguf_files import GGUFModel
from examples.llm.models.huggingface_files import HuggingFaceModel
from examples.llm.models.huggingface_names import module_names
from examples.llm.models.tiny import TINY
from examples.llm.models.tokenizer import NO_SPECIAL_TOKENS, SpecialTokens
from examples.llm.program.command import main
from examples.llm.program.events import Job, StepDone
from examples.llm.program.settings import DEFAULTS, QLORA_RECIPE
from examples.llm.program.worker import fine_tune
from examples.llm.tasks.scoring import accuracy_by_subject
from examples.llm.training.problems import build_judges, build_problem
from examples.llm.training.tuning import base_parameters, tuned
from optax_lowbit import qlora

pytest.importorskip("safetensors", reason="safetensors is missing")


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "instructions.jsonl"
    rows = [{"input": f"{n} ", "output": "yes"} for n in range(10, 40)]  # of one length
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """As in the QLoRA paper's program: an array, and the answer a letter."""
    path = tmp_path_factory.mktemp("data") / "questions.json"
    rows = [
        {"input": f"{n}?\nAnswer:", "output": "ABCD"[n % 4], "subject": "odd" if n < 3 else "more"}
        for n in range(9)
    ]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def job(tiny_gguf, instructions, questions, tmp_path_factory):
    settings = dataclasses.replace(
        QLORA_RECIPE, task=str(instructions), judge=(str(questions),), steps=3, accumulate=2,
        batch_size=2, sequence_length=16, learning_rate=1e-2, train_examples=20, eval_examples=4,
        checkpoint_every=1, output=tmp_path_factory.mktemp("whole"),
    )  # fmt: skip
    return Job("paged-adamw4bit", settings, tiny_gguf)


@pytest.fixture(scope="module")
def whole(job):
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
        return fine_tune(job, lambda _: None)


class KilledError(Exception):
    """The run ends here."""


def test_a_run_learns_and_is_judged(whole):
    assert whole.loss_after < whole.loss_before
    scores = {"perplexity", "questions accuracy", "questions accuracy by subject"}
    assert set(whole.scores_after) == set(whole.scores_before) == scores
    np.testing.assert_allclose(whole.scores_after["perplexity"], np.exp(whole.loss_after))


def test_a_run_goes_on_where_it_was_killed(job, whole, tmp_path):
    def kill(event):
        if isinstance(event, StepDone) and event.step == 2:
            raise KilledError

    settings = dataclasses.replace(job.settings, output=tmp_path)
    killed = dataclasses.replace(job, settings=settings)
    with jax.numpy_dtype_promotion("standard"):
        with pytest.raises(KilledError):
            fine_tune(killed, kill)
        settings = dataclasses.replace(settings, resume=True)
        events = []
        resumed = fine_tune(dataclasses.replace(killed, settings=settings), events.append)
    assert [event.step for event in events if isinstance(event, StepDone)] == [2, 3]
    for name in ("losses", "loss_before", "loss_after", "scores_before", "scores_after"):
        assert getattr(resumed, name) == getattr(whole, name)

    adapter, other = (qlora.read_adapter(run.folder / "adapter") for run in (job, killed))
    assert adapter.config.r == 64 and len(adapter.matrices) == 7 * TINY.num_layers
    for module, arrays in adapter.matrices.items():
        for role, array in arrays.items():
            assert np.asarray(array).tobytes() == np.asarray(other.matrices[module][role]).tobytes()


def test_the_adapter_written_is_what_was_trained(job, whole, tiny_gguf):
    """Put into the base again, it gives the loss of the run's end."""
    lora, leaves = qlora.from_peft(qlora.read_adapter(job.folder / "adapter"), module_names(TINY))
    stored = GGUFModel(tiny_gguf)
    graph, _ = abstract_model(TINY)
    base = qlora.quantize_model(build_model(graph, stored.parameters()))
    model = lora.wrap(base, key=1)
    lora.update(model, leaves)
    problem = build_problem(job.settings, stored.tokenizer(), stored.special_tokens())
    measure = nnx.jit(problem.measure)
    measured = [measure(model, jax.tree.map(jnp.asarray, b)) for b in problem.held_out()]
    np.testing.assert_allclose(problem.evaluation(measured).loss, whole.loss_after, rtol=1e-5)


def write_folder(folder, tiny_gguf, **fields):
    """The tiny model as Hugging Face's folder, in floats."""
    from safetensors.numpy import save_file

    stored = GGUFModel(tiny_gguf)
    parameters = stored.parameters()
    tensors = {
        "model.embed_tokens.weight": parameters["embedding"]["embedding"],
        "model.norm.weight": parameters["final_norm"]["scale"],
    }
    layers = parameters["layers"]
    for path, modules in module_names(TINY).items():
        _, block, name, _ = path.split("/")
        for module, kernel in zip(modules, layers[block][name]["kernel"], strict=True):
            tensors[f"{module}.weight"] = kernel.T
    for name, ours in (("input", "attention"), ("post_attention", "feed_forward")):
        for layer, scale in enumerate(layers[f"{ours}_norm"]["scale"]):
            tensors[f"model.layers.{layer}.{name}_layernorm.weight"] = scale
    config = {
        "model_type": "llama", "hidden_size": TINY.hidden_size, "vocab_size": TINY.vocabulary_size,
        "intermediate_size": TINY.feed_forward_size, "num_hidden_layers": TINY.num_layers,
        "num_attention_heads": TINY.num_heads, "num_key_value_heads": TINY.num_key_value_heads,
        "head_dim": TINY.head_size, "max_position_embeddings": TINY.context_length,
        "rope_theta": TINY.rotary_base, "rms_norm_eps": TINY.norm_epsilon,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": [2, 3], **fields,
    }  # fmt: skip
    folder.mkdir()
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    stored.tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def test_a_folder_is_the_same_model_as_a_file(tiny_gguf, tmp_path):
    folder = write_folder(tmp_path / "model", tiny_gguf)
    model = HuggingFaceModel(folder)
    assert model.special_tokens() == SpecialTokens(None, 2)  # its tokenizer puts none in front
    text = "One, two: 3!"
    stored = GGUFModel(tiny_gguf)
    assert model.tokenizer().encode(text).ids == stored.tokenizer().encode(text).ids
    expected = stored.parameters()
    assert jax.tree.all(
        jax.tree.map(lambda x, y: bool((x == y).all()), model.parameters(), expected)
    )


def test_what_a_tokenizer_puts_in_front(tiny_gguf, tmp_path):
    folder = write_folder(tmp_path / "model", tiny_gguf)
    tokenizer = HuggingFaceModel(folder).tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|special1|> $A", special_tokens=[("<|special1|>", 1)]
    )
    tokenizer.enable_truncation(3)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert HuggingFaceModel(folder).special_tokens() == SpecialTokens(1, 2)
    assert len(HuggingFaceModel(folder).tokenizer().encode("abcdef").ids) == 7


@pytest.mark.slow
def test_the_command_fine_tunes_a_folder(tiny_gguf, instructions, tmp_path, capsys):
    folder = write_folder(tmp_path / "model", tiny_gguf)
    arguments = (
        "--model", folder, "--task", instructions, "--method", "mezo", "--steps", 2,
        "--sequence-length", 16,
        "--train-examples", 20, "--eval-examples", 2, "--accumulate", 2,
        "--prompt", "10", "--output", tmp_path / "run",
    )  # fmt: skip
    assert main(["qlora", *map(str, arguments)]) == 0
    (run,) = json.loads((tmp_path / "run" / "metrics.json").read_text())["runs"]
    assert run["method"] == "mezo" and run["continuation"] and len(run["losses"]) == 2
    assert (tmp_path / "run" / "mezo" / "seed-0" / "adapter" / "adapter_config.json").is_file()
    assert f"{tmp_path / 'run'}/METHOD/seed-N/adapter" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot read .*tokenizer"),
    ],
)
def test_a_tokenizer_that_cannot_be_read(change, message, tiny_gguf, tmp_path):
    folder = write_folder(tmp_path / "model", tiny_gguf)
    change(folder)
    with pytest.raises(UsageError, match=message):
        HuggingFaceModel(folder).tokenizer()


def test_special_tokens_outside_of_the_vocabulary(tiny_gguf, tmp_path):
    folder = write_folder(tmp_path / "model", tiny_gguf, bos_token_id=264)
    with pytest.raises(UsageError, match="bos_token_id must be a token below 264, is 264"):
        HuggingFaceModel(folder).special_tokens()


def test_a_base_in_16_bits_under_adapters_in_32(tiny_gguf):
    graph, _ = abstract_model(TINY)
    parameters = base_parameters(GGUFModel(tiny_gguf).parameters(), "qlora", "bfloat16")
    tuning = tuned("qlora", graph, parameters, 0)
    assert {leaf.dtype for leaf in jax.tree.leaves(tuning.trainable)} == {jnp.dtype("float32")}
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)

    def features(trainable, frozen, tokens):
        return tuning.model(trainable, frozen).features(tokens)

    with jax.numpy_dtype_promotion("standard"):  # Flax's norms work in float32
        found = jax.eval_shape(features, tuning.trainable, tuning.frozen, tokens)
    assert found.dtype == jnp.bfloat16


def test_files_in_4_bits_are_for_qlora(tiny_gguf):
    parameters = GGUFModel(tiny_gguf).parameters()
    query = parameters["layers"]["attention"]["query"]
    query["kernel"] = qlora.quantize_matrix(query["kernel"])
    with pytest.raises(UsageError, match="--tuning: the model's matrices are in 4 bits"):
        base_parameters(parameters, "lora", None)
    cast = base_parameters(parameters, "qlora", "bfloat16")
    kernel = cast["layers"]["attention"]["query"]["kernel"]
    assert kernel.dtype == cast["layers"]["attention"]["key"]["kernel"].dtype == jnp.bfloat16


def test_letters_are_options(questions, tiny_gguf):
    settings = dataclasses.replace(DEFAULTS, judge=(str(questions),))
    (problem,) = build_judges(
        settings, GGUFModel(tiny_gguf).tokenizer(), NO_SPECIAL_TOKENS, 64
    ).values()
    batch = next(iter(problem.held_out()))
    tokenizer = GGUFModel(tiny_gguf).tokenizer()
    for letter, targets in zip("ABCD", batch.targets[0], strict=True):
        assert tokenizer.decode(targets.tolist()) == f" {letter}"
    assert problem.test.subjects == ("more", "odd")
    assert len(problem.test.examples) == 9


@pytest.mark.parametrize(("given", "asked"), [(None, 201), (5, 5)])
def test_a_judge_asks_all_unless_told_how_many(given, asked, tiny_gguf, tmp_path):
    path = tmp_path / "judge.json"
    row = {"input": "1?\nAnswer:", "output": "A", "subject": "odd"}
    path.write_text(json.dumps([row] * 201))
    settings = dataclasses.replace(DEFAULTS, judge=(str(path),), eval_examples=given)
    tokenizer = GGUFModel(tiny_gguf).tokenizer()
    (problem,) = build_judges(settings, tokenizer, NO_SPECIAL_TOKENS, 64).values()
    assert len(problem.test.examples) == asked


def test_a_judge_without_examples_is_refused(tiny_gguf, tmp_path):
    path = tmp_path / "empty.tsv"
    path.write_text("sentence\tlabel\n")
    settings = dataclasses.replace(DEFAULTS, judge=(str(path),))
    with pytest.raises(UsageError, match=r"--judge: .*empty\.tsv is empty"):
        build_judges(settings, GGUFModel(tiny_gguf).tokenizer(), NO_SPECIAL_TOKENS, 64)


def test_judges_of_one_name_are_told_apart(questions, tiny_gguf, tmp_path):
    other = tmp_path / questions.name
    other.write_text(questions.read_text())
    settings = dataclasses.replace(DEFAULTS, judge=(str(questions), str(other)))
    judges = build_judges(settings, GGUFModel(tiny_gguf).tokenizer(), NO_SPECIAL_TOKENS, 64)
    assert judges.keys() == {str(questions), str(other)}


def test_what_is_learnt_from_is_no_judge(questions, capsys):
    assert main(["--task", str(questions), "--judge", str(questions)]) == 2
    assert "--judge: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "f1", "accumulate": 2}, "--accumulate: f1 is of a batch as a whole"),
        ({"objective": "f1"}, "--objective: f1 is of two options, and mmlu has 4"),
        ({"eval_batches": 3}, r"--eval-batches: .*\.json is a choice of options, which has no use"),
    ],
)
def test_what_a_choice_of_four_options_does_not_have(changes, message, tiny_gguf, questions):
    stored = GGUFModel(tiny_gguf)
    settings = dataclasses.replace(
        DEFAULTS, task=str(questions), train_examples=4, eval_examples=2, sequence_length=32,
        **changes,
    )  # fmt: skip
    with pytest.raises(UsageError, match=message):
        build_problem(settings, stored.tokenizer(), stored.special_tokens())


def test_all_that_is_not_held_out_is_learnt_from(instructions, tiny_gguf):
    stored = GGUFModel(tiny_gguf)
    settings = dataclasses.replace(DEFAULTS, task=str(instructions), sequence_length=16)
    told = []
    problem = build_problem(settings, stored.tokenizer(), stored.special_tokens(), tell=told.append)
    assert told == [
        f"{instructions}, read as instructions: 16 to learn from, 7 to make choices by, 7 held out"
    ]
    parts = (problem.train.all(), problem.held_out("dev"), problem.held_out("test"))
    counts = [sum(int((b.weights.sum(-1) > 0).sum()) for b in batches) for batches in parts]
    assert counts == [16, 7, 7]


def test_accuracy_by_subject_counts_every_subject_alike():
    predictions, labels = jnp.array([0, 1, 2, 3, 0]), jnp.array([0, 1, 2, 0, 0])
    weights, subjects = jnp.array([1.0, 1, 1, 1, 0]), jnp.array([0, 0, 0, 1, 1])
    assert accuracy_by_subject(predictions, labels, weights, subjects, 2) == 0.5
    assert accuracy_by_subject(predictions, labels, weights, subjects + 1, 3) == 0.5


def test_parts_with_other_subjects_are_judged_by_their_own(tiny_gguf, tmp_path):
    for name, subjects in (("train", "ab"), ("many", "abcdd"), ("few", "ce"), ("one", "d")):
        rows = [
            {"input": f"{name} {n}?\nAnswer:", "output": "B", "subject": subject}
            for n, subject in enumerate(subjects)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    stored = GGUFModel(tiny_gguf)

    def scores(part, **files):
        settings = dataclasses.replace(
            DEFAULTS, task=str(tmp_path / "train.json"), sequence_length=32, batch_size=5,
            **{flag: tmp_path / f"{name}.json" for flag, name in files.items()},
        )  # fmt: skip
        problem = build_problem(settings, stored.tokenizer(), stored.special_tokens())
        (batch,) = problem.held_out(part)
        subjects = np.array([problem.test.subjects[number] for number in batch.subjects])
        measured = {name: getattr(batch, name) for name in ("labels", "weights", "subjects")}
        predictions = np.where(np.isin(subjects, ["c", "d"]), batch.labels, 0)
        return problem.evaluation([{**measured, "loss": 1.0, "predictions": predictions}]).scores

    for part, other in (("dev", "test"), ("test", "dev")):
        found = scores(part, **{part: "many", other: "few"})
        assert (found["accuracy"], found["accuracy by subject"]) == pytest.approx((3 / 5, 2 / 4))
        found = scores(part, **{part: "few", other: "many"})
        assert (found["accuracy"], found["accuracy by subject"]) == pytest.approx((1 / 2, 1 / 2))
    assert "accuracy by subject" not in scores("dev", dev="one", test="few")
