"""What stands beside the arrays of a checkpoint: which leaf they are, and how codes are read."""

import dataclasses
import json
import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowbit.checkpoint.leaves import Leaf, dtype_of, is_key, pieces_of, shape_of
from optax_lowbit.moments.storage import is_factored
from optax_lowbit.optimizers import FactoredMoment
from optax_lowbit.quant import QuantSpec, is_quantized
from optax_lowbit.quant.array import abstract_quantized

FORMAT = "optax_lowbit checkpoint"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Piece:
    """One array of a checkpoint.

    Attributes:
      name: Its name among the stored arrays.
      shape: Its shape.
      dtype: Name of its dtype.
      checksum: Its :func:`~optax_lowbit.kernels.checksums.checksum`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    checksum: int

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    def abstract(self) -> jax.ShapeDtypeStruct:
        """Its shape and dtype."""
        return jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype))

    def zeros(self) -> np.ndarray:
        """What it is if it has no elements."""
        return np.zeros(self.shape, jnp.dtype(self.dtype))

    def check(self, array: Any, found: int) -> None:
        """Raises ValueError if an array that was read, of a checksum, is not this one."""
        given, wanted = (shape_of(array), str(dtype_of(array))), (self.shape, self.dtype)
        if given != wanted:
            raise ValueError(f"its array {self.name!r} is {given}, and should be {wanted}")
        if found != self.checksum:
            raise ValueError(
                f"its array {self.name!r} is damaged: its checksum is {found}, and was "
                f"{self.checksum}"
            )


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """A leaf of a checkpoint.

    Attributes:
      leaf: The leaf; its value is abstract.
      pieces: Its arrays.
      key: The implementation of a typed PRNG key; or empty.
    """

    leaf: Leaf
    pieces: tuple[Piece, ...]
    key: str


def stored_leaves(leaves: list[Leaf], checksums: Mapping[str, int]) -> list[StoredLeaf]:
    """The leaves of a state as they stand in a manifest."""
    return [
        StoredLeaf(
            leaf,
            tuple(
                Piece(name, shape_of(x), str(dtype_of(x)), checksums[name])
                for name, x in storable_pieces(index, leaf).items()
            ),
            str(jax.random.key_impl(leaf.value)) if is_key(leaf.value) else "",
        )
        for index, leaf in enumerate(leaves)
    ]


def storable_pieces(index: int, leaf: Leaf) -> dict[str, Any]:
    """The arrays of a leaf by the names that they have in a checkpoint."""
    value = jax.random.key_data(leaf.value) if is_key(leaf.value) else leaf.value

    def name(key):
        return ".".join([f"{index:05d}", *re.findall(r"\w+", "".join(leaf.path) + key)])

    return {
        name(key): piece if hasattr(piece, "dtype") else np.asarray(piece)
        for key, piece in pieces_of(value).items()
    }


def to_json(leaves: list[StoredLeaf]) -> dict[str, Any]:
    """The manifest, with a checksum of its own."""
    content = [
        {
            "path": list(stored.leaf.path),
            "state": stored.leaf.state,
            "field": stored.leaf.field,
            "parameter": stored.leaf.parameter,
            "shape": list(shape_of(stored.leaf.value)),
            "dtype": str(dtype_of(stored.leaf.value)),
            "key": stored.key,
            **_storage_to_json(stored.leaf.value),
            "arrays": [dataclasses.asdict(piece) for piece in stored.pieces],
        }
        for stored in leaves
    ]
    return {"format": FORMAT, "version": VERSION, "crc32": _crc32(content), "leaves": content}


def from_json(manifest: Any) -> list[StoredLeaf]:
    """The leaves of a manifest.

    Raises:
      ValueError: If it is none, of a newer version, or damaged.
    """
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"its manifest does not say that it is an {FORMAT}")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"it has version {manifest.get('version')!r} of the format, and this release of "
            f"optax_lowbit reads version {VERSION}"
        )
    content: Any = manifest.get("leaves")
    if manifest.get("crc32") != _crc32(content):
        raise ValueError("its manifest is damaged: the checksum of it differs")
    return [_stored_leaf(entry) for entry in content]


def _stored_leaf(entry: dict[str, Any]) -> StoredLeaf:
    pieces = tuple(Piece(**{**x, "shape": tuple(x["shape"])}) for x in entry["arrays"])
    leaf = Leaf(
        tuple(entry["path"]),
        entry["state"],
        entry["field"],
        entry["parameter"],
        _abstract_value(entry, pieces),
    )
    return StoredLeaf(leaf, pieces, entry["key"])


def _abstract_value(entry: dict[str, Any], pieces: tuple[Piece, ...]) -> Any:
    shape = tuple(entry["shape"])
    if entry["key"]:
        return jax.eval_shape(lambda: jax.random.key(0, impl=entry["key"])).update(shape=shape)
    dtype = jnp.dtype(entry["dtype"])
    if entry["storage"] == "codes":
        return abstract_quantized(shape, dtype, _spec_from_json(entry["spec"]))
    if entry["storage"] == "means":
        means: Any = (piece.abstract() for piece in pieces)
        return FactoredMoment(*means)
    return jax.ShapeDtypeStruct(shape, dtype)


def assembled(stored: StoredLeaf, arrays: list[Any]) -> Any:
    """The leaf of which these are the arrays."""
    value = stored.leaf.value
    if stored.key:
        return jax.random.wrap_key_data(arrays[0], impl=stored.key)
    return jax.tree.unflatten(jax.tree.structure(value), arrays)


def _storage_to_json(value: Any) -> dict[str, Any]:
    if is_quantized(value):
        return {"storage": "codes", "spec": _spec_to_json(value.spec)}
    return {"storage": "means" if is_factored(value) else "array"}


def _spec_to_json(spec: QuantSpec) -> dict[str, Any]:
    fields = dataclasses.asdict(spec)
    if isinstance(spec.codebook, tuple):
        fields["codebook"] = [float(value) for value in spec.codebook]
    # The table of a name, too, is held to what it was.
    return {**fields, "table_crc32": _table_crc32(spec)}


def _spec_from_json(entry: dict[str, Any]) -> QuantSpec:
    fields = {name: value for name, value in entry.items() if name != "table_crc32"}
    if isinstance(fields["codebook"], list):
        fields["codebook"] = tuple(fields["codebook"])
    spec = QuantSpec(**fields)
    if _table_crc32(spec) != entry["table_crc32"]:
        raise ValueError(f"its codes were made with another table {spec.codebook!r} than today's")
    return spec


def _table_crc32(spec: QuantSpec) -> int:
    return zlib.crc32(np.asarray(spec.values, "<f4").tobytes())


def _crc32(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
