"""The low-bit array: how it is specified, made from a float array, and read back."""

import dataclasses
import functools
import math
import numbers
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowbit.quant import (
    codebooks,
    double_quant,
    offset_scales,
    packing,
    random_bits,
    rounding,
    scaling,
)
from optax_lowbit.quant.double_quant import CodedScales
from optax_lowbit.quant.offset_scales import OffsetScales

Scaling = Literal["tensor", "row", "column", "block", "rank1"]
Rounding = Literal["nearest", "stochastic"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How a float array is kept in few bits. Hashable, comparable by value, never callable.

    Being neither a number nor a callable it stays a static argument under
    :func:`optax.inject_hyperparams` and :func:`jax.jit`.

    Raises:
      ValueError, TypeError: At construction, if a field or a combination of fields is impossible.

    Examples:
      >>> from optax_lowbit import QuantSpec
      >>> QuantSpec(codebook="linear", bits=4, signed=False, scaling="rank1").block_size
      128
      >>> QuantSpec(codebook=(-1.0, -0.25, 0.25, 1.0), bits=2, signed=True, scaling="row").bits
      2
    """

    # A name of `codebooks.NAMES`, or the table: code i stands for the i-th value, in [-1, 1].
    codebook: str | tuple[float, ...]
    # Bits that a code takes in storage: 2, 3, 4 or 8.
    bits: int
    # Whether the table has values of both signs. Unsigned specs are for arrays without negative
    # values, such as second moments.
    signed: bool
    # Which elements share a scale; see `optax_lowbit.quant.scaling`.
    scaling: Scaling
    # Elements in a block along the last axis. Codes are packed in groups of this size whatever the
    # scaling, so it is also the granularity at which the last axis can be sharded without traffic.
    block_size: int = 128
    # "stochastic" rounds up or down at random so that the mean is kept; quantizing needs a key.
    rounding: Rounding = "nearest"
    # Let the scale carry the sign of the element with the largest magnitude, which then is always
    # code +1, exactly: the dynamic-exponent tables have a +1 and no -1.
    signed_scale: bool = False
    # Keep the scales in 8 bits, and one float32 for each 256 of them down a column of blocks; see
    # `optax_lowbit.quant.double_quant`. "offset" is for weights, as in QLoRA: less their mean, in
    # groups over the whole array; see `optax_lowbit.quant.offset_scales`. Needs scaling="block".
    double_quant: bool | Literal["offset"] = False

    def __post_init__(self):
        if not isinstance(self.codebook, str | tuple):
            raise TypeError(
                f"codebook must be a name or a tuple of floats, got {type(self.codebook).__name__}"
            )
        if type(self.bits) is not int or self.bits not in codebooks.BITS:
            raise ValueError(f"bits must be one of {codebooks.BITS}, got {self.bits!r}")
        for name in ("signed", "signed_scale"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        if not isinstance(self.double_quant, bool) and self.double_quant != "offset":
            raise TypeError(f"double_quant must be a bool or 'offset', got {self.double_quant!r}")
        if self.scaling not in get_args(Scaling):
            raise ValueError(f"scaling must be one of {get_args(Scaling)}, got {self.scaling!r}")
        if self.rounding not in get_args(Rounding):
            raise ValueError(f"rounding must be one of {get_args(Rounding)}, got {self.rounding!r}")
        if type(self.block_size) is not int or self.block_size < 1:
            raise ValueError(f"block_size must be a positive int, got {self.block_size!r}")
        if self.signed_scale and not (self.signed and self.scaling != "rank1"):
            raise ValueError(
                "signed_scale=True needs signed=True and a scaling other than 'rank1', "
                f"got signed={self.signed}, scaling={self.scaling!r}"
            )
        if self.double_quant and self.scaling != "block":
            raise ValueError(
                f"double_quant={self.double_quant!r} needs scaling='block', "
                f"got scaling={self.scaling!r}"
            )
        if self.double_quant == "offset" and self.signed_scale:
            raise ValueError("double_quant='offset' needs signed_scale=False, got True")
        self._check_table()

    def _check_table(self):
        if isinstance(self.codebook, str):
            codebooks.codebook(self.codebook, self.bits, self.signed)
            return
        values = self.codebook
        if not 2 <= len(values) <= 2**self.bits:
            raise ValueError(
                f"a codebook for bits={self.bits} has 2 to {2**self.bits} values, got {len(values)}"
            )
        lowest = -1.0 if self.signed else 0.0
        for value in values:
            if not isinstance(value, numbers.Real) or not lowest <= value <= 1.0:
                raise ValueError(
                    f"codebook values must be numbers in [{lowest:g}, 1] for "
                    f"signed={self.signed}, got {value!r}"
                )

    @property
    def values(self) -> tuple[float, ...]:
        """The code table; code ``i`` stands for ``values[i]`` times its scale."""
        if isinstance(self.codebook, tuple):
            return self.codebook
        return tuple(codebooks.codebook(self.codebook, self.bits, self.signed).tolist())

    @property
    def group_size(self) -> int:
        """Codes that are packed together: a multiple of ``block_size`` that fills whole bytes."""
        return packing.group_size(self.bits, self.block_size)


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
