"""Directions with some elements left out, chosen at random or by the size of the weights.

A mask is never stored. It is made again where a direction's rows are drawn: an element takes part
if its score (random bits of its index, or the bits of its weight) is below a threshold, one number
for a leaf, that is kept in the optimizer's state.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optax_lowbit.kernels import tiling
from optax_lowbit.kernels.ordering import data_zero
from optax_lowbit.kernels.reference import name_hash
from optax_lowbit.quant import random_bits
from optax_lowbit.zo.checks import check_count
from optax_lowbit.zo.directions import Trainable, leaf_keys
from optax_lowbit.zo.noise import Noise, columns, words
from optax_lowbit.zo.refresh import Kept, refreshed
from optax_lowbit.zo.rows import Rows, row_tiles, whole
from optax_lowbit.zo.selection import BOUND, threshold

Scope = Literal["leaf", "global"]


class Masking(NamedTuple):
    """What a mask keeps between steps.

    Attributes:
      noise: What the noise that is masked keeps.
      thresholds: uint32 ``(leaves,)``: scores below them take part.
      keys: uint32 ``(leaves, 2)``: of random scores.
    """

    noise: Any
    thresholds: Kept
    keys: jax.Array


@dataclasses.dataclass(frozen=True)
class _Mask(Noise):
    noise: Noise
    ratio: float
    interval: int
    scope: Scope = "leaf"

    def __post_init__(self):
        if not isinstance(self.noise, Noise):
            raise TypeError(f"noise must be a Noise, got {type(self.noise).__name__}")
        if not isinstance(self.ratio, int | float) or not 0 <= self.ratio < 1:
            raise ValueError(
                f"ratio must be the share left out, from 0 to below 1, got {self.ratio!r}"
            )
        check_count("interval", self.interval)
        if self.scope not in ("leaf", "global"):
            raise ValueError(f"scope must be 'leaf' or 'global', got {self.scope!r}")

    def prepare(self, prepared, params, run, step):
        """Thresholds, found in the first step of each interval."""
        is_first = not isinstance(prepared, Masking)
        own = random_bits.fold_in(run, name_hash("mask"))
        key = random_bits.fold_in(own, step // self.interval)
        keys = leaf_keys((key[0][None], key[1][None]), params.paths)
        noise = self.noise.prepare(() if is_first else prepared.noise, params, run, step)
        find = functools.partial(self._thresholds, params, keys)
        kept = () if is_first else prepared.thresholds
        return Masking(noise, refreshed(kept, step, self.interval, find), keys)

    def draw(self, probe, rows):
        """The noise, and zeros."""
        direction = self.noise.draw(self._unmasked(probe), rows)
        masking: Masking = probe.prepared
        first, second = masking.keys[rows.leaf]
        score = self._score((first + jnp.uint32(probe.zero), second), rows)
        return jnp.where(score < masking.thresholds.value[rows.leaf], direction, 0)

    def scale(self, probe, keys, leaves):
        """That of the noise."""
        return self.noise.scale(self._unmasked(probe), keys, leaves)

    def _unmasked(self, probe):
        return probe._replace(prepared=probe.prepared.noise)

    def _score(self, key: random_bits.Key, rows: Rows) -> jax.Array:
        """uint32 below `BOUND` of the shape of the rows."""
        raise NotImplementedError

    def _thresholds(self, params: Trainable, keys: jax.Array) -> jax.Array:
        """uint32 ``(leaves,)``."""
        raise NotImplementedError

    def _by_score(self, params: Trainable, keys: jax.Array, kept: Sequence[Any]) -> jax.Array:
        """A threshold for each leaf, so that so many take part."""
        found = []
        for number, (leaf, count) in enumerate(zip(params.leaves, kept, strict=True)):
            rows = whole(number, leaf)
            # One leaf after the other: scores are then those of one leaf.
            first, second = keys[number]
            key = first + data_zero(found[-1]) if found else first, second
            below = functools.partial(_count_below, self._score, key, rows)
            found.append(threshold(below, jnp.int32(count), leaf.size))
        return jnp.stack(found)


class RandomMask(_Mask):
    r"""Leaves out randomly chosen elements, the same ones for ``interval`` steps.

    .. math::
      z = m \odot z', \qquad \sum_i (1 - m_i) = \mathrm{round}(\mathrm{ratio} \cdot n)

    ``c z`` estimates ``m * G``, the gradient of what takes part, without bias; averaged over masks,
    ``1 - ratio`` of the gradient. An element takes part if 31 random bits of its leaf's path, its
    row and its column are below a threshold that has just so many below it. The count is exact, but
    for ties of the bits at the threshold: of ``n`` elements one with a probability of about
    ``n / 2**31``.

    With ``scope="global"`` the ``ratio`` is that over all leaves. Each leaf leaves out as many
    elements as it has among the ``round(ratio * n)`` smallest weights of all by magnitude, so
    leaves of small weights are masked more; which elements, is drawn at random all the same.

    **Cost.** One word of random bits for each element wherever a direction is drawn, and up to 62
    times in the first step of an interval (:mod:`~optax_lowbit.zo.selection`).

    Differs from the reference of the benchmark, where an element is left out if a *normal* value is
    below ``ratio``: nominal 0.1 left out 0.54.

    Attributes:
      noise: What is masked.
      ratio: The share of elements that is left out, from 0 to below 1.
      interval: Steps that a mask lives.
      scope: Whether the share is that of each leaf, or that of all together.

    Raises:
      TypeError, ValueError: If an attribute is impossible; at init also if a scope has ``2**31``
        elements or more.

    Examples:
      >>> from optax_lowbit import zo
      >>> opt = zo.zo_sgd(1e-6, noise=zo.RandomMask(zo.Rademacher(), 0.9, interval=100))

    References:
      Zhang et al, `Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning: A
      Benchmark <https://arxiv.org/abs/2402.11592>`_, 2024, section 5.
    """

    def _score(self, key, rows):
        return words(key, rows, columns(rows)).reshape(rows.values.shape) >> 1

    def _thresholds(self, params, keys):
        sizes = [leaf.size for leaf in params.leaves]
        if self.scope == "leaf":
            return self._by_score(params, keys, [_kept(size, self.ratio) for size in sizes])
        total = sum(sizes)
        left_out = total - _kept(total, self.ratio)
        rows = [whole(number, leaf) for number, leaf in enumerate(params.leaves)]
        bound = _magnitude_threshold(rows, left_out)
        counts = _counts_below(rows, bound)
        return self._by_score(params, keys, [s - count for s, count in zip(sizes, counts)])


class MagnitudeMask(_Mask):
    r"""Leaves out the largest weights by magnitude: Sparse-MeZO.

    .. math::
      z_i = z'_i \text{ if } |\theta_i| < t \text{ else } 0, \qquad
      \#\{i: |\theta_i| \ge t\} = \mathrm{round}(\mathrm{ratio} \cdot n)

    ``c z`` estimates the gradient of the weights that take part, without bias. The threshold ``t``,
    of a leaf or of all leaves, is found from the weights in the first step of each interval, and is
    exact but for weights of equal magnitude: those at the threshold take part, so a leaf of zeros
    trains as a whole. Between, weights that grow past it are left out and others join: the share
    drifts. Probe and update of a step see the same weights, so the same mask.

    **Cost.** A comparison for each element wherever a direction is drawn, and up to 62 readings of
    the weights in the first step of an interval.

    Attributes:
      noise: What is masked.
      ratio: The share of elements that is left out, from 0 to below 1.
      interval: Steps that a threshold lives. In the paper it lives for the whole run.
      scope: Whether there is a threshold for each leaf, or one for all of them.

    Raises:
      TypeError, ValueError: As in :class:`RandomMask`.

    Examples:
      >>> from optax_lowbit import zo
      >>> noise = zo.MagnitudeMask(zo.Rademacher(), 0.75, interval=1000)
      >>> opt = zo.zo_sgd(1e-6, noise=noise, weight_decay=0.0)

    References:
      Liu et al, `Sparse MeZO: Less Parameters for Better Performance in Zeroth-Order LLM
      Fine-Tuning <https://arxiv.org/abs/2402.15751>`_, 2024, Algorithm 1.
    """

    def _score(self, key, rows):
        return _magnitude(key, rows)

    def _thresholds(self, params, keys):
        sizes = [leaf.size for leaf in params.leaves]
        if self.scope == "leaf":
            return self._by_score(params, keys, [_kept(size, self.ratio) for size in sizes])
        rows = [whole(number, leaf) for number, leaf in enumerate(params.leaves)]
        bound = _magnitude_threshold(rows, _kept(sum(sizes), self.ratio))
        return jnp.broadcast_to(bound, (len(rows),))


def _kept(size: int, ratio: float) -> int:
    """How many of so many elements take part."""
    if size >= BOUND:
        raise ValueError(
            f"a mask chooses among fewer than 2**31 elements, got {size}: use scope='leaf', or "
            "train fewer leaves"
        )
    return size - round(ratio * size)


def _magnitude(key: random_bits.Key, rows: Rows) -> jax.Array:
    """The bits of the float32 magnitude, in the order of magnitudes."""
    # Not at all before the key is there: of -0 the magnitude is that of 0.
    values = rows.values + data_zero(key[0]).astype(rows.values.dtype)
    magnitude = jnp.abs(values.astype(jnp.float32))
    return jax.lax.bitcast_convert_type(magnitude, jnp.uint32)


def _magnitude_threshold(rows: Sequence[Rows], kept: int) -> jax.Array:
    """The bound of magnitudes, over all leaves, with so many below it."""

    def below(bound):
        return functools.reduce(jnp.add, _counts_below(rows, bound))

    return threshold(below, jnp.int32(kept), sum(own.values.size for own in rows))


def _counts_below(rows: Sequence[Rows], bound: jax.Array) -> list[jax.Array]:
    """How many magnitudes of each leaf are below a bound, counted one leaf after the other."""
    nothing, counts = (jnp.uint32(0), jnp.uint32(0)), []
    for own in rows:
        counts.append(_count_below(_magnitude, nothing, own, bound))
        bound = bound + data_zero(counts[-1])
    return counts


def _count_below(
    score: Callable[[random_bits.Key, Rows], jax.Array],
    key: random_bits.Key,
    rows: Rows,
    bound: jax.Array,
) -> jax.Array:
    # Made anew for each bound: a compiler would take them out of the search, and hold them.
    key = key[0] + data_zero(bound), key[1]

    def count(values, numbers):
        part = dataclasses.replace(rows, values=values, numbers=numbers)
        return jnp.sum(score(key, part) < bound, dtype=jnp.int32)

    plan = row_tiles(rows.values)
    if plan is None:
        return count(rows.values, rows.numbers)
    total = tiling.over_tiles(
        plan,
        lambda tile, parts, total: total + count(*parts),
        (rows.values, rows.numbers),
        jnp.zeros((1,) * rows.values.ndim, jnp.int32),
    )
    return total.reshape(())
