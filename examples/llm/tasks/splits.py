"""Train, development and test examples that share nothing."""

import re
from collections.abc import Iterable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from examples.llm.errors import UsageError


class Keyed(Protocol):
    """A record of what is split."""

    @property
    def keys(self) -> tuple[str, ...]:
        """What it is about."""
        ...


Item = TypeVar("Item")
AnyRecord = TypeVar("AnyRecord", bound=Keyed)

# What parts are called in files of data, those of one part by how much they are preferred.
_NAMES = (("train",), ("validation", "valid", "val", "dev"), ("test",))


class Splits(NamedTuple, Generic[Item]):
    """The parts of a task.

    Attributes:
      train: what methods learn from.
      dev: what hyperparameters are chosen by.
      test: what is reported.
    """

    train: list[Item]
    dev: list[Item]
    test: list[Item]


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


def with_test(given: Splits[Item], dev_is_named: bool) -> Splits[Item]:
    """Make the development part the test where there is none, as for GLUE and SuperGLUE.

    Another one is then taken from what there is to train on.

    Args:
      given: parts as they came; those that did not are empty.
      dev_is_named: whether the user said what is for development; it then stays that.
    """
    if given.test or dev_is_named:
        return given
    return Splits(given.train, [], given.dev)


def fill(given: Splits[AnyRecord], sizes: tuple[int, int, int], seed: int = 0) -> Splits[AnyRecord]:
    """Deal what there is to train on out to the parts that are not given; see `split`.

    What is judged is not learnt: of records that share a key with one of a given part only that
    part's are kept, those of the test before those for development.

    Args:
      given: parts as they came; those that did not are empty.
      sizes: at most so many for training, development and test; a part that is dealt out is a
        quarter of what there is at most.
      seed: of the order in which they are dealt.

    Raises:
      UsageError: there is nothing to train on, or too little for a part to have any.
    """
    if not given.train:
        raise UsageError("--task: there is nothing to train on, only what models are judged by")
    given_dev = _without(
        given.dev, given.test, "--task: all there is for development is in the test, too"
    )
    judged = [*given_dev, *given.test]
    train = _without(given.train, judged, "--task: all there is to train on is judged by, too")
    quarter = max(len(train) // 4, 1)
    dev_size, test_size = (
        size if part else min(size, quarter) for part, size in zip(given[1:], sizes[1:])
    )
    wanted = (sizes[0], 0 if given.dev else dev_size, 0 if given.test else test_size)
    dealt = split(train, wanted, seed)
    dev = split(given_dev, (0, dev_size, 0), seed).dev if given.dev else dealt.dev
    test = split(given.test, (0, 0, test_size), seed).test if given.test else dealt.test
    return Splits(dealt.train, dev, test)


def _without(
    records: list[AnyRecord], others: Sequence[AnyRecord], problem: str
) -> list[AnyRecord]:
    """Records that share no key with others; a `UsageError` of `problem` if there are none."""
    keys = {key for other in others for key in other.keys}
    kept = [record for record in records if keys.isdisjoint(record.keys)]
    if records and not kept:
        raise UsageError(problem)
    return kept


def names_of_parts(names: Iterable[str], origin: str) -> tuple[str | None, str | None, str | None]:
    """Find the parts among names such as `train-v2.0.json`; None for one that is not there.

    Args:
      names: their first word tells the part.
      origin: the flag that named them, and what it named.

    Raises:
      UsageError: several are called by the same word.
    """
    by_word: dict[str, list[str]] = {}
    for name in names:
        by_word.setdefault(re.split(r"\W|_", name.lower(), maxsplit=1)[0], []).append(name)

    def find(words: tuple[str, ...]) -> str | None:
        found = next((by_word[word] for word in words if word in by_word), [])
        if len(found) > 1:
            raise UsageError(f"{origin} has several parts {', '.join(found)}: choose one of them")
        return found[0] if found else None

    train, dev, test = map(find, _NAMES)
    return train, dev, test


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
