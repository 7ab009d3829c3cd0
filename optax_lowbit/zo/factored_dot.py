"""Matmuls with a leaf that is perturbed by a direction of low rank, which is never formed.

.. math::
  x (W + U V^T) = x W + (x U) V^T

Under ``vmap`` over probes only ``U`` differs: ``x W`` stays one matmul of all probes' ``x``.

References:
  Sarkar et al, `Evolution Strategies at the Hyperscale <https://arxiv.org/abs/2511.16652>`_, 2025
  (EGGROLL), where models must be written for it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from optax_lowbit.moments.equations import bind
from optax_lowbit.zo.noise import Factors
from optax_lowbit.zo.rows import Rows
from optax_lowbit.zo.views import Pending

_LINEAR = frozenset({"convert_element_type", "copy", "name", "transpose"})


def factored_dot(
    equation: JaxprEqn, operands: list[Any], factors: Callable[[Rows], Factors | None]
) -> jax.Array | None:
    """What a ``dot_general`` gives for a perturbed operand, without making that.

    The perturbation is added to the product in float32, so casts of the operand do not round it.

    Args:
      equation: The ``dot_general``.
      operands: Two, of which one is :class:`Pending`.
      factors: Of what is added to its rows.

    Returns:
      The product, in the dtype of the equation's; None where the operand must be perturbed: both
      are pending, it was reshaped before, its columns are a batch axis, no row is contracted, or
      there are no factors.
    """
    pending, other = operands if isinstance(operands[0], Pending) else operands[::-1]
    if isinstance(other, Pending):
        return None
    order = _axis_order(pending)
    names, result = _axis_names(equation)
    own, others = names if pending is operands[0] else names[::-1]
    if order is None or not set(own) - set(result):
        return None
    # The axes as the rows have them.
    own = [own[order.index(axis)] for axis in range(len(order))]
    rows, columns = own[:-1], own[-1]
    if columns in result and columns in others:
        return None
    found = factors(pending.rows)
    if found is None:
        return None
    rank = max(*own, *others) + 1
    stages = [(found.left, [*rows, rank]), (found.right, [columns, rank])]
    if columns in others:
        stages.reverse()
    (first, first_names), (second, second_names) = stages
    kept = set(result) | set(second_names)
    inner = [name for name in dict.fromkeys([*others, *first_names]) if name in kept]
    result_type: Any = equation.outvars[0].aval
    dtype = result_type.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    values = pending.after(pending.rows.values)
    whole = [values if x is pending else x for x in operands]
    (product,) = bind(equation, whole, preferred_element_type=wide)
    small = _einsum(other, others, first, first_names, inner, wide)
    return (product + _einsum(small, inner, second, second_names, result, wide)).astype(dtype)


def _axis_order(pending: Pending) -> list[int] | None:
    """Which axis of the rows each axis of the operand is; None if it is more than transposed."""
    order = list(range(pending.rows.values.ndim))
    for equation in (*pending.casts, *pending.moves):
        if equation.primitive.name not in _LINEAR:
            return None
        if equation.primitive.name == "transpose":
            order = [order[axis] for axis in equation.params["permutation"]]
    return order


def _axis_names(equation: JaxprEqn) -> tuple[list[list[int]], list[int]]:
    """Numbers for the axes of both operands and of the result; an axis they share has one."""
    (contracted, batch) = equation.params["dimension_numbers"]
    types: list[Any] = [var.aval for var in equation.invars]
    left, right = (list(range(type_.ndim)) for type_ in types)
    right = [name + len(left) for name in right]
    for mine, theirs in zip((*contracted[0], *batch[0]), (*contracted[1], *batch[1]), strict=True):
        right[theirs] = left[mine]
    batch_names = [left[axis] for axis in batch[0]]
    done = {*batch_names, *(left[axis] for axis in contracted[0])}
    free = [name for name in (*left, *right) if name not in done]
    return [left, right], [*batch_names, *free]


def _einsum(
    x: jax.Array, x_names: list[int], y: jax.Array, y_names: list[int], names: list[int], dtype: Any
) -> jax.Array:
    # Few columns: full precision costs little, and the direction is then that of the update.
    return jnp.einsum(
        x.astype(dtype), x_names, y.astype(dtype), y_names, names,
        precision=jax.lax.Precision.HIGHEST,
    )  # fmt: skip
