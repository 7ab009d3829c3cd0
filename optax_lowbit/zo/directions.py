"""Sums of random directions over a tree: what a probe adds to parameters, and what a step does."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowbit.kernels.reference import name_hash, widened
from optax_lowbit.moments.policy import path_name
from optax_lowbit.quant import random_bits
from optax_lowbit.zo.noise import Noise, Probe
from optax_lowbit.zo.rows import Rows

# Chooses leaves: a regular expression that is searched for in a path such as `layers/0/kernel`, or
# a predicate of path and leaf.
Choice = str | Callable[[str, Any], bool]


def chooses(choice: Choice, path: str, leaf: Any) -> bool:
    """Whether a leaf is chosen."""
    return bool(re.search(choice, path) if isinstance(choice, str) else choice(path, leaf))


@dataclasses.dataclass(frozen=True)
class Trainable:
    """The leaves of a tree that train, and the rest.

    Attributes:
      leaves: The arrays that train.
      paths: The name of each.
    """

    leaves: tuple[jax.Array, ...]
    paths: tuple[str, ...]
    _others: tuple[Any, ...]
    _is_trainable: tuple[bool, ...]
    _treedef: Any

    def tree(self, leaves: Sequence[Any]) -> Any:
        """The tree with these in place of the leaves that train."""
        new, others = iter(leaves), iter(self._others)
        return self._treedef.unflatten(next(new if yes else others) for yes in self._is_trainable)


def split(params: Any, trainable: Choice | None = None) -> Trainable:
    """The leaves that train: float arrays, of those that ``trainable`` chooses.

    Args:
      params: Pytree of arrays.
      trainable: Of the float leaves; None: all.

    Raises:
      ValueError: If no leaf trains.
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(params)
    chosen = [
        jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        and jnp.size(leaf) > 0
        and (trainable is None or chooses(trainable, path_name(path), leaf))
        for path, leaf in pairs
    ]
    named = [(path_name(path), leaf) for path, leaf in pairs]
    ours = [pair for pair, yes in zip(named, chosen) if yes]
    if not ours:
        paths = [path for path, _ in named]
        raise ValueError(f"trainable={trainable!r} must choose a float leaf, and there are {paths}")
    others = [leaf for (_, leaf), yes in zip(named, chosen) if not yes]
    return Trainable(
        tuple(jnp.asarray(leaf) for _, leaf in ours), tuple(path for path, _ in ours),
        tuple(others), tuple(chosen), treedef,
    )  # fmt: skip


def slope_sum(
    noise: Noise, probe: Probe, keys: jax.Array, slopes: jax.Array, rows: Rows,
    zero: jax.typing.ArrayLike,
    each: Callable[[jax.Array], jax.Array] = lambda z: z,
    active: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """``sum_i slopes[i] * each(z_i)`` at some rows, float32, added in order.

    Args:
      noise: The distribution.
      probe: What directions are drawn from, but for its key.
      keys: uint32 ``(n, leaves, 2)``, from :func:`probe_keys`.
      slopes: float32 ``(n,)``.
      rows: Where.
      zero: A uint32 0 that delays the drawing; see `late_perturbation.data_zero`.
      each: Done to each direction.
      active: int32 ``()``: after so many the slopes are 0, and nothing is drawn; None: all count.
    """
    zero = jnp.uint32(zero)

    def term(i):
        first, second = keys[i, rows.leaf]
        z = noise.draw(probe._replace(key=(first + zero, second), zero=zero), rows)
        return slopes[i] * each(z)

    if len(slopes) == 1:
        return term(0)
    start = jnp.zeros_like(widened(rows.values))
    count = len(slopes) if active is None else active
    return jax.lax.fori_loop(0, count, lambda i, total: total + term(i), start)


# A number that no probe has.
_ROUNDING = 2**32 - 1


def probe_keys(
    run: random_bits.Key, step: jax.Array, num_probes: int, paths: Sequence[str]
) -> jax.Array:
    """The keys of a step's probes: uint32 ``(num_probes, leaves, 2)``."""
    return _step_keys(run, step, jnp.arange(num_probes, dtype=jnp.uint32), paths)


def rounding_keys(run: random_bits.Key, step: jax.Array, paths: Sequence[str]) -> jax.Array:
    """The keys of a step's stochastic rounding: uint32 ``(leaves, 2)``."""
    return _step_keys(run, step, jnp.array([_ROUNDING], jnp.uint32), paths)[0]


def leaf_keys(key: random_bits.Key, paths: Sequence[str]) -> jax.Array:
    """The keys of leaves by their paths: uint32 ``(leaves, 2)``."""
    return _step_keys(key, jnp.int32(0), jnp.zeros(1, jnp.uint32), paths)[0]


def _step_keys(key, step, numbers, paths) -> jax.Array:
    # One call of the cipher, with a key for each leaf: each call takes a while to compile.
    shape = len(numbers), len(paths)
    hashes = jnp.stack([name_hash(path) for path in paths])
    words = random_bits.threefry2x32(
        (key[0], jnp.broadcast_to(key[1] ^ hashes, shape)),
        jnp.broadcast_to(step.astype(jnp.uint32), shape),
        jnp.broadcast_to(numbers[:, None], shape),
    )
    # Else the compiler takes the table apart and runs the cipher for each leaf, as scalars.
    return jax.lax.optimization_barrier(jnp.stack(words, axis=-1))
