"""Flax NNX variables among the leaves of a tree, handled without importing Flax.

`jax.tree.map` goes through a variable, which keeps its metadata (a sharding, say) for whatever
takes its value's place. A low-bit array is several arrays with shapes of their own, so it takes the
place of the variable itself.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp


def is_variable(x: Any) -> bool:
    """Whether ``x`` is an `nnx.Variable`; the ``is_leaf`` under which trees are mapped here.

    One that :func:`optax.masked` has emptied is none.
    """
    variable = getattr(sys.modules.get("flax.nnx"), "Variable", ())
    return isinstance(x, variable) and bool(jax.tree.leaves(x))


def unwrapped(x: Any) -> Any:
    """The array in a variable, or of a Python number; anything else as it is."""
    if is_variable(x):
        return jax.tree.leaves(x)[0]
    return jnp.asarray(x) if isinstance(x, bool | int | float | complex) else x


def wrapped_like(x: Any, value: jax.Array) -> Any:
    """``value`` in a variable with the metadata of ``x``, if ``x`` is one."""
    return jax.tree.map(lambda _: value, x) if is_variable(x) else value
