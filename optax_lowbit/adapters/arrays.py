"""Arrays that adapters are put on: floats, or matrices in few bits."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_lowbit.kernels.quantized_matrix import QuantizedMatrix
from optax_lowbit.moments.policy import path_name


def is_quantized_matrix(leaf: Any) -> bool:
    """Whether it is one leaf of a tree although it has arrays of its own."""
    return isinstance(leaf, QuantizedMatrix)


def is_float(leaf: Any) -> bool:
    """Whether it is an array of floats, or a shape and dtype of one."""
    return hasattr(leaf, "ndim") and jnp.issubdtype(leaf.dtype, jnp.floating)


def is_matrix(leaf: Any) -> bool:
    """Whether it can have adapters: floats with two axes or more, or a matrix in few bits."""
    return is_quantized_matrix(leaf) or (is_float(leaf) and leaf.ndim >= 2)


def dequantized(leaf: Any) -> jax.Array:
    """The floats of an array, or of a matrix in few bits."""
    return leaf.dequantize() if is_quantized_matrix(leaf) else leaf


def leaves_by_path(params: Any) -> dict[str, Any]:
    """The leaves of a tree by paths such as `layers/query/kernel`."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized_matrix)
    return {path_name(path): leaf for path, leaf in pairs}
