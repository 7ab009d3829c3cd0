"""How lpmm, torchao and bitsandbytes lay out the state of one parameter.

All three divide the flattened tensor into blocks. Where blocks end with rows, or the tensor is a
vector, that is the layout of :class:`~optax_lowbit.QuantizedArray` but for the order of the codes
in a byte, and codes and scales are taken over as they are. Otherwise the tensor is dequantized.

References:
  lpmm: https://github.com/thu-ml/low-bit-optimizers at e3e2854; torchao 0.18; bitsandbytes 0.50.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowbit.optimizers import FactoredMoment
from optax_lowbit.quant import QuantizedArray, QuantSpec, packing
from optax_lowbit.quant.array import code_padding
from optax_lowbit.quant.scaling import rank1_axes

Entries = Mapping[str, Any]
Shape = tuple[int, ...]

# Of lpmm's flattened codes, before packing.
_LPMM_GROUP = 2048
# Of a vector under rank-1, and of its default configurations.
_LPMM_BLOCK = 128
# Since 0.44, and before.
_BITSANDBYTES_BLOCKS = (256, 2048)


def read_lpmm(entries: Entries, shape: Shape) -> dict[str, Any]:
    """Moments by lpmm's names, of ``lpmm.optim.AdamW`` or ``SGD``.

    An entry such as ``exp_avg`` has bytes of 4-bit codes, the even element in the low nibble,
    padded to a multiple of 2048 elements and by one byte. ``exp_avg_qstate`` has the table and,
    in ``overhead``, ``max1`` and ``scaled_shape`` of blocks, or ``max_dims`` of rank-1.
    """
    moments = {}
    for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
        if name in entries:
            state = entries.get(f"{name}_qstate", {})
            moments[name] = _lpmm_moment(np.asarray(entries[name]), state, shape)
    if "exp_avg_sq_row" in entries:
        rows = np.asarray(entries["exp_avg_sq_row"], np.float32)[..., None]
        columns = np.asarray(entries["exp_avg_sq_col"], np.float32)[..., None, :]
        moments["exp_avg_sq"] = FactoredMoment(jnp.asarray(rows), jnp.asarray(columns))
    return moments


def _lpmm_moment(stored: np.ndarray, state: Entries, shape: Shape) -> Any:
    if stored.dtype.kind == "f":
        return stored
    table, overhead = _table(state["qmap"]), state["overhead"]
    bits = (table.size - 1).bit_length()
    codes = _lpmm_codes(stored, bits, shape)
    max_dims = overhead.get("max_dims")
    if max_dims is not None:
        each = max_dims.values() if isinstance(max_dims, Mapping) else max_dims
        return _rank1(codes, tuple(np.asarray(x, np.float32) for x in each), table)
    scaled_shape = overhead.get("scaled_shape")
    block = _LPMM_BLOCK if scaled_shape is None else int(np.asarray(scaled_shape)[-1])
    return _blockwise(codes, overhead["max1"], table, block)


def _lpmm_codes(stored: np.ndarray, bits: int, shape: Shape) -> np.ndarray:
    if stored.dtype.itemsize > 1:  # its simulated quantizers pack nothing
        # They keep the zeros that fill the last block.
        return _shaped(stored.reshape(-1)[: _size(shape)], shape)
    width = bits if bits in (1, 2, 4) else 8
    padded = -(-_size(shape) // _LPMM_GROUP) * _LPMM_GROUP
    if stored.size != padded * width // 8 + 1:
        raise ValueError(f"{stored.size} bytes of {bits}-bit codes, which is not shape {shape}")
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    codes = stored.reshape(-1, 1).view(np.uint8) >> shifts & (2**width - 1)
    return codes.reshape(-1)[: _size(shape)].reshape(shape)


def read_torchao(entries: Entries, shape: Shape) -> dict[str, Any]:
    """Moments by torchao's names, of ``AdamW4bit``, ``AdamW8bit`` and such.

    ``exp_avg`` and ``exp_avg_sq`` are float arrays, or have ``codes`` (4 bits: the even element in
    the high nibble), ``scale`` and ``qmap``.
    """
    names = [name for name in entries if name != "step"]
    return {name: _torchao_moment(entries[name], shape) for name in names}


def _torchao_moment(stored: Any, shape: Shape) -> Any:
    if not isinstance(stored, Mapping):
        return np.asarray(stored)
    codes, table = np.asarray(stored["codes"]).reshape(-1), _table(stored["qmap"])
    if table.size == 16:
        codes = np.stack([codes >> 4, codes & 15], axis=-1)
    scales = np.asarray(stored["scale"])
    block = _size(shape) // max(scales.size, 1)
    return _blockwise(_shaped(codes, shape), scales, table, block)


def read_bitsandbytes(entries: Entries, shape: Shape) -> dict[str, Any]:
    """Moments ``state1`` and ``state2`` of an 8-bit optimizer of bitsandbytes.

    They are float arrays, or uint8 with ``absmax1`` (of blocks) and ``qmap1``.
    """
    # Where the state was saved for FSDP, what is quantized is in a dict of its own.
    entries = {**entries, **entries.get("__bnb_optimizer_quant_state__", {})}
    moments = {}
    for number in (1, 2):
        if f"state{number}" not in entries:
            continue
        stored = np.asarray(entries[f"state{number}"])
        if stored.dtype == np.uint8:
            absmax = np.asarray(entries[f"absmax{number}"])
            blocks = [b for b in _BITSANDBYTES_BLOCKS if -(-_size(shape) // b) == absmax.size]
            table = _table(entries[f"qmap{number}"])
            block = (blocks or _BITSANDBYTES_BLOCKS)[0]
            stored = _blockwise(_shaped(stored, shape), absmax, table, block)
        moments[f"state{number}"] = stored
    return moments


def _blockwise(codes: np.ndarray, scales: Any, table: np.ndarray, block: int) -> Any:
    _check_codes(codes, table)
    scales = np.asarray(scales, np.float32).reshape(-1)
    if not block or scales.size != -(-codes.size // block):
        raise ValueError(f"{scales.size} scales of blocks of {block} for {codes.size} elements")
    if codes.ndim and (codes.ndim == 1 or codes.shape[-1] % block == 0):
        scales = scales.reshape(*codes.shape[:-1], -(-codes.shape[-1] // block))
        return _quantized(codes, jnp.asarray(scales), table, "block", block)
    scale = np.repeat(scales, block)[: codes.size].reshape(codes.shape)
    return table[codes] * scale


def _rank1(codes: np.ndarray, maxima: tuple[np.ndarray, ...], table: np.ndarray) -> Any:
    _check_codes(codes, table)
    shapes = [
        tuple(size if axis == own else 1 for axis, size in enumerate(codes.shape))
        for own in range(codes.ndim)
    ]
    if [x.shape for x in maxima] != shapes:
        raise ValueError(f"maxima of shapes {[x.shape for x in maxima]}, which must be {shapes}")
    if rank1_axes(codes.shape, _LPMM_BLOCK) == codes.ndim:
        scales = tuple(jnp.asarray(x) for x in maxima)
        return _quantized(codes, scales, table, "rank1", _LPMM_BLOCK)
    smallest = np.broadcast_arrays(*maxima)
    return table[codes] * np.minimum.reduce(smallest)


def _check_codes(codes: np.ndarray, table: np.ndarray) -> None:
    if not 2 <= table.size <= 256:
        raise ValueError(f"a code table of {table.size} values, which must have 2 to 256")
    if codes.size and codes.max() >= table.size:
        raise ValueError(f"code {codes.max()}, beyond a table of {table.size} values")


def _quantized(codes: np.ndarray, scales: Any, table: np.ndarray, scaling, block) -> Any:
    bits = next(b for b in (2, 4, 8) if table.size <= 2**b)
    spec = QuantSpec(
        codebook=tuple(table.tolist()),
        bits=bits,
        signed=bool(table.min() < 0),
        scaling=scaling,
        block_size=block,
    )
    packed = _pack(jnp.asarray(codes, jnp.uint8), bits, spec.group_size)
    padding = code_padding(codes.shape[-1], bits)
    return QuantizedArray(packed, scales, spec, padding, np.dtype(np.float32))


_pack = jax.jit(packing.pack, static_argnames=("bits", "group"))


def _table(values: Any) -> np.ndarray:
    return np.asarray(values, np.float32).reshape(-1)


def _shaped(codes: np.ndarray, shape: Shape) -> np.ndarray:
    if codes.size != _size(shape):
        raise ValueError(f"{codes.size} codes, which is not shape {shape}")
    return codes.reshape(shape)


def _size(shape: Shape) -> int:
    return int(np.prod(shape))
