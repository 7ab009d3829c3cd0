"""Batches of texts of like length, in few shapes."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from examples.llm.instructions.encoding import EncodedText
from examples.llm.sampling import of_like_length

# Lengths are rounded up to a multiple of this but for the longest, and are at most so many: each
# compiles.
_LENGTH_STEP = 16
_LENGTHS = 4

# NumPy's where a batch is made, JAX's where it is traced.
Array = Any


class PairBatch(NamedTuple):
    """Texts, padded; nothing depends on the padding.

    Attributes:
      tokens: int32 `(batch, length + 1)`.
      weights: float32 `(batch, length)`: 1 where the token after is to be predicted.
      segments: int32 `(batch, length)`: to which text of its row a token belongs, counted from 1,
        and 0 for padding. None where each row is a text.
    """

    tokens: Array
    weights: Array
    segments: Array = None


class PairBatches:
    """Batches of a set of texts."""

    def __init__(
        self,
        texts: Sequence[EncodedText],
        size: int,
        *,
        alike: int = 1,
        seed: int = 0,
        train_on_source: bool = False,
    ):
        """Makes batches of `size` texts.

        Args:
          texts: what they are made of.
          size: texts in a batch.
          alike: so many batches in a row have one shape.
          seed: chooses their order.
          train_on_source: whether the tokens of the sources are to be predicted too.
        """
        self._texts, self._size, self._on_source = texts, size, train_on_source
        self._lengths = np.array([len(text.tokens) - 1 for text in texts])
        self._groups = of_like_length(self._lengths, size, seed, alike=alike)

    @property
    def random(self) -> grain.MapDataset:
        """An endless sequence of `PairBatch`es."""
        return self._groups.map(lambda group: self._padded(group.texts, group.alike))

    def all(self) -> Iterator[PairBatch]:
        """All texts once, those of like length together."""
        for chosen in in_order(self._lengths, self._size):
            yield self._padded(chosen, chosen)

    def _padded(self, chosen: np.ndarray, alike: np.ndarray) -> PairBatch:
        rows, length = [[self._texts[number]] for number in chosen], room(self._lengths, alike)
        return batch_of(rows, self._size, length, on_source=self._on_source)


def in_order(lengths: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """The numbers of all texts, in groups of like length; the last may be smaller than `size`."""
    order = np.argsort(lengths, kind="stable")
    return (order[start : start + size] for start in range(0, len(order), size))


def room(lengths: np.ndarray, chosen: np.ndarray) -> int:
    """The length that chosen texts are padded to: one of few, since each compiles."""
    longest = int(lengths.max())
    step = -(-longest // (_LENGTHS * _LENGTH_STEP)) * _LENGTH_STEP
    return min(-(-int(lengths[chosen].max()) // step) * step, longest)


def batch_of(
    rows: Sequence[Sequence[EncodedText]],
    size: int,
    length: int,
    *,
    on_source: bool = False,
    packed: bool = False,
) -> PairBatch:
    """A batch of texts, which is filled up with empty rows.

    Args:
      rows: at most `size`; texts that follow each other.
      size: of the batch.
      length: tokens that the model reads; a row has at most one more.
      on_source: whether the tokens of the sources are to be predicted too.
      packed: whether rows are of several texts, which `segments` then tell apart.
    """
    tokens = np.zeros((size, length + 1), np.int32)
    weights = np.zeros((size, length), np.float32)
    segments = np.zeros((size, length), np.int32)
    for row, texts in enumerate(rows):
        start = 0
        for number, text in enumerate(texts, 1):
            end = start + len(text.tokens)
            tokens[row, start:end] = text.tokens
            segments[row, start:end] = number
            # What comes after the last token is of another text.
            weights[row, start : end - 1] = on_source or text.is_target[1:]
            start = end
    return PairBatch(tokens, weights, segments if packed else None)
