"""How a low-bit array is specified: table, bits, scales, rounding."""

import dataclasses
import numbers
from typing import Literal, get_args

from optax_lowbit.quant import codebooks, packing

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
