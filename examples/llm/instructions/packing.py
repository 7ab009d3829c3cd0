"""Windows of several texts, none of which sees another."""

import bisect
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from examples.llm.instructions.batches import PairBatch, batch_of
from examples.llm.instructions.encoding import EncodedText
from examples.llm.sampling import shuffled


class PackedBatches:
    """Batches of windows in which as many texts follow each other as there is room for.

    The texts of a window are the same in every epoch. grain can pack as it goes, but then what is
    in a batch no longer follows from its number.
    """

    def __init__(
        self,
        texts: Sequence[EncodedText],
        size: int,
        length: int,
        *,
        seed: int = 0,
        train_on_source: bool = False,
    ):
        """Makes batches of `size` windows.

        Args:
          texts: each of at most `length + 1` tokens.
          size: windows in a batch.
          length: tokens of a window that the model reads.
          seed: chooses their order.
          train_on_source: whether the tokens of the sources are to be predicted too.
        """
        self._texts, self._size, self._length = texts, size, length
        self._on_source = train_on_source
        self._windows = packed([len(text.tokens) for text in texts], length + 1)
        self._groups = shuffled(len(self._windows), size, seed)

    @property
    def random(self) -> grain.MapDataset:
        """An endless sequence of `PairBatch`es."""
        return self._groups.map(self._batch)

    def all(self) -> Iterator[PairBatch]:
        """All windows once."""
        for start in range(0, len(self._windows), self._size):
            yield self._batch(range(len(self._windows))[start : start + self._size])

    def _batch(self, windows: Sequence[int] | np.ndarray) -> PairBatch:
        rows = [[self._texts[number] for number in self._windows[window]] for window in windows]
        return batch_of(rows, self._size, self._length, on_source=self._on_source, packed=True)


def packed(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put texts together, the longest first, each where it leaves the least room.

    Args:
      lengths: of the texts, none above `capacity`.
      capacity: of a window.

    Returns:
      The numbers of the texts of each window.
    """
    windows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left in a window, and its number, in order
    for text in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        place = bisect.bisect_left(room, (lengths[text], 0))
        if place < len(room):
            left, window = room.pop(place)
        else:
            left, window = capacity, len(windows)
            windows.append([])
        windows[window].append(text)
        bisect.insort(room, (left - lengths[text], window))
    return windows
