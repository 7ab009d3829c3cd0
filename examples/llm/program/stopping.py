"""Ends a run between two batches when its process is asked to."""

import signal
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Batch = TypeVar("Batch")


class StopRequestedError(Exception):
    """The process was asked to end."""


class StopSwitch:
    """Is thrown by SIGTERM, from the block's beginning to its end; a context manager."""

    def __init__(self) -> None:
        self._is_thrown = False

    def __enter__(self):
        self._former = signal.signal(signal.SIGTERM, self._throw)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGTERM, self._former)

    def check(self) -> None:
        """Raise a `StopRequestedError` if the switch was thrown, in any of several processes."""
        is_thrown = self._is_thrown
        if jax.process_count() > 1:
            is_thrown = bool(multihost_utils.process_allgather(np.array(is_thrown)).any())
        if is_thrown:
            raise StopRequestedError

    def checked(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches, checking before each."""
        for batch in batches:
            self.check()
            yield batch

    def _throw(self, *_) -> None:
        self._is_thrown = True
