"""Which parameter a leaf of an optimizer's state belongs to."""

import itertools
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
    by_path = {}
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_variable)
    for index, (path, leaf) in enumerate(leaves):
        by_path[path_names(path)] = index, len(unwrapped(leaf).shape)
    longest = max(map(len, by_path), default=0)

    def owner_of(path, leaf):
        names = path_names(path)
        is_scalar = not unwrapped(leaf).shape
        for length, end in itertools.product(range(longest, -1, -1), range(len(names), -1, -1)):
            found = by_path.get(names[end - length : end]) if length <= end else None
            if found and (not is_scalar or found[1] == 0):
                return found[0]
        return None

    state_leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_state_leaf)
    return [owner_of(path, leaf) for path, leaf in state_leaves]
