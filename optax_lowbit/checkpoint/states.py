"""From the state of one transform to that of another, in the middle of a run."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from optax_lowbit.checkpoint.conversion import check_convertible, converted
from optax_lowbit.checkpoint.leaves import Leaf, leaves_of, structure_of
from optax_lowbit.checkpoint.matching import matched


def convert_state(
    state: optax.OptState, *, to: optax.GradientTransformation, params: Any
) -> optax.OptState:
    """The state of one transform as that of another, so that training goes on with the other.

    Moments match by the field of the optax state (``mu``, ``nu``, ``trace``) and by the path of
    the parameter, wherever in a chain, a mask or a wrapper they are. Codes are kept where both
    store them alike. Otherwise a leaf goes through float32: stored in other bits (to nearest), as
    an array, or, for :func:`~optax_lowbit.factor4bit`, as the row and column means of the second
    moment. Counts go to the same state types; where there is none, they take the value of the other
    counts. Hyperparameters of :func:`optax.inject_hyperparams` are carried over by name; new ones
    are those of ``to``.

    **Memory.** Beside the two states one leaf in float32 at a time.

    Args:
      state: Of any transform, of this library or of optax.
      to: The transform to go on with.
      params: The parameters: ``to.init(params)`` says how the new state is stored, and where.

    Returns:
      The state for ``to``. A moment that needs no conversion is the same array in both states, so
      only one of them can be donated.

    Raises:
      ValueError: If a leaf of either state has no counterpart, several, or one of another shape
        or dtype; it is named.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_lowbit
      >>> params = {"w": jnp.ones((128, 128))}
      >>> state = optax.adamw(1e-3).init(params)
      >>> tx = optax_lowbit.adamw4bit(1e-3)
      >>> state = optax_lowbit.convert_state(state, to=tx, params=params)
      >>> int(state[0].count), state[0].mu["w"].nbytes
      (0, 8704)
    """
    sources = leaves_of(state)
    fresh = to.init(params)
    treedef, targets = structure_of(fresh), leaves_of(fresh)
    del fresh
    return filled(treedef, targets, sources)


def filled(treedef: Any, targets: list[Leaf], sources: Sequence[Leaf]) -> Any:
    """The tree of ``targets`` with the values of the sources.

    Targets are taken out of their list one by one, so that zeros go as values come.
    """

    def read_count(index):
        return int(np.asarray(sources[index].value))

    chosen = matched(sources, targets, read_count, can_keep=True)
    for index, target in zip(chosen, targets):
        if index is not None:
            check_convertible(sources[index], target)
    values = []
    for index in chosen:
        like = targets.pop(0).value
        values.append(like if index is None else converted(sources[index].value, like))
    return jax.tree.unflatten(treedef, values)
