"""Answers in a model's own words: how they are judged, and learning to write them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.llm.errors import UsageError
from examples.llm.models.gguf_files import GGUFModel
from examples.llm.models.tokenizer import SpecialTokens
from examples.llm.program.settings import DEFAULTS
from examples.llm.tasks import answers
from examples.llm.tasks.example import Example
from examples.llm.tasks.questions import encode_question
from examples.llm.training.judging import make_judge
from examples.llm.training.problems import build_judges, build_problem
from optax_lowbit import zo


@pytest.mark.parametrize(
    ("written", "right", "exact", "f1"),
    [
        # Worked out by hand from the definition: words of lower case, no articles, no punctuation.
        ("The Eiffel-Tower!", ["eiffeltower"], 1, 1),
        ("in the Paris of Texas", ["Paris", "Paris, Texas"], 0, 2 * (2 / 4) * 1 / (2 / 4 + 1)),
        ("a big big dog", ["big dog"], 0, 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("dog big", ["big dog"], 0, 1),
        ("cat", ["dog"], 0, 0),
        ("", ["dog"], 0, 0),
        ("the", ["an"], 1, 1),  # of either nothing is left
        ("Unanswerable.", ["unanswerable"], 1, 1),
        ("it is unanswerable", ["unanswerable"], 0, 0),
        ("unanswerable", ["Paris"], 0, 0),
    ],
)
def test_scores_of_squad(written, right, exact, f1, tmp_path):
    found = answers.SQUAD.judged(f" {written}\nQuestion: more", right)
    assert found == {"exact match": exact, "f1": pytest.approx(f1)}


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("16 - 3 = <<16-3=13>>13\n#### 26", True),
        ("#### $26.00\nQuestion: 3", True),
        ("#### 26\n\nQuestion: 1 + 2?\nAnswer: #### 3", True),
        ("#### 3\n\nQuestion: 13 * 2?\nAnswer: #### 26", False),
        ("#### 1,026", False),
        ("so 16-26", True),
        ("It makes 26.", True),
        ("It makes -26", False),
        ("#### 27, not 26", False),
        ("no number", False),
    ],
)
def test_final_numbers(written, right):
    assert answers.GSM8K.judged(written, ["13 * 2 = 26\n#### 26"]) == {"exact match": right}
    assert answers.final_number("#### 1,234.50 rest") == pytest.approx(1234.5)


def test_free_text_is_the_same_but_for_space():
    assert answers.FREE_TEXT.judged(" ] ) }\nQ:", ["] ) }"]) == {"exact match": 1}
    assert answers.FREE_TEXT.judged("] ) ]", ["] ) }"]) == {"exact match": 0}


@pytest.fixture(scope="module")
def tokenizer(tiny_gguf):
    return GGUFModel(tiny_gguf).tokenizer()


def test_a_prompt_leaves_room_for_an_answer(tokenizer):
    example = Example("abcdef", ("xy",), answers=("xy",))
    special = SpecialTokens(1, 2)
    question = encode_question(example, tokenizer, special, max_length=8, count=4)
    assert question.prompt[0] == 1 and tokenizer.decode(question.prompt[1:]) == "def"
    assert sum(question.text.is_target) == 3 and question.text.tokens[-1] == 2
    assert encode_question(
        Example("", ("xy",)), tokenizer, SpecialTokens(None, 2), 8, 4
    ).prompt == (0,)


@pytest.fixture(scope="module")
def problem(tiny_gguf, tmp_path_factory):
    """Builds one in which the answer to a letter is the next one."""
    folder = tmp_path_factory.mktemp("squad")
    for part, letters in (("train", "bcdefghi"), ("dev", "jklmn"), ("test", "opqrs")):
        rows = [
            {
                "context": part[-1] * n,
                "question": x,
                "answers": {"text": [chr(ord(x) + 1), f"z {x}"]},
            }
            for n, x in enumerate(letters, 1)
        ]
        (folder / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stored = GGUFModel(tiny_gguf)
    settings = dataclasses.replace(
        DEFAULTS, task=str(folder), template=False, sequence_length=32, batch_size=4, accumulate=2
    )
    return lambda **changes: build_problem(
        dataclasses.replace(settings, **changes), stored.tokenizer(), SpecialTokens(None, None)
    )


@pytest.fixture(scope="module")
def follower(tokenizer):
    """A model of `x y`, where `y` is the letter that is so much further on than `x`."""
    space, line_feed = tokenizer.encode(" ").ids + tokenizer.encode("\n").ids

    def following(features, further):
        last, second, third = jnp.moveaxis(features, -1, 0)
        is_answer = (second == space) & (third == last - further)
        after_letter = jnp.where(is_answer, line_feed, space)
        return jnp.where(last == space, second + further, after_letter)

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Follower:
        further: jax.Array

        def features(self, tokens, segments=None, /):
            """The last three tokens."""
            before = [jnp.pad(tokens, ((0, 0), (n, 0)))[:, : tokens.shape[1]] for n in (0, 1, 2)]
            return jnp.stack(before, axis=-1)

        def logits(self, features, /):
            further = jnp.round(self.further).astype(jnp.int32)
            return 9 * jax.nn.one_hot(following(features, further), 264)

        def remember(self, tokens, segments, /, *, room):
            last = jnp.sum(segments, axis=1)[:, None, None] - 1
            features = self.features(tokens)
            return features, jnp.take_along_axis(features, last, axis=1)

        def extend(self, tokens, cache, /):
            features = jnp.concatenate([tokens[:, :, None], cache[..., :2]], axis=-1)
            return features, features

    return Follower


def test_models_are_judged_by_what_they_write(problem, follower):
    built = problem()
    judge = make_judge(lambda trainable, frozen: follower(trainable), built)
    found = {
        (further, part): judge(jnp.float32(further), {}, built.held_out(part))
        for further in (1, 2)
        for part in ("dev", "test")
    }
    for part in ("dev", "test"):
        assert found[1, part].scores == {"exact match": 1, "f1": 1}
        assert found[2, part].scores["exact match"] == 0
        # All of " l\n" is likely.
        np.testing.assert_allclose(found[1, part].loss, np.log(1 + 263 * np.exp(-9)), rtol=1e-4)
    # Two further on is what comes after the right letter: f1 is 0, but for "z p" after "o".
    assert found[2, "test"].scores["f1"] == 0
    assert found[2, "dev"].loss > 5


def test_answers_are_learnt_token_by_token(problem, follower):
    built = problem()
    batches = [built.batches[number] for number in range(6)]
    for one, other in zip(batches[::2], batches[1::2], strict=True):
        assert one.tokens.shape == other.tokens.shape
    assert (batches[0].weights.sum(-1) == 3).all() and built.weight(batches[0]) == 12
    loss = built.loss(follower(jnp.float32(1)), jax.tree.map(jnp.asarray, batches[0]))
    np.testing.assert_allclose(loss, np.log(1 + 263 * np.exp(-9)), rtol=1e-4)


@pytest.mark.parametrize("objective", ["f1", "accuracy"])
def test_scores_are_an_objective_without_a_gradient(objective, problem, follower):
    built = problem(objective=objective)
    batches = [jax.tree.map(jnp.asarray, built.batches[number]) for number in range(2)]
    assert [x.shape for x in jax.tree.leaves(batches[0])] == [
        x.shape for x in jax.tree.leaves(batches[1])
    ]

    @jax.jit
    def loss(further, batch):
        return built.loss(follower(further), batch)

    assert loss(jnp.float32(1), batches[0]) == 0 and loss(jnp.float32(2), batches[0]) == 1
    # From 1.4 a probe falls on either side of where rounding changes.
    optimizer = zo.zo_sgd(1e-3, eps=0.3)
    _, _, info = jax.jit(lambda x, batch: optimizer.step(loss, x, optimizer.init(x, 0), batch))(
        jnp.float32(1.4), batches[1]
    )
    assert info.loss in (0, 0.5, 1)


def test_objectives_that_answers_do_not_have_are_refused(problem):
    with pytest.raises(UsageError, match="--objective: squad is answered freely"):
        problem(objective="classification")


def test_other_tasks_that_are_answered_judge_too(tiny_gguf, tmp_path):
    rows = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(5)]
    (tmp_path / "math.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = dataclasses.replace(DEFAULTS, judge=(str(tmp_path / "math.jsonl"),))
    tokenizer = GGUFModel(tiny_gguf).tokenizer()
    (judge,) = build_judges(settings, tokenizer, SpecialTokens(None, None), 64).values()
    batches = [*judge.held_out()]
    assert sorted(np.concatenate([batch.numbers for batch in batches]).tolist()) == [-1, *range(5)]
    # As if the model had written the question's number, and then the end of a thought.
    written = tokenizer.encode("so 4 is").ids
    measured = [
        {
            "loss": 1.0,
            "tokens": 2.0,
            "written": np.tile(np.array(written, np.int32), (len(batch.numbers), 1)),
            "numbers": batch.numbers,
        }
        for batch in batches
    ]
    assert judge.evaluation(measured) == (0.5, {"exact match": 0.2})
