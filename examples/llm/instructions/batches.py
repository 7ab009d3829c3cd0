"""Batches of texts of like length, in few shapes."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from examples.llm.instructions.encoding import EncodedPair

# Lengths are rounded up to a multiple of this, and are at most so many: each compiles.
_LENGTH_STEP = 16
_LENGTHS = 4
# Of so many groups the texts are put in order of length, as in Hugging Face's trainer.
_GROUPS_IN_ORDER = 50

# NumPy's where a batch is made, JAX's where it is traced.
Array = Any


class PairBatch(NamedTuple):
    """Texts, padded; nothing depends on the padding.

    Attributes:
      tokens: int32 `(batch, length + 1)`.
      weights: float32 `(batch, length)`: 1 where the token after is to be predicted.
    """

    tokens: Array
    weights: Array


class LengthGroups:
    """An endless, numbered sequence of groups of texts of like length, in random order.

    In an epoch no text is in two groups; those left over, fewer than a group, are others in every
    epoch. Hugging Face's `group_by_length` leaves groups in the order of their lengths; here they
    are shuffled, so that losses do not swing with the length.
    """

    def __init__(self, lengths: np.ndarray, size: int, seed: int):
        """Groups `size` texts of these lengths, as `seed` chooses."""
        self._lengths, self._size, self._seed = lengths, size, seed
        self._groups = lru_cache(maxsize=2)(self._new_groups)

    def __getitem__(self, number: int) -> np.ndarray:
        """The texts of a group; it depends on nothing but its number."""
        in_epoch = max(len(self._lengths) // self._size, 1)
        return self._groups(number // in_epoch)[number % in_epoch]

    def _new_groups(self, epoch: int) -> np.ndarray:
        """`(groups, size)`, the order of an epoch."""
        generator = np.random.default_rng([self._seed, epoch])
        order = generator.permutation(len(self._lengths))
        whole = max(len(order) // self._size, 1) * self._size
        order = np.resize(order, whole)  # a set smaller than a group is repeated in it
        stretch = self._size * _GROUPS_IN_ORDER
        for start in range(0, whole, stretch):
            part = order[start : start + stretch]
            order[start : start + stretch] = part[np.argsort(self._lengths[part], kind="stable")]
        return generator.permutation(order.reshape(-1, self._size))


class PairBatches:
    """Batches of a set of texts."""

    def __init__(
        self,
        pairs: Sequence[EncodedPair],
        size: int,
        *,
        alike: int = 1,
        seed: int = 0,
        train_on_source: bool = False,
    ):
        """Makes batches of `size` texts.

        Args:
          pairs: the texts.
          size: texts in a batch.
          alike: so many batches in a row have one shape.
          seed: chooses their order.
          train_on_source: whether the tokens of the sources are to be predicted too.
        """
        self._pairs, self._size, self._alike = pairs, size, alike
        self._on_source = train_on_source
        self._lengths = np.array([len(pair.tokens) - 1 for pair in pairs])
        self._step = -(-int(self._lengths.max()) // (_LENGTHS * _LENGTH_STEP)) * _LENGTH_STEP
        self._groups = LengthGroups(self._lengths, size * alike, seed)

    def random(self, number: int) -> PairBatch:
        """Batch `number` of an endless sequence."""
        group = self._groups[number // self._alike]
        start = number % self._alike * self._size
        return self._padded(group[start : start + self._size], self._lengths[group].max())

    def all(self) -> Iterator[PairBatch]:
        """All texts once, those of like length together."""
        order = np.argsort(self._lengths, kind="stable")
        for start in range(0, len(order), self._size):
            chosen = order[start : start + self._size]
            yield self._padded(chosen, self._lengths[chosen].max())

    def _padded(self, chosen: np.ndarray, length: int) -> PairBatch:
        length = -(-int(length) // self._step) * self._step
        tokens = np.zeros((self._size, length + 1), np.int32)
        weights = np.zeros((self._size, length), np.float32)
        for row, index in enumerate(chosen.tolist()):
            pair = self._pairs[index]
            tokens[row, : len(pair.tokens)] = pair.tokens
            first = 0 if self._on_source else max(pair.source_length - 1, 0)
            weights[row, first : len(pair.tokens) - 1] = 1
        return PairBatch(tokens, weights)
