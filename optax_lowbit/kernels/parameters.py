"""Steps that write parameters instead of updates, in one pass."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_lowbit.kernels.reference import widened
from optax_lowbit.quant import random_bits
from optax_lowbit.quant.random_bits import element_indices
from optax_lowbit.quant.rounding import stochastic_bfloat16


class Noise(NamedTuple):
    """A key and where a leaf's elements lie, as arrays laid out like the leaf."""

    # The words of the key; every axis is 1.
    key: random_bits.Key
    # uint32 numbers of rows, over all leading axes; the last axis is 1.
    rows: jax.Array
    # uint32 columns at which blocks begin; the other axes are 1.
    columns: jax.Array


class Descent(NamedTuple):
    """``p - learning_rate * (u + weight_decay * p)`` is what a step writes."""

    params: jax.Array
    learning_rate: jax.Array
    weight_decay: jax.Array
    # For stochastic rounding of bfloat16 parameters.
    key: random_bits.Key | None = None
    # uint32 numbers of the rows, over all leading axes, where they are some of a leaf's; the last
    # axis is 1.
    rows: jax.Array | None = None
    # The same for a kernel.
    noise: Noise | None = None


def descended(update: jax.Array, descent: Descent | None) -> jax.Array:
    """The update, or the parameters after it, if there is a descent."""
    if descent is None:
        return update
    params = widened(descent.params)
    update = widened(update) + descent.weight_decay.astype(params.dtype) * params
    new = params - descent.learning_rate.astype(params.dtype) * update
    indices = element_indices(new.shape, descent.rows)
    return rounded(new, descent.params.dtype, descent.key, indices)


def rounded(
    x: jax.Array,
    dtype: jax.typing.DTypeLike,
    key: random_bits.Key | None,
    indices: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """``x`` as ``dtype``: to nearest, or stochastically if that is bfloat16 and there is a key.

    ``indices`` are rows and columns in the leaf of which ``x`` is a part; None: it is all of it.
    """
    if key is None or dtype != jnp.bfloat16:
        return x.astype(dtype)
    noise = random_bits.halves(key, *(element_indices(x.shape) if indices is None else indices))
    return stochastic_bfloat16(x.astype(jnp.float32), noise)


def noise_operands(
    key: random_bits.Key, params: jax.Array, rows: jax.Array | None, block: int
) -> Noise:
    """The operands of a kernel that rounds stochastically, for blocks of the last axis."""
    shape, ones = params.shape, (1,) * params.ndim
    if rows is None:
        rows, _ = element_indices((*shape[:-1], 1))
    _, numbers = element_indices((*ones[:-1], -(-shape[-1] // block)))
    return Noise((key[0].reshape(ones), key[1].reshape(ones)), rows, numbers * jnp.uint32(block))
