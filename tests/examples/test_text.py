import numpy as np
import pytest

from examples.llm.errors import UsageError
from examples.llm.models.gguf_files import GGUFModel
from examples.llm.text import (
    TokenWindows,
    load_addresses,
    parts_of_file,
    train_and_held_out_windows,
)


@pytest.fixture(scope="module")
def tokenizer(tiny_gguf):
    return GGUFModel(tiny_gguf).tokenizer()


@pytest.fixture(scope="module")
def windows(tokenizer):
    return TokenWindows(["one two three " * 50, "four five six " * 90], tokenizer, 17, seed=3)


def test_batches_depend_on_nothing_but_their_index(windows, tokenizer):
    later = windows.batch(5, 3)
    windows.batch(0, 3)
    np.testing.assert_array_equal(windows.batch(5, 3), later)
    assert later.shape == (3, 17)
    assert later.dtype == np.int32


def test_batches_and_seeds_differ(windows, tokenizer):
    assert not np.array_equal(windows.batch(0, 3), windows.batch(1, 3))
    other = TokenWindows(windows.texts, tokenizer, 17, seed=4)
    assert not np.array_equal(windows.batch(0, 3), other.batch(0, 3))


def test_a_window_is_text_of_one_address(windows, tokenizer):
    for row in windows.batch(0, 20):
        text = tokenizer.decode(row.tolist())
        assert any(text in whole for whole in windows.texts)


def test_train_and_held_out_addresses_never_overlap():
    train, held_out = load_addresses()
    assert len(train) > 5 * len(held_out) > 100
    assert not set(train) & set(held_out)


def test_the_seed_changes_the_training_windows_only(tokenizer):
    texts = (["one two three " * 50], ["four five six " * 90])
    train, held_out = train_and_held_out_windows(tokenizer, *texts, 16, seed=0)
    other_train, other_held_out = train_and_held_out_windows(tokenizer, *texts, 16, seed=1)
    assert not np.array_equal(train.batch(0, 2), other_train.batch(0, 2))
    np.testing.assert_array_equal(held_out.batch(0, 2), other_held_out.batch(0, 2))
    assert train.batch(0, 2).shape == (2, 17)


def test_texts_shorter_than_a_window_are_refused(tokenizer):
    with pytest.raises(UsageError, match="too short for 16 tokens"):
        TokenWindows(["so short"], tokenizer, 17, seed=0).batch(0, 1)


def test_the_last_tenth_of_a_file_is_held_out(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(chr(ord("a") + i % 26) for i in range(100)))
    (train,), (held_out,) = parts_of_file(path)
    assert train + held_out == path.read_text() and len(held_out) == 10


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "too little text"), (b"a" * 5, "too little text"), (b"\xff" * 100, "is not UTF-8")],
)
def test_files_without_text_are_refused(content, message, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        parts_of_file(tmp_path / "a.txt")
