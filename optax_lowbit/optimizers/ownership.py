"""Which parameter a leaf of an optimizer's state belongs to."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from optax_lowbit.optimizers.flax_variables import is_variable, unwrapped
from optax_lowbit.optimizers.leafwise import is_low_bit
from optax_lowbit.optimizers.policy import path_names


def is_state_leaf(x: Any) -> bool:
    """The ``is_leaf`` under which states are mapped here: what one parameter has in one field."""
    return is_low_bit(x) or is_variable(x)


def owners(state: Any, params: Any) -> list[int | None]:
    """For each leaf of ``state`` under :func:`is_state_leaf`, the index of its parameter, or None.

    A leaf belongs to the parameter whose path its own path contains, the longest of them, and of
    equals the last: ``[0].mu['block']['kernel']`` to ``['block']['kernel']``, and so does
    ``mu['block']['kernel'][1]`` of a state that keeps a list for each parameter. Scalars belong to
    scalar parameters only: a counter or a hyperparameter may bear a parameter's name.

    Args:
      state: The state of any optax transform; leaves may be abstract.
      params: The parameters that it was made for; leaves may be abstract.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> params = {"b": jnp.zeros(3), "w": jnp.zeros((2, 3))}
      >>> owners(optax.adam(1e-3).init(params), params)  # count, mu, nu
      [None, 0, 1, 0, 1]
    """
    return [slot.owner for slot in slots(state, params)]


class Slot(NamedTuple):
    """Where a leaf of a state stands.

    Attributes:
      owner: The index of its parameter, or None.
      state: The name of the innermost NamedTuple around it, or "".
      field: The field of that tuple, or "".
      path: Its path in the state, for messages.
    """

    owner: int | None
    state: str
    field: str
    path: str


def slots(state: Any, params: Any) -> list[Slot]:
    """The :class:`Slot` of each leaf of ``state`` under :func:`is_state_leaf`.

    Args:
      state, params: As for :func:`owners`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> params = {"w": jnp.zeros((2, 3))}
      >>> slots(optax.adam(1e-3).init(params), params)[1]
      Slot(owner=0, state='ScaleByAdamState', field='mu', path='0/mu/w')
    """
    by_path = {}
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_variable)
    for index, (path, leaf) in enumerate(leaves):
        by_path[path_names(path)] = index, len(unwrapped(leaf).shape)
    longest = max(map(len, by_path), default=0)

    def slot(path, leaf):
        names = path_names(path)
        is_scalar = not unwrapped(leaf).shape
        owner, before = None, len(names)
        for length, end in itertools.product(range(longest, -1, -1), range(len(names), -1, -1)):
            found = by_path.get(names[end - length : end]) if length <= end else None
            if found and (not is_scalar or found[1] == 0):
                owner, before = found[0], end - length
                break
        *_, (holder, field) = _fields_along(state, path[:before])
        return Slot(owner, holder, field, "/".join(names))

    state_leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_state_leaf)
    return [slot(path, leaf) for path, leaf in state_leaves]


def _fields_along(node: Any, path: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
    """Names of the NamedTuples that a path goes through, and of their fields; first two empty."""
    yield "", ""
    for key in path:
        if isinstance(key, jax.tree_util.GetAttrKey):
            if isinstance(node, tuple):
                yield type(node).__name__, key.name
            node = getattr(node, key.name)
        elif isinstance(key, jax.tree_util.DictKey | jax.tree_util.SequenceKey):
            node = node[key.key if isinstance(key, jax.tree_util.DictKey) else key.idx]
        else:
            return
