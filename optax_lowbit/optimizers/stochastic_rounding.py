"""Updates of bfloat16 parameters that are not lost to rounding."""

from typing import Any

import jax

from optax_lowbit.kernels.parameters import rounded
from optax_lowbit.kernels.reference import widened
from optax_lowbit.moments.flax_variables import is_variable, unwrapped, wrapped_like
from optax_lowbit.moments.keys import fold_in_path
from optax_lowbit.quant import random_bits


def apply_updates_stochastic(params: Any, updates: Any, key: jax.Array | int) -> Any:
    r"""Adds updates to parameters; sums in bfloat16 are rounded stochastically.

    Bfloat16 has 8 bits of precision: an update of less than 1/512 of its parameter is rounded away
    by :func:`optax.apply_updates`, step after step. Here a sum :math:`s` between the neighbours
    :math:`a < b` becomes :math:`b` with probability :math:`(s - a) / (b - a)`, so its mean is
    :math:`s`. The bits are those of Threefry-2x32 for the path, the row and the column of an
    element: the same on every mesh.

    Args:
      params: Parameters of any float dtypes. Those that are not bfloat16 are rounded to nearest.
      updates: Updates, a tree of the same structure. In float32 they lose nothing: let gradients
        be float32 where the parameters are bfloat16.
      key: A `jax.random.key` of Threefry, its data, or a seed: another one in every step.

    Returns:
      New parameters, in their dtypes.

    Raises:
      TypeError: If ``key`` is no key.
      ValueError: If it is one of another generator.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_lowbit
      >>> params, update = jnp.ones(10000, jnp.bfloat16), jnp.full(10000, 1e-3)
      >>> new = optax_lowbit.apply_updates_stochastic(params, update, jax.random.key(0))
      >>> f"{new.astype(jnp.float32).mean():.4f}"
      '1.0010'

    References:
      Zamirai et al, `Revisiting BFloat16 Training <https://arxiv.org/abs/2010.06192>`_, 2020,
      Section 4.

    .. seealso:: :func:`fused_apply`
    """
    words = random_bits.key_words(key)

    def add(path, param, update):
        value = unwrapped(param)
        total = widened(value) + unwrapped(update).astype(widened(value).dtype)
        return wrapped_like(param, rounded(total, value.dtype, fold_in_path(words, path)))

    return jax.tree_util.tree_map_with_path(add, params, updates, is_leaf=is_variable)
