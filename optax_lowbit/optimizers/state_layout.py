"""How each array of a state is spread over devices, given how the parameters are."""

import collections
import itertools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from optax_lowbit.moments.flax_variables import is_variable, unwrapped
from optax_lowbit.moments.placement import divisible
from optax_lowbit.optimizers.ownership import is_state_leaf, owners


def array_shardings(
    state: Any, params: Any, shardings: Sequence[NamedSharding | None], rest: NamedSharding | None
) -> list[NamedSharding | None]:
    """For each array of a state, in the order of `jax.tree.leaves`, where it lies.

    Args:
      state: Of any optax transform; may be abstract.
      params: The parameters; may be abstract.
      shardings: Of each parameter, or None.
      rest: For arrays that belong to no parameter, or to one without a sharding.
    """
    shapes = [tuple(unwrapped(leaf).shape) for leaf in jax.tree.leaves(params, is_leaf=is_variable)]
    turns: collections.Counter[Any] = collections.Counter()
    found: list[NamedSharding | None] = []
    leaves = jax.tree.leaves(state, is_leaf=is_state_leaf)
    for leaf, owner in zip(leaves, owners(state, params)):
        shape, arrays = tuple(unwrapped(leaf).shape), jax.tree.leaves(leaf)
        sharding = None if owner is None else shardings[owner]
        if owner is None or sharding is None:
            found += [rest] * len(arrays)
            continue
        along = _along(sharding, shapes[owner], shape, turns[owner, shape])
        turns[owner, shape] += 1
        found += [divisible(along, array.shape) for array in arrays]
    return found


def _along(
    sharding: NamedSharding, full_shape: tuple[int, ...], shape: tuple[int, ...], turn: int
) -> NamedSharding:
    """The sharding of a leaf of the state, by the axes of its parameter that it belongs to."""
    spec = (*sharding.spec, *[None] * (len(full_shape) - len(sharding.spec)))
    extra = len(shape) - len(full_shape)
    if extra >= 0:
        same = zip(shape[extra:], full_shape, spec)
        entries = [None] * extra + [entry if size == full else None for size, full, entry in same]
    else:
        choices = [
            axes
            for axes in itertools.combinations(range(len(full_shape)), len(shape))
            if all(full_shape[axis] == size for axis, size in zip(axes, shape))
        ]
        entries = [spec[axis] for axis in choices[turn % len(choices)]] if choices else []
    return NamedSharding(sharding.mesh, PartitionSpec(*entries), memory_kind=sharding.memory_kind)
