"""How fast rotary positions turn, in the variants by which contexts were made longer."""

import math
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp


def plain_frequencies(base: float | jax.Array, head_size: int) -> jax.Array:
    """Return `base**(-2i / head_size)`, the angle by which pair `i` turns a token: float32."""
    return base ** -(jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)


class RotaryScaling(Protocol):
    """A variant. Frozen and hashable."""

    @property
    def limit(self) -> int | None:
        """The longest text whose keys stay as they are when more is written; None for any."""
        ...

    def frequencies(self, base: float, head_size: int, length: jax.Array) -> jax.Array:
        """Return the frequencies of pairs, float32 `(head_size / 2,)`, in texts of a length."""
        ...


@dataclass(frozen=True)
class Unscaled:
    """The plain frequencies."""

    limit = None

    def frequencies(self, base: float, head_size: int, length: jax.Array) -> jax.Array:
        """See `RotaryScaling`."""
        del length
        return plain_frequencies(base, head_size)


UNSCALED = Unscaled()


@dataclass(frozen=True)
class Linear:
    """All turn `factor` times slower (position interpolation)."""

    factor: float
    limit = None

    def frequencies(self, base: float, head_size: int, length: jax.Array) -> jax.Array:
        """See `RotaryScaling`."""
        del length
        return plain_frequencies(base, head_size) / self.factor


@dataclass(frozen=True)
class Divided:
    """Each is divided by a number of its own, as GGUF files have them."""

    divisors: tuple[float, ...]
    limit = None

    def frequencies(self, base: float, head_size: int, length: jax.Array) -> jax.Array:
        """See `RotaryScaling`."""
        del length
        return plain_frequencies(base, head_size) / jnp.array(self.divisors, jnp.float32)


@dataclass(frozen=True)
class Llama3:
    """Those that turn rarely within the original context turn `factor` times slower.

    Attributes:
      factor: of those with a wavelength of more than `original_length / low`.
      low: see `factor`.
      high: those below `original_length / high` stay; between, it is a mixture.
      original_length: the context before it was made longer.
    """

    factor: float
    low: float
    high: float
    original_length: int
    limit = None

    def frequencies(self, base: float, head_size: int, length: jax.Array) -> jax.Array:
        """See `RotaryScaling`."""
        del length
        plain = plain_frequencies(base, head_size)
        turns = self.original_length * plain / (2 * math.pi)
        kept = jnp.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return kept * plain + (1 - kept) * plain / self.factor


@dataclass(frozen=True)
class DynamicNTK:
    """In texts of more than `limit` tokens, the longer the slower, and the slow ones most."""

    factor: float
    limit: int

    def frequencies(self, base: float, head_size: int, length: jax.Array) -> jax.Array:
        """See `RotaryScaling`."""
        stretch = self.factor * jnp.maximum(length / self.limit, 1) - (self.factor - 1)
        return plain_frequencies(base * stretch ** (head_size / (head_size - 2)), head_size)
