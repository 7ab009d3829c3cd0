"""The codes of a low-bit array as places in their sorted table, which steps move up and down."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowbit.quant import QuantizedArray, QuantSpec, codebooks, packing, rounding
from optax_lowbit.zo.rows import Rows


@dataclasses.dataclass(frozen=True)
class Grid:
    """How the packed codes of a :class:`QuantizedArray`, or rows of them, are read.

    Place ``k`` of an element is the rank of its value in the table, from 0: for a table in
    ascending order, the code itself.

    Attributes:
      spec: Of the array.
      columns: Length of the array's last axis; None for an array without axes.
    """

    spec: QuantSpec
    columns: int | None

    @classmethod
    def of(cls, q: QuantizedArray) -> "Grid":
        """The grid of an array."""
        return cls(q.spec, None if q.padding is None else q.last_dim)

    @property
    def top(self) -> int:
        """The last place."""
        return len(self.spec.values) - 1

    def unpacked(self, codes: jax.Array) -> jax.Array:
        """Bytes ``(..., ceil(n * bits / 8))`` to uint8 ``(..., n)``."""
        if self.columns is None:
            return codes
        return packing.unpack(codes, self.spec.bits, self.spec.group_size, self.columns)

    def packed(self, codes: jax.Array) -> jax.Array:
        """The inverse of :meth:`unpacked`."""
        if self.columns is None:
            return codes
        return packing.pack(codes, self.spec.bits, self.spec.group_size)

    def places(self, codes: jax.Array) -> jax.Array:
        """Places of packed codes: int32 ``(..., n)``."""
        codes, order = self.unpacked(codes), self._codes_by_place()
        if order is not None:
            ranks = tuple(np.argsort(order).tolist())
            return rounding.code_values(codes, ranks).astype(jnp.int32)
        return codes.astype(jnp.int32)

    def codes(self, places: jax.Array) -> jax.Array:
        """Packed codes of the nearest places to int32 or float32 ones; the table is not left."""
        codes = jnp.clip(jnp.round(places), 0, self.top).astype(jnp.uint8)
        order = self._codes_by_place()
        if order is not None:
            codes = rounding.code_values(codes, tuple(order.tolist())).astype(jnp.uint8)
        return self.packed(codes)

    def opened(self, rows: Rows) -> Rows:
        """Rows of codes with their places, float32 ``(..., n)``, for values."""
        return dataclasses.replace(rows, values=self.places(rows.values).astype(jnp.float32))

    def moved(self, codes: jax.Array, by: jax.Array) -> jax.Array:
        """Packed codes after steps of so many places, float32 ``(..., n)``."""
        return self.codes(self.places(codes).astype(jnp.float32) + by)

    def _codes_by_place(self) -> np.ndarray | None:
        """The code of each place; None where that is the place itself."""
        return codebooks.decision_table(self.spec.values).codes
