"""What a GGUF file says of itself, checked before `gguf` believes it.

`gguf.GGUFReader` takes lengths as they stand: of a short file it can make a list of 2**60 numbers,
or two tensors of the same bytes. Here the header is walked through once, and nothing of it is kept.
"""

import math
import mmap
import struct
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from examples.llm.errors import UsageError

_VERSIONS = (2, 3)
_SCALAR_BYTES = {
    GGUFValueType.UINT8: 1,
    GGUFValueType.INT8: 1,
    GGUFValueType.BOOL: 1,
    GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2,
    GGUFValueType.UINT32: 4,
    GGUFValueType.INT32: 4,
    GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8,
    GGUFValueType.INT64: 8,
    GGUFValueType.FLOAT64: 8,
}
# `gguf` makes objects, of half a kilobyte, of every field, tensor and item of an array. The
# tokenizer of Llama 3 has 540,000 items.
_MOST_FIELDS = _MOST_TENSORS = 2**16
_MOST_ITEMS = 2**20
_MOST_AXES = 4
_DEFAULT_ALIGNMENT, _MOST_ALIGNMENT = 32, 2**16
# What `gguf` calls the numbers before the fields.
_RESERVED: tuple[str, ...] = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count")


def check_header(path: Path) -> None:
    """Raise a `UsageError` that names the file and the field unless `gguf` can read the file.

    Memory is that of the longest string in it.
    """
    try:
        if not path.is_file():
            raise UsageError(f"--model: cannot read {path}: it is no file")
        if not path.stat().st_size:
            raise UsageError(f"--model: cannot read {path}: it is empty")
        with path.open("rb") as file:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _Header(path, data).check()
    except OSError as error:
        raise UsageError(f"--model: cannot read {path}: {error.strerror}") from error


class _Header:
    """A place in a file, which moves on as its header is checked."""

    def __init__(self, path: Path, data: mmap.mmap):
        self._path, self._data, self._at = path, data, 0
        self._items = 0
        self._alignment = _DEFAULT_ALIGNMENT

    def check(self) -> None:
        if self._data[:4] != b"GGUF":
            raise self._wrong("it is no GGUF file")
        self._skip(4, "magic")
        version = self._uint32("version")
        if version not in _VERSIONS:
            # Files of the other byte order have theirs in the upper bytes.
            raise self._wrong(f"version must be one of {_VERSIONS} in little-endian, is {version}")
        tensors = self._count("tensor_count", _MOST_TENSORS)
        fields = self._count("kv_count", _MOST_FIELDS)
        names = set(_RESERVED)
        for index in range(fields):
            self._check_field(self._new_name(f"field {index + 1}", names))
        names = set()
        spans = [
            self._tensor_span(self._new_name(f"tensor {index + 1}", names))
            for index in range(tensors)
        ]
        self._check_spans(spans)

    def _check_field(self, name: str) -> None:
        kind = self._uint32(name)
        if name == "general.alignment":
            if kind != GGUFValueType.UINT32:
                raise self._wrong(f"{name} must be of type {GGUFValueType.UINT32}, is of {kind}")
            self._alignment = self._uint32(name)
            if self._alignment.bit_count() != 1 or self._alignment > _MOST_ALIGNMENT:
                raise self._wrong(
                    f"{name} must be a power of two up to {_MOST_ALIGNMENT}, is {self._alignment}"
                )
        elif kind == GGUFValueType.ARRAY:
            kind, length = self._uint32(name), self._uint64(name)
            self._items += length
            if self._items > _MOST_ITEMS:
                raise self._wrong(
                    f"arrays must have at most {_MOST_ITEMS} items together, with {name} they "
                    f"have {self._items}"
                )
            self._skip_values(name, kind, length)
        else:
            self._skip_values(name, kind, 1)

    def _skip_values(self, name: str, kind: int, count: int) -> None:
        if kind == GGUFValueType.STRING:
            for _ in range(count):
                self._string(name)
        elif kind in _SCALAR_BYTES:
            self._skip(count * _SCALAR_BYTES[GGUFValueType(kind)], name)
        else:
            raise self._wrong(f"{name} has values of type {kind}, which cannot be read")

    def _tensor_span(self, name: str) -> tuple[int, int, str]:
        """Where the data of a tensor start and end, counted from where all data start."""
        axes = self._uint32(name)
        if not 1 <= axes <= _MOST_AXES:
            raise self._wrong(f"{name} must have 1 to {_MOST_AXES} axes, has {axes}")
        shape = [self._uint64(name) for _ in range(axes)]
        kind, start = self._uint32(name), self._uint64(name)
        if kind not in GGML_QUANT_SIZES:
            raise self._wrong(f"{name} is of type {kind}, which cannot be read")
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if 0 in shape or shape[0] % block:
            raise self._wrong(f"{name} has an impossible shape {shape} for blocks of {block}")
        return start, start + math.prod(shape) // block * block_bytes, name

    def _check_spans(self, spans: list[tuple[int, int, str]]) -> None:
        room = len(self._data) - math.ceil(self._at / self._alignment) * self._alignment
        last = 0
        for start, end, name in sorted(spans):
            if end > room:
                raise self._wrong(f"{name} ends at byte {end} of the data, which has {room}")
            if start < last:
                raise self._wrong(f"{name} starts at byte {start}, within another tensor")
            last = end

    def _new_name(self, what: str, names: set[str]) -> str:
        name = self._string(f"the name of {what}")
        if name in names:
            raise self._wrong(f"{shortened(name)} is there twice")
        names.add(name)
        return shortened(name)

    def _count(self, name: str, most: int) -> int:
        count = self._uint64(name)
        if count > most:
            raise self._wrong(f"{name} must be at most {most}, is {count}")
        return count

    def _uint32(self, name: str) -> int:
        return struct.unpack_from("<I", self._data, self._skip(4, name))[0]

    def _uint64(self, name: str) -> int:
        return struct.unpack_from("<Q", self._data, self._skip(8, name))[0]

    def _string(self, name: str) -> str:
        start = self._skip(self._uint64(name), name)
        try:
            return self._data[start : self._at].decode()
        except UnicodeDecodeError as error:
            raise self._wrong(f"{name} has bytes that are no UTF-8") from error

    def _skip(self, size: int, name: str) -> int:
        """Go on by `size` bytes and return where they start."""
        start, left = self._at, len(self._data) - self._at
        if size > left:
            raise self._wrong(f"the file ends within {name}: {size} bytes, of which it has {left}")
        self._at += size
        return start

    def _wrong(self, what: str) -> UsageError:
        return UsageError(f"--model: cannot read {self._path}: {what}")


def shortened(value: object) -> str:
    """A value for a message: short, and on one line."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
