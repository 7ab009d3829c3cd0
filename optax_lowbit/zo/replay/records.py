"""The numbers of a step as bytes: what was measured, and of the settings what changes.

A record ends with its settings (learning rate, weight decay): numbers that were given, not
measured, and are the same for many steps or follow a schedule. The bytes have those that differ
from the step before, and then all that was measured. Which settings they have is said only where
that changes: by :data:`MARK`, a NaN, which no record has, and a bit for each setting.
"""

import dataclasses

import numpy as np

MARK = b"\xff\xff\xff\xff"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a step.

    Attributes:
      values: float32 ``(n,)``.
      written: bool ``(n,)``: whether the bytes of the step have them.
    """

    values: np.ndarray
    written: np.ndarray


def no_settings(number: int) -> Settings:
    """What there is before the first step: zeros."""
    return Settings(np.zeros(number, np.float32), np.zeros(number, bool))


def encoded(record: np.ndarray, before: Settings) -> tuple[bytes, Settings]:
    """A step's numbers as bytes, and its settings.

    Args:
      record: float32 ``(k,)``, without a NaN.
      before: Settings of the step before.
    """
    record = record.astype("<f4")
    measured, values = np.split(record, [len(record) - len(before.values)])
    changed = values.view("<u4") != before.values.astype("<f4").view("<u4")
    data = values[changed].tobytes() + measured.tobytes()
    if not np.array_equal(changed, before.written):
        bits = np.packbits(changed, bitorder="little").tobytes()
        data = MARK + bits.ljust(_mask_bytes(before), b"\0") + data
    return data, Settings(values, changed)


def decoded(
    data: bytes, position: int, measured: int, before: Settings
) -> tuple[np.ndarray, Settings, int]:
    """The record at ``position``, its settings, and where its bytes end.

    Args:
      data: The bytes of a log. Zeros stand for what is beyond them.
      position: Where the step's begin.
      measured: How many numbers a record has before its settings.
      before: Settings of the step before.
    """
    written = before.written
    if data[position : position + 4] == MARK:
        position += 4 + _mask_bytes(before)
        mask = data[position - _mask_bytes(before) : position].ljust(_mask_bytes(before), b"\0")
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
        written = bits[: len(written)].astype(bool)
    length = 4 * (int(written.sum()) + measured)
    bytes_here = data[position : position + length].ljust(length, b"\0")
    numbers = np.frombuffer(bytes_here, "<f4").astype(np.float32)
    values = before.values.copy()
    values[written] = numbers[: len(numbers) - measured]
    record = np.concatenate([numbers[len(numbers) - measured :], values])
    return record, Settings(values, written), position + length


def _mask_bytes(settings: Settings) -> int:
    """A bit for each, in whole words."""
    return -(-len(settings.values) // 32) * 4
