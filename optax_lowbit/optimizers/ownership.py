"""Which parameter a leaf of an optimizer's state belongs to."""

from collections.abc import Iterator
from typing import Any

import jax

from optax_lowbit.optimizers.flax_variables import is_variable, unwrapped
from optax_lowbit.optimizers.leafwise import is_low_bit
from optax_lowbit.optimizers.policy import path_names


def is_state_leaf(x: Any) -> bool:
    """The ``is_leaf`` under which states are mapped here: what one parameter has in one field."""
    return is_low_bit(x) or is_variable(x)


def owners(state: Any, params: Any) -> list[int | None]:
    """For each leaf of ``state`` under :func:`is_state_leaf`, the index of its parameter, or None.

    A leaf belongs to the parameter whose path its own path contains: right behind the last field's
    name, or else the longest, and of equals the last. So ``[0].mu['block']['kernel']`` belongs to
    ``['block']['kernel']``, and so does ``.mu['block']['kernel'][1]`` of a state that keeps a list
    for each parameter. Scalars belong to scalar parameters only: a counter or a hyperparameter may
    bear a parameter's name.

    Args:
      state: The state of any optax transform; leaves may be abstract.
      params: The parameters that it was made for; leaves may be abstract.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> params = {"b": jnp.zeros(3), "w": jnp.zeros((2, 3))}
      >>> owners(optax.adam(1e-3).init(params), params)  # count, mu, nu
      [None, 0, 1, 0, 1]
    """
    by_path = {}
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_variable)
    for index, (path, leaf) in enumerate(leaves):
        by_path[_keys(path)] = index, len(unwrapped(leaf).shape)
    longest = max(map(len, by_path), default=0)

    def owner_of(path, leaf):
        keys = _keys(path)
        is_scalar = not unwrapped(leaf).shape
        for start, end in _spans(keys, longest):
            index, ndim = by_path.get(keys[start:end], (None, 0))
            if index is not None and (not is_scalar or (ndim == 0 and end == len(keys))):
                return index
        return None

    state_leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_state_leaf)
    return [owner_of(path, leaf) for path, leaf in state_leaves]


def _keys(path: tuple[Any, ...]) -> tuple[tuple[str, bool], ...]:
    """The names on a path, and whether each is that of a field: ``.count`` is no ``['count']``."""
    is_field = (isinstance(key, jax.tree_util.GetAttrKey) for key in path)
    return tuple(zip(path_names(path), is_field))


def _spans(keys: tuple[tuple[str, bool], ...], longest: int) -> Iterator[tuple[int, int]]:
    """Where in ``keys`` a parameter's path may lie, the likeliest first."""
    home = max((i + 1 for i, (_, is_field) in enumerate(keys) if is_field), default=0)
    if home:
        yield from (
            (home, home + length) for length in range(min(longest, len(keys) - home), 0, -1)
        )
    for length in range(min(longest, len(keys)), -1, -1):
        yield from ((end - length, end) for end in range(len(keys), length - 1, -1))
