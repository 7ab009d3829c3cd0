"""The native CPU kernels as functions of arrays of one device.

They differ from the reference in this: an update multiplies by the reciprocals of the bias
corrections (see :class:`~optax_lowbit.kernels.adam.Coefficients`), and with AVX-512 its square root
is an estimate and a Newton step, 2 units in the last place off at most. Codes are those of the
quotients that the reference compares.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowbit.kernels.adam import Coefficients
from optax_lowbit.kernels.codable import why_not_codes, why_not_dtype, why_not_read
from optax_lowbit.kernels.cpu.library import library
from optax_lowbit.kernels.cpu.quantized_dot import why_not_matrix
from optax_lowbit.kernels.parameters import Descent
from optax_lowbit.quant import QuantizedArray, QuantSpec, codebooks
from optax_lowbit.quant.array import abstract_quantized
from optax_lowbit.quant.scaling import absmax, effective_scaling

# native/step.h: Second.
_NONE, _BLOCK, _RANK1, _FACTORED = range(4)
_MOST_ELEMENTS = 2048  # native/codebook.h: kMostElements
_VECTOR = 16

Factors = tuple[jax.Array, jax.Array]


def why_not(op: str, shape: tuple[int, ...], dtype: Any, *specs: QuantSpec | None) -> str | None:
    """Why the kernel of ``op`` cannot take a leaf; None if it can.

    Args:
      op: ``"adam"``, ``"momentum"``, ``"quantize"``, ``"dequantize"``, ``"quantized_dot"`` or
        ``"square_sums"``.
      shape: The leaf's.
      dtype: Of the gradient, or of the array to be quantized.
      specs: Of the op's moments in their order; None for a factored second moment.
    """
    if library() is None:
        return "no native library that loads"
    if not shape or 0 in shape:
        return "no elements, or no axes"
    if reason := why_not_dtype(dtype):
        return reason
    if op == "square_sums":
        return None if len(shape) > 1 else "no matrix"
    first, *rest = specs
    for spec in specs:
        if spec is not None and (reason := _why_not_spec(spec, op)):
            return reason
    if first is None or effective_scaling(first.scaling, len(shape)) != "block":
        return "scaling of the first moment"
    for spec in rest:
        if spec is None:
            continue
        if spec.block_size != first.block_size:
            return "moments in blocks of different sizes"
    if op == "quantized_dot":
        return why_not_matrix(shape, np.dtype(dtype).itemsize, first.group_size)
    return None


def _why_not_spec(spec: QuantSpec, op: str) -> str | None:
    # Values are looked up in any table; codes of 8 bits in one of boundaries, which ascend.
    is_read = op in ("dequantize", "quantized_dot") and spec.bits == 4
    if reason := (why_not_read if is_read else why_not_codes)(spec):
        return reason
    if spec.scaling not in ("block", "rank1"):
        return f"{spec.scaling} scaling"
    if spec.block_size % (2 * _VECTOR) or spec.block_size > _MOST_ELEMENTS:
        return f"blocks of {spec.block_size}"
    boundaries = codebooks.decision_table(spec.values).boundaries
    if spec.bits == 8 and not _one_boundary_in_a_high_half(boundaries):
        return "a table with values too close to each other"
    return None


def _one_boundary_in_a_high_half(boundaries: np.ndarray) -> bool:
    """What native/codebook.h needs: floats with the same upper 16 bits have two codes at most."""
    halves = boundaries.astype(np.float32).view(np.uint32) >> 16
    return np.unique(halves).size == halves.size


def adam(
    grad: jax.Array,
    mu: QuantizedArray,
    nu: QuantizedArray | Factors,
    c: Coefficients,
    *,
    nu_scales: tuple[jax.Array, ...] | None = None,
    descent: Descent | None = None,
) -> tuple[jax.Array, QuantizedArray, QuantizedArray | Factors]:
    """A step of Adam.

    Args:
      grad: float32 or bfloat16.
      mu: First moment, scaled by blocks.
      nu: Second moment, scaled by blocks or rank-1; or shares of rows and means of columns.
      c: Coefficients.
      nu_scales: New scales under rank-1, from :func:`adam_rank1_maxima`.
      descent: None for an update; else parameters are written.

    Returns:
      The update, over the gradient, or the new parameters, over the old; and the new moments.
    """
    spec = nu.spec if isinstance(nu, QuantizedArray) else None
    second, nu_arrays, nu_outputs = _FACTORED, [], []
    if not isinstance(nu, QuantizedArray):
        nu_arrays = list(nu)
    elif isinstance(nu.scales, tuple):
        assert nu_scales is not None
        second, nu_outputs = _RANK1, [nu.codes]
        nu_arrays = [nu.codes, *_rows_and_columns(nu.scales), *_rows_and_columns(nu_scales)]
    else:
        second = _BLOCK
        nu_arrays = nu_outputs = [nu.codes, nu.scales]
    result, mu, new = _step(second, c, grad, mu, spec, nu_arrays, nu_outputs, descent)
    if not isinstance(nu, QuantizedArray):
        return result, mu, nu
    scales = nu_scales if second == _RANK1 else new[1]
    return result, mu, _replaced(nu, new[0], scales)


def momentum(
    grad: jax.Array,
    trace: QuantizedArray,
    decay: jax.Array,
    *,
    nesterov: bool,
    descent: Descent | None = None,
) -> tuple[jax.Array, QuantizedArray]:
    """``t' = g + decay * t``; the update is ``t'``, or ``g + decay * t'`` with Nesterov's."""
    one, zero = jnp.ones((), jnp.float32), jnp.zeros((), jnp.float32)
    moment, gradient = (decay, one) if nesterov else (one, zero)
    c = Coefficients(decay, one, zero, zero, moment, gradient, zero, zero, zero)
    result, trace, _ = _step(_NONE, c, grad, trace, None, [], [], descent)
    return result, trace


def adam_rank1_maxima(
    grad: jax.Array, nu: QuantizedArray, c: Coefficients
) -> tuple[jax.Array, ...]:
    """Maxima of the new second moment along each axis: its rank-1 scales."""
    old = _rows_and_columns(nu.scales)
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in old]
    call = jax.ffi.ffi_call("optax_lowbit_rank1_maxima", outputs)
    rows, columns = call(_operand(c, None), grad, nu.codes, *old, **_codes("nu", nu.spec))

    def over_other_axes(scale):
        shorter = [i for i, size in enumerate(scale.shape) if size != rows.shape[i]]
        return absmax(rows, tuple(shorter)) if shorter else rows

    return *map(over_other_axes, nu.scales[:-1]), columns


def _rows_and_columns(scales: Any) -> tuple[jax.Array, jax.Array]:
    """Rank-1 scales as one for each row and one for each column: all but the last axis in one."""
    *leading, columns = scales
    return functools.reduce(jnp.minimum, leading), columns


def square_sums(x: jax.Array, row_parts: int, column_parts: int) -> tuple[jax.Array, jax.Array]:
    """Sums of squares over equal parts of the last axis, and of the last but one.

    They are added up in the same order whatever the number of threads.

    Returns:
      Sums of shape ``(..., rows, column_parts)`` and ``(..., row_parts, columns)``, float32.
    """
    *leading, rows, columns = x.shape
    outputs = [
        jax.ShapeDtypeStruct((*leading, rows, column_parts), jnp.float32),
        jax.ShapeDtypeStruct((*leading, row_parts, columns), jnp.float32),
    ]
    by_row, by_column = jax.ffi.ffi_call("optax_lowbit_square_sums", outputs)(x)
    return by_row, by_column


def quantize(x: jax.Array, spec: QuantSpec) -> QuantizedArray:
    """:func:`optax_lowbit.quantize`, scaled by blocks."""
    like = abstract_quantized(x.shape, x.dtype, spec)
    outputs: Any = [like.codes, like.scales]
    call = jax.ffi.ffi_call("optax_lowbit_quantize", outputs)
    codes, scales = call(x, **_codes("x", spec))
    return _replaced(like, codes, scales)


def dequantize(q: QuantizedArray) -> jax.Array:
    """:func:`optax_lowbit.dequantize`, scaled by blocks."""
    like = jax.ShapeDtypeStruct(q.shape, q.dtype)
    call = jax.ffi.ffi_call("optax_lowbit_dequantize", like)
    return call(q.codes, q.scales, **_codes("x", q.spec))


def _step(second, c, grad, mu, nu_spec, nu_arrays, nu_outputs, descent):
    arrays = [grad, mu.codes, mu.scales, *nu_arrays]
    if descent is not None:
        arrays.append(descent.params)
        arrays += jax.tree.leaves(descent.noise)
    result = grad if descent is None else descent.params
    outputs = [result, mu.codes, mu.scales, *nu_outputs]
    # Every output takes the place of an operand; 1: the coefficients come first.
    places = {id(x): i + 1 for i, x in enumerate(arrays)}
    call = jax.ffi.ffi_call(
        "optax_lowbit_step",
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        input_output_aliases={places[id(x)]: i for i, x in enumerate(outputs)},
    )
    result, codes, scales, *new = call(
        _operand(c, descent),
        *arrays,
        second=np.int64(second),
        descend=descent is not None,
        has_noise=descent is not None and descent.noise is not None,
        **_codes("mu", mu.spec),
        **_codes("nu", nu_spec),
    )
    return result, _replaced(mu, codes, scales), new


def _operand(c: Coefficients, descent: Descent | None) -> jax.Array:
    zero = jnp.zeros((), jnp.float32)
    rates = (zero, zero) if descent is None else (descent.learning_rate, descent.weight_decay)
    return jnp.stack([*c, *rates])


def _codes(name: str, spec: QuantSpec | None) -> dict[str, Any]:
    """Attributes that tell a kernel how codes are stored."""
    values = boundaries = np.zeros(0, np.float32)
    if spec is not None:
        values, boundaries = spec.values, codebooks.decision_table(spec.values).boundaries
    return {
        f"{name}_bits": np.int64(spec.bits if spec else 0),
        f"{name}_block": np.int64(spec.block_size if spec else 0),
        f"{name}_values": np.asarray(values, np.float32),
        f"{name}_boundaries": np.asarray(boundaries, np.float32),
    }


def _replaced(like: QuantizedArray, codes: Any, scales: Any) -> QuantizedArray:
    return QuantizedArray(codes, scales, like.spec, like.padding, like.dtype)
