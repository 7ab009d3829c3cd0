"""Files of instructions, their tokens and batches, and what is learnt of them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import processors

from examples.llm.errors import UsageError
from examples.llm.instructions.batches import PairBatches
from examples.llm.instructions.encoding import EncodedText, encode_dialogue
from examples.llm.instructions.formats import Dialogue, Pair, one, reader_of
from examples.llm.instructions.problem import InstructionProblem
from examples.llm.models.gguf_files import GGUFModel
from examples.llm.models.tokenizer import SpecialTokens
from examples.llm.sampling import of_like_length
from examples.llm.tasks.batches import encode
from examples.llm.tasks.example import Example
from examples.llm.tasks.files import File
from examples.llm.tasks.loading import read_data
from examples.llm.tasks.published import read_rows
from examples.llm.tasks.sources import find_source
from examples.llm.tasks.splits import Splits, fill
from examples.llm.text import TokenWindows
from examples.llm.training.accumulation import AccumulatedLoss, loss_and_gradients
from optax_lowbit import zo

FORMATS = {
    "alpaca": (
        [{"instruction": "Add.", "input": "1 2", "output": "3"}],
        [("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response: ", "3")],
    ),
    "alpaca with no input": (
        [{"instruction": "Greet.", "input": None, "output": "Hi"}],
        [("### Instruction:\nGreet.\n\n### Response: ", "Hi")],
    ),
    "alpaca without input": (
        [{"instruction": "Greet.", "input": "", "output": "Hi"}],
        [("### Instruction:\nGreet.\n\n### Response: ", "Hi")],
    ),
    "seeds": (
        [{"instruction": "Add.", "instances": [{"input": "1", "output": "2"}] * 2, "name": "x"}],
        [("### Input:\n1\n\n### Response: ", "2")] * 2,
    ),
    "self-instruct": ([{"prompt": "a", "completion": "b"}], [("a", "b")]),
    "input-output": ([{"input": "a", "output": "b"}], [("a", "b")]),
    "hh-rlhf": ([{"chosen": "a", "rejected": "b"}], [("", "a")]),
    "chip2": ([{"text": "<human>: why?\n<bot>: so."}], [("why?", "so.")]),
    "oasst1": ([{"text": "### Human: a### Assistant: b"}], [("", "### Human: a### Assistant: b")]),
}


def dialogues_in(path):
    rows = read_rows(File(path))
    reader = reader_of(rows)
    assert reader
    return [dialogue for row in rows for dialogue in reader(row)]


def pairs_in(path):
    return [pair for dialogue in dialogues_in(path) for pair in dialogue.pairs]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("is_array", [True, False])
def test_formats(name, is_array, tmp_path):
    rows, expected = FORMATS[name]
    path = tmp_path / "file.json"
    path.write_text(json.dumps(rows) if is_array else "\n".join(map(json.dumps, rows)))
    pairs = pairs_in(path)
    assert [pair.target for pair in pairs] == [target for _, target in expected]
    for pair, (source, _) in zip(pairs, expected, strict=True):
        assert pair.source.endswith(source) and bool(pair.source) == bool(source)
        assert pair.source == source or pair.source.startswith("Below is an instruction")


def test_csv_with_quotes_and_line_feeds(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('input,output\n"one, ""two""\nthree",four\nfive,"six"\n')
    assert pairs_in(path) == [Pair('one, "two"\nthree', "four"), Pair("five", "six")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"input": "a", "output": "b"}, 3]', "item 2: must be a JSON object, got int"),
        ("a.json", '[{"input": "a", "output": "b"}', "line 1: not JSON"),
        ("a.jsonl", '{"input": "a", "output": "b"}\n{"input": "a"}', "line 2: there is no field"),
        ("a.jsonl", '{"input": "a", "output": 3}', "line 1: output must be a str, got 3"),
        ("a.jsonl", '{"input": "a", "output": "b"}\n{"input', "line 2: not JSON"),
        ("a.json", "[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", '{"input": "a", "output": "\\ud83d"}', "line 1: output must be text, got half"),
        ("a.csv", "input,output\na\n", "row 1: must have 2 columns, got 1"),
        ("a.CSV", "input,output\na,b,c\n", "row 1: must have 2 columns, got 3"),
        ("a.tsv", "input\toutput\na\n", "line 2: must have 2 columns, got 1"),
        ("a.csv", 'input,output\na,"b\n', "not CSV"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UsageError, match=f"--task: {path}, .*{message}"):
        pairs_in(path)


def test_other_rows_have_no_reader(tmp_path):
    for number, content in enumerate(['{"a": 1}', "sentence\tlabel\nfine\t1"]):
        path = tmp_path / str(number)
        path.write_text(content)
        assert reader_of(read_rows(File(path))) is None


@pytest.mark.parametrize("outputs", [("A", "B"), ("A", "Because.")])
def test_a_subject_alone_makes_no_questions_of_instructions(outputs, tmp_path):
    path = tmp_path / "a.json"
    rows = [{"input": "x", "output": output, "subject": "y"} for output in outputs]
    path.write_text(json.dumps(rows))
    data = read_data(find_source(str(path), tmp_path))
    assert (data.format is None) == ("Because." in outputs)
    assert reader_of(data.any_rows)


def test_instances_of_a_seed_task_are_in_one_part(tmp_path):
    path = tmp_path / "seed_tasks.jsonl"
    rows = [
        {"instruction": f"Task {n}", "instances": [{"input": str(i), "output": "x"}] * 2}
        for i in range(3)
        for n in range(20)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    parts = fill(Splits(dialogues_in(path), [], []), (90, 30, 30))
    train, dev, test = ({dialogue.topic for dialogue in part} for part in parts)
    assert train and dev and test and not (train & dev or train & test or dev & test)
    # Those of Alpaca's are as general as `Edit this sentence`.
    path.write_text(json.dumps([{"instruction": "Edit", "input": x, "output": "y"} for x in "ab"]))
    first, second = dialogues_in(path)
    assert first.keys != second.keys


def test_long_fields_of_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"input,output\na,{'b' * 200_000}\n")
    assert len(pairs_in(path)[0].target) == 200_000


@pytest.fixture(scope="module")
def tokenizer(tiny_gguf):
    return GGUFModel(tiny_gguf).tokenizer()


@pytest.fixture(scope="module")
def tokenizer_with_begin(tiny_gguf):
    """As a LLaMA's, which puts a token in front of what it is given."""
    tokenizer = GGUFModel(tiny_gguf).tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|special3|> $A", special_tokens=[("<|special3|>", 3)]
    )
    assert tokenizer.encode("a").ids[0] == 3
    return tokenizer


def test_a_tokenizer_with_a_begin_puts_it_nowhere_else(tokenizer, tokenizer_with_begin):
    special = SpecialTokens(3, 2)
    text = encode_dialogue(one("ab", "cd"), tokenizer_with_begin, special, 20)
    assert text == encode_dialogue(one("ab", "cd"), tokenizer, special, 20)
    assert text.tokens.count(3) == 1 and text.tokens[0] == 3
    example = Example("ab", ("c", "d"), 0)
    options = encode(example, tokenizer_with_begin, special, 20)
    assert options == encode(example, tokenizer, special, 20)
    assert options.prompt[0] == 3 and all(len(option) == 1 for option in options.options)
    window = TokenWindows(["one two three " * 50], tokenizer_with_begin, 17, 0).batches(1)[0]
    assert (window != 3).all()


def shown(text, tokenizer):
    """Letters, those to be written in upper case."""
    letters = {1: "<", 2: ">"}
    return "".join(
        (letters.get(token) or tokenizer.decode([token])).translate(UPPER if is_target else {})
        for token, is_target in zip(text.tokens, text.is_target, strict=True)
    )


UPPER = {ord(x): x.upper() for x in "abcdefghijklmnopqrstuvwxyz"} | {ord(">"): "!"}


@pytest.mark.parametrize(
    ("pairs", "kept"),
    [
        (("abc", "de"), "<abcDE!"),
        (("abc", ""), "<abc!"),
        (("", "abc"), "<ABC!"),
        (("abcdefgh", "z"), "<bcdefghZ!"),  # ten tokens in all
        (("ab", "qrstuvwxyz"), "<abQRSTUVW"),
        (("abcdefgh", "qrstuvwxyz"), "<efghQRSTU"),
        (("a", "b", "c", "d"), "<aB!cD!"),
        (("a", "b", "c", "defghijk"), "<aB!cDEFGH"),
        (("ab", "cd", "efghij", "k"), "<abCD!efgh"),
        (("ab", "qrstuvwxyz", "a", "b"), "<abQRSTUVW"),
    ],
)
def test_a_text_is_cut_to_its_length(pairs, kept, tokenizer):
    dialogue = Dialogue(tuple(map(Pair, pairs[::2], pairs[1::2])))
    encoded = encode_dialogue(dialogue, tokenizer, SpecialTokens(1, 2), max_length=9)
    assert shown(encoded, tokenizer) == kept
    begin_and_ends = 1 + len(pairs) // 2
    assert encoded.is_cut == (begin_and_ends + sum(map(len, pairs)) > 10)


def test_without_special_tokens_nothing_may_be_left_to_write(tokenizer):
    none = SpecialTokens(None, None)
    assert encode_dialogue(one("", "ab"), tokenizer, none, 8).is_target == (True, True)
    for dialogue in (one("abc", ""), one("", "a")):
        with pytest.raises(UsageError, match="nothing is to be written after"):
            encode_dialogue(dialogue, tokenizer, none, 8)


LENGTHS = np.random.default_rng(0).integers(1, 200, 103)


def groups_of(lengths, size, seed, **options):
    groups = of_like_length(lengths, size, seed, **options)
    return lambda number: groups[number].texts


def test_no_text_is_in_two_groups_of_an_epoch():
    group = groups_of(LENGTHS, 10, seed=3)
    epochs = [np.concatenate([group(10 * epoch + n) for n in range(10)]) for epoch in range(6)]
    assert all(len(set(epoch.tolist())) == 100 for epoch in epochs)
    # Those left over are others each time.
    assert len({tuple(sorted(set(range(103)) - set(epoch.tolist()))) for epoch in epochs}) == 6
    again = groups_of(LENGTHS, 10, seed=3)
    assert (again(17) == group(17)).all() and (again(2) == group(2)).all()
    other = groups_of(LENGTHS, 10, seed=4)
    assert any((other(number) != group(number)).any() for number in range(5))


def test_groups_are_of_like_length_and_in_no_order():
    for epoch in range(3):
        numbers = range(10 * epoch, 10 * epoch + 10)
        groups = [LENGTHS[groups_of(LENGTHS, 10, seed=0)(number)] for number in numbers]
        assert np.mean([np.ptp(group) for group in groups]) < np.ptp(LENGTHS) / 5
        means = [group.mean() for group in groups]
        assert means != sorted(means) and means != sorted(means, reverse=True)


def test_a_set_smaller_than_a_group_is_repeated():
    group = groups_of(LENGTHS[:3], 8, seed=0)
    for number in range(3):
        assert sorted(np.bincount(group(number)).tolist()) == [2, 3, 3]


def test_batches_of_a_step_are_a_group():
    wide, narrow = groups_of(LENGTHS, 12, seed=0), of_like_length(LENGTHS, 3, 0, alike=4)
    for number in range(9):
        np.testing.assert_array_equal(narrow[number].alike, wide(number // 4))
    together = np.concatenate([narrow[number].texts for number in range(4, 8)])
    np.testing.assert_array_equal(together, wide(1))


TEXTS = [
    EncodedText(tuple(range(1, n + 1)), tuple(place >= source for place in range(n)))
    for n, source in [(5, 2), (40, 1), (9, 0)]
]


@pytest.mark.parametrize("on_source", [False, True])
def test_weights_are_of_the_tokens_to_predict(on_source):
    batches = PairBatches(TEXTS, 3, train_on_source=on_source)
    (batch,) = batches.all()
    # Tokens that come after a place: the first of a text is never predicted.
    assert batch.tokens.shape == (3, 40) and batch.weights.shape == (3, 39)
    expected = (4, 8, 39) if on_source else (3, 8, 39)
    assert tuple(batch.weights.sum(-1)) == expected
    assert batch.weights[0, :4].tolist() == [1 if on_source else 0, 1, 1, 1]


def test_batches_of_a_step_have_one_shape_and_shapes_are_few():
    texts = [EncodedText((1,) * (n + 1), (True,) * (n + 1)) for n in LENGTHS]
    batches = PairBatches(texts, 2, alike=4).random
    lengths = [batches[number].tokens.shape[1] for number in range(40)]
    assert all(len(set(lengths[start : start + 4])) == 1 for start in range(0, 40, 4))
    assert 1 < len(set(lengths)) <= 4


def table_model(table):
    """A model whose logits depend on the token alone."""

    class Model:
        def features(self, tokens, segments=None, /):
            return table[tokens]

        def logits(self, features):
            return features

    return Model()


@pytest.fixture(scope="module")
def table():
    return jax.random.normal(jax.random.key(0), (41, 41))


def by_hand(table, batches):
    """The mean over all tokens of all batches, one by one, in float64."""
    log_probabilities = np.asarray(jax.nn.log_softmax(table), np.float64)
    losses = [
        -log_probabilities[before, after]
        for batch in batches
        for tokens, weights in zip(batch.tokens, batch.weights, strict=True)
        for before, after, weight in zip(tokens[:-1], tokens[1:], weights, strict=True)
        if weight
    ]
    return np.mean(losses)


def test_the_loss_is_the_mean_over_answers(table):
    problem = InstructionProblem(*[PairBatches(TEXTS, 2)] * 3)
    batches = [*problem.held_out()]
    assert len(batches) == 2  # the second is half empty
    measured = [problem.measure(table_model(table), batch) for batch in batches]
    evaluation = problem.evaluation(measured)
    expected = by_hand(table, batches)
    np.testing.assert_allclose(evaluation.loss, expected, rtol=1e-5)
    np.testing.assert_allclose(evaluation.scores["perplexity"], np.exp(expected), rtol=1e-5)
    loss = problem.loss(table_model(table), batches[0])
    np.testing.assert_allclose(loss, by_hand(table, batches[:1]), rtol=1e-5)


@pytest.fixture
def accumulated():
    problem = InstructionProblem(*[PairBatches(TEXTS, 1, alike=3)] * 3)
    batches = [problem.batches[number] for number in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)

    def loss(table, frozen, batch):
        return problem.loss(table_model(table + frozen), batch)

    return loss, AccumulatedLoss(loss, problem.weight), stacked, whole


def test_accumulated_gradients_are_those_of_the_whole_batch(accumulated, table):
    loss, in_pieces, stacked, whole = accumulated
    expected = jax.value_and_grad(loss)(table, 0.5, whole)
    found = jax.jit(lambda *args: loss_and_gradients(in_pieces, *args))(table, 0.5, stacked)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-7)
    # Not the mean of means: their numbers of tokens differ.
    means = [loss(table, 0.5, jax.tree.map(lambda x, i=i: x[i], stacked)) for i in range(3)]
    assert abs(np.mean(means) - expected[0]) > 1e-2


def test_zeroth_order_steps_take_them_too(accumulated, table):
    loss, in_pieces, stacked, whole = accumulated
    opt = zo.zo_sgd(1e-2)
    steps = [
        jax.jit(lambda x, batch, f=f: opt.step(f, x, opt.init(x, 0), 0.5, batch))(table, batch)
        for f, batch in ((loss, whole), (in_pieces, stacked))
    ]
    np.testing.assert_allclose(steps[0][2].loss, steps[1][2].loss, rtol=1e-6)
    # The difference of two losses, in float32, over 2 eps.
    np.testing.assert_allclose(steps[0][0], steps[1][0], atol=1e-2 * 1e-6 / 1e-3 * 4)
    assert jnp.abs(steps[0][0] - table).max() > 1e-4  # more than they may differ
