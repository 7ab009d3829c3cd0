"""The elements with the smallest scores, found by counting: nothing is sorted or kept."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Scores are below it.
BOUND = 2**31


def threshold(
    count_below: Callable[[jax.Array], jax.Array], wanted: jax.Array, total: int
) -> jax.Array:
    """A bound below which there are as many scores as wanted.

    Guesses are interpolated between counts that are known, and every second one halves the range:
    so there are at most 62, and fewer where scores are spread evenly.

    Args:
      count_below: Of a uint32 bound, how many scores are below it: int32.
      wanted: int32, from 0 to ``total``.
      total: How many scores there are; at most ``2**31 - 1``.

    Returns:
      uint32: with exactly ``wanted`` scores below it; or, where several scores are equal and only
      some of them would be, the smallest bound with all of them below.
    """
    low = jnp.uint32(0), jnp.int32(0)
    is_none = wanted == 0
    high = (
        jnp.where(is_none, jnp.uint32(0), jnp.uint32(BOUND)),
        jnp.where(is_none, jnp.int32(0), jnp.int32(total)),
    )

    def is_open(state):
        _, (low, _), (high, count) = state
        return (count != wanted) & (high - low > 1)

    def narrow(state):
        turn, low, high = state
        bound = _guess(turn, low, high, wanted)
        found = bound, count_below(bound)
        is_enough = found[1] >= wanted
        pick = lambda yes, no: tuple(jnp.where(is_enough, x, y) for x, y in zip(yes, no))  # noqa: E731
        return turn + 1, pick(low, found), pick(found, high)

    _, _, (bound, _) = jax.lax.while_loop(is_open, narrow, (jnp.int32(0), low, high))
    return bound


def _guess(turn: jax.Array, low: tuple, high: tuple, wanted: jax.Array) -> jax.Array:
    """A bound strictly between two."""
    width = high[0] - low[0]
    between = (high[1] - low[1]).astype(jnp.float32)
    share = ((wanted - low[1]).astype(jnp.float32) + 0.5) / (between + 1)
    interpolated = (share * width.astype(jnp.float32)).astype(jnp.uint32)
    step = jnp.where(turn % 2 == 0, interpolated, width // 2)
    return low[0] + jnp.clip(step, jnp.uint32(1), width - 1)
