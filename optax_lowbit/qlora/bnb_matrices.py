"""One matrix in 4 bits, and the tensors that bitsandbytes has of it in a safetensors file.

Of a matrix ``P.weight`` there are: its codes, two in a byte, the first one high; ``.absmax``, the
scales of blocks; ``.quant_map``, the table; ``.quant_state.bitsandbytes__nf4``, JSON as bytes; and,
of scales in 8 bits, ``.nested_absmax`` and ``.nested_quant_map``.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from optax_lowbit.kernels.quantized_matrix import QuantizedMatrix
from optax_lowbit.qlora.safetensors_files import TensorFiles, parse_json
from optax_lowbit.quant import QuantizedArray, QuantSpec, codebooks
from optax_lowbit.quant.array import code_padding
from optax_lowbit.quant.offset_scales import GROUP, OffsetScales

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16}
# Dtypes of packed codes in a file. They are bytes all the same; FSDP wants a model in one dtype.
STORAGES = {"uint8": np.uint8, "int8": np.int8, "float64": np.float64, **DTYPES}
# Between the name of a matrix and that of its code table.
STATE = ".quant_state.bitsandbytes__"

_MAX_STATE_BYTES = 4096
_FIELDS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_FIELDS = ("nested_blocksize", "nested_dtype", "nested_offset")


@dataclasses.dataclass(frozen=True)
class _State:
    """What a matrix's JSON says."""

    quant_type: str
    blocksize: int
    dtype: str
    shape: tuple[int, int]  # of the PyTorch weight: (out, in)
    offset: float | None

    @classmethod
    def parse(cls, data: bytes, quant_type: str, where: str) -> "_State":
        fields = parse_json(data, where)
        is_nested = any(field in fields for field in _NESTED_FIELDS)
        expected = {*_FIELDS, *(_NESTED_FIELDS if is_nested else ())}
        if fields.keys() != expected:
            raise ValueError(f"{where}: must have {sorted(expected)}, has {str([*fields])[:200]}")
        shape, offset = fields["shape"], fields.get("nested_offset")
        is_shape = isinstance(shape, list) and len(shape) == 2
        rules = {
            "quant_type": fields["quant_type"] == quant_type in ("nf4", "fp4"),
            "blocksize": _is_int(fields["blocksize"]) and fields["blocksize"] in BLOCK_SIZES,
            "dtype": isinstance(fields["dtype"], str) and fields["dtype"] in DTYPES,
            "shape": is_shape and all(_is_int(x) and 0 < x < 2**40 for x in shape),
            "nested_blocksize": not is_nested or fields["nested_blocksize"] == GROUP,
            "nested_dtype": not is_nested or fields["nested_dtype"] == "float32",
            "nested_offset": not is_nested or _is_float32(offset),
        }
        for field, is_right in rules.items():
            if not is_right:
                raise ValueError(f"{where}: impossible {field!r}: {fields[field]!r:.100}")
        return cls(quant_type, fields["blocksize"], fields["dtype"], (shape[0], shape[1]), offset)

    def to_bytes(self) -> bytes:
        fields: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": self.dtype,
            "shape": list(self.shape),
        }
        if self.offset is not None:
            fields |= {
                "nested_blocksize": GROUP,
                "nested_dtype": "float32",
                "nested_offset": self.offset,
            }
        return json.dumps(fields).encode()

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        return -(-self.size // self.blocksize)

    @property
    def spec(self) -> QuantSpec:
        return QuantSpec(
            codebook=self.quant_type,
            bits=4,
            signed=True,
            scaling="block",
            block_size=self.blocksize,
            double_quant=False if self.offset is None else "offset",
        )


def parts_of(blocks: int, is_nested: bool) -> dict[str, tuple[int, Any]]:
    """Length and dtype of what a matrix has beside its codes and its JSON."""
    if not is_nested:
        return {"absmax": (blocks, np.float32), "quant_map": (16, np.float32)}
    return {
        "absmax": (blocks, np.uint8),
        "quant_map": (16, np.float32),
        "nested_absmax": (-(-blocks // GROUP), np.float32),
        "nested_quant_map": (256, np.float32),
    }


def _tables(quant_type: str) -> dict[str, np.ndarray]:
    return {
        "quant_map": codebooks.codebook(quant_type, 4, True),
        "nested_quant_map": codebooks.codebook("dynamic_exponent", 8, True),
    }


def read_matrix(files: TensorFiles, name: str, state_name: str) -> QuantizedMatrix:
    """The matrix of that name, of NumPy arrays; its JSON is under ``state_name``."""
    like = files.abstract(state_name)
    where = f"{files.where(state_name)}: {state_name!r}"
    if like.ndim != 1 or like.dtype != np.uint8 or like.size > _MAX_STATE_BYTES:
        raise ValueError(f"{where}: must be uint8 of at most {_MAX_STATE_BYTES}, is {like}")
    quant_type = state_name.removeprefix(name + STATE)
    state = _State.parse(files[state_name].tobytes(), quant_type, where)
    parts: Any = _read_parts(files, name, state)
    codes = _half_blocks(_read_codes(files, name, state), state.size, state.blocksize)

    def coded(absmax: Any) -> OffsetScales:
        offset: Any = np.asarray(state.offset, np.float32)
        return OffsetScales(absmax, parts["nested_absmax"], offset)

    dtype = DTYPES[state.dtype]
    return assembled(codes, parts["absmax"], state.shape, dtype, state.spec, coded)


def assembled(
    codes: Any,
    absmax: Any,
    shape: tuple[int, int],
    dtype: Any,
    spec: QuantSpec,
    coded: Callable[[Any], OffsetScales],
) -> QuantizedMatrix:
    """The matrix of a PyTorch weight of ``shape`` ``(out, in)``.

    Args:
      codes: All packed codes, flat.
      absmax: Of all blocks, flat.
      shape: ``(m, n)``.
      dtype: What it dequantizes to.
      spec: How it is kept.
      coded: Makes scales in 8 bits of ``absmax``, if the spec has them.
    """
    m, n = shape
    in_rows = n % spec.group_size == 0
    lead = (m, -1) if in_rows else (-1,)
    scales = absmax.reshape(lead)
    if spec.double_quant:
        scales = coded(scales)
    padding = code_padding(n if in_rows else n * m, 4)
    rows = QuantizedArray(codes.reshape(lead), scales, spec, padding, np.dtype(dtype))
    return QuantizedMatrix(rows, n, m)


def _read_parts(files: TensorFiles, name: str, state: _State) -> dict[str, np.ndarray]:
    parts = {}
    for part, (length, dtype) in parts_of(state.blocks, state.offset is not None).items():
        full = f"{name}.{part}"
        if full not in files:
            raise ValueError(f"{files.where(name)}: has {name!r} in 4 bits, but no {full!r}")
        like = files.abstract(full)
        if like.shape != (length,) or like.dtype != dtype:
            raise ValueError(
                f"{files.where(full)}: {full!r} must be {np.dtype(dtype)} of shape {(length,)}, "
                f"is {like.dtype} of {like.shape}"
            )
        parts[part] = files[full]
    for part, table in _tables(state.quant_type).items():
        if part in parts and not np.array_equal(parts[part], table):
            raise ValueError(
                f"{files.where(name)}: '{name}.{part}' is not the table of bitsandbytes' "
                f"{state.quant_type if part == 'quant_map' else 'signed dynamic map'}"
            )
    return parts


def _read_codes(files: TensorFiles, name: str, state: _State) -> np.ndarray:
    like = files.abstract(name)
    expected = -(-state.size // 2)
    length = expected // like.dtype.itemsize
    is_whole = length * like.dtype.itemsize == expected
    if not is_whole or like.dtype.name not in STORAGES or like.shape != (length, 1):
        raise ValueError(
            f"{files.where(name)}: {name!r} must be {expected} bytes of codes for "
            f"{state.shape}, of shape (length, 1); is {like.dtype} of {like.shape}"
        )
    return files[name].reshape(-1).view(np.uint8)


def matrix_tensors(name: str, matrix: QuantizedMatrix, storage: str) -> dict[str, np.ndarray]:
    """The tensors of a matrix by their names, its codes under a dtype of ``STORAGES``."""
    rows, spec = matrix.rows, matrix.spec
    if matrix.ndim != 2:
        raise ValueError(f"{name!r} must be one matrix, got a stack {matrix.shape}")
    if spec.codebook not in ("nf4", "fp4") or spec.block_size not in BLOCK_SIZES:
        raise ValueError(
            f"{name!r} must be nf4 or fp4 in blocks of one of {BLOCK_SIZES}, got {spec}"
        )
    if matrix.dtype.name not in DTYPES:
        raise ValueError(f"{name!r} must be of one of {sorted(DTYPES)}, got {matrix.dtype}")
    offset = float(rows.scales.offset) if spec.double_quant else None
    state = _State(spec.codebook, spec.block_size, matrix.dtype.name, (matrix.m, matrix.n), offset)
    codes = _neighbours(np.asarray(rows.codes).reshape(-1), state)
    if codes.size % np.dtype(STORAGES[storage]).itemsize:
        raise ValueError(f"{name!r} has {codes.size} bytes of codes, which do not fill {storage}")
    parts = {"absmax": rows.scales}
    if spec.double_quant:
        parts = {"absmax": rows.scales.codes, "nested_absmax": rows.scales.absmax}
    for part, table in _tables(spec.codebook).items():
        if part in parts_of(1, bool(spec.double_quant)):
            parts[part] = table
    return {
        name: codes.view(STORAGES[storage])[:, None],
        **{f"{name}.{part}": np.asarray(x).reshape(-1) for part, x in parts.items()},
        name + STATE + spec.codebook: np.frombuffer(state.to_bytes(), np.uint8),
    }


def _half_blocks(packed: np.ndarray, size: int, block: int) -> np.ndarray:
    """bitsandbytes' bytes of ``size`` codes, neighbours in one, to ours, half a block apart."""
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[:size]
    full = size // block * block
    halves = codes[:full].reshape(-1, 2, block // 2)
    ours = (halves[:, 0] | halves[:, 1] << 4).reshape(-1)
    if full == size:
        return ours
    half = -(-(size - full) // 2)
    low, high = codes[full : full + half], codes[full + half :]
    return np.concatenate([ours, low | np.pad(high, (0, half - high.size)) << 4])


def _neighbours(ours: np.ndarray, state: _State) -> np.ndarray:
    """The inverse of :func:`_half_blocks`; an odd last code has that of 0 beside it."""
    size, block = state.size, state.blocksize
    full = size // block * block
    halves = ours[: full // 2].reshape(-1, 1, block // 2)
    codes = np.concatenate([halves & 15, halves >> 4], axis=1).reshape(-1)
    if full < size:
        rest = ours[full // 2 :]
        codes = np.concatenate([codes, rest & 15, rest >> 4])[:size]
    if size % 2:
        zero = _tables(state.quant_type)["quant_map"].tolist().index(0.0)
        codes = np.append(codes, np.uint8(zero))
    return codes[0::2] << 4 | codes[1::2]


def _is_int(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_float32(x: Any) -> bool:
    largest = float(np.finfo(np.float32).max)
    is_number = isinstance(x, int | float) and not isinstance(x, bool)
    return is_number and -largest <= x <= largest
