"""Which parameter a leaf of an optimizer's state belongs to."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from optax_lowbit.moments.flax_variables import is_variable, unwrapped
from optax_lowbit.moments.policy import path_name, path_names
from optax_lowbit.moments.storage import is_low_bit


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
    return [slot.owner for slot in slots(state, params)]


class Slot(NamedTuple):
    """Where a leaf of a state stands.

    Attributes:
      owner: The index of its parameter, or None.
      state: The name of the innermost type with fields around it (a NamedTuple, a dict), or "".
      field: Its field there, or "".
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
        by_path[_keys(path)] = index, len(unwrapped(leaf).shape)
    longest = max(map(len, by_path), default=0)

    def slot(path, leaf):
        keys = _keys(path)
        is_scalar = not unwrapped(leaf).shape
        owner, before = None, len(keys)
        for start, end in _spans(keys, longest):
            index, ndim = by_path.get(keys[start:end], (None, 0))
            if index is not None and (not is_scalar or (ndim == 0 and end == len(keys))):
                owner, before = index, start
                break
        # Without an owner it is not known which keys are the parameter's.
        *_, (holder, field) = _fields_along(state, path[:before], has_keys=owner is not None)
        return Slot(owner, holder, field, path_name(path))

    state_leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_state_leaf)
    return [slot(path, leaf) for path, leaf in state_leaves]


def moment_names(slots: Sequence[Slot]) -> list[str]:
    """The fields, numbered from the second that a parameter has of one name: ``mu``, ``mu 2``."""
    seen: dict[tuple[int | None, str], int] = {}
    names = []
    for slot in slots:
        number = seen[slot.owner, slot.field] = seen.get((slot.owner, slot.field), 0) + 1
        names.append(slot.field if number == 1 else f"{slot.field} {number}")
    return names


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


def _fields_along(node: Any, path: tuple[Any, ...], *, has_keys: bool) -> Iterator[tuple[str, str]]:
    """Names of the types that a path goes through, and of their fields; first two empty."""
    yield "", ""
    for key in path:
        if isinstance(key, jax.tree_util.GetAttrKey):
            yield type(node).__name__, key.name
            node = getattr(node, key.name)
        elif isinstance(key, jax.tree_util.DictKey):
            if has_keys:
                yield type(node).__name__, str(key.key)
            node = node[key.key]
        elif isinstance(key, jax.tree_util.SequenceKey):
            node = node[key.idx]
        else:
            return
