"""Where abstract states and parameters lie on a mesh, and the bytes of a tree on one device."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from optax_lowbit.optimizers.describe import leaf_nbytes
from optax_lowbit.optimizers.state_layout import array_shardings

Path = tuple[Any, ...]


class Bytes(NamedTuple):
    """Bytes of arrays: of all devices together, each element counted once, and on one device."""

    total: int = 0
    device: int = 0

    def __add__(self, other: Any) -> "Bytes":
        return Bytes(self.total + other.total, self.device + other.device)


def bytes_of(tree: Any) -> Bytes:
    """The bytes of abstract leaves; a leaf without a sharding is on every device."""
    return sum(map(_bytes_of_leaf, jax.tree.leaves(tree)), Bytes())


def _bytes_of_leaf(leaf: jax.ShapeDtypeStruct) -> Bytes:
    total = leaf_nbytes(leaf)
    if leaf.sharding is None or not total:
        return Bytes(total, total)
    part = math.prod(leaf.sharding.shard_shape(leaf.shape))
    return Bytes(total, total * part // math.prod(leaf.shape))


def abstracted(tree: Any) -> Any:
    """The leaves, arrays or numbers, as `jax.ShapeDtypeStruct`; of shardings, only named ones."""

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        return jax.ShapeDtypeStruct(
            jax.numpy.shape(leaf),
            jax.dtypes.result_type(leaf),
            sharding=sharding if isinstance(sharding, NamedSharding) else None,
            weak_type=getattr(leaf, "weak_type", isinstance(leaf, int | float | complex)),
        )

    return jax.tree.map(abstract, tree)


def abstract_state(tx: optax.GradientTransformation, params: Any) -> Any:
    """The state of any transform as `jax.ShapeDtypeStruct`, laid out as its parameters are.

    As :func:`optax_lowbit.state_shardings` lays it out; what belongs to no parameter is on every
    device. Nothing is allocated.

    Args:
      tx: Any Optax transform.
      params: A tree of arrays or `jax.ShapeDtypeStruct`, of which some may have a `NamedSharding`.

    Returns:
      What ``jax.eval_shape(tx.init, params)`` gives, with shardings where parameters have them.

    Examples:
      >>> import jax
      >>> from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
      >>> from optax_lowbit import adamw4bit
      >>> from optax_lowbit.memory import abstract_state
      >>> rows = NamedSharding(AbstractMesh((8,), ("data",)), PartitionSpec("data"))
      >>> params = {"w": jax.ShapeDtypeStruct((1024, 512), "float32", sharding=rows)}
      >>> state = abstract_state(adamw4bit(1e-3), params)
      >>> state[0].mu["w"].codes.sharding.shard_shape((1024, 256))
      (128, 256)
    """
    params = abstracted(params)
    # Without shardings: those in types, of an Explicit mesh, would need the mesh to be set.
    plain = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    state = jax.eval_shape(tx.init, plain)
    leaves, treedef = jax.tree.flatten(state)
    own = [leaf.sharding for leaf in jax.tree.leaves(params)]
    placed = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for leaf, sharding in zip(leaves, array_shardings(state, plain, own, None), strict=True)
    ]
    return treedef.unflatten(placed)


def fully_sharded(params: Mapping[str, Any], devices: int, axis: str) -> Any:
    """The parameters of :func:`abstract_params`, each split over all devices.

    The axis that is split is the first that ``devices`` divides, after that of the layers: the rows
    of matrices, so that blocks along the last axis stay whole.
    """
    mesh = AbstractMesh((devices,), (axis,), axis_types=(AxisType.Auto,))

    def split(path: Path, leaf: Any) -> jax.ShapeDtypeStruct:
        first = 1 if path[0] == jax.tree_util.DictKey("layers") else 0
        divided = [i for i in range(first, leaf.ndim) if leaf.shape[i] % devices == 0]
        spec = PartitionSpec(*[None] * divided[0], axis) if divided else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(split, params)
