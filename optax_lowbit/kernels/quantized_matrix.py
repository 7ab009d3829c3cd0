"""A frozen matrix in few bits that is used as ``x @ w``."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowbit.kernels import quantization
from optax_lowbit.kernels.backends import Backend, checked
from optax_lowbit.kernels.quantized_dot import quantized_dot
from optax_lowbit.quant import QuantizedArray, QuantSpec, packing, rounding, scaling
from optax_lowbit.quant.array import code_padding, compute_scales, to_float32
from optax_lowbit.quant.offset_scales import offset_scales

# As QLoRA: 4.127 bits an element.
NF4 = QuantSpec(
    codebook="nf4", bits=4, signed=True, scaling="block", block_size=64, double_quant="offset"
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedMatrix:
    r"""A frozen matrix ``(..., n, m)`` in few bits, for ``x @ w``.

    Made by :func:`quantize_matrix`. A product dequantizes it, and so does its derivative with
    respect to ``x``, again: what is kept for a backward pass is the matrix in few bits. Nothing is
    differentiated with respect to the matrix. It can't be used as an array otherwise; that raises a
    TypeError, and :meth:`dequantize` gives the array.

    A pytree: `jax.lax.scan` slices a stack of them, with leading axes, and `jax.vmap` maps over it.

    **Memory.** Four bits an element, and for each block of 64 a scale: 4 bytes, or 8 bits under
    double quantization, which makes 4.127 bits. Of a product, the matrix in the dtype of ``x``,
    for as long as the product takes; of a kernel's, on TPUs and GPUs and for large matrices on
    CPUs, a tile of it.

    Attributes:
      rows: ``(..., m, n)``, its columns, in blocks along ``n``, which is summed over. If ``n`` is
        no multiple of the block, the columns one after the other, ``(..., m * n)``, and blocks run
        on from one to the next. Both are the order of a PyTorch weight in bitsandbytes.
      n: Rows of the matrix.
      m: Columns of the matrix.
      backend: What multiplies, a :data:`~optax_lowbit.kernels.backends.Backend`; to compile for a
        platform that this process does not have, it must be named.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from optax_lowbit import qlora
      >>> w = qlora.quantize_matrix(jax.random.normal(jax.random.key(0), (256, 512)))
      >>> (jnp.ones((2, 256)) @ w).shape, w.shape
      ((2, 512), (256, 512))
      >>> round(w.bits_per_parameter, 3)
      4.127

    References:
      Dettmers et al, `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, Section 3.
    """

    rows: QuantizedArray
    n: int = dataclasses.field(metadata={"static": True})
    m: int = dataclasses.field(metadata={"static": True})
    backend: Backend = dataclasses.field(default="auto", metadata={"static": True})

    # NumPy arrays, too, leave `x @ w` to this class.
    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, ...]:
        """``(..., n, m)``."""
        return (*self.rows.shape[: self._stack_axes()], self.n, self.m)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self._stack_axes() + 2

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype that :meth:`dequantize` gives."""
        return self.rows.dtype

    @property
    def spec(self) -> QuantSpec:
        """How it is kept."""
        return self.rows.spec

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, also of abstract ones."""
        return self.rows.nbytes

    @property
    def bits_per_parameter(self) -> float:
        """Bits of its arrays for each element."""
        return 8 * self.nbytes / self.size

    def __repr__(self) -> str:
        if not hasattr(self.rows, "codes") or not hasattr(self.rows.codes, "ndim"):
            return f"QuantizedMatrix(rows={self.rows})"
        return f"QuantizedMatrix(shape={self.shape}, dtype={self.dtype}, spec={self.spec})"

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise TypeError("a QuantizedMatrix is no array: use dequantize()")

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        return self.left_dot(x)

    def left_dot(
        self, x: jax.Array, *, out_sharding: jax.sharding.NamedSharding | None = None
    ) -> jax.Array:
        """``x @ w``, floats ``(..., n)`` to ``(..., m)`` in their dtype, summed up in float32.

        Args:
          x: The left factor.
          out_sharding: Of the product, on an Explicit mesh that leaves a choice.

        Raises:
          TypeError: If this is a stack of matrices, or ``x`` is not of a float dtype.
          ValueError: If the shapes don't fit.
        """
        if self.ndim != 2:
            raise TypeError(
                f"x @ w needs a matrix, and w is a stack {self.shape}: use jax.lax.scan or jax.vmap"
            )
        return quantized_dot(
            jnp.asarray(x), self.rows, (self.n, self.m),
            out_sharding=out_sharding, backend=self.backend,
        )  # fmt: skip

    def dequantize(self) -> jax.Array:
        """The array, of ``shape`` and ``dtype``."""
        stack = self.rows.shape[: self._stack_axes()]
        backend: Backend = self.backend if self.backend in ("auto", "cpu") else "reference"
        return quantization.dequantize(self.rows, backend).reshape(*stack, self.m, self.n).mT

    def _stack_axes(self) -> int:
        is_flat = self.rows.last_dim != self.n or self.n % self.spec.group_size != 0
        return self.rows.ndim - (1 if is_flat else 2)


def quantize_matrix(
    w: jax.Array, spec: QuantSpec = NF4, *, backend: Backend = "auto"
) -> QuantizedMatrix:
    """Keeps a matrix in few bits, for ``x @ w``.

    Args:
      w: Floats ``(..., n, m)``: the kernel of a Flax layer, or a stack of them, each of which is
        quantized for itself. Of a PyTorch weight ``(m, n)``: its transpose.
      spec: How to store it: 4 bits, scales of blocks.
      backend: What multiplies by it, a :data:`~optax_lowbit.kernels.backends.Backend`; it raises
        where it cannot.

    Returns:
      A :class:`QuantizedMatrix`. Codes, scales and dequantized values are those of bitsandbytes,
      bit for bit, for the tables and block sizes that it has.

    Raises:
      TypeError: If ``w`` is not a float array, or ``spec`` is no :class:`QuantSpec`.
      ValueError: If ``w`` has no elements or fewer than two axes, the spec does not fit, or there
        is no such backend.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_lowbit import QuantSpec, qlora
      >>> fp4 = QuantSpec(codebook="fp4", bits=4, signed=True, scaling="block", block_size=128)
      >>> qlora.quantize_matrix(jnp.ones((3, 5)), fp4).dequantize().shape
      (3, 5)
    """
    check_spec(spec)
    checked(backend)
    if not hasattr(w, "dtype") or not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(
            f"w must be an array of a float dtype, got {getattr(w, 'dtype', type(w).__name__)}"
        )
    if w.ndim < 2 or not w.size:
        raise ValueError(f"w must have two axes or more, and elements, got shape {w.shape}")
    rows = _quantized_rows(jnp.asarray(w), spec)
    return QuantizedMatrix(rows, w.shape[-2], w.shape[-1], backend)


def abstract_matrix(
    shape: tuple[int, ...], dtype: Any, spec: QuantSpec = NF4, *, backend: Backend = "auto"
) -> QuantizedMatrix:
    """What :func:`quantize_matrix` would give, without an array.

    Args:
      shape: ``(..., n, m)``.
      dtype: A float dtype.
      spec: How it is stored.
      backend: What multiplies by it.

    Returns:
      A :class:`QuantizedMatrix` of `jax.ShapeDtypeStruct`.

    Raises:
      TypeError, ValueError: As :func:`quantize_matrix`.

    Examples:
      >>> from optax_lowbit import qlora
      >>> qlora.abstract_matrix((80, 8192, 22016), "bfloat16").nbytes / 2**30
      6.93...
    """
    like = jax.ShapeDtypeStruct(shape, dtype)
    return jax.eval_shape(functools.partial(quantize_matrix, spec=spec, backend=backend), like)


def check_spec(spec: QuantSpec) -> None:
    """Raise unless matrices can be kept so."""
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"spec must be a QuantSpec, got {type(spec).__name__}")
    wrong = {
        "bits=4": spec.bits != 4,
        "signed=True": not spec.signed,
        "scaling='block'": spec.scaling != "block",
        "an even block_size": spec.block_size % 2 != 0,
        "rounding='nearest'": spec.rounding != "nearest",
        "signed_scale=False": spec.signed_scale,
        "double_quant=False or 'offset'": spec.double_quant is True,
    }
    needed = [name for name, is_wrong in wrong.items() if is_wrong]
    if needed:
        raise ValueError(f"spec of a matrix must have {', '.join(needed)}, got {spec}")


@functools.partial(jax.jit, static_argnames="spec")
def _quantized_rows(w: jax.Array, spec: QuantSpec) -> QuantizedArray:
    if w.ndim > 2:
        return jax.vmap(functools.partial(_quantized_rows, spec=spec))(w)
    is_whole = w.shape[0] % spec.block_size == 0
    codes, absmax = (_code_columns if is_whole else _code_flat)(to_float32(w), spec)
    scales: Any = offset_scales(absmax) if spec.double_quant else absmax
    padding = code_padding(w.size, spec.bits)
    return QuantizedArray(codes, scales, spec, padding, np.dtype(w.dtype))


def _code_columns(w: jax.Array, spec: QuantSpec) -> tuple[jax.Array, jax.Array]:
    """Packed codes ``(m, n / 2)`` and scales of a float32 matrix whose columns are whole blocks.

    What is transposed is bytes: of a transposed ``w`` XLA would read each element from another row.
    """
    n, m = w.shape
    blocks = w.reshape(-1, spec.block_size, m)
    absmax = scaling.absmax(blocks, (1,))
    # bitsandbytes multiplies by the reciprocal of a scale.
    factors = jnp.broadcast_to(scaling.divide(jnp.float32(1), absmax), blocks.shape)

    def encode(x, factor):
        return rounding.nearest_codes(x * factor, spec.values)

    last = [array.swapaxes(1, 2) for array in (blocks, factors)]
    codes = packing.encode_and_pack(encode, last, spec.bits, spec.block_size)
    return codes.swapaxes(1, 2).reshape(n * spec.bits // 8, m).T, absmax[:, 0].T


def _code_flat(w: jax.Array, spec: QuantSpec) -> tuple[jax.Array, jax.Array]:
    """Packed codes and scales of the columns of a float32 matrix one after the other, 1-D.

    As :func:`_code_columns`, but a last block that is not full is divided by its scale, as
    bitsandbytes does; codes differ where the two do. Both are within `encode_and_pack`: XLA would
    else normalize an element anew for each boundary it is compared with.
    """
    rows = w.mT.reshape(-1)
    absmax: Any = compute_scales(rows, dataclasses.replace(spec, double_quant=False))
    factors, divisors = scaling.divide(jnp.float32(1), absmax), jnp.ones_like(absmax)
    if rows.size % spec.block_size:
        factors, divisors = factors.at[-1].set(1), divisors.at[-1].set(absmax[-1])

    def encode(x, factor, divisor):
        return rounding.nearest_codes(scaling.divide(x * factor, divisor), spec.values)

    wide = [
        scaling.expand_scales(scales, spec.scaling, spec.block_size, rows.shape)
        for scales in (factors, divisors)
    ]
    return packing.encode_and_pack(encode, [rows, *wide], spec.bits, spec.group_size), absmax
