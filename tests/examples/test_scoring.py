"""Batches of examples with options: scores by hand, padding, losses, F1."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.llm.errors import UsageError
from examples.llm.models.building import abstract_model, build_model
from examples.llm.models.decoder import Decoder
from examples.llm.models.gguf_files import GGUFModel
from examples.llm.models.tiny import TINY
from examples.llm.models.tokenizer import NO_SPECIAL_TOKENS, SpecialTokens
from examples.llm.tasks.batches import Batches, EncodedExample, OptionBatch, encode
from examples.llm.tasks.example import Example
from examples.llm.tasks.scoring import (
    OBJECTIVES,
    accuracy,
    f1,
    option_scores,
    token_log_likelihoods,
)
from examples.llm.training.judging import make_judge
from examples.llm.training.problems import OptionProblem

VOCABULARY = 7


class Bigrams:
    """A model whose logits depend on the last token alone: row `t` of a table."""

    def __init__(self, table):
        self.table = jnp.asarray(table, jnp.float32)

    def features(self, tokens, segments=None, /):
        return jax.nn.one_hot(tokens, VOCABULARY, dtype=jnp.float32)

    def logits(self, features, /):
        return features @ self.table


@pytest.fixture
def table(rng):
    return rng.normal(size=(VOCABULARY, VOCABULARY))


def log_probability(table, token, following):
    row = table[token]
    return row[following] - np.log(np.exp(row).sum())


def by_hand(table, prompt, option):
    text = (*prompt, *option)
    chances = [
        log_probability(table, text[place - 1], text[place])
        for place in range(len(prompt), len(text))
    ]
    return sum(chances) / len(option)


LONG = EncodedExample((1, 2, 3), ((4, 5, 6), (5,)), 1)
SHORT = EncodedExample((6,), ((1, 1), (2, 3, 4, 5)), 0)
SINGLE = EncodedExample((1, 2, 3, 3), ((4,), (5,)), 0)


def one_batch(*examples, size=None):
    (batch,) = Batches(examples, size or len(examples)).all()
    return jax.tree.map(jnp.asarray, batch)


def scores(model, batch):
    return option_scores(token_log_likelihoods(model, batch), batch.mask)


def test_scores_are_mean_log_probabilities(table):
    found = scores(Bigrams(table), one_batch(LONG, SHORT))
    expected = {
        example: [by_hand(table, example.prompt, option) for option in example.options]
        for example in (LONG, SHORT)
    }
    # Of all examples the shortest come first: of SHORT the model reads four tokens, of LONG five.
    np.testing.assert_allclose(found, [expected[SHORT], expected[LONG]], rtol=1e-5)


def test_options_of_one_token_share_a_row(table):
    batch = one_batch(SINGLE, SINGLE)
    assert batch.tokens.shape == (2, 1, 16)
    expected = [by_hand(table, SINGLE.prompt, option) for option in SINGLE.options]
    np.testing.assert_allclose(scores(Bigrams(table), batch)[0], expected, rtol=1e-5)
    assert one_batch(SINGLE, LONG).tokens.shape == (2, 2, 16)
    (batch,) = Batches((SINGLE, LONG), 2, max_length=10).all()
    assert batch.tokens.shape == (2, 2, 10)


@pytest.fixture(scope="module")
def decoder():
    _, shapes = abstract_model(TINY)
    rng = np.random.default_rng(0)
    parameters = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype), shapes
    )
    return build_model(abstract_model(TINY)[0], parameters)


def test_padding_does_not_change_scores(decoder: Decoder):
    alone = scores(decoder, one_batch(LONG))
    crowd = Batches([LONG, EncodedExample((1,) * 30, ((2,), (3,)), 0)], 3)
    (batch,) = crowd.all()
    assert batch.tokens.shape == (3, 2, 32)
    np.testing.assert_array_equal(batch.weights, [1, 1, 0])
    together = scores(decoder, jax.tree.map(jnp.asarray, batch))
    np.testing.assert_allclose(together[0], alone[0], rtol=1e-5)


def test_losses_by_hand(table):
    batch = one_batch(LONG, SHORT, size=3)
    model = Bigrams(table)
    likelihoods = token_log_likelihoods(model, batch)
    both = np.array(
        [[by_hand(table, x.prompt, option) for option in x.options] for x in (LONG, SHORT)]
    )
    right = both[[0, 1], [1, 0]]
    expected = np.mean(np.log(np.exp(both).sum(axis=1)) - right)
    loss = OBJECTIVES["classification"].loss(likelihoods, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    # The right options have one token and two.
    expected = -(1 * right[0] + 2 * right[1]) / 3
    loss = OBJECTIVES["language-model"].loss(likelihoods, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_accuracy_and_f1_by_hand():
    predictions = jnp.array([1, 1, 1, 0, 0, 1], jnp.int32)
    labels = jnp.array([1, 0, 1, 1, 0, 1], jnp.int32)
    weights = jnp.array([1, 1, 1, 1, 1, 0], jnp.float32)
    assert float(accuracy(predictions, labels, weights)) == pytest.approx(3 / 5)
    # Two found; three claimed, three there: precision and recall are both two thirds.
    assert float(f1(predictions, labels, weights)) == pytest.approx(2 / 3)
    nothing = jnp.zeros(6, jnp.int32)
    assert float(f1(nothing, nothing, weights)) == 0


@pytest.mark.parametrize("name", ["accuracy", "f1"])
def test_objectives_that_count(name, table):
    batch = one_batch(LONG, SHORT)
    perfect = batch._replace(
        labels=jnp.argmax(scores(Bigrams(table), batch), axis=-1).astype(jnp.int32)
    )
    likelihoods = token_log_likelihoods(Bigrams(table), batch)
    right = 0.0 if name == "accuracy" or perfect.labels.any() else 1.0
    assert float(OBJECTIVES[name].loss(likelihoods, perfect)) == right
    wrong = perfect._replace(labels=1 - perfect.labels)
    assert float(OBJECTIVES[name].loss(likelihoods, wrong)) == 1


def test_a_whole_set_is_judged_as_if_it_were_one_batch(table):
    rng = np.random.default_rng(1)
    examples = [
        EncodedExample(
            tuple(rng.integers(VOCABULARY, size=rng.integers(1, 24)).tolist()),
            ((1,), (2, 3)),
            int(rng.integers(2)),
        )
        for _ in range(11)
    ]
    problem = OptionProblem(*[Batches(examples, 4)] * 3, "classification", 0)
    judge = make_judge(lambda trainable, frozen: Bigrams(trainable), problem)
    found = judge(table, {}, problem.held_out())
    whole = one_batch(*examples)
    likelihoods = token_log_likelihoods(Bigrams(table), whole)
    loss = OBJECTIVES["classification"].loss(likelihoods, whole)
    assert found.loss == pytest.approx(float(loss), rel=1e-5)
    predictions = jnp.argmax(scores(Bigrams(table), whole), axis=-1)
    rate = float(accuracy(predictions, whole.labels, whole.weights))
    assert found.scores["accuracy"] == pytest.approx(rate)
    assert 0 < rate < 1
    assert found.scores["f1"] == pytest.approx(float(f1(predictions, whole.labels, whole.weights)))


def test_offsets_are_taken_away_from_scores(table):
    batch = one_batch(LONG, SHORT)
    model = Bigrams(table)
    problem = OptionProblem(*[Batches([LONG], 1)] * 3, "classification", 0)
    found = scores(model, batch)
    for favoured, offsets in enumerate(((0.0, 100.0), (100.0, 0.0))):
        measured = dataclasses.replace(problem, offsets=offsets).measure(model, batch)
        np.testing.assert_array_equal(measured["predictions"], [favoured, favoured])
    np.testing.assert_array_equal(
        problem.measure(model, batch)["predictions"], jnp.argmax(found, axis=-1)
    )


def test_random_batches_have_one_shape_and_go_through_all_examples():
    examples = [EncodedExample((1,) * (n + 1), ((2,), (3,)), 0) for n in range(20)]
    batches = Batches(examples, 5)
    drawn = [batches.random(3)[number] for number in range(8)]
    assert {batch.tokens.shape for batch in drawn} == {(5, 1, 32)}
    lengths = [sorted((batch.tokens != 0).sum(axis=(1, 2))) for batch in drawn]
    for epoch in (drawn[:4], drawn[4:]):
        seen = np.concatenate([(batch.tokens != 0).sum(axis=(1, 2)) for batch in epoch])
        assert sorted(seen) == list(range(1, 21))
    assert lengths[0] != lengths[4]
    np.testing.assert_array_equal(batches.random(3)[5].tokens, drawn[5].tokens)
    # Nor is an epoch of one seed the one of another.
    others = [batches.random(4)[number].tokens for number in range(8)]
    assert not any(np.array_equal(batch.tokens, other) for batch in drawn for other in others)


def test_an_option_that_an_example_lacks_is_never_chosen(table):
    more = EncodedExample((1, 2), ((3,), (4,), (5,)), 2)
    batch = one_batch(SINGLE, more)
    (fewer, whole), model = [0, 1] if batch.labels[0] == 0 else [1, 0], Bigrams(table)
    found = scores(model, batch)
    assert jnp.isneginf(found[fewer, 2]) and jnp.isfinite(found[whole]).all()
    alone = [by_hand(table, SINGLE.prompt, option) for option in SINGLE.options]
    np.testing.assert_allclose(found[fewer, :2], alone, rtol=1e-5)

    @jax.jit
    @jax.value_and_grad
    def loss(table):
        likelihoods = token_log_likelihoods(Bigrams(table), batch)
        return OBJECTIVES["classification"].loss(likelihoods, batch)

    value, gradient = loss(jnp.asarray(table, jnp.float32))
    alone = [
        np.array([by_hand(table, example.prompt, option) for option in example.options])
        for example in (SINGLE, more)
    ]
    right = [np.log(np.exp(x).sum()) - x[label] for x, label in zip(alone, (0, 2), strict=True)]
    np.testing.assert_allclose(value, np.mean(right), rtol=1e-5)
    assert jnp.isfinite(gradient).all()


def test_encoding_cuts_the_beginning_of_a_prompt(tiny_gguf):
    tokenizer = GGUFModel(tiny_gguf).tokenizer()
    example = Example("one two", (" a", " bcd"), 1)
    whole = encode(example, tokenizer, NO_SPECIAL_TOKENS, 64)
    assert tokenizer.decode(whole.prompt) == "one two"
    assert [tokenizer.decode(option) for option in whole.options] == [" a", " bcd"]
    cut = encode(example, tokenizer, NO_SPECIAL_TOKENS, 6)
    assert tokenizer.decode(cut.prompt) == "two"
    assert cut.length == 6 and cut.options == whole.options
    assert cut.is_cut and not whole.is_cut
    with pytest.raises(UsageError, match="--sequence-length: 3 tokens are too few"):
        encode(example, tokenizer, NO_SPECIAL_TOKENS, 3)
    assert encode(Example("", ("a",), 0), tokenizer, SpecialTokens(5, None), 8).prompt == (5,)


def test_batches_hold_what_they_say():
    batch = Batches([LONG], 1).random(0)[0]
    assert isinstance(batch, OptionBatch)
    np.testing.assert_array_equal(batch.tokens[0, :, :6], [[1, 2, 3, 4, 5, 0], [1, 2, 3, 0, 0, 0]])
    np.testing.assert_array_equal(batch.positions[0], [[2, 3, 4], [2, 0, 0]])
    np.testing.assert_array_equal(batch.targets[0], [[4, 5, 6], [5, 0, 0]])
    np.testing.assert_array_equal(batch.mask[0], [[1, 1, 1], [1, 0, 0]])


def test_accumulated_language_model_loss_is_that_of_the_whole_batch():
    """Options of one and of four tokens: microbatches count by their tokens."""
    objective = OBJECTIVES["language-model"]
    whole = Batches([LONG, SHORT], 2).random(0)[0]
    likelihoods = -jnp.abs(jnp.sin(jnp.arange(whole.mask.size, dtype=jnp.float32)))
    likelihoods = likelihoods.reshape(whole.mask.shape) * whole.mask
    parts = [jax.tree.map(lambda x, i=i: x[i : i + 1], whole) for i in range(2)]
    weights = [objective.weight(part) for part in parts]
    losses = [objective.loss(likelihoods[i : i + 1], part) for i, part in enumerate(parts)]
    total = sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)
    np.testing.assert_allclose(total, objective.loss(likelihoods, whole), rtol=1e-6)
    assert weights[0] != weights[1]
