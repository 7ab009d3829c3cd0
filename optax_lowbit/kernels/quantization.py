"""Quantizing and dequantizing by whatever kernel takes an array."""

import dataclasses
import functools
from typing import Any

import jax

from optax_lowbit import quant
from optax_lowbit.kernels import backends
from optax_lowbit.kernels.partitioning import no_coefficients, per_device
from optax_lowbit.quant import QuantizedArray, QuantSpec, is_quantized
from optax_lowbit.quant.array import code_padding, with_coded_scales, with_float_scales


def quantize(x: jax.Array, spec: QuantSpec, backend: backends.Backend = "auto") -> QuantizedArray:
    """:func:`optax_lowbit.quantize` to nearest, by a kernel where one takes it.

    Args:
      x: Float array.
      spec: How to store it; rounding to nearest.
      backend: A :data:`~optax_lowbit.kernels.backends.Backend`.

    Raises:
      ValueError: If the backend is unknown, or is named and cannot take the array.
    """
    chosen = _chosen("quantize", backend, x, spec)
    plain = dataclasses.replace(spec, double_quant=False)
    q = backends.by_platform(chosen, lambda name: functools.partial(_quantized, name, plain), x)
    return with_coded_scales(q, spec)


def dequantize(q: QuantizedArray, backend: backends.Backend = "auto") -> jax.Array:
    """:func:`optax_lowbit.dequantize`, by a kernel where one takes it.

    Args:
      q: The array.
      backend: A :data:`~optax_lowbit.kernels.backends.Backend`.

    Raises:
      ValueError: If the backend is unknown, or is named and cannot take the array.
    """
    chosen = _chosen("dequantize", backend, q, q.spec)
    q = with_float_scales(q)
    return backends.by_platform(chosen, lambda name: functools.partial(_dequantized, name), q)


def _quantized(backend: str, spec: QuantSpec, x: jax.Array) -> QuantizedArray:
    if backend == "reference":
        return quant.quantize(x, spec)

    def kernel(_, x):
        q = backends.kernels(backend).quantize(x, spec, **backends.options(backend))
        return q.codes, q.scales

    codes, scales = per_device(kernel, no_coefficients(), (x,), spec.group_size)
    return QuantizedArray(codes, scales, spec, code_padding(x.shape[-1], spec.bits), x.dtype)


def _dequantized(backend: str, q: QuantizedArray) -> jax.Array:
    if backend == "reference":
        return quant.dequantize(q)

    def kernel(_, codes, scales):
        # Shards hold whole blocks, without padding; a row with padding is not spread.
        part = dataclasses.replace(q, codes=codes, scales=scales)
        return (backends.kernels(backend).dequantize(part, **backends.options(backend)),)

    group = q.spec.group_size * q.spec.bits // 8
    if q.shape[-1] % q.spec.group_size:
        group = q.codes.shape[-1]
    arrays: Any = (q.codes, q.scales)  # scales of blocks: one array
    (x,) = per_device(kernel, no_coefficients(), arrays, group)
    return x


def _chosen(op: str, backend: backends.Backend, array: Any, spec: QuantSpec) -> dict[str, str]:
    backends.checked(backend)
    leaf = array.codes if is_quantized(array) else array
    return backends.platforms(
        backend, op, leaf, array.shape, array.dtype, spec, task=f"{op} this array"
    )
