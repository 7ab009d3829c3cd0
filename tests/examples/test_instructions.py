"""Files of instructions, their tokens and batches, and what is learnt of them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import processors

from examples.llm.errors import UsageError
from examples.llm.instructions.batches import LengthGroups, PairBatch, PairBatches
from examples.llm.instructions.encoding import EncodedPair, encode_pair
from examples.llm.instructions.formats import Pair, read_pairs, reader_of
from examples.llm.instructions.problem import InstructionProblem
from examples.llm.models.gguf_files import GGUFModel
from examples.llm.models.tokenizer import SpecialTokens
from examples.llm.tasks.batches import encode
from examples.llm.tasks.example import Example
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


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("is_array", [True, False])
def test_formats(name, is_array, tmp_path):
    rows, expected = FORMATS[name]
    path = tmp_path / "file.json"
    path.write_text(json.dumps(rows) if is_array else "\n".join(map(json.dumps, rows)))
    reader = reader_of(path)
    assert reader
    pairs = read_pairs(path, reader)
    assert [pair.target for pair in pairs] == [target for _, target in expected]
    for pair, (source, _) in zip(pairs, expected, strict=True):
        assert pair.source.endswith(source) and bool(pair.source) == bool(source)
        assert pair.source == source or pair.source.startswith("Below is an instruction")


def test_csv_with_quotes_and_line_feeds(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('input,output\n"one, ""two""\nthree",four\nfive,"six"\n')
    reader = reader_of(path)
    assert reader
    assert read_pairs(path, reader) == [Pair('one, "two"\nthree', "four"), Pair("five", "six")]


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
        ("a.csv", "input,output\na\n", "row 1: must have the 2 columns"),
        ("a.csv", "input,output\na,b,c\n", "row 1: must have the 2 columns"),
        ("a.csv", 'input,output\na,"b\n', "not CSV"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UsageError, match=f"--task: {path}, .*{message}"):
        reader = reader_of(path)
        assert reader
        read_pairs(path, reader)


def test_other_files_have_no_reader(tmp_path):
    for number, content in enumerate(
        ["", "[]", '{"a": 1}', "sentence\tlabel\n", '{"input": "", "output": "A", "subject": ""}']
    ):
        path = tmp_path / str(number)
        path.write_text(content)
        assert reader_of(path) is None


def test_long_fields_of_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"input,output\na,{'b' * 200_000}\n")
    reader = reader_of(path)
    assert reader
    assert len(read_pairs(path, reader)[0].target) == 200_000


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
    pair = encode_pair(Pair("ab", "cd"), tokenizer_with_begin, special, 20)
    assert pair == encode_pair(Pair("ab", "cd"), tokenizer, special, 20)
    assert pair.tokens.count(3) == 1 and pair.tokens[0] == 3
    example = Example("ab", ("c", "d"), 0)
    options = encode(example, tokenizer_with_begin, 20, 3)
    assert options == encode(example, tokenizer, 20, 3)
    assert options.prompt[0] == 3 and all(len(option) == 1 for option in options.options)
    window = TokenWindows(["one two three " * 50], tokenizer_with_begin, 17, 0).batch(0, 1)
    assert (window != 3).all()


@pytest.mark.parametrize(
    ("source", "target", "kept"),
    [
        ("abc", "de", "<abc|de>"),
        ("abc", "", "<abc|>"),
        ("", "abc", "<|abc>"),
        ("abcdefgh", "z", "<bcdefgh|z>"),  # ten tokens in all
        ("ab", "qrstuvwxyz", "<ab|qrstuvw"),
        ("abcdefgh", "qrstuvwxyz", "<efgh|qrstu"),
    ],
)
def test_a_text_is_cut_to_its_length(source, target, kept, tokenizer):
    encoded = encode_pair(Pair(source, target), tokenizer, SpecialTokens(1, 2), max_length=9)
    before, after = kept.split("|")
    letters = {1: "<", 2: ">"}
    text = "".join(letters.get(token) or tokenizer.decode([token]) for token in encoded.tokens)
    assert text == before + after
    assert encoded.source_length == len(before)


def test_without_special_tokens_nothing_may_be_left_to_write(tokenizer):
    none = SpecialTokens(None, None)
    assert encode_pair(Pair("", "ab"), tokenizer, none, 8).source_length == 0
    for pair in (Pair("abc", ""), Pair("", "a")):
        with pytest.raises(UsageError, match="nothing is to be written after"):
            encode_pair(pair, tokenizer, none, 8)


LENGTHS = np.random.default_rng(0).integers(1, 200, 103)


def test_no_text_is_in_two_groups_of_an_epoch():
    groups = LengthGroups(LENGTHS, 10, seed=3)
    epochs = [np.concatenate([groups[10 * epoch + n] for n in range(10)]) for epoch in range(6)]
    assert all(len(set(epoch.tolist())) == 100 for epoch in epochs)
    # Those left over are others each time.
    assert len({tuple(sorted(set(range(103)) - set(epoch.tolist()))) for epoch in epochs}) == 6
    again = LengthGroups(LENGTHS, 10, seed=3)
    assert (again[17] == groups[17]).all() and (again[2] == groups[2]).all()
    other = LengthGroups(LENGTHS, 10, seed=4)
    assert any((other[number] != groups[number]).any() for number in range(5))


def test_groups_are_of_like_length_and_in_no_order():
    for epoch in range(3):
        numbers = range(10 * epoch, 10 * epoch + 10)
        groups = [LENGTHS[LengthGroups(LENGTHS, 10, seed=0)[number]] for number in numbers]
        assert np.mean([np.ptp(group) for group in groups]) < np.ptp(LENGTHS) / 5
        means = [group.mean() for group in groups]
        assert means != sorted(means) and means != sorted(means, reverse=True)


def test_a_set_smaller_than_a_group_is_repeated():
    groups = LengthGroups(LENGTHS[:3], 8, seed=0)
    for number in range(3):
        assert sorted(np.bincount(groups[number]).tolist()) == [2, 3, 3]


PAIRS = [EncodedPair(tuple(range(1, n + 1)), source) for n, source in [(5, 2), (40, 1), (9, 0)]]


@pytest.mark.parametrize("on_source", [False, True])
def test_weights_are_of_the_tokens_to_predict(on_source):
    batches = PairBatches(PAIRS, 3, train_on_source=on_source)
    (batch,) = batches.all()
    # Tokens that come after a place: the first of a text is never predicted.
    assert batch.tokens.shape == (3, 49) and batch.weights.shape == (3, 48)
    expected = (4, 8, 39) if on_source else (3, 8, 39)
    assert tuple(batch.weights.sum(-1)) == expected
    assert batch.weights[0, :4].tolist() == [1 if on_source else 0, 1, 1, 1]


def test_batches_of_a_step_have_one_shape_and_shapes_are_few():
    pairs = [EncodedPair((1,) * (n + 1), 0) for n in LENGTHS]
    batches = PairBatches(pairs, 2, alike=4)
    lengths = [batches.random(number).tokens.shape[1] for number in range(40)]
    assert all(len(set(lengths[start : start + 4])) == 1 for start in range(0, 40, 4))
    assert 1 < len(set(lengths)) <= 4


def table_model(table):
    """A model whose logits depend on the token alone."""

    class Model:
        def features(self, tokens):
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
    problem = InstructionProblem(PairBatches(PAIRS, 2), PairBatches(PAIRS, 2))
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
    problem = InstructionProblem(PairBatches(PAIRS, 1, alike=3), PairBatches(PAIRS, 1))
    batches = [problem.batch(number) for number in range(3)]
    stacked = PairBatch(*(np.stack(leaves) for leaves in zip(*batches, strict=True)))
    whole = PairBatch(*(np.concatenate(leaves) for leaves in zip(*batches, strict=True)))

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
    means = [loss(table, 0.5, PairBatch(*(x[i] for x in stacked))) for i in range(3)]
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
