"""Stacks with more elements than int32 can number, taken slice by slice along their first axis."""

import math
from collections.abc import Callable
from typing import Any

import jax

# Of what a kernel takes at once: the last tile may reach beyond the end.
MOST_ELEMENTS = 2**31 - 2**16


def are_too_many(shape: tuple[int, ...]) -> bool:
    """Whether a kernel cannot take so many elements at once."""
    return math.prod(shape) >= MOST_ELEMENTS


def why_not_slices(shape: tuple[int, ...]) -> str | None:
    """Why a leaf can be taken neither at once nor in slices, which must be matrices at least."""
    if not are_too_many(shape) or (len(shape) > 2 and not are_too_many(shape[1:])):
        return None
    return "2**31 elements or more" if len(shape) < 3 else "slices of 2**31 elements or more"


def step_in_slices(
    step: Callable[[jax.Array, Any, Any, Any], tuple[jax.Array, Any]],
    grad: jax.Array,
    moments: Any,
    others: Any,
    descent: Any,
) -> tuple[jax.Array, Any]:
    """``step(grad, moments, others, descent)``, at once where that can be, always in place.

    Args:
      step: Gives what it writes over the gradient, or over the parameters of a descent, and the new
        moments.
      grad, descent: As a kernel takes them.
      moments, others: Trees of arrays of the leaf's rank: those that are written, and the rest.
    """
    if not are_too_many(grad.shape):
        return step(grad, moments, others, descent)

    def turn(i, written):
        target, moments = _slice(written, i)
        if descent is None:
            new = step(target, moments, _slice(others, i), None)
        else:
            own = descent._replace(params=target)
            new = step(_slice(grad, i), moments, _slice(others, i), own)
        return jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, axis=0), written, new
        )

    target = grad if descent is None else descent.params
    return jax.lax.fori_loop(0, len(grad), turn, (target, moments))


def mapped(fun: Callable[..., Any], shape: tuple[int, ...], *arrays: Any) -> Any:
    """``fun(*arrays)`` of a leaf of a shape, at once where that can be."""
    if not are_too_many(shape):
        return fun(*arrays)
    return jax.lax.map(lambda parts: fun(*parts), arrays)


def _slice(tree: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)
