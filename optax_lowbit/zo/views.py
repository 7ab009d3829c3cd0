"""Operations on a parameter that only move or cast it: it is not perturbed before them.

A program that looks rows up in an embedding, takes a layer out of a stack, transposes a kernel or
casts it does not need the perturbed leaf yet. What it reads is followed, as :class:`Pending`, until
arithmetic is done on it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from optax_lowbit.moments.equations import bind
from optax_lowbit.zo.rows import Rows


@dataclasses.dataclass(frozen=True)
class Pending:
    """Rows of a parameter that are yet to be perturbed, and what happens to them after that."""

    rows: Rows
    casts: tuple[JaxprEqn, ...] = ()  # elementwise, so rows may still be chosen after them
    moves: tuple[JaxprEqn, ...] = ()

    def after(self, values: jax.Array) -> jax.Array:
        """The result of the operations, given the perturbed rows."""
        for equation in (*self.casts, *self.moves):
            (values,) = bind(equation, [values])
        return values


def viewed(equation: JaxprEqn, operands: list[Any]) -> Pending | None:
    """What an equation makes of a pending first operand; None if it needs the values themselves."""
    pending, *others = operands
    if not isinstance(pending, Pending) or any(isinstance(x, Pending) for x in others):
        return None
    name = equation.primitive.name
    if name in _CASTS and not pending.moves:
        return dataclasses.replace(pending, casts=(*pending.casts, equation))
    if name in _ROW_VIEWS and not pending.moves and pending.rows.values.ndim > 1:
        along = _ROW_VIEWS[name](equation)
        if along is not None:

            def view(x):
                (result,) = bind(equation, [x, *others], **along(x))
                return result

            return dataclasses.replace(pending, rows=_map_rows(view, pending.rows))
    if name in _MOVES and not others and _size(equation.outvars[0]) == _size(equation.invars[0]):
        return dataclasses.replace(pending, moves=(*pending.moves, equation))
    return None


_CASTS = frozenset({"convert_element_type", "copy", "name", "reduce_precision"})
_MOVES = frozenset(
    {"broadcast_in_dim", "reshape", "sharding_constraint", "squeeze", "transpose", *_CASTS}
)


def _size(var: Any) -> int:
    return var.aval.size


def _shape(var: Any) -> tuple[int, ...]:
    return var.aval.shape


def _map_rows(view: Callable[[jax.Array], jax.Array], rows: Rows) -> Rows:
    return jax.tree.map(view, rows)


# For each operation that may keep the last axis as it is: the parameters that depend on that
# axis's length, as a function of the operand; or None where this equation does not keep it.
Along = Callable[[jax.Array], dict[str, Any]]


def _gather(equation: JaxprEqn) -> Along | None:
    operand, result = _shape(equation.invars[0]), _shape(equation.outvars[0])
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    last = len(operand) - 1
    is_kept = (
        sizes[-1] == operand[-1]
        and last not in (*numbers.collapsed_slice_dims, *numbers.start_index_map)
        and last not in numbers.operand_batching_dims
        and numbers.offset_dims[-1:] == (len(result) - 1,)
        and len(result) > 1
    )
    # What is read out of bounds is no parameter. NaN stays NaN; any other value must not move.
    fill = equation.params["fill_value"]
    is_kept = is_kept and (fill is None or np.isnan(fill))

    def along(x):
        # Row numbers can't be NaN.
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        own = {} if fill is None or is_float else {"fill_value": 0}
        return {"slice_sizes": (*sizes[:-1], x.shape[-1]), **own}

    return along if is_kept else None


def _dynamic_slice(equation: JaxprEqn) -> Along | None:
    sizes = equation.params["slice_sizes"]
    if sizes[-1] != _shape(equation.invars[0])[-1]:
        return None
    return lambda x: {"slice_sizes": (*sizes[:-1], x.shape[-1])}


def _slice(equation: JaxprEqn) -> Along | None:
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"]
    is_whole = starts[-1] == 0 and limits[-1] == _shape(equation.invars[0])[-1]
    if not is_whole or (strides is not None and strides[-1] != 1):
        return None
    return lambda x: {"limit_indices": (*limits[:-1], x.shape[-1])}


def _squeeze(equation: JaxprEqn) -> Along | None:
    if len(_shape(equation.invars[0])) - 1 in equation.params["dimensions"]:
        return None
    return lambda x: {}


_ROW_VIEWS: dict[str, Callable[[JaxprEqn], Along | None]] = {
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "slice": _slice,
    "squeeze": _squeeze,
}


def takes_rows_only(equation: JaxprEqn, place: int) -> bool:
    """Whether an equation reads no more than some rows of its operand number ``place``."""
    name = equation.primitive.name
    if place or name not in ("dynamic_slice", "gather") or len(_shape(equation.invars[0])) < 2:
        return False
    smaller = _size(equation.outvars[0]) < _size(equation.invars[0])
    return smaller and _ROW_VIEWS[name](equation) is not None
