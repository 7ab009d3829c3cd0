"""Sums of directions that are held, leaf by leaf, for what needs an ordinary tree."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowbit.kernels.ordering import data_zero, first_element
from optax_lowbit.zo.directions import Directions, Trainable
from optax_lowbit.zo.rows import whole


def summed(
    directions: Directions, params: Trainable, slopes: jax.Array, companions: Sequence[Any]
) -> list[jax.Array]:
    """``sum_i slopes[i] z_i`` of each leaf that trains, float32.

    Args:
      directions: Of ``n`` probes.
      params: The leaves.
      slopes: float32 ``(n,)``.
      companions: For each leaf, what the noise is given of its moments.
    """
    # One leaf after the other: what drawing needs beside its result is then that of one leaf.
    zero, sums = jnp.uint32(0), []
    for number, values in enumerate(params.leaves):
        rows = params.opened(whole(number, values, companions[number]))
        sums.append(directions.sum(slopes, rows, zero))
        zero = data_zero(first_element(sums[-1]))
    return sums
