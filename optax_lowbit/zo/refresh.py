"""What noise keeps between steps, and makes anew only every so many."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Kept(NamedTuple):
    """A value, and which interval of steps it was made for.

    Attributes:
      turn: int32 ``()``: the interval's number; -1 before the first step.
      value: Pytree of arrays.
    """

    turn: jax.Array
    value: Any


def refreshed(kept: Any, step: jax.Array, interval: int, make: Callable[[], Any]) -> Kept:
    """The value of the step's interval: what is kept, or what ``make`` gives if that is older.

    Args:
      kept: A :class:`Kept`; or ``()`` before there is one, and then zeros are kept.
      step: int32 ``()``.
      interval: Steps of an interval.
      make: Costs nothing in a step that does not need it.
    """
    if not isinstance(kept, Kept):
        like = jax.eval_shape(make)
        return Kept(jnp.int32(-1), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like))
    turn = step // interval
    value = jax.lax.cond(turn == kept.turn, lambda: kept.value, make)
    return Kept(turn, value)
