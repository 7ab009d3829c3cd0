"""The leaves of a training state, and what each is: which field of which optax state, of which
parameter.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowbit.moments.policy import path_name
from optax_lowbit.moments.storage import is_low_bit


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array of a tree, or a low-bit array as a whole.

    Attributes:
      path: The keys from the root, as `jax.tree_util.keystr` writes each: ``("[0]", ".mu")``.
      state: Name of the type of the innermost NamedTuple above it, an optax state; or empty.
      field: The field of that NamedTuple; or empty.
      parameter: The path below that field (or from the root), such as ``layers/0/kernel``.
      value: The array, number, :class:`~optax_lowbit.QuantizedArray` or
        :class:`~optax_lowbit.FactoredMoment`, concrete or abstract.
    """

    path: tuple[str, ...]
    state: str
    field: str
    parameter: str
    value: Any

    @property
    def name(self) -> str:
        """The path, for messages."""
        return "".join(self.path) or "the state"

    @property
    def role(self) -> tuple[str, str]:
        """What it is, wherever in a tree it stands."""
        return self.field, self.parameter

    @property
    def is_count(self) -> bool:
        """Whether it counts steps."""
        is_integer = jnp.issubdtype(dtype_of(self.value), jnp.integer)
        return self.field == "count" and not self.parameter and is_integer

    @property
    def is_hyperparameter(self) -> bool:
        """Whether `optax.inject_hyperparams` put it into the state."""
        return self.field == "hyperparams"


def leaves_of(tree: Any) -> list[Leaf]:
    """All leaves, in the order of ``jax.tree.leaves(tree, is_leaf=is_low_bit)``."""
    found = []

    def visit(node, keys, state, start):
        children = [((), node)]
        if not is_low_bit(node):
            children, _ = jax.tree_util.tree_flatten_with_path(
                node, is_leaf=lambda x: x is not node
            )
        is_state = isinstance(node, tuple) and hasattr(node, "_fields")
        for key, child in children:
            if not key:
                field = path_name(keys[start - 1 : start]) if state else ""
                path = tuple(map(str, keys))
                found.append(Leaf(path, state, field, path_name(keys[start:]), child))
            elif is_state:
                visit(child, keys + key, type(node).__name__, len(keys) + 1)
            else:
                visit(child, keys + key, state, start)

    visit(tree, (), "", 0)
    return found


def structure_of(tree: Any) -> Any:
    """The tree of which :func:`leaves_of` gives the leaves."""
    return jax.tree.structure(tree, is_leaf=is_low_bit)


def shape_of(value: Any) -> tuple[int, ...]:
    """Shape of a leaf, of the array that it stands for."""
    return tuple(value.shape) if hasattr(value, "shape") else np.shape(value)


def dtype_of(value: Any) -> Any:
    """Dtype of a leaf, of the array that it stands for."""
    return value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype


def is_key(value: Any) -> bool:
    """Whether a leaf is a typed PRNG key."""
    return jax.dtypes.issubdtype(dtype_of(value), jax.dtypes.prng_key)


def is_on_host(value: Any) -> bool:
    """Whether a leaf is a number or an array of NumPy."""
    return isinstance(value, bool | int | float | complex | np.ndarray | np.generic)


def pieces_of(value: Any) -> dict[str, Any]:
    """The arrays of a leaf by name: itself under ``""``, or ``".codes"``, ``".scales[0]"``, ..."""
    pieces, _ = jax.tree_util.tree_flatten_with_path(value)
    return {jax.tree_util.keystr(path): piece for path, piece in pieces}
