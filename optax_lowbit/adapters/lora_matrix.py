"""A matrix with low-rank adapters that is used as ``x @ w`` and is never formed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowbit.adapters.arrays import dequantized, is_quantized_matrix
from optax_lowbit.adapters.dora import column_scales
from optax_lowbit.kernels.reference import float_dtype
from optax_lowbit.quant import random_bits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LoRAMatrix:
    """A matrix ``W + scale A^T B`` that is not formed: ``x @ w`` is ``x W + scale (x A^T) B``.

    Made by :meth:`LoRA.attach`. It also answers ``w[indices]``, the rows that an embedding looks
    up, and ``x @ w.T`` of a tied one. A pytree, so `jax.lax.scan` slices a stack of them. It can't
    be used as an array otherwise; that raises a TypeError, and :meth:`merged` is the array.

    Attributes:
      base: ``(..., n, m)``: floats, or a :class:`QuantizedMatrix`. Of a kernel whose ``n`` or ``m``
        is several axes, with these axes.
      a: float32 ``(..., r, n)``.
      b: float32 ``(..., r, m)``.
      scale: A number.
      magnitude: Of DoRA, the lengths of the columns, float32 ``(..., m)``, or None.
      dropout_key: Two uint32 words, each ``(...)``, or None for no dropout.
      dropout: Share of the inputs of ``A`` that is dropped.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    scale: float = dataclasses.field(metadata={"static": True})
    magnitude: jax.Array | None = None
    dropout_key: random_bits.Key | None = None
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    # NumPy arrays, too, leave `x @ w` to this class.
    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of ``base``."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """That of ``base``."""
        return self.base.ndim

    @property
    def dtype(self) -> Any:
        """That of ``base``."""
        return self.base.dtype

    @property
    def T(self) -> "TransposedLoRAMatrix":
        """For ``x @ w.T``, as a tied output layer has it. Nothing is dropped out there."""
        return TransposedLoRAMatrix(self)

    mT = T

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        return self.add_to(x @ self._flat_base(), x)

    def __getitem__(self, indices: Any) -> jax.Array:
        indices = jnp.asarray(indices)
        if not jnp.issubdtype(indices.dtype, jnp.integer) or is_quantized_matrix(self.base):
            raise TypeError(
                "w[indices] needs integers and a table of floats; got "
                f"{indices.dtype} and {type(self.base).__name__}"
            )
        return self.add_rows_to(self._flat_base()[indices], indices)

    def add_to(self, y: jax.Array, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """``x`` times this matrix, of ``y = x W + bias``, computed in float32, rounded once.

        Args:
          y: ``(..., m)``.
          x: ``(..., n)``.
          bias: ``(m,)`` or None.
        """
        self._check_no_stack()
        dtype = float_dtype(y.dtype)
        x = self._dropped_out(x.astype(dtype))
        return self.add_product_to(y, x @ self.a.mT.astype(dtype) @ self.b.astype(dtype), bias)

    def add_rows_to(self, rows: jax.Array, indices: jax.Array) -> jax.Array:
        """Rows ``indices`` of this matrix, of those of ``W``."""
        self._check_no_stack()
        dtype = float_dtype(rows.dtype)
        return self.add_product_to(rows, self.a.mT[indices].astype(dtype) @ self.b.astype(dtype))

    def add_product_to(
        self, y: jax.Array, low: jax.Array, bias: jax.Array | None = None
    ) -> jax.Array:
        """As :meth:`add_to`, of ``low = (x A^T) B`` in float32."""
        dtype = low.dtype
        moved = self.scale * low
        if self.magnitude is not None:
            scales = _broadcast(self.column_scales().astype(dtype), y.ndim)
            product = y.astype(dtype)
            if bias is not None:
                product -= _broadcast(bias.astype(dtype), y.ndim)
            moved = (scales - 1) * product + scales * moved
        return (y.astype(dtype) + moved).astype(y.dtype)

    def merged(self) -> jax.Array:
        """The matrix, in the dtype of ``base``, rounded once."""
        base = dequantized(self.base)
        dtype = float_dtype(base.dtype)
        w = base.astype(dtype) + low_rank(self.a, self.b, self.scale, dtype).reshape(base.shape)
        if self.magnitude is not None:
            scales = self.column_scales()
            flat = w.reshape(*self._flat_shape()) * scales[..., None, :].astype(dtype)
            w = flat.reshape(base.shape)
        return w.astype(base.dtype)

    def column_scales(self) -> jax.Array:
        """Of DoRA, what the columns are multiplied with, ``(..., m)``."""
        assert self.magnitude is not None
        return column_scales(self.base, self.a, self.b, self.scale, self.magnitude)

    def _dropped_out(self, x):
        if self.dropout_key is None or not self.dropout:
            return x
        kept = random_bits.uniform(self.dropout_key, *random_bits.element_indices(x.shape))
        return jnp.where(kept >= self.dropout, x / (1 - self.dropout), 0)

    def _flat_shape(self):
        return (*self.a.shape[:-2], self.a.shape[-1], self.b.shape[-1])

    def _flat_base(self):
        self._check_no_stack()
        if is_quantized_matrix(self.base):
            return self.base
        return self.base.reshape(self._flat_shape())

    def _check_no_stack(self):
        if self.a.ndim != 2:
            raise TypeError(
                f"x @ w needs a matrix, and w is a stack {self.shape}: use jax.lax.scan or jax.vmap"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class TransposedLoRAMatrix:
    """For ``x @ w.T``: ``x W^T + scale (x B^T) A``."""

    matrix: LoRAMatrix

    # NumPy arrays, too, leave `x @ w.T` to this class.
    __array_ufunc__ = None

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        x = self.scaled(jnp.asarray(x))
        return self.add_to(x @ dequantized(self.matrix.base).mT, x)

    def scaled(self, x: jax.Array) -> jax.Array:
        """``x``, with DoRA times what scales the columns: those are what it is summed over."""
        if self.matrix.magnitude is None:
            return x
        scales = _broadcast(self.matrix.column_scales(), x.ndim)
        return (x.astype(scales.dtype) * scales).astype(x.dtype)

    def add_to(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """``x`` scaled times the transposed matrix, of ``y``, which is it times ``W^T``."""
        w, dtype = self.matrix, float_dtype(y.dtype)
        low = x.astype(dtype) @ w.b.mT.astype(dtype) @ w.a.astype(dtype)
        return (y.astype(dtype) + w.scale * low).astype(y.dtype)


def low_rank(a: jax.Array, b: jax.Array, scale: float, dtype: Any) -> jax.Array:
    """``scale A^T B``, ``(..., n, m)``."""
    return scale * jnp.matmul(a.mT.astype(dtype), b.astype(dtype), precision="highest")


def _broadcast(row: jax.Array, ndim: int) -> jax.Array:
    return row.reshape((1,) * (ndim - row.ndim) + row.shape)
