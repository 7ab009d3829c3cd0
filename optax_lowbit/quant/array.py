"""The low-bit array: made from a float array, and read back."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowbit.quant import (
    double_quant,
    offset_scales,
    packing,
    random_bits,
    rounding,
    scaling,
)
from optax_lowbit.quant.double_quant import CodedScales
from optax_lowbit.quant.offset_scales import OffsetScales
from optax_lowbit.quant.spec import QuantSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class QuantizedArray:
    """A float array kept as packed codes and scales; a pytree whose leaves are those arrays.

    Made by :func:`quantize`. Where ``b = spec.bits`` and the array has shape ``(..., n)``:

    1. ``codes`` is uint8 of shape ``(..., ceil(n * b / 8))``; leading axes are the array's own.
    2. ``scales`` is float32, or a tuple of float32 arrays (``"rank1"``), each of the array's rank;
       axes that it has no scales along are 1. See :mod:`optax_lowbit.quant.scaling`. Under
       ``spec.double_quant`` it is a :class:`~optax_lowbit.quant.double_quant.CodedScales` or an
       :class:`~optax_lowbit.quant.offset_scales.OffsetScales`.
    3. The static fields hold for any slice of leading axes and for any slice of the last axis at
       borders of ``spec.group_size``, hence under ``vmap``, ``scan`` and ``shard_map``. Under
       ``spec.double_quant`` the rows of a slice begin at a multiple of 256; where it is "offset",
       they hold for slices of axes that were mapped over when it was made alone.
    4. A 0-d array has 0-d codes (one byte, not packed) and a 0-d scale.

    Attributes:
      codes: The packed codes.
      scales: The scales.
      spec: The :class:`QuantSpec` it was made with.
      padding: Places for codes in the last bytes that hold none; None where codes are not packed
        because the array has no axes.
      dtype: The dtype that :func:`dequantize` gives.
    """

    codes: jax.Array
    scales: Any  # see 2
    spec: QuantSpec = dataclasses.field(metadata={"static": True})
    padding: int | None = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that it stands for."""
        if self.padding is None:
            return self.codes.shape
        return (*self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.spec.bits - self.padding)

    @property
    def last_dim(self) -> int:
        """Length of the last axis; 1 for an array without axes."""
        return self.shape[-1] if self.shape else 1

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.codes.ndim

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, also of abstract ones."""
        leaves = jax.tree.leaves((self.codes, self.scales))
        return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves)

    def __repr__(self) -> str:
        # It may be a tree of shardings, of dtypes, ...
        if not isinstance(self.codes, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            return f"QuantizedArray(codes={self.codes}, scales={self.scales})"
        return f"QuantizedArray(shape={self.shape}, dtype={self.dtype}, spec={self.spec})"


def is_quantized(x: Any) -> bool:
    """Whether ``x`` is a :class:`QuantizedArray`; the ``is_leaf`` to pass to tree functions.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_lowbit
      >>> state = optax_lowbit.scale_by_adam4bit().init({"w": jnp.ones((128, 128))})
      >>> floats = jax.tree.map(
      ...     lambda x: optax_lowbit.dequantize(x) if optax_lowbit.is_quantized(x) else x,
      ...     state, is_leaf=optax_lowbit.is_quantized)
      >>> floats.mu["w"].shape
      (128, 128)
    """
    return isinstance(x, QuantizedArray)


def quantize(
    x: jax.Array, spec: QuantSpec, *, key: jax.Array | int | None = None
) -> QuantizedArray:
    """Keeps a float array in few bits.

    With ``s`` the element's scale and ``q`` the code table, ``code = argmin_i |q[i] - x/s|``, ties
    to the lower value; or, with stochastic rounding, one of the two neighbours of ``x / s``, drawn
    so that the mean is ``x / s``. All maths is in float32.

    A zero block stays zero. A finite input never gives NaN. A non-finite element makes itself and
    elements that it gives their scale non-finite, and no others (under ``double_quant``: all that
    share a scale with its scale), so that overflow stays visible;
    the sign of an infinity is not kept.

    Args:
      x: A float array of any shape; under ``spec.signed=False`` without negative values (they would
        become the least table value).
      spec: How to store it.
      key: For ``spec.rounding="stochastic"``, which needs it, and to round 8-bit scales
        stochastically: a `jax.random.key` (Threefry) or a seed. The bits of an element depend on
        its index alone, so they are the same on every mesh.

    Returns:
      A :class:`QuantizedArray`: ``spec.bits / 8`` bytes an element, and 4 for each scale. Under jit
      no float32 copy of ``x`` is kept.

    Raises:
      TypeError: If ``x`` is not a float array.
      ValueError: If ``key`` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_lowbit import QuantSpec, dequantize, quantize
      >>> spec = QuantSpec(codebook="dynamic_exponent", bits=4, signed=True, scaling="block")
      >>> q = quantize(jnp.linspace(-1.0, 1.0, 256), spec)
      >>> q.codes.shape, q.scales.shape, q.nbytes
      ((128,), (2,), 136)
      >>> float(jnp.abs(dequantize(q) - jnp.linspace(-1.0, 1.0, 256)).max()) < 0.12
      True

    References:
      Li et al, `Memory Efficient Optimizers with 4-bit States <https://arxiv.org/abs/2309.01507>`_,
      2023, Section 2.2. Blocks run along the last axis, not over the flattened array as there;
      the two agree where the last axis is a multiple of the block.
    """
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"x must be an array of a float dtype, got {getattr(x, 'dtype', type(x).__name__)}"
        )
    if spec.rounding == "stochastic" and key is None:
        raise ValueError("key must be given for a spec with rounding='stochastic', got None")
    words = None
    if key is not None and (spec.rounding == "stochastic" or spec.double_quant):
        words = random_bits.key_words(key)
    return _quantize(jnp.asarray(x), spec, words)


def dequantize(q: QuantizedArray) -> jax.Array:
    """The float array, of ``q.shape`` and ``q.dtype``: table value times scale, element by element.

    Raises:
      TypeError: If ``q`` is not a :class:`QuantizedArray`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_lowbit import QuantSpec, dequantize, quantize
      >>> spec = QuantSpec(codebook="linear", bits=4, signed=False, scaling="tensor")
      >>> dequantize(quantize(jnp.array([0.0, 1.0, 3.0, 4.0]), spec))
      Array([0.25, 1.  , 3.  , 4.  ], dtype=float32)
    """
    if not is_quantized(q):
        raise TypeError(f"q must be a QuantizedArray, got {type(q).__name__}")
    return _dequantize(q)


@functools.partial(jax.jit, static_argnames="spec", inline=True)
def _quantize(x: jax.Array, spec: QuantSpec, key: random_bits.Key | None) -> QuantizedArray:
    noise = None
    if key is not None and spec.rounding == "stochastic":
        noise = random_bits.uniform(key, *random_bits.element_indices(x.shape))
    values = to_float32(x)
    q = encode(values, compute_scales(values, spec), spec, x.dtype, noise)
    return with_coded_scales(q, spec, None if key is None else random_bits.fold_in(key, 0))


def with_float_scales(q: QuantizedArray) -> QuantizedArray:
    """``q`` with scales in float32, of a spec without ``double_quant``; itself if it is so."""
    if isinstance(q.scales, OffsetScales):
        scales = offset_scales.float_scales(q.scales)
    elif isinstance(q.scales, CodedScales):
        scales = double_quant.float_scales(q.scales, q.spec.signed_scale)
    else:
        return q
    spec = dataclasses.replace(q.spec, double_quant=False)
    return dataclasses.replace(q, scales=scales, spec=spec)


def with_coded_scales(
    q: QuantizedArray, spec: QuantSpec, key: random_bits.Key | None = None
) -> QuantizedArray:
    """``q``, whose scales are in float32, as ``spec`` has it; ``key`` is of stochastic rounding.

    The codes stay, though the scales under which they are read are rounded after them.
    """
    if not spec.double_quant or not q.ndim:
        return dataclasses.replace(q, spec=spec)
    scales: Any = q.scales
    if spec.double_quant == "offset":
        coded = offset_scales.offset_scales(scales)
    else:
        coded = double_quant.code_scales(scales, spec.signed_scale, key)
    return dataclasses.replace(q, scales=coded, spec=spec)


@functools.partial(jax.jit, inline=True)
def _dequantize(q: QuantizedArray) -> jax.Array:
    return decode(q).astype(q.dtype)


def decode(q: QuantizedArray) -> Any:
    """:func:`dequantize` in float32, whatever ``q.dtype``."""
    q = with_float_scales(q)
    spec = q.spec
    if q.padding is None:
        return rounding.code_values(q.codes, spec.values) * q.scales
    codes = packing.unpack(q.codes, spec.bits, spec.group_size, q.last_dim)
    scale = scaling.expand_scales(q.scales, spec.scaling, spec.block_size, q.shape)
    return rounding.code_values(codes, spec.values) * scale


def encode(
    x: jax.Array,
    scales: scaling.Scales,
    spec: QuantSpec,
    dtype: np.dtype,
    noise: jax.Array | None = None,
) -> QuantizedArray:
    """Float32 ``x`` as codes under float32 scales; ``noise`` is that of stochastic rounding."""
    noises = [] if noise is None else [noise]
    if x.ndim == 0:
        codes = _codes(spec, x, scales, *noises)
        return QuantizedArray(codes, scales, spec, None, np.dtype(dtype))
    scale = _scale_per_element(scales, spec, x.shape)
    packed = packing.encode_and_pack(
        functools.partial(_codes, spec), [x, scale, *noises], spec.bits, spec.group_size
    )
    padding = code_padding(x.shape[-1], spec.bits)
    return QuantizedArray(packed, scales, spec, padding, np.dtype(dtype))


def encode_unpacked(
    x: jax.Array, scales: scaling.Scales, spec: QuantSpec, noise: jax.Array | None = None
) -> jax.Array:
    """The codes of :func:`encode` before packing: uint8 of the shape of ``x``, not 0-d."""
    noises = [] if noise is None else [noise]
    return _codes(spec, x, _scale_per_element(scales, spec, x.shape), *noises)


def _scale_per_element(scales: scaling.Scales, spec: QuantSpec, shape: tuple[int, ...]):
    scale = scaling.expand_scales(scales, spec.scaling, spec.block_size, shape)
    return jnp.broadcast_to(scale, shape)


def _codes(spec: QuantSpec, x: jax.Array, scale: Any, *noise: jax.Array) -> jax.Array:
    normalized = scaling.divide(x, scale)
    if spec.rounding == "stochastic":
        return rounding.stochastic_codes(normalized, spec.values, *noise)
    return rounding.nearest_codes(normalized, spec.values)


def compute_scales(x: jax.Array, spec: QuantSpec, axes: int | None = None) -> scaling.Scales:
    """The scales of float32 ``x``; ``axes`` as in :func:`scaling.absmax_scales`."""
    if x.ndim == 0:
        return x if spec.signed_scale else jnp.abs(x)
    if axes is None:
        axes = scaling.rank1_axes(x.shape, spec.block_size)
    return scaling.absmax_scales(
        x, spec.scaling, spec.block_size, signed_scale=spec.signed_scale, axes=axes
    )


def abstract_quantized(shape: tuple[int, ...], dtype: np.dtype, spec: QuantSpec) -> QuantizedArray:
    """The :class:`QuantizedArray` of `jax.ShapeDtypeStruct` that :func:`quantize` would give."""
    scales: Any = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32),
        scaling.scale_shapes(shape, spec.scaling, spec.block_size),
        is_leaf=lambda s: all(isinstance(d, int) for d in s),
    )
    if not shape:
        codes: Any = jax.ShapeDtypeStruct((), jnp.uint8)
        return QuantizedArray(codes, scales, spec, None, np.dtype(dtype))
    if spec.double_quant == "offset":
        scales = offset_scales.offset_shapes(scales.shape)
    elif spec.double_quant:
        scales = double_quant.coded_shapes(scales.shape)
    *lead, n = shape
    codes = jax.ShapeDtypeStruct((*lead, packing.packed_size(n, spec.bits)), jnp.uint8)
    return QuantizedArray(codes, scales, spec, code_padding(n, spec.bits), np.dtype(dtype))


def code_padding(n: int, bits: int) -> int:
    """Code places left empty in the last byte(s) of ``n`` packed codes."""
    return packing.packed_size(n, bits) * 8 // bits - n


def to_float32(x: jax.Array) -> jax.Array:
    """``x`` in float32; finite float64 values beyond its range become its largest."""
    if x.dtype != jnp.float64:
        return x.astype(jnp.float32)
    largest = float(jnp.finfo(jnp.float32).max)
    return jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x).astype(jnp.float32)
