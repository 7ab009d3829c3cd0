import numpy as np
import pytest

from examples.llm.errors import UsageError
from examples.llm.models.gguf_files import GGUFModel
from examples.llm.tasks.sources import find_source
from examples.llm.tasks.splits import Splits
from examples.llm.text import TokenWindows, load_addresses, texts_of_files, windows_of


@pytest.fixture(scope="module")
def tokenizer(tiny_gguf):
    return GGUFModel(tiny_gguf).tokenizer()


@pytest.fixture(scope="module")
def windows(tokenizer):
    return TokenWindows(["one two three " * 50, "four five six " * 90], tokenizer, 17, seed=3)


def test_batches_depend_on_nothing_but_their_index(windows, tokenizer):
    later = windows.batches(3)[5]
    windows.batches(3)[0]
    np.testing.assert_array_equal(windows.batches(3)[5], later)
    assert later.shape == (3, 17)
    assert later.dtype == np.int32


def test_batches_and_seeds_differ(windows, tokenizer):
    assert not np.array_equal(windows.batches(3)[0], windows.batches(3)[1])
    other = TokenWindows(windows.texts, tokenizer, 17, seed=4)
    assert not np.array_equal(windows.batches(3)[0], other.batches(3)[0])


def test_a_window_is_text_of_one_address(windows, tokenizer):
    for row in windows.batches(20)[0]:
        text = tokenizer.decode(row.tolist())
        assert any(text in whole for whole in windows.texts)


def test_train_and_held_out_addresses_never_overlap():
    train, dev, test = load_addresses()
    assert len(train) > 5 * len(test) > 100 and len(dev) > 20
    assert not (set(train) & set(dev) or set(train) & set(test) or set(dev) & set(test))


def test_the_seed_changes_the_training_windows_only(tokenizer):
    texts = Splits(["one two three " * 50], ["four five six " * 90], ["seven eight " * 70])
    train, *held_out = (w.batches(2)[0] for w in windows_of(tokenizer, texts, 16, seed=0))
    other_train, *others = (w.batches(2)[0] for w in windows_of(tokenizer, texts, 16, seed=1))
    assert not np.array_equal(train, other_train)
    np.testing.assert_array_equal(held_out, others)
    assert train.shape == (2, 17)


def test_texts_shorter_than_a_window_are_refused(tokenizer):
    with pytest.raises(UsageError, match="too short for 16 tokens"):
        TokenWindows(["so short"], tokenizer, 17, seed=0).batches(1)[0]


def texts_in(path, **parts):
    return texts_of_files(find_source(str(path), path.parent, **parts))


def test_the_ends_of_a_file_are_held_out(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(chr(ord("a") + i % 26) for i in range(100)))
    (train,), (dev,), (test,) = texts_in(path)
    assert train + dev + test == path.read_text() and (len(dev), len(test)) == (9, 10)


def test_files_that_are_called_by_their_parts(tmp_path):
    for name in ("train", "valid", "TEST"):
        (tmp_path / f"{name}.TXT").write_text(f"{name} " * 20)
    assert texts_in(tmp_path) == (["train " * 20], ["valid " * 20], ["TEST " * 20])
    (tmp_path / "TEST.TXT").unlink()
    # What is reported is then the development part, and another one is the end of the rest.
    train, dev, test = texts_in(tmp_path)
    assert test == ["valid " * 20] and train[0] + dev[0] == "train " * 20 and len(dev[0]) == 12
    one, other = tmp_path / "train.TXT", tmp_path / "valid.TXT"
    assert texts_in(one, dev=other).dev == ["valid " * 20]
    assert texts_in(one, test=other).test == ["valid " * 20]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "too little text"), (b"a" * 5, "too little text"), (b"\xff" * 100, "is not UTF-8")],
)
def test_files_without_text_are_refused(content, message, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        texts_in(tmp_path / "a.txt")
