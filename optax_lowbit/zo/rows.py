"""A leaf of the parameters, or some of its rows, and which rows they are.

The last axis of a leaf is its columns; all other axes are its rows, counted in row-major order. The
noise of an element follows from its row and column, so what a program reads of a leaf (a layer of a
stack, the rows of an embedding) is enough to perturb it.
"""

import dataclasses
from typing import Any

import jax

from optax_lowbit.kernels import tiling
from optax_lowbit.kernels.meshes import axis_shards
from optax_lowbit.quant import random_bits

# Of a larger leaf a tile of so many at a time is made on each device: a direction, an estimate.
TILE_ELEMENTS = 2**18


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one leaf.

    Attributes:
      values: ``(..., n)``: the rows.
      numbers: uint32 ``(..., 1)``: which they are. Of a leaf without axes: ``()``, and 0.
      companions: Pytree of arrays with the same leading axes: what an optimizer keeps for them.
      leaf: Number of the leaf among those that train.
    """

    values: jax.Array
    numbers: jax.Array
    companions: Any = ()
    leaf: int = dataclasses.field(default=0, metadata={"static": True})

    def indices(self) -> tuple[jax.Array, jax.Array]:
        """Row and column in the leaf of each element, uint32."""
        return random_bits.element_indices(self.values.shape, self.numbers)


def whole(leaf: int, values: jax.Array, companions: Any = ()) -> Rows:
    """All rows of a leaf."""
    shape = (*values.shape[:-1], 1) if values.ndim else ()
    return Rows(values, random_bits.element_indices(shape)[0], companions, leaf)


def row_tiles(values: jax.Array) -> tiling.Tiling | None:
    """Tiles of whole rows, for what is made of a leaf; None if that is small, or has no rows."""
    if values.ndim < 2:
        return None
    return tiling.plan_tiles(values.shape, values.shape[-1], axis_shards(values), TILE_ELEMENTS)
