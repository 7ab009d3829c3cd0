"""Which leaf of one state becomes which leaf of another."""

import collections
import itertools
from collections.abc import Callable, Sequence

from optax_lowbit.checkpoint.leaves import Leaf
from optax_lowbit.optimizers import Trace4bitState

_MOST_NAMES = 8


def matched(
    sources: Sequence[Leaf],
    targets: Sequence[Leaf],
    read_count: Callable[[int], int],
    can_keep: bool,
) -> list[int | None]:
    """For each target the index of its source, or None where the target's own value stays.

    Leaves match by the field of the optax state and by the path of the parameter, wherever in a
    tree the state is; of several that do, the one with the longest common path is taken. A count
    without a counterpart takes the value of the others, if they agree. Hyperparameters without one
    keep the value of the target.

    Args:
      sources: Leaves of the state that there is.
      targets: Leaves of the state that is wanted.
      read_count: The value of the source of an index, which is a count.
      can_keep: Whether targets have values.

    Raises:
      ValueError: If a target has no source or several, or a source no target, by name.
    """
    by_role = collections.defaultdict(list)
    for index, source in enumerate(sources):
        by_role[source.role].append(index)
    counts = [index for index, source in enumerate(sources) if source.is_count]
    chosen, missing = [], []
    for target in targets:
        candidates = _closest(target, sources, by_role[target.role])
        if target.is_count and not candidates and not _numbers_draws(target):
            candidates = counts
        index = _only(target, sources, candidates, read_count)
        if index is None and not _numbers_draws(target):
            if not (target.is_hyperparameter and can_keep):
                missing.append(target.name)
        chosen.append(index)
    _check_all_used(sources, targets, chosen, missing)
    return chosen


def _closest(target: Leaf, sources: Sequence[Leaf], candidates: list[int]) -> list[int]:
    """The candidates that share the longest path with the target."""
    if target.is_count:
        # Of another type it may count something else.
        candidates = [i for i in candidates if sources[i].state == target.state]
    exact = [i for i in candidates if sources[i].path == target.path]
    if exact:
        return exact
    lengths = [_common_length(target.path, sources[i].path) for i in candidates]
    return [i for i, length in zip(candidates, lengths) if length == max(lengths)]


def _only(
    target: Leaf, sources: Sequence[Leaf], candidates: list[int], read_count: Callable[[int], int]
) -> int | None:
    """The one candidate, or one of several counts if they agree."""
    if not candidates:
        return None
    is_one = len(candidates) == 1
    if not is_one and not (target.is_count and len({read_count(i) for i in candidates}) == 1):
        names = ", ".join(sources[i].name for i in candidates)
        raise ValueError(f"{target.name} could be made from each of {names}, which differ")
    return candidates[0]


def _numbers_draws(target: Leaf) -> bool:
    """Whether it is a count of which any value will do: it numbers draws of random rounding."""
    return target.is_count and target.state == Trace4bitState.__name__


def _common_length(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))


def _check_all_used(
    sources: Sequence[Leaf],
    targets: Sequence[Leaf],
    chosen: Sequence[int | None],
    missing: list[str],
) -> None:
    uses = collections.Counter(
        i for i, target in zip(chosen, targets) if i is not None and not target.is_count
    )
    shared = [sources[i].name for i, number in uses.items() if number > 1]
    if shared:
        raise ValueError(f"more than one leaf would be made from {_listed(shared)}")
    extra = [
        source.name
        for i, source in enumerate(sources)
        if i not in uses and not source.is_count and not source.is_hyperparameter
    ]
    complaints = []
    if missing:
        complaints.append(f"there is nothing to make {_listed(missing)} from")
    if extra:
        complaints.append(f"there is no place for {_listed(extra)}")
    if complaints:
        raise ValueError(" and ".join(complaints))


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_NAMES
    shown = ", ".join(names[:_MOST_NAMES])
    return f"{shown} and {more} more" if more > 0 else shown
