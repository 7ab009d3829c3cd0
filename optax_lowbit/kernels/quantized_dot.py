"""``x @ W`` with a frozen ``W`` in few bits, of which no dequantized copy outlives the product.

An operation of its own with JAX: linear in ``x``, its derivatives are itself and its transpose, and
what they keep is ``W`` as it is stored. Written with ``dequantize(w)`` the same product keeps the
dequantized matrix of every layer for the backward pass.

References:
  Dettmers et al, `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, Section 3, equation 5.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from optax_lowbit.kernels import backends, quantization
from optax_lowbit.kernels.backends import Backend
from optax_lowbit.kernels.cpu.quantized_dot import MOST_ROWS
from optax_lowbit.kernels.meshes import are_on_one_device, as_varying, is_explicit, varying_axes
from optax_lowbit.kernels.ordering import data_zero, first_element
from optax_lowbit.kernels.reference import float_dtype
from optax_lowbit.quant import QuantizedArray
from optax_lowbit.quant.array import with_float_scales


def quantized_dot(
    x: jax.Array,
    rows: QuantizedArray,
    shape: tuple[int, int],
    *,
    out_sharding: NamedSharding | None = None,
    precision: Any = None,
    backend: Backend = "auto",
) -> jax.Array:
    """``x @ W`` for ``W`` of ``shape`` ``(n, m)``.

    Args:
      x: Floats ``(..., n)``.
      rows: ``W`` transposed, ``(m, n)``, or all of its elements in that order, ``(m * n,)``; it is
        not differentiated.
      shape: ``(n, m)``.
      out_sharding: Of the product, on an Explicit mesh that leaves a choice.
      precision: Of the product and of its derivatives, as of `jax.lax.dot_general`; by default that
        of the context. Of a pair both must be the same.
      backend: A :data:`~optax_lowbit.kernels.backends.Backend`. Where a kernel takes the product,
        ``W`` is never dequantized but for a tile at a time: on TPUs and GPUs, and on CPUs where
        that is faster, with a ``W`` of 32 MiB in the dtype of ``x`` and 512 rows of ``x`` at most.
        In a process with several devices that is known to be possible inside `jax.shard_map`, and
        of concrete arrays of one device; traced ones may be spread, and are left to XLA unless a
        kernel is named. Else, and as ``"reference"``, the product is XLA's, of what that backend
        dequantizes.

    Returns:
      ``(..., m)`` in the dtype of ``x``; summed up in float32.

    Raises:
      ValueError: If the shapes don't fit, the precision is none or differs for the two factors, or
        the backend is unknown, or is named and cannot take the product.
      TypeError: If ``x`` is not of a float dtype of 16 bits or more.
    """
    backends.checked(backend)
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 2:
        raise TypeError(f"x must be of a float dtype of 16 bits or more, got {x.dtype}")
    n, m = shape
    if not x.ndim or x.shape[-1] != n:
        raise ValueError(f"x must have a last axis of {n} for a matrix {shape}, got {x.shape}")
    if rows.shape not in ((m, n), (m * n,)):
        raise ValueError(f"rows must be {(m, n)} or {(m * n,)} for {shape=}, got {rows.shape}")
    # Not by `stop_gradient`, of whose results a scan keeps a copy for each layer; see `_jvp`.
    leaves, structure = jax.tree.flatten(rows)
    # In a shard_map whose devices have rows of their own each gives a part of the cotangent of x.
    x = as_varying(x, frozenset().union(*map(varying_axes, leaves)))
    product = _Product(structure, shape, False, out_sharding, _named(precision), backend)
    return _bind(product, x, leaves)


class _Product(NamedTuple):
    """What is multiplied with what.

    Attributes:
      structure: Of ``rows``, whose arrays are the other operands.
      shape: ``(n, m)``.
      is_transposed: Whether it is the product with ``W`` transposed, of a cotangent.
      out_sharding: Of the product, on an Explicit mesh.
      precision: By the name that contexts have for it; None if they have none.
      backend: What multiplies, or dequantizes.
      is_alone: Whether all operands are known to be on one device.
    """

    structure: Any
    shape: tuple[int, int]
    is_transposed: bool
    out_sharding: NamedSharding | None
    precision: str | None
    backend: Backend
    is_alone: bool = False


def _named(precision: Any) -> str | None:
    """A precision by its name in `jax.default_matmul_precision`; None is the context's."""
    if precision is None:
        config: Any = jax.config
        return config.jax_default_matmul_precision
    one = precision[0] if isinstance(precision, tuple) and len({*precision}) == 1 else precision
    if isinstance(one, jax.lax.DotAlgorithmPreset):
        return one.name
    if isinstance(one, str) and one in jax.lax.DotAlgorithmPreset.__members__:
        return one
    try:
        return jax.lax.Precision(one).name.lower()
    except ValueError as error:
        raise ValueError(
            "precision must be a jax.lax.Precision or a preset of an algorithm, or the name of "
            f"one, and the same for both factors, got {precision!r}"
        ) from error


_dot = Primitive("quantized_dot")
_dot.multiple_results = True


def _bind(product: _Product, x: jax.Array, leaves: Sequence[jax.Array]) -> jax.Array:
    types = tuple(jax.typeof(operand) for operand in (x, *leaves))
    product = product._replace(is_alone=are_on_one_device((x, *leaves)))
    program = _program(product, types, jax.sharding.get_abstract_mesh())
    (y,) = _dot.bind(x, *leaves, product=product, program=program)
    return y


@functools.lru_cache(maxsize=1024)
def _program(product: _Product, types: tuple[Any, ...], mesh: Any) -> ClosedJaxpr:
    """What the operation lowers to: an operand of it, for JAX to look for what needs devices."""
    del mesh  # It is traced in the context that it is taken from.
    with jax.default_matmul_precision(product.precision):
        return jax.make_jaxpr(functools.partial(_compute, product))(*types)


def _compute(product: _Product, x: jax.Array, *leaves: jax.Array) -> jax.Array:
    rows: QuantizedArray = jax.tree.unflatten(product.structure, leaves)
    if x.size:
        rows = _after(rows, x)

    def run(name):
        if name == "reference" or (name == "cpu" and not _has_tiles_on_cpus(product, x, rows)):
            dequantizer = "auto" if product.backend == "auto" else name
            return functools.partial(_by_xla, product, dequantizer)
        return functools.partial(_by_kernel, product, name)

    return backends.by_platform(_chosen(product, x, rows), run, x, rows)


def _chosen(product: _Product, x: jax.Array, rows: QuantizedArray) -> dict[str, str]:
    """The backend of each platform."""
    backend = product.backend if x.size else "reference"
    if backend in ("reference", "cpu"):
        return backends.everywhere(backend)
    task = "multiply by this matrix"
    chosen = backends.platforms(
        backend, "quantized_dot", None if product.is_alone else x,
        rows.shape, _stored_dtype(x, rows), rows.spec, task=task,
    )  # fmt: skip
    if backend != "auto" and is_explicit(x):
        if reason := backends.why_not_spread(backend, "quantized_dot", x):
            raise ValueError(f"backend={backend!r} cannot {task}: {reason}")
    return chosen


def _stored_dtype(x: jax.Array, rows: QuantizedArray) -> Any:
    """What a kernel must know: values are rounded to the dtype of the matrix before that of x."""
    return x.dtype if rows.dtype in (jnp.float32, jnp.bfloat16) else rows.dtype


def _has_tiles_on_cpus(product: _Product, x: jax.Array, rows: QuantizedArray) -> bool:
    """Whether a product on CPUs is a kernel's; else it is XLA's, of the matrix dequantized."""
    is_few = x.size <= MOST_ROWS * x.shape[-1]
    dtype = _stored_dtype(x, rows)
    return is_few and not (
        backends.why_not("cpu", "quantized_dot", rows.shape, dtype, rows.spec)
        or backends.why_not_spread("cpu", "quantized_dot", None if product.is_alone else x)
    )


def _by_kernel(product: _Product, backend: str, x: jax.Array, rows: QuantizedArray) -> jax.Array:
    # A kernel's result has the type of its operands, which must be alike inside of a shard_map.
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves((x, rows))))
    x, rows = jax.tree.map(lambda operand: as_varying(operand, axes), (x, rows))
    y = backends.kernels(backend).quantized_dot(
        x.reshape(-1, x.shape[-1]),
        rows,
        is_transposed=product.is_transposed,
        **backends.options(backend),
    )
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _by_xla(product: _Product, backend: Backend, x: jax.Array, rows: QuantizedArray) -> jax.Array:
    n, m = product.shape
    if x.size:
        rows = _codes_after(rows, x)
    matrix = quantization.dequantize(rows, backend).reshape(m, n).astype(x.dtype)
    contracted = ((x.ndim - 1,), (0 if product.is_transposed else 1,))
    wide = float_dtype(x.dtype)
    y = jax.lax.dot_general(
        x, matrix, (contracted, ((), ())),
        preferred_element_type=wide, out_sharding=product.out_sharding,
    )  # fmt: skip
    return y.astype(x.dtype)


def _after(rows: QuantizedArray, x: jax.Array) -> QuantizedArray:
    """``rows`` that can't be dequantized before ``x``, a cotangent, is there.

    The compiler would find them dequantized for the forward pass, and keep that. It takes an
    `optimization_barrier` out before it looks, at least for CPUs; so they depend on ``x`` itself.
    """
    rows = with_float_scales(rows)
    bits = jax.lax.bitcast_convert_type(rows.scales, jnp.uint32) | data_zero(first_element(x))
    scales = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return QuantizedArray(rows.codes, scales, rows.spec, rows.padding, rows.dtype)


def _codes_after(rows: QuantizedArray, x: jax.Array) -> QuantizedArray:
    """``rows`` whose codes wait for ``x``, too.

    The compiler would find what they stand for, before it is scaled, looked up for the forward
    pass, and keep that. Kernels, to which no compiler looks in, take codes as they are stored.
    """
    zero = data_zero(first_element(x)).astype(rows.codes.dtype)
    return dataclasses.replace(rows, codes=rows.codes | zero)


def _run(*operands, program, product):
    del product
    return jaxpr_as_fun(program)(*operands)


def _abstract(*operands, program, product):
    del operands, product
    return program.out_avals


def _jvp(primals, tangents, product, program):
    del program
    # Only x has a tangent: no other operand is differentiated, whatever tangents there are.
    x, *leaves = primals
    dx = ad.instantiate_zeros(tangents[0])
    return [_bind(product, x, leaves)], [_bind(product, dx, leaves)]


def _transpose(cotangents, x, *leaves, product, program):
    del program
    (dy,) = cotangents
    none: list[Any] = [None] * len(leaves)
    if type(dy) is ad.Zero:
        return [None, *none]
    is_explicit = bool(x.aval.sharding.mesh.explicit_axes)
    transposed = product._replace(
        is_transposed=not product.is_transposed,
        out_sharding=x.aval.sharding if is_explicit else None,
    )
    return [_bind(transposed, dy, leaves), *none]


def _batch(operands, axes, product, program):
    del program
    x, *leaves = operands
    x_axis, *leaf_axes = axes
    if all(axis is None for axis in leaf_axes):
        x = jnp.moveaxis(x, x_axis, 0)
        if product.out_sharding is not None:
            entries = (jax.typeof(x).sharding.spec[0], *product.out_sharding.spec)
            sharding = product.out_sharding.update(spec=PartitionSpec(*entries))
            product = product._replace(out_sharding=sharding)
        return [_bind(product, x, leaves)], [0]
    if x_axis is None:
        size = next(
            leaf.shape[axis]
            for leaf, axis in zip(leaves, leaf_axes, strict=True)
            if axis is not None
        )
        x, x_axis = jnp.broadcast_to(x, (size, *x.shape)), 0
    mapped = [axis is not None for axis in leaf_axes]
    stacks = [
        jnp.moveaxis(leaf, axis, 0) if is_mapped else None
        for leaf, axis, is_mapped in zip(leaves, leaf_axes, mapped, strict=True)
    ]

    def one(pair):
        part, slices = pair
        own = [
            piece if is_mapped else leaf
            for piece, leaf, is_mapped in zip(slices, leaves, mapped, strict=True)
        ]
        return _bind(product, part, own)

    # One matrix after the other, as they would be in a scan over layers.
    return [jax.lax.map(one, (jnp.moveaxis(x, x_axis, 0), stacks))], [0]


_dot.def_impl(jax.jit(_run, static_argnames=("program", "product")))
_dot.def_abstract_eval(_abstract)
ad.primitive_jvps[_dot] = _jvp
ad.primitive_transposes[_dot] = _transpose
batching.primitive_batchers[_dot] = _batch
mlir.register_lowering(_dot, mlir.lower_fun(_run, multiple_results=True))
