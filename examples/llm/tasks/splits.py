"""Train, development and test examples that share nothing."""

from collections.abc import Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from examples.llm.errors import UsageError


class Keyed(Protocol):
    """A record of what is split."""

    @property
    def keys(self) -> tuple[str, ...]:
        """What it is about."""
        ...


AnyRecord = TypeVar("AnyRecord", bound=Keyed)


class Splits(NamedTuple, Generic[AnyRecord]):
    """The parts of a task.

    Attributes:
      train: what methods learn from.
      dev: what hyperparameters are chosen by.
      test: what is reported.
    """

    train: list[AnyRecord]
    dev: list[AnyRecord]
    test: list[AnyRecord]


def split(
    records: Sequence[AnyRecord], sizes: tuple[int, int, int], seed: int = 0
) -> Splits[AnyRecord]:
    """Deal records out; the same `seed` and records always give the same parts.

    Records that share a key are in one part, or in none: a part is not filled beyond its size.

    Args:
      records: all there are.
      sizes: at most so many for training, development and test.
      seed: of the order in which they are dealt.

    Raises:
      UsageError: there are too few for a part to have any.
    """
    groups = _groups(records)
    order = np.random.default_rng(seed).permutation(len(groups))
    parts: tuple[list[AnyRecord], ...] = ([], [], [])
    for number in order:
        group = [records[index] for index in groups[number]]
        # The test part first: it stays the same when another size is changed.
        for part in (2, 1, 0):
            if len(parts[part]) + len(group) <= sizes[part]:
                parts[part].extend(group)
                break
    if not all(part or not size for part, size in zip(parts, sizes, strict=True)):
        raise UsageError(
            f"--task: {len(records)} examples on {len(groups)} subjects are too few "
            f"for training, development and test"
        )
    return Splits(*parts)


def _groups(records: Sequence[Keyed]) -> list[list[int]]:
    """Numbers of records that hang together by their keys, in the order of the first of each."""
    parents: dict[str, str] = {}

    def root(key: str) -> str:
        while (parent := parents.setdefault(key, key)) != key:
            parents[key] = key = parents[parent]
        return key

    for record in records:
        for key in record.keys[1:]:
            parents[root(key)] = root(record.keys[0])
    groups: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        groups.setdefault(root(record.keys[0]), []).append(number)
    return list(groups.values())
