"""Tasks with options for encoders, by models that stand in for them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from examples.llm.errors import UsageError
from examples.llm.models.gguf_files import GGUFModel
from examples.llm.models.tokenizer import SpecialTokens
from examples.llm.program.settings import DEFAULTS
from examples.llm.training.judging import make_judge
from examples.llm.training.problems import build_problem

BEGIN, END, MASK, UNKNOWN, NO, YES = range(6)
WORDS = ["<s>", "</s>", "<mask>", "<unk>", "No", "Yes", "good", "bad", "It", "was", "terrible",
         "great", ".", "?", ","]  # fmt: skip
SPECIAL = SpecialTokens(BEGIN, END, pad=END, mask=MASK)


@pytest.fixture(scope="module")
def tokenizer():
    """Puts tokens around a text, as RoBERTa's."""
    built = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, "<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    built.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BEGIN), ("</s>", END)]
    )
    return built


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """Those that begin with `good` are positive; of unlike lengths."""
    path = tmp_path_factory.mktemp("data") / "train.tsv"
    rows = [f"{('bad', 'good')[n % 2]} {'x ' * (n % 5)}{n}\t{n % 2}" for n in range(40)]
    path.write_text("sentence\tlabel\n" + "\n".join(rows))
    return path


@pytest.fixture(scope="module")
def build(tokenizer, reviews):
    settings = dataclasses.replace(
        DEFAULTS, task=str(reviews), sequence_length=16, batch_size=3, eval_examples=8
    )
    return lambda head, special=SPECIAL, **changes: build_problem(
        dataclasses.replace(settings, **changes), tokenizer, special, head
    )


class Reader:
    """Tells a text by its first word."""

    def __init__(self, weight):
        self.weight = weight

    def features(self, tokens, mask, /):
        """`(batch, length, 2)`: whether the first word is good, and the own token."""
        first = jnp.where(tokens[:, 1] == WORDS.index("good"), 1.0, -1.0)
        assert mask.shape == tokens.shape
        first = jnp.broadcast_to(first[:, None], tokens.shape)
        return jnp.stack([first, tokens.astype(jnp.float32)], axis=-1)

    def logits(self, features, /):
        """`great` or `terrible` where the mask is, a constant elsewhere."""
        good = jax.nn.one_hot(WORDS.index("great"), len(WORDS))
        bad = jax.nn.one_hot(WORDS.index("terrible"), len(WORDS))
        is_mask = (features[..., 1:] == MASK).astype(jnp.float32)
        one_or_other = jnp.expand_dims(good - bad, tuple(range(features.ndim - 1)))
        return self.weight * is_mask * features[..., :1] * one_or_other

    def class_logits(self, tokens, mask, /):
        """Negative and positive."""
        first = self.features(tokens, mask)[:, 0, :1]
        return self.weight * jnp.concatenate([-first, first], axis=-1) / 2


def test_a_mask_is_filled_with_the_words_of_the_task(build, tokenizer):
    problem = build("masked-lm")
    batch = next(iter(problem.held_out()))
    (row, *_), (seen, *_) = batch.tokens[:, 0], batch.seen[:, 0]
    text = tokenizer.decode(row[seen > 0].tolist(), skip_special_tokens=False).split()
    assert (text[0], text[-5:]) == ("<s>", ["It", "was", "<mask>", ".", "</s>"])
    assert row[batch.positions[0, 0, 0]] == MASK
    words = [WORDS.index("terrible"), WORDS.index("great")]
    np.testing.assert_array_equal(batch.targets[0, :, 0], words)

    judge = make_judge(lambda trainable, frozen: Reader(trainable), problem)
    evaluation = judge(jnp.float32(4), {}, problem.held_out())
    assert evaluation.scores["accuracy"] == 1
    # Among the two words: of the whole vocabulary's softmax the rest cancels out.
    np.testing.assert_allclose(evaluation.loss, np.log(1 + np.exp(-8)), rtol=1e-4)
    assert judge(jnp.float32(-4), {}, problem.held_out("dev")).scores["accuracy"] == 0


def test_padding_is_told_to_the_model(build):
    for head in ("masked-lm", "classes"):
        problem = build(head)
        batch = problem.batches[0]
        lengths = batch.seen[:, 0].sum(-1)
        assert len(set(lengths.tolist())) > 1
        assert (batch.tokens[:, 0] * (1 - batch.seen[:, 0]) == 0).all()
        # The end comes last of what is seen.
        assert (batch.tokens[np.arange(3), 0, lengths - 1] == END).all()


def test_a_layer_tells_the_class(build):
    problem = build("classes")
    batch = jax.tree.map(jnp.asarray, problem.batches[0])
    assert problem.test.num_options == 2
    judge = make_judge(lambda trainable, frozen: Reader(trainable), problem)
    evaluation = judge(jnp.float32(3), {}, problem.held_out())
    assert evaluation.scores == {"accuracy": 1, "f1": 1}
    np.testing.assert_allclose(evaluation.loss, np.log(1 + np.exp(-3)), rtol=1e-4)
    loss, gradient = jax.value_and_grad(lambda weight: problem.loss(Reader(weight), batch))(
        jnp.float32(3)
    )
    np.testing.assert_allclose(loss, np.log(1 + np.exp(-3)), rtol=1e-4)
    np.testing.assert_allclose(gradient, -1 / (1 + np.exp(3)), rtol=1e-4)


def test_long_texts_lose_their_beginning(build):
    for head, length in (("masked-lm", 7), ("classes", 5)):
        problem = build(head, sequence_length=length)
        tokens = np.concatenate([batch.tokens[:, 0] for batch in problem.held_out()])
        seen = np.concatenate([batch.seen[:, 0] for batch in problem.held_out()])
        assert seen.sum(-1).max() == length and (tokens[:, 0] == BEGIN).all()
        assert any(example.is_cut for example in problem.test.examples)
        assert not any(example.is_cut for example in build(head).test.examples)


def rte(folder):
    rows = [
        {"premise": f"It was good {n}.", "hypothesis": "It was", "label": label}
        for n, label in enumerate(["entailment", "not_entailment"] * 8)
    ]
    path = folder / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_a_mask_between_two_sentences(build, tokenizer, tmp_path):
    problem = build("masked-lm", task=rte(tmp_path))
    batch = next(iter(problem.held_out()))
    text = tokenizer.decode(batch.tokens[0, 0].tolist(), skip_special_tokens=False)
    assert text.startswith("<s> It was good <unk> ? <mask> , <unk> was </s>")  # it, not It
    np.testing.assert_array_equal(batch.targets[0, :, 0], [YES, NO])


@pytest.mark.parametrize(
    ("head", "row", "changes", "message"),
    [
        ("masked-lm", {"passage": "p", "question": "q", "label": True}, {}, "boolq has no wording"),
        ("classes", {"premise": "p", "choice1": "a", "choice2": "b", "question": "cause",
                     "label": 0}, {}, "copa has other options in each example"),
        ("classes", {"question": "q", "answer": "#### 1"}, {}, "has no options, which an encoder"),
        ("masked-lm", {"instruction": "i", "output": "o"}, {}, "has no options, which an encoder"),
        ("masked-lm", {"sentence": "s", "label": 0}, {"template": False}, "--no-template: a mask"),
        ("masked-lm", {"sentence": "s", "label": 0}, {"sequence_length": 3}, "must hold one mask"),
        ("masked-lm", {"sentence": "s", "label": 0}, {"special": SpecialTokens(0, 1)}, "no mask"),
    ],
)  # fmt: skip
def test_what_encoders_do_not_learn_is_refused(head, row, changes, message, build, tmp_path):
    path = tmp_path / "a.jsonl"
    field = next(iter(row))
    rows = [row | {field: f"{row[field]} {n}"} for n in range(9)]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UsageError, match=message):
        build(head, task=str(path), **changes)


def test_words_of_several_tokens_fill_no_mask(reviews, tiny_gguf):
    single_bytes = GGUFModel(tiny_gguf).tokenizer()
    settings = dataclasses.replace(DEFAULTS, task=str(reviews), sequence_length=32)
    with pytest.raises(UsageError, match="' terrible' is 9 tokens of the model, must be one"):
        build_problem(settings, single_bytes, SPECIAL, "masked-lm")


def test_texts_are_not_for_encoders(build, tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    with pytest.raises(UsageError, match="is text, and an encoder learns from options"):
        build("classes", task=str(tmp_path / "a.txt"))
