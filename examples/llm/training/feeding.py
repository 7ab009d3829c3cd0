"""The batches of a run's steps, made ahead by grain."""

from typing import Any

import grain
import numpy as np

from examples.llm.sampling import in_batches

# One batch is made while a step runs, and one waits.
_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


class Feed:
    """What steps learn from.

    A step's data follow from its number, which is all that a checkpoint needs of them: a run that
    goes on after a stop asks for another first step.
    """

    def __init__(self, batches: grain.MapDataset, accumulate: int):
        """Feeds from a problem's batches, of which so many make a step.

        Elements are batches, stacked if they are several, and their numbers.
        """
        numbered = batches.map_with_index(lambda number, batch: (batch, np.int32(number)))
        self._steps = numbered if accumulate == 1 else in_batches(numbered, accumulate)
        self._next, self._made = 0, None

    def step(self, number: int) -> Any:
        """The element of a step, which is there already if it comes after the one before."""
        if self._made is None or number != self._next:
            self._made = iter(self._steps[number:].to_iter_dataset(_AHEAD))
        self._next = number + 1
        return next(self._made)
