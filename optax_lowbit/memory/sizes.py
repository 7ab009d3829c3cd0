"""Sizes of memories: as text, of devices, and whether something fits."""

import dataclasses
import re
from collections.abc import Mapping

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

# GiB of one device, as it is sold.
DEVICES: Mapping[str, int] = {
    "rtx3090": 24, "rtx4090": 24, "rtx5090": 32, "l4": 24, "l40s": 48,
    "a100-40gb": 40, "a100-80gb": 80, "h100": 80, "h200": 141,
    "v4": 32, "v5e": 16, "v5p": 95, "v6e": 32,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Fit:
    """Whether something fits into a memory: true or false, and printable.

    Attributes:
      needed: Bytes that are needed on each device.
      available: Bytes that a device has.
    """

    needed: int
    available: int

    def __bool__(self) -> bool:
        return self.left >= 0

    @property
    def left(self) -> int:
        """Bytes that are left; negative: that are missing."""
        return self.available - self.needed

    def __str__(self) -> str:
        verdict = "fits" if self else "does not fit"
        rest = "left" if self else "missing"
        return (
            f"{verdict} in {in_gib(self.available)} ({self.available / 1e9:.2f} GB of 10^9 bytes): "
            f"{in_gib(self.needed)} needed, {in_gib(abs(self.left))} {rest}"
        )


def parse_size(size: str | int) -> int:
    """Bytes of ``"24GB"``, ``"24GiB"``, ``"512MB"``, of a device of `DEVICES`, or of an int.

    Both GB and GiB are 2^30 bytes here: a card that is sold with 24 GB has 24 GiB.

    Raises:
      ValueError: If the text is neither.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    if isinstance(size, str):
        text = size.strip().lower()
        if text in DEVICES:
            return DEVICES[text] * 2**30
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text):
            return int(float(match[1]) * _UNITS[match[2].upper()])
    raise ValueError(
        f"size must be bytes, or such as '24GB', or one of {', '.join(DEVICES)}; got {size!r}"
    )


def in_gib(nbytes: int) -> str:
    """``"12.55 GiB"``."""
    return f"{nbytes / 2**30:.2f} GiB"
