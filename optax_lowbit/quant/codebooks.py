"""Named code tables and the decision points between their values.

A code table (codebook) lists the values in [-1, 1] that a b-bit code can stand for. The tables here
are equal, to the last bit of float32, to those of the systems they come from:

====================================  ==============================================================
``"dynamic_exponent"``                lpmm ``nonlinear``, torchao 4-bit (signed), bitsandbytes 8-bit
``"dynamic_exponent_nozero"``         lpmm ``nonlinear-nozero`` ("DE-0")
``"linear"``                          lpmm ``power-1``, torchao 4-bit (unsigned)
``"power2"``, ``"power3"``            lpmm ``power-2``, ``power-3``
``"integer"``                         symmetric integers over their largest magnitude
``"nf4"``, ``"fp4"``, ``"af4"``       bitsandbytes (af4, of blocks of 64: in descending order)
====================================  ==============================================================

References:
  Li et al, `Memory Efficient Optimizers with 4-bit States <https://arxiv.org/abs/2309.01507>`_,
  2023, Appendix E; Dettmers et al, `8-bit Optimizers via Block-wise Quantization
  <https://arxiv.org/abs/2110.02861>`_, 2022; Dettmers et al, `QLoRA
  <https://arxiv.org/abs/2305.14314>`_, 2023, Appendix E; Yoshida, `NF4 Isn't Information
  Theoretically Optimal (and that's Good) <https://arxiv.org/abs/2306.06965>`_, 2023.
"""

import functools
from typing import NamedTuple

import numpy as np

BITS = (2, 3, 4, 8)

_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

_AF4 = (
    -1.0,
    -0.69441008,
    -0.51243739,
    -0.3736951,
    -0.25607552,
    -0.14982478,
    -0.04934812,
    0.0,
    0.04273164,
    0.12934483,
    0.21961274,
    0.31675666,
    0.42563882,
    0.55496234,
    0.72424863,
    1.0,
)

# Indexed by bit pattern (bit 3 is the sign), hence not sorted. Not the OCP E2M1 table: the
# subnormal is 1/192, not 1/12.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


def _linspace(start: float, stop: float, num: int) -> np.ndarray:
    """Float32 ``linspace`` as PyTorch computes it: from both ends, with fused multiply-adds.

    The fused operation is emulated in float64, which holds a product of two float32 exactly.
    """
    step = np.float64((np.float32(stop) - np.float32(start)) / np.float32(num - 1))
    index = np.arange(num, dtype=np.float64)
    from_start = np.float64(np.float32(start)) + step * index
    from_stop = np.float64(np.float32(stop)) - step * (num - 1 - index)
    return np.where(index < num // 2, from_start, from_stop).astype(np.float32)


def _dynamic_exponent(bits: int, signed: bool) -> np.ndarray:
    levels = bits - 1
    values: list[np.ndarray] = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    for level in range(levels):
        edges = _linspace(0.1, 1.0, 2 ** (level + (not signed)) + 1)
        midpoints = (edges[:-1] + edges[1:]) / np.float32(2)
        # Float32 times float32, as in the references: another order moves the last bit.
        magnitudes = np.float32(10.0 ** (level - levels + 1)) * midpoints
        values += [magnitudes, -magnitudes] if signed else [magnitudes]
    return np.sort(np.concatenate(values))


def _dynamic_exponent_nozero(bits: int, signed: bool) -> np.ndarray:
    table = _dynamic_exponent(bits, signed)
    if not signed:
        # Overwritten rather than removed, as in the paper: one of the codes is given up.
        table[0] = table[1]
    return table


def _power(bits: int, signed: bool, exponent: int) -> np.ndarray:
    if signed:
        base = _linspace(-1.0, 1.0, 2**bits)
        # Repeated products: powf rounds the cube differently.
        return np.sign(base) * functools.reduce(np.multiply, [np.abs(base)] * exponent)
    return _linspace(0.0, 1.0, 2**bits + 1)[1:] ** exponent


def _integer(bits: int, signed: bool) -> np.ndarray:
    largest = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    smallest = -largest if signed else 0
    return np.arange(smallest, largest + 1, dtype=np.float32) / np.float32(largest)


def _fp4() -> np.ndarray:
    magnitudes = np.asarray(_FP4_MAGNITUDES, np.float32) / np.float32(12)
    return np.concatenate([magnitudes, np.float32(0) - magnitudes])  # 0 - 0 is +0, as there


_FAMILIES = {
    "dynamic_exponent": _dynamic_exponent,
    "dynamic_exponent_nozero": _dynamic_exponent_nozero,
    "integer": _integer,
    "linear": functools.partial(_power, exponent=1),
    "power2": functools.partial(_power, exponent=2),
    "power3": functools.partial(_power, exponent=3),
}
_FIXED = {
    "af4": lambda: np.asarray(_AF4, np.float32),
    "fp4": _fp4,
    "nf4": lambda: np.asarray(_NF4, np.float32),
}

NAMES = tuple(sorted([*_FAMILIES, *_FIXED]))


def codebook(name: str, bits: int, signed: bool) -> np.ndarray:
    """The values that the codes ``0 .. 2**bits - 1`` of a named table stand for.

    Args:
      name: One of ``"dynamic_exponent"``, ``"dynamic_exponent_nozero"``, ``"linear"``,
        ``"power2"``, ``"power3"``, ``"integer"``, ``"nf4"``, ``"fp4"``, ``"af4"``.
      bits: 2, 3, 4 or 8; 4 for the last three.
      signed: Whether the table covers [-1, 1] or [0, 1]; True for the last three.

    Returns:
      A float32 array of ``2**bits`` values (``2**bits - 1`` for a signed ``"integer"``), ascending
      except for ``"fp4"``, whose codes are bit patterns. With ``E = bits - 1`` the tables are

      * dynamic exponent: 0, 1 and, for ``i = 0 .. E-1``, the midpoints of ``2**i`` equal parts of
        [0.1, 1] (``2**(i+1)`` if unsigned) times ``10**(i-E+1)``, mirrored if signed. There is a +1
        and no -1. Without zero (unsigned only): code 0 repeats code 1.
      * linear, power2, power3: ``((i + 1) / 2**bits) ** p``, so zero is left out; signed, the
        ``2**bits`` equally spaced points of [-1, 1], sign kept, to the power ``p``.
      * integer: ``i / (2**(bits-1) - 1)``, or ``i / (2**bits - 1)`` if unsigned.

    Raises:
      ValueError: If there is no such table.

    Examples:
      >>> from optax_lowbit import quant
      >>> quant.codebook("linear", 2, signed=False)
      array([0.25, 0.5 , 0.75, 1.  ], dtype=float32)
      >>> quant.codebook("dynamic_exponent", 2, signed=True)
      array([-0.55,  0.  ,  0.55,  1.  ], dtype=float32)

    References:
      Li et al, `Memory Efficient Optimizers with 4-bit States <https://arxiv.org/abs/2309.01507>`_,
      2023, Section 3 and Appendix E.
    """
    if name in _FIXED:
        if bits != 4 or not signed:
            raise ValueError(
                f"codebook {name!r} has 4 bits and is signed, got bits={bits}, signed={signed}"
            )
        return _FIXED[name]()
    if name not in _FAMILIES:
        raise ValueError(f"codebook must be one of {NAMES} or a tuple of values, got {name!r}")
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits!r}")
    return _FAMILIES[name](bits, signed)


class DecisionTable(NamedTuple):
    """What nearest rounding to a code table needs; numpy, so that it is a constant under jit."""

    sorted_values: np.ndarray  # float32 [k], ascending
    # float32 [k - 1]: (sorted_values[i] + sorted_values[i + 1]) / 2, rounded to float32.
    boundaries: np.ndarray
    # uint8 [k]: the code of each sorted value; None where that is its own index.
    codes: np.ndarray | None


@functools.lru_cache(maxsize=256)
def decision_table(values: tuple[float, ...]) -> DecisionTable:
    """Sorts a code table and places the boundaries half-way between neighbours, in float32."""
    table = np.asarray(values, np.float32)
    order = np.argsort(table, kind="stable")
    ascending = table[order]
    boundaries = (ascending[:-1] + ascending[1:]) * np.float32(0.5)
    is_sorted = bool((order == np.arange(order.size)).all())
    return DecisionTable(ascending, boundaries, None if is_sorted else order.astype(np.uint8))
