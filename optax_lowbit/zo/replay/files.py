"""The bytes of a log: a header, and a few for each step, all under checksums.

All numbers are little-endian. The header is :data:`MAGIC`, the length of what follows (uint32), a
JSON text compressed by zlib, and the CRC-32 of all that. A step has its numbers (see
:mod:`~optax_lowbit.zo.replay.records`), after every ``digest_every`` steps a digest of the
parameters (uint32), and a CRC-32 that goes on from that of the step before, or of the header: no
step can be left out, moved, or taken from another log unnoticed, and its number needs no writing.
"""

import dataclasses
import json
import os
import pathlib
import struct
import warnings
import zlib
from typing import Any

import numpy as np

from optax_lowbit.zo.replay.records import Settings, decoded, no_settings

MAGIC = b"ZOLOG\r\n\x1a"
# Raised by whatever changes the layout, or the bits of a step: directions, rounding, arithmetic.
VERSION = 3

_WORD = struct.Struct("<I")
# Bytes: some 200 for a leaf.
_LONGEST_HEADER = 2**28


@dataclasses.dataclass(frozen=True, eq=False)
class Log:
    """A log that was read.

    Attributes:
      run: What the header says: ``library`` and ``version`` (of the format), ``prng`` and ``key``
        (two words), ``optimizer`` (all of it that a replay depends on), ``leaves`` (by path:
        ``shape``, ``dtype``, ``checksum``, and whether it ``trains`` and ``decays``),
        ``record_size``, how many of these are ``settings``, and ``digest_every``.
      records: float32 ``(steps, record_size)``: what each step was made from.
      digests: Of the trained parameters, by the number of steps taken.
      dropped: Bytes at the end of the file that are no whole record.

    Examples:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> from optax_lowbit import zo
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.zolog"
      >>> opt, params = zo.zo_sgd(1e-2), {"w": jnp.ones(3)}
      >>> state = opt.init(params, key=0)
      >>> with zo.replay.Writer(path, opt, params, state) as log:
      ...     log.append(*opt.step(lambda p: jnp.sum(p["w"] ** 2), params, state))
      >>> log = zo.replay.read(path)
      >>> log.steps, log.run["key"], log.run["leaves"]["w"]["shape"]
      (1, [0, 0], [3])
    """

    run: dict[str, Any]
    records: np.ndarray
    digests: dict[int, int]
    dropped: int
    # Where the next step goes, and the CRC-32 and the settings that it goes on from.
    end: int
    crc: int
    settings: Settings

    @property
    def steps(self) -> int:
        """How many steps it has."""
        return len(self.records)


def read(path: Any) -> Log:
    """Reads a log, and checks every byte of it.

    A process that is killed leaves at most one record that is cut off. It is dropped, as is a whole
    last record whose checksum is wrong: a file system may leave it so when the power fails.

    Args:
      path: What a :class:`Writer` was given.

    Returns:
      The :class:`Log`: as large as the file, and held in memory.

    Raises:
      FileNotFoundError: If there is no such file. It appears with the first step.
      ValueError: If it is no log, of another version, or damaged anywhere before its last record.

    Warns:
      UserWarning: If the last record is dropped.

    Examples:
      >>> from optax_lowbit import zo
      >>> try:
      ...     zo.replay.read(zo.replay.__file__)
      ... except ValueError as error:
      ...     print(str(error).rpartition(": ")[2])
      it is no log of zo.replay
    """
    data = pathlib.Path(path).read_bytes()
    try:
        run, start, crc = _header(data)
        log = _records(data, run, start, crc)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if log.dropped:
        warnings.warn(
            f"{path}: step {log.steps} is cut off or damaged at the end of the file, and dropped",
            UserWarning, stacklevel=2,
        )  # fmt: skip
    return log


def header_bytes(run: dict[str, Any]) -> bytes:
    """A header, with its checksum."""
    text = zlib.compress(json.dumps(run, separators=(",", ":")).encode(), 9)
    data = MAGIC + _WORD.pack(len(text)) + text
    return data + _WORD.pack(zlib.crc32(data))


def step_bytes(numbers: bytes, digest: int | None, crc: int) -> bytes:
    """A step, with its checksum; ``crc`` is that of the bytes before it."""
    data = numbers if digest is None else numbers + _WORD.pack(digest)
    return data + _WORD.pack(zlib.crc32(data, crc))


def crc_of(data: bytes) -> int:
    """The CRC-32 that a header or a step ends with."""
    return _WORD.unpack(data[-4:])[0]


def create(path: pathlib.Path, data: bytes) -> None:
    """Writes a file that appears with all that is in it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _header(data: bytes) -> tuple[dict[str, Any], int, int]:
    """What it says, where the records begin, and its checksum."""
    if not data.startswith(MAGIC):
        raise ValueError("it is no log of zo.replay")
    start = len(MAGIC) + 8
    if len(data) >= start:
        start += _WORD.unpack_from(data, len(MAGIC))[0]
    if len(data) < start or zlib.crc32(data[: start - 4]) != crc_of(data[:start]):
        raise ValueError("its header is cut off or damaged")
    run = _said(data[len(MAGIC) + 4 : start - 4])
    if run["version"] != VERSION:
        raise ValueError(
            f"it has version {run['version']} of the format, and this release of optax_lowbit "
            f"({run['library']} wrote it) reads version {VERSION}"
        )
    return run, start, crc_of(data[:start])


def _said(text: bytes) -> dict[str, Any]:
    """What a header says, of which no more is unpacked than a run can have to say."""
    try:
        run = json.loads(zlib.decompressobj().decompress(text, _LONGEST_HEADER))
    except (zlib.error, RecursionError) as error:
        raise ValueError("its header is no JSON text") from error
    if not isinstance(run, dict) or "version" not in run or "library" not in run:
        raise ValueError("its header does not say the version of the format")
    return run


def _records(data: bytes, run: dict[str, Any], position: int, crc: int) -> Log:
    found, digests = [], {}
    size, settings = run["record_size"], no_settings(run["settings"])
    while position < len(data):
        step = len(found)
        record, new, end = decoded(data, position, size - run["settings"], settings)
        has_digest = is_digested(step + 1, run["digest_every"])
        end += 4 * has_digest + 4
        whole = data[position:end]
        if end > len(data) or zlib.crc32(whole[:-4], crc) != crc_of(whole):
            if end < len(data):
                raise ValueError(
                    f"step {step} is damaged, at byte {position}; what is before it is whole: cut "
                    "the file there to keep that"
                )
            break
        found.append(record)
        if has_digest:
            digests[step + 1] = _WORD.unpack_from(whole, len(whole) - 8)[0]
        position, crc, settings = end, crc_of(whole), new
    records = np.array(found, np.float32).reshape(-1, size)
    return Log(run, records, digests, len(data) - position, position, crc, settings)


def is_digested(steps: int, every: int) -> bool:
    """Whether the step that makes them so many has a digest."""
    return every > 0 and steps % every == 0
