"""Several texts in a window: none sees another, and the loss is that of each by itself."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.llm.errors import UsageError
from examples.llm.instructions.batches import PairBatches
from examples.llm.instructions.encoding import EncodedText
from examples.llm.instructions.packing import PackedBatches, packed
from examples.llm.instructions.problem import InstructionProblem
from examples.llm.models.building import abstract_model
from examples.llm.models.gguf_files import GGUFModel
from examples.llm.models.tiny import TINY
from examples.llm.models.tokenizer import SpecialTokens
from examples.llm.program.settings import DEFAULTS
from examples.llm.text import pieces_of
from examples.llm.training.problems import build_problem
from examples.llm.training.tuning import tuned


def test_windows_hold_every_text_once_and_no_more_than_they_can():
    lengths = np.random.default_rng(0).integers(2, 33, 500).tolist()
    windows = packed(lengths, 64)
    assert sorted(text for window in windows for text in window) == list(range(500))
    filled = [sum(lengths[text] for text in window) for window in windows]
    assert max(filled) <= 64
    # Not more windows than there must be, but for a few.
    assert len(windows) <= 1.02 * sum(lengths) / 64 + 1
    assert packed([3, 5, 2, 4], 7) == [[1, 2], [3, 0]]


def texts(count, generator):
    lengths = generator.integers(2, 20, count)
    return [
        EncodedText(
            tuple(generator.integers(8, TINY.vocabulary_size, n).tolist()),
            tuple((generator.random(n) < 0.6).tolist()),
        )
        for n in lengths
    ]


@pytest.mark.parametrize("scheme", ["full", "prompt"])
def test_loss_and_gradient_of_windows_are_those_of_their_texts(scheme, tiny_gguf, rng):
    graph, _ = abstract_model(TINY)
    found = tuned(scheme, graph, GGUFModel(tiny_gguf).parameters(), 0)
    made = texts(6, rng)
    whole, single = PackedBatches(made, 3, 31), PairBatches(made, 6)
    problem = InstructionProblem(whole, whole, whole)

    @jax.jit
    def loss_and_gradient(trainable, batch):
        def loss(trainable):
            return problem.loss(found.model(trainable, found.frozen), batch)

        return jax.value_and_grad(loss)(trainable)

    batch, alone = (next(iter(batches.all())) for batches in (whole, single))
    assert batch.segments.max() > 1 and batch.tokens.shape == (3, 32) and alone.segments is None
    assert batch.weights.sum() == alone.weights.sum()
    loss, gradient = loss_and_gradient(found.trainable, jax.tree.map(jnp.asarray, batch))
    expected = loss_and_gradient(found.trainable, jax.tree.map(jnp.asarray, alone))
    # Sums of float32 in another order.
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-6), gradient, expected[1]
    )
    if scheme == "full":  # if texts see those before them it is another
        blind, _ = loss_and_gradient(found.trainable, batch._replace(segments=None))
        assert abs(blind - loss) > 1e-3


def test_windows_come_in_a_new_order_each_epoch(rng):
    made = [EncodedText((n, n, n), (True,) * 3) for n in range(1, 33)]
    batches = PackedBatches(made, 2, 11, seed=1).random  # eight windows of four
    epochs = [np.concatenate([batches[4 * e + n].tokens for n in range(4)]) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch.reshape(-1).tolist()) == sorted(3 * [*range(1, 33)])
    assert not np.array_equal(epochs[0], epochs[1])
    np.testing.assert_array_equal(
        PackedBatches(made, 2, 11, seed=1).random[7].tokens, batches[7].tokens
    )


@pytest.fixture(scope="module")
def build(tiny_gguf):
    stored = GGUFModel(tiny_gguf)
    settings = dataclasses.replace(
        DEFAULTS, pack=True, sequence_length=32, batch_size=2, accumulate=2
    )
    return lambda task, **changes: build_problem(
        dataclasses.replace(settings, task=str(task), **changes), stored.tokenizer(),
        SpecialTokens(1, 2),
    )  # fmt: skip


def test_pieces_of_a_text_predict_each_token_once(tiny_gguf):
    tokenizer = GGUFModel(tiny_gguf).tokenizer()
    pieces = pieces_of(["abcdefghij", "k"], tokenizer, SpecialTokens(1, 2), 4)
    letters = {1: "<", 2: ">"}
    shown = ["".join(letters.get(t) or tokenizer.decode([t]) for t in p.tokens) for p in pieces]
    assert shown == ["<abcd", "defgh", "hij>", "<k>"]
    assert all(all(piece.is_target) for piece in pieces)


def test_text_instructions_and_answers_are_packed(build, tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {n}\n" for n in range(100)))
    rows = [{"input": f"{n}?", "output": "yes"} for n in range(40)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    rows = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(40)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("a.txt", "a.json", "b.jsonl"):
        problem = build(tmp_path / name)
        batch = problem.batches[3]
        assert batch.tokens.shape == (2, 33) and batch.segments.shape == (2, 32)
        assert batch.weights.sum() > 0 and len([*problem.held_out("dev")])


def test_what_is_not_packed_is_refused(build, tmp_path):
    (tmp_path / "a.tsv").write_text("ham\tx\n" * 9)
    with pytest.raises(UsageError, match=r"--pack: .*a\.tsv is a choice of options, which"):
        build(tmp_path / "a.tsv")
    rows = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(40)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UsageError, match="--pack: exact match is of answers"):
        build(tmp_path / "b.jsonl", objective="accuracy")
