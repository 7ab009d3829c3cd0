"""The benchmark: what is chosen by which examples, its files and its command line."""

import dataclasses
import json
import weakref

import jax
import numpy as np
import pytest

from examples.llm.bench.cells import CALIBRATED, ZERO_SHOT, Bench, Cell, CellResult, Cost, run_cell
from examples.llm.bench.command import cells_of
from examples.llm.bench.matrix import matrices
from examples.llm.bench.report import Contents, Results, markdown_table, read_contents, write_report
from examples.llm.bench.search import SEARCH_SEED, FinalRun, Trial, best_trial, search
from examples.llm.bench.settings import BenchSettings
from examples.llm.errors import UsageError
from examples.llm.program.about import about_this_run
from examples.llm.program.command import main
from examples.llm.tasks.scoring import option_scores, token_log_likelihoods
from examples.llm.training.judging import Evaluation
from examples.llm.training.methods import METHODS


def evaluation(accuracy, loss=1.0):
    return Evaluation(loss, {"accuracy": accuracy, "f1": 0.5})


def test_rates_are_chosen_by_development_examples_alone():
    # By the test examples the second rate is the best, by the development examples the third.
    quality = {"dev": {0.1: 0.5, 0.2: 0.6, 0.3: 0.8}, "test": {0.1: 0.4, 0.2: 0.9, 0.3: 0.7}}
    events = []

    def train(rate, seed, is_final):
        events.append(("train", rate, seed, is_final))
        return rate

    def judge(rate, part):
        events.append((part, rate))
        return evaluation(quality[part][rate])

    trials, rate, runs = search(train, judge, [0.1, 0.2, 0.3], [7, 8], lambda _: None)
    assert rate == 0.3
    assert [(trial.learning_rate, trial.dev.scores["accuracy"]) for trial in trials] == [
        (0.1, 0.5), (0.2, 0.6), (0.3, 0.8),
    ]  # fmt: skip
    assert [(run.seed, run.test.scores["accuracy"]) for run in runs] == [(7, 0.7), (8, 0.7)]
    first_test = next(number for number, event in enumerate(events) if event[0] == "test")
    assert ("train", 0.3, 7, True) in events[:first_test]
    assert {event for event in events if event[0] == "test"} == {("test", 0.3)}
    assert {event[2:] for event in events if event[0] == "train"} == {
        (SEARCH_SEED, False), (7, True), (8, True),
    }  # fmt: skip


def test_only_one_trained_model_is_held_at_a_time():
    class Trained:
        pass

    alive = weakref.WeakSet()

    def train(rate, seed, is_final):
        assert not alive
        trained = Trained()
        alive.add(trained)
        return trained

    search(train, lambda *_: evaluation(1), [0.1, 0.2], [1, 2], lambda _: None)


def test_a_single_rate_is_not_tried_first():
    calls = []
    trials, rate, _ = search(
        lambda *call: calls.append(call), lambda *_: evaluation(1), [0.5], [3], lambda _: None
    )
    assert (trials, rate, calls) == ([], 0.5, [(0.5, 3, True)])


def test_of_equal_trials_the_lower_loss_wins_and_nan_loses():
    losses = (2.0, 1.0, float("nan"))
    trials = [Trial(rate, evaluation(0.5, loss)) for rate, loss in enumerate(losses)]
    assert best_trial(trials).learning_rate == 1
    assert best_trial([*trials, Trial(9, evaluation(0.6, 5.0))]).learning_rate == 9
    assert best_trial(trials[2:]).learning_rate == 2


def test_where_f1_is_the_objective_f1_chooses():
    one, other = (
        Trial(rate, Evaluation(1.0, {"accuracy": rate, "f1": 1 - rate})) for rate in (0.25, 0.75)
    )
    assert best_trial([one, other], "f1") is one and best_trial([one, other]) is other


COST = Cost(
    steps=10, trainable=1000, forward_passes=20, derivative="", step_seconds=0.25,
    state_bytes=2**20, peak_bytes=3 * 2**20,
)  # fmt: skip
CONTENTS = Contents("a model", {"polarity": "sentences", "sms": "messages"})
RUNS = [FinalRun(seed, evaluation(0.5), evaluation(0.1 * seed)) for seed in (5, 6, 7)]


@pytest.fixture
def results(tmp_path):
    settings = BenchSettings()
    results = Results(tmp_path / "results.json", settings, "m.gguf", about_this_run(), CONTENTS)
    zero_shot = Cell("polarity", "full", ZERO_SHOT, settings, tmp_path)
    results.add(zero_shot, CellResult([], RUNS[:1]))
    mezo = Cell("polarity", "lora", "mezo", settings, tmp_path)
    results.add(mezo, CellResult([Trial(1e-3, evaluation(0.5))], RUNS, 1e-3, 1e-2, COST))
    return results


def test_the_table_has_means_and_deviations(results):
    rows = [
        [field.strip() for field in line.strip("|").split("|")]
        for line in markdown_table(results.cells).splitlines()
    ]
    assert rows[2][:8] == ["polarity", "", "zero-shot", "", "", "1.000", "50.0", "50.0"]
    assert rows[3] == [
        "polarity", "lora", "mezo", "0.001", "1e-02", "1.000", "60.0 ± 10.0", "50.0", "1,000",
        "1.0", "3", "0.25", "10", "20",
    ]  # fmt: skip
    assert len({len(row) for row in rows}) == 1


def test_a_matrix_has_methods_by_tuning(results, tmp_path):
    adam = Cell("polarity", "full", "adam", BenchSettings(), tmp_path)
    results.add(adam, CellResult([], RUNS, 1e-3, None, COST))
    assert matrices(results.cells).splitlines()[2:] == [
        "| accuracy %, loss | lora | full |",
        "| --- | ---: | ---: |",
        "| zero-shot | 50.0, 1.000 | 50.0, 1.000 |",
        "| mezo | 60.0 ± 10.0, 1.000 |  |",
        "| adam |  | 60.0 ± 10.0, 1.000 |",
    ]


def test_a_page_has_the_table_and_a_figure_of_each_kind(results, tmp_path):
    write_report(results, tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "60.0 ± 10.0" in text and text.count("<figure>") == 2
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_of_untrained_models_has_no_figure(tmp_path):
    results = Results(
        tmp_path / "results.json", BenchSettings(), "m.gguf", about_this_run(), CONTENTS
    )
    zero_shot = Cell("polarity", "full", ZERO_SHOT, BenchSettings(), tmp_path)
    results.add(zero_shot, CellResult([], RUNS[:1]))
    write_report(results, tmp_path)
    assert "<figure>" not in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "report.png").exists()


def test_results_are_gone_on_with_by_the_same_settings_only(results):
    settings = BenchSettings(method=("mezo", "adam"), task=("sms",))
    again = Results(results.path, settings, "m.gguf", {}, CONTENTS)
    assert again.cells == results.cells
    assert again.settings["task"] == ["sms"]  # told, and free
    assert again.cells["polarity lora mezo"]["runs"][2]["test"]["scores"]["accuracy"] == 0.1 * 7
    other = dataclasses.replace(settings, batch_size=9)
    before = results.path.read_bytes()
    with pytest.raises(UsageError, match=r"--output: .*\.json .*batch_size is 8 there and 9"):
        Results(results.path, other, "m.gguf", {}, CONTENTS)
    with pytest.raises(UsageError, match=r"model is m\.gguf there and other\.gguf here"):
        Results(results.path, settings, "other.gguf", {}, CONTENTS)
    assert results.path.read_bytes() == before


@pytest.mark.parametrize(
    ("contents", "name"),
    [
        (dataclasses.replace(CONTENTS, model="another"), "m.gguf"),
        (dataclasses.replace(CONTENTS, tasks={"polarity": "others"}), "polarity"),
    ],
)
def test_results_of_files_that_have_changed_are_not_added_to(results, contents, name):
    with pytest.raises(UsageError, match=f"has results of {name} before it was changed"):
        Results(results.path, BenchSettings(), "m.gguf", {}, contents)


def test_a_result_of_which_the_files_are_not_known_is_made_again(results, tmp_path):
    zero_shot, mezo = (
        Cell("polarity", tuning, method, BenchSettings(), tmp_path)
        for tuning, method in (("full", ZERO_SHOT), ("lora", "mezo"))
    )
    content = json.loads(results.path.read_text())
    del content["cells"][zero_shot.name]["identity"]
    results.path.write_text(json.dumps(content))
    again = Results(results.path, BenchSettings(), "m.gguf", {}, CONTENTS)
    assert not again.has(zero_shot) and again.has(mezo)


def test_contents_follow_from_the_bytes(messages, tmp_path):
    settings, model = BenchSettings(task=(str(messages),)), tmp_path / "m.gguf"
    model.write_bytes(b"1")
    before = read_contents(settings, model)
    assert read_contents(settings, model) == before
    model.write_bytes(b"2")
    messages.write_text("ham\thello\n")
    after = read_contents(settings, model)
    assert after.model != before.model and after.tasks != before.tasks


def test_all_cells_are_there(tmp_path):
    settings = BenchSettings(task=("polarity", "sms"), tuning=("full", "lora"), method=("mezo",))
    assert [cell.name for cell in cells_of(settings, tmp_path)] == [
        "polarity full zero-shot", "polarity full zero-shot calibrated",
        "polarity full mezo", "polarity lora mezo",
        "sms full zero-shot", "sms full zero-shot calibrated", "sms full mezo", "sms lora mezo",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "nezo"], "--method: 'nezo' is unknown, choose from adamw"),
        (["--task", "nowhere.tsv"], "--task: nowhere.tsv is neither a file"),
        (["--task", "polarity"], "--data: polarity needs sentence_polarity.zip"),
        (["--seeds", "1", "1"], "--seeds: give at least one, and none twice, got (1, 1)"),
        (["--rate-factors", "0"], "--rate-factors: must be a number above 0, got 0"),
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--tuning", "lora", "--method", "hybrid"], "--tuning: hybrid is for full, not for lora"),
        (["--dev-examples", "0"], "--dev-examples: must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_one_line_and_exit_code_two(arguments, message, capsys):
    assert main(["zo_bench", *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.startswith("error: ") and errors.count("\n") == 1


@pytest.fixture
def messages(tmp_path):
    lines = [
        f"{('ham', 'spam')[n % 2]}\t{('hello', 'WIN NOW')[n % 2]} number {n}\n" for n in range(60)
    ]
    path = tmp_path / "messages.tsv"
    path.write_text("".join(lines))
    return path


def test_a_cell_from_start_to_end(tiny_gguf, messages):
    settings = BenchSettings(
        task=(str(messages),), steps=3, search_steps=2, seeds=(0,), rate_factors=(1.0, 10.0),
        train_examples=20, dev_examples=8, test_examples=8, batch_size=4, sequence_length=54,
    )  # fmt: skip
    told = []
    cell = Cell(str(messages), "prompt", "mezo", settings, tiny_gguf)
    result = run_cell(cell, told.append)
    own = METHODS["mezo"].learning_rates["prompt"]
    assert [trial.learning_rate for trial in result.trials] == [own, 10 * own]
    assert result.learning_rate in (own, 10 * own)
    assert result.cost.trainable == 10 * 64
    assert (result.cost.steps, result.cost.forward_passes) == (3, 6)
    assert result.cost.peak_bytes > 0 and len(told) == 3
    assert json.dumps(dataclasses.asdict(result))


@pytest.mark.parametrize(
    ("tuning", "method"),
    [
        ("full", "mezo"), ("full", "hybrid"), ("full", "blockwise"), ("lora", "blockwise"),
        ("prefix", "blockwise"), ("prompt", "lozo"), ("full", "adam"), ("full", CALIBRATED),
    ],
)  # fmt: skip
def test_an_encoder_learns_classes_by_any_method(tiny_bert, messages, tuning, method):
    settings = BenchSettings(
        steps=2, first_order_steps=2, seeds=(0,), rate_factors=(1.0,), train_examples=20,
        dev_examples=8, test_examples=8, batch_size=4, sequence_length=16,
    )  # fmt: skip
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
        result = run_cell(Cell(str(messages), tuning, method, settings, tiny_bert), lambda _: None)
    (run,) = result.runs
    assert np.isfinite(run.test.loss) and 0 <= run.test.scores["accuracy"] <= 1
    if result.cost:
        assert result.cost.trainable >= 32 * 32 + 32 + 2 * 32 + 2  # the head, at least


def test_what_a_task_is_read_as_is_told_once(tiny_gguf, messages):
    settings = BenchSettings(dev_examples=8, test_examples=8, batch_size=8, sequence_length=48)
    told = []
    for method in (ZERO_SHOT, CALIBRATED):
        cell = Cell(str(messages), "full", method, settings, tiny_gguf)
        run_cell(cell, told.append)
    read, *accuracies = (event.text for event in told)
    assert read.endswith(": read as sms: 44 to learn from, 8 to make choices by, 8 held out")
    assert len(accuracies) == 2 and all(": accuracy " in text for text in accuracies)


def test_a_head_that_the_encoder_does_not_have_is_refused(tiny_bert, messages):
    settings = BenchSettings(head="masked-lm", sequence_length=16)
    with pytest.raises(UsageError, match="--head: the model was not made to fill masks"):
        Bench(Cell(str(messages), "full", "mezo", settings, tiny_bert), "mezo")


def test_virtual_tokens_of_any_tuning_have_to_fit(tiny_gguf, messages):
    settings = BenchSettings(tuning=("full", "prefix"), sequence_length=60)
    with pytest.raises(UsageError, match="at most 64 tokens, got 60 and 5 virtual ones of prefix"):
        Bench(Cell(str(messages), "full", ZERO_SHOT, settings, tiny_gguf), "adam")


def test_mean_scores_are_those_of_all_examples(tiny_gguf, messages):
    settings = BenchSettings(
        train_examples=20, dev_examples=7, test_examples=8, batch_size=4, sequence_length=54
    )
    bench = Bench(Cell(str(messages), "full", CALIBRATED, settings, tiny_gguf), "adam")
    parameters = bench.trainer.parameters(0)
    decoder = bench.trainer.tuning.model(parameters, {})
    (batch,) = dataclasses.replace(bench.problem.dev, size=7).all()
    scores = option_scores(token_log_likelihoods(decoder, batch), batch.mask)
    np.testing.assert_allclose(bench.mean_scores(parameters, "dev"), scores.mean(axis=0), rtol=1e-5)
