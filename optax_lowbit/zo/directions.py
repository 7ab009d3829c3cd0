"""Sums of random directions over a tree: what a probe adds to parameters, and what a step does."""

import dataclasses
import functools
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optax_lowbit.kernels.meshes import as_varying, varying_axes
from optax_lowbit.kernels.reference import name_hash, name_number
from optax_lowbit.moments.policy import path_name
from optax_lowbit.quant import is_quantized, random_bits
from optax_lowbit.zo.grid import Grid
from optax_lowbit.zo.noise import Factors, Noise, Probe
from optax_lowbit.zo.rows import Rows

# Chooses leaves: a regular expression that is searched for in a path such as `layers/0/kernel`, or
# a predicate of path and leaf.
Choice = str | Callable[[str, Any], bool]

# What of a tree trains: all float arrays, or of every `QuantizedArray` the scales or the codes.
Part = Literal["floats", "scales", "codes"]


def chooses(choice: Choice, path: str, leaf: Any) -> bool:
    """Whether a leaf is chosen."""
    return bool(re.search(choice, path) if isinstance(choice, str) else choice(path, leaf))


@dataclasses.dataclass(frozen=True)
class Trainable:
    """The leaves of a tree that train, and the rest.

    Attributes:
      leaves: The arrays that train.
      paths: The name of each.
      grids: For each leaf that is the codes of a :class:`QuantizedArray`, how they are read.
    """

    leaves: tuple[jax.Array, ...]
    paths: tuple[str, ...]
    grids: tuple[Grid | None, ...]
    _others: tuple[Any, ...]
    _is_trainable: tuple[bool, ...]
    _treedef: Any

    def tree(self, leaves: Sequence[Any]) -> Any:
        """The tree with these in place of the leaves that train."""
        new, others = iter(leaves), iter(self._others)
        return self._treedef.unflatten(next(new if yes else others) for yes in self._is_trainable)

    def opened(self, rows: Rows) -> Rows:
        """The rows, with an element for each column: of codes, their places."""
        grid = self.grids[rows.leaf]
        return rows if grid is None else grid.opened(rows)


def split(params: Any, trainable: Choice | None = None, part: Part = "floats") -> Trainable:
    """The leaves that train: of those that ``part`` names, the ones that ``trainable`` chooses.

    Args:
      params: Pytree of arrays and of :class:`QuantizedArray`. Empty arrays do not train.
      trainable: None: all.
      part: See :data:`Part`.

    Raises:
      TypeError: If a leaf is of floats of 8 bits.
      ValueError: If no leaf trains, or two of them would have the same directions.
    """
    others, ours, chosen = [], [], []
    for path, leaf, node in _leaves_with_nodes(params):
        yes = _is_part(leaf, node, part) and (trainable is None or chooses(trainable, path, leaf))
        chosen.append(yes)
        if yes:
            ours.append((jnp.asarray(leaf), path, Grid.of(node) if part == "codes" else None))
        else:
            others.append(leaf)
    if not ours:
        what = "a float leaf" if part == "floats" else f"the {part} of a QuantizedArray"
        paths = [path for path, *_ in _leaves_with_nodes(params)]
        raise ValueError(f"trainable={trainable!r} must choose {what}, and there are {paths}")
    leaves, paths, grids = zip(*ours)
    _check_leaves(leaves, paths)
    return Trainable(leaves, paths, grids, tuple(others), tuple(chosen), jax.tree.structure(params))


def _check_leaves(leaves: Sequence[jax.Array], paths: Sequence[str]) -> None:
    owners: dict[int, str] = {}
    for leaf, path in zip(leaves, paths):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize == 1:
            raise TypeError(
                f"leaf {path!r} must be of floats of 16 bits or more to train, got {leaf.dtype}; "
                f"trainable= can leave it out"
            )
        owner = owners.setdefault(name_number(path), path)
        if owner is not path:
            raise ValueError(
                f"leaves {owner!r} and {path!r} must have other paths: their directions would be "
                f"the same"
            )


def _leaves_with_nodes(params: Any) -> list[tuple[str, Any, Any]]:
    """Path and array of every leaf, and the :class:`QuantizedArray` that it is in, or itself."""
    nodes, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    return [
        (path_name((*path, *inner)), leaf, node)
        for path, node in nodes
        for inner, leaf in jax.tree_util.tree_leaves_with_path(node)
    ]


def _is_part(leaf: Any, node: Any, part: Part) -> bool:
    if not jnp.size(leaf):
        return False
    if part == "codes":
        return is_quantized(node) and leaf is node.codes
    is_float = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return is_float and (part == "floats" or is_quantized(node))


@dataclasses.dataclass(frozen=True)
class Directions:
    """The directions of some probes.

    Attributes:
      noise: The distribution.
      probe: What they are drawn from, but for its key.
      keys: uint32 ``(n, leaves, 2)``, from :func:`probe_keys`.
      scale: float32 ``(n,)``: what each is multiplied with.
      active: int32 ``()``: after so many their slopes are 0, and nothing is drawn; None: all count.
    """

    noise: Noise
    probe: Probe
    keys: jax.Array
    scale: jax.Array
    active: jax.Array | None = None

    def sum(
        self,
        slopes: jax.Array,
        rows: Rows,
        zero: jax.typing.ArrayLike,
        each: Callable[[jax.Array], jax.Array] | None = None,
    ) -> jax.Array:
        """``sum_i slopes[i] * each(z_i)`` at some rows, float32, added in order.

        Args:
          slopes: float32 ``(n,)``.
          rows: Where.
          zero: A uint32 0 that delays the drawing; see `late_perturbation.data_zero`.
          each: Done to each direction; None: nothing.
        """

        def term(i):
            z = self.noise.draw(self._source(i, rows, zero), rows)
            return (
                slopes[i] * self.scale[i] * z
                if each is None
                else slopes[i] * each(self.scale[i] * z)
            )

        if len(slopes) == 1:
            return term(0)
        factors = None if each is not None else self.factors(slopes, rows, zero)
        if factors is not None:
            return outer(factors.left, factors.right)
        given: Any = (zero, self.keys, slopes, rows.values, rows.numbers)
        axes = frozenset[str]().union(*map(varying_axes, given))
        # Zeros that depend on nothing would be made for all leaves at once.
        start = jnp.broadcast_to(jnp.uint32(zero).astype(jnp.float32), rows.values.shape)
        start = as_varying(start, axes)
        count = len(slopes) if self.active is None else self.active
        return jax.lax.fori_loop(0, count, lambda i, total: total + term(i), start)

    def factors(self, slopes: jax.Array, rows: Rows, zero: jax.typing.ArrayLike) -> Factors | None:
        """Factors of :meth:`sum`, the slopes in the left one; None where it has full rank."""

        def term(i) -> Any:
            return self.noise.factors(self._source(i, rows, zero), rows)

        first = term(0)
        if first is None:
            return None
        slopes = slopes * self.scale
        left = slopes[0] * first.left
        if len(slopes) > 1:

            def add(i, total):
                return total + slopes[i] * term(i).left

            count = len(slopes) if self.active is None else self.active
            left = jax.lax.fori_loop(1, count, add, left)
        return first._replace(left=left)

    def _source(self, i: Any, rows: Rows, zero: Any) -> Probe:
        first, second = self.keys[i, rows.leaf]
        zero = jnp.uint32(zero)
        return self.probe._replace(key=(first + zero, second), zero=zero)


def directions_of(
    noise: Noise,
    probe: Probe,
    keys: jax.Array,
    leaves: Sequence[jax.Array],
    active: jax.Array | None = None,
) -> Directions:
    """The directions with these keys, their scale found."""
    return Directions(noise, probe, keys, noise.scale(probe, keys, leaves), active)


def outer(left: jax.Array, right: jax.Array) -> jax.Array:
    """``left @ right.T``: ``(..., n)`` of ``(..., rank)`` and ``(n, rank)``.

    Not by a matmul: a sum in the order of columns is the same for some rows as for all of them.
    """
    right = right.reshape((1,) * (left.ndim - 1) + right.shape)
    terms = [left[..., k : k + 1] * right[..., k] for k in range(right.shape[-1])]
    return functools.reduce(operator.add, terms)


# A number that no probe has.
_ROUNDING = 2**32 - 1


def probe_keys(
    run: random_bits.Key, step: jax.Array, num_probes: int, paths: Sequence[str | jax.Array]
) -> jax.Array:
    """The keys of a step's probes: uint32 ``(num_probes, leaves, 2)``."""
    return _step_keys(run, step, jnp.arange(num_probes, dtype=jnp.uint32), paths)


def rounding_keys(run: random_bits.Key, step: jax.Array, paths: Sequence[str]) -> jax.Array:
    """The keys of a step's stochastic rounding: uint32 ``(leaves, 2)``."""
    return _step_keys(run, step, jnp.array([_ROUNDING], jnp.uint32), paths)[0]


def leaf_keys(key: random_bits.Key, paths: Sequence[str | jax.Array]) -> jax.Array:
    """A key for each leaf, by its path: uint32 ``(..., leaves, 2)`` of key words ``(..., 1)``.

    Paths may be given by their :func:`~optax_lowbit.kernels.reference.name_hash`.
    """
    zeros = jnp.zeros((*key[0].shape[:-1], len(paths)), jnp.uint32)
    return _keys(key, zeros, zeros, paths)


def _step_keys(key, step, numbers, paths) -> jax.Array:
    shape = len(numbers), len(paths)
    steps = jnp.broadcast_to(step.astype(jnp.uint32), shape)
    return _keys(key, steps, jnp.broadcast_to(numbers[:, None], shape), paths)


def _keys(key, x0, x1, paths) -> jax.Array:
    # One call of the cipher, with a key for each leaf: each call takes a while to compile.
    hashes = jnp.stack([name_hash(path) if isinstance(path, str) else path for path in paths])
    hashes = jnp.broadcast_to(hashes, x0.shape)
    first, second = (jnp.broadcast_to(word, x0.shape) for word in key)
    words = random_bits.threefry2x32((first, second ^ hashes), x0, x1)
    # Else the compiler takes the table apart and runs the cipher for each leaf, as scalars.
    return jax.lax.optimization_barrier(jnp.stack(words, axis=-1))
