"""What to learn from next: endless, numbered sequences, by grain.

Element `i` follows from the seed and `i` alone, so that a run that goes on after a stop needs to
know nothing but the number of its next step.
"""

import sys
from functools import lru_cache
from typing import NamedTuple

import grain
import numpy as np

# Of so many groups the texts are put in order of length, as in Hugging Face's trainer.
_GROUPS_IN_ORDER = 50


def shuffled(count: int, size: int, seed: int) -> grain.MapDataset:
    """Groups of `size` of the numbers below `count`, int arrays.

    Every number is in one group before any is in another: an epoch is a new order.
    """
    return in_batches(grain.MapDataset.range(count).seed(seed).shuffle().repeat(), size)


def in_batches(endless: grain.MapDataset, size: int) -> grain.MapDataset:
    """So many elements at a time, stacked, of a sequence that never ends."""
    # With a remainder grain counts batches in floats, and those of one element are more than fit.
    return endless.batch(size, drop_remainder=True)


class Chosen(NamedTuple):
    """What a batch is made of.

    Attributes:
      texts: int `(size,)`: their numbers.
      alike: those of all batches that are to have the same shape, among them this one.
    """

    texts: np.ndarray
    alike: np.ndarray


def of_like_length(
    lengths: np.ndarray, size: int, seed: int, *, alike: int = 1
) -> grain.MapDataset:
    """Groups of `size` texts of like length, in random order: `Chosen`s.

    In an epoch no text is in two groups; those left over, fewer than a group, are others in every
    epoch. Hugging Face's `group_by_length` leaves groups in the order of their lengths; here they
    are shuffled, so that losses do not swing with the length.

    Args:
      lengths: of the texts.
      size: texts in a group.
      seed: chooses their order.
      alike: so many groups in a row are of like length, too, and are to have one shape.
    """
    count, wide = len(lengths), size * alike
    epoch = grain.MapDataset.range(max(count, wide))  # a set smaller than a group is repeated in it
    epoch = epoch.map(lambda number: number % count).seed(seed).shuffle()
    groups = _LengthGroups(epoch[: len(epoch) // wide * wide], lengths, wide).shuffle().repeat()

    def chosen(number: int) -> Chosen:
        group, place = np.asarray(groups[number // alike]), number % alike * size
        return Chosen(group[place : place + size], group)

    return grain.MapDataset.range(sys.maxsize).map(chosen)


class _LengthGroups(grain.MapDataset):
    """Stretches of shuffled texts, put in order of length and cut into groups."""

    def __init__(self, texts: grain.MapDataset, lengths: np.ndarray, size: int):
        super().__init__(texts)
        self._texts, self._lengths, self._size = texts, lengths, size
        stretches = -(-len(self) // _GROUPS_IN_ORDER)
        self._stretch = lru_cache(maxsize=2 * stretches)(self._sorted)

    def __len__(self) -> int:
        return len(self._texts) // self._size

    def __str__(self) -> str:
        return f"LengthGroups(size={self._size})"

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, len(self))
        stretch, place = divmod(place, _GROUPS_IN_ORDER)
        return self._stretch(epoch, stretch)[place]

    def _sorted(self, epoch: int, stretch: int) -> np.ndarray:
        """`(groups, size)`; numbers beyond an epoch are grain's for those of the next."""
        first = stretch * _GROUPS_IN_ORDER * self._size
        last = min(first + _GROUPS_IN_ORDER * self._size, len(self._texts))
        start = epoch * len(self._texts)
        texts = np.array([self._texts[start + place] for place in range(first, last)])
        order = np.argsort(self._lengths[texts], kind="stable")
        return texts[order].reshape(-1, self._size)
