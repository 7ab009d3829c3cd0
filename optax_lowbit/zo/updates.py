"""What a step makes of a leaf: directions drawn again, parameters written, moments kept."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowbit.kernels import tiling
from optax_lowbit.kernels.backends import Backend
from optax_lowbit.kernels.parameters import Descent, rounded
from optax_lowbit.kernels.reference import Step, widened
from optax_lowbit.kernels.steps import Fused, step_leaf
from optax_lowbit.moments.storage import Moment
from optax_lowbit.quant import is_quantized, random_bits
from optax_lowbit.zo.directions import Directions
from optax_lowbit.zo.grid import Grid
from optax_lowbit.zo.noise import Factors
from optax_lowbit.zo.rows import Rows, row_tiles


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf, or a slice of one, as a step is given it.

    Attributes:
      rows: Its values, and the moments by name as companions.
      directions: Those of the step.
      zero: A uint32 0 that delays their drawing.
      key: For stochastic rounding of parameters and moments.
      count: int32 ``()``: steps taken before this one.
      decays: Whether weight decay applies.
      scalars: The rule's scalars, after this step.
      grid: Of a leaf of codes: how they are read.
    """

    rows: Rows
    directions: Directions
    zero: jax.Array
    key: random_bits.Key
    count: jax.Array
    decays: bool
    scalars: Mapping[str, jax.Array]
    grid: Grid | None = None

    def draw(
        self, slopes: jax.Array, each: Callable[[jax.Array], jax.Array] | None = None
    ) -> jax.Array:
        """``sum_i slopes[i] * each(z_i)``, float32; see :meth:`Directions.sum`."""
        return self.directions.sum(slopes, self.rows, self.zero, each)

    def factors(self, slopes: jax.Array) -> Factors | None:
        """The factors of that; None where directions have full rank."""
        return self.directions.factors(slopes, self.rows, self.zero)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """How coefficients become new parameters.

    A record of zeros stands for a step that is not taken: nothing is updated then, neither
    parameters nor moments nor scalars.

    Attributes:
      moments: What is kept for every element, by name.
      scalars: Small arrays that are kept beside, by name, as they are at first.
      settings: How many of a record's numbers, the last ones, are hyperparameters or products of
        these: a log has them where they change.
    """

    moments: Mapping[str, Moment] = dataclasses.field(default_factory=dict)
    scalars: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    settings: ClassVar[int] = 0

    def record(self, coefficients: jax.Array, rate: jax.Array, decay: jax.Array) -> jax.Array:
        """The numbers that an update is made from: float32 ``(k,)``.

        Args:
          coefficients: float32 ``(n,)``; their sum with the directions estimates the gradient.
          rate: The learning rate.
          decay: The weight decay.
        """
        raise NotImplementedError

    def advance(
        self, scalars: dict[str, jax.Array], record: jax.Array, count: jax.Array
    ) -> dict[str, jax.Array]:
        """The scalars after a step with this record, the step of number ``count``, from 0."""
        del record, count
        return scalars

    def update(self, record: jax.Array, leaf: Leaf) -> tuple[jax.Array, dict[str, Any]]:
        """New values of the leaf, in its dtype, and its new moments."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Descend(Rule):
    """``theta <- (1 - eta lambda) theta - eta sum_i c_i z_i``; nothing is kept.

    The record has ``-eta c_i``, so replaying needs no learning rate, and then ``eta lambda``. With
    signs for ``z`` each product is exact: the result does not depend on how it was compiled.
    """

    settings: ClassVar[int] = 1

    def record(self, coefficients, rate, decay):
        """Slopes, and the share of each parameter that is taken away."""
        return jnp.append(-rate * coefficients, rate * decay)

    def update(self, record, leaf):
        """Adds the directions to what decay leaves."""
        return moved(leaf, leaf.draw(record[:-1]), record[-1]), {}


@dataclasses.dataclass(frozen=True)
class DescendSign(Rule):
    """``theta <- (1 - eta lambda) theta - eta sign(sum_i c_i z_i)``; nothing is kept."""

    settings: ClassVar[int] = 2

    def record(self, coefficients, rate, decay):
        """Coefficients, the learning rate and the weight decay."""
        return jnp.concatenate([coefficients, rate[None], decay[None]])

    def update(self, record, leaf):
        """A step of the same size everywhere, and none where the estimate is 0."""
        rate, decay = record[-2], record[-1]
        signs = jnp.sign(leaf.draw(record[:-2]))
        return moved(leaf, -rate * signs, rate * decay), {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stepped(Rule):
    """A first-order optimizer's own step on the estimate of one leaf's gradient at a time.

    Attributes:
      step: Given the number of the step, from 1: what it does to a piece of a leaf in float32.
      fused: The same as the kernels know it.
      backend: The kernels.
      scalars: The number of steps taken; those that were not are not counted.
    """

    step: Callable[[jax.Array], Step]
    fused: Fused | None = None
    backend: Backend = "auto"
    scalars: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"count": np.int32(0)})
    settings: ClassVar[int] = 2

    def record(self, coefficients, rate, decay):
        """Coefficients, the learning rate and the weight decay."""
        return jnp.concatenate([coefficients, rate[None], decay[None]])

    def advance(self, scalars, record, count):
        """Counts the step."""
        return {"count": scalars["count"] + 1}

    def update(self, record, leaf):
        """Estimate, step and descend."""
        estimate = leaf.draw(record[:-2])
        return stepped(
            leaf, estimate, leaf.rows.companions, self.step, self.fused, self.backend,
            leaf.scalars["count"], rate=record[-2], decay=record[-1],
        )  # fmt: skip


def stepped(
    leaf: Leaf,
    estimate: jax.Array,
    moments: dict[str, Any],
    step: Callable[[jax.Array], Step],
    fused: Fused | None,
    backend: str,
    count: jax.Array,
    rate: jax.Array,
    decay: jax.Array,
) -> tuple[jax.Array, dict[str, Any]]:
    """``p - rate * (u + decay * p)`` with ``u`` of step number ``count``, and the new moments."""
    descent = Descent(
        leaf.rows.values, rate, decay if leaf.decays else jnp.float32(0),
        random_bits.fold_in(leaf.key, 1), leaf.rows.numbers,
    )  # fmt: skip
    scalars = None if fused is None else fused.scalars(count)
    return step_leaf(
        step(count), fused, backend, scalars, estimate, moments, leaf.key, descent=descent
    )


def moved(leaf: Leaf, by: jax.Array, share: jax.Array) -> jax.Array:
    """The values less a share of them, if they decay, plus ``by``; in their dtype."""
    values = widened(leaf.rows.values)
    if leaf.decays:
        values = values - uncontracted(share * values, leaf.count)
    return rounded(values + by, leaf.rows.values.dtype, leaf.key, leaf.rows.indices())


def is_taken(record: jax.Array) -> jax.Array:
    """Whether a record is that of a step: one of zeros is not."""
    return jnp.any(record != 0)


def update_leaf(rule: Rule, record: jax.Array, leaf: Leaf) -> tuple[jax.Array, dict[str, Any]]:
    """The rule on a leaf, tile by tile if it is large; nothing if no step is taken."""
    rows = leaf.rows
    # The direction of one probe is made where it is added; the sum of several is held.
    if not rule.moments and len(leaf.directions.keys) == 1:
        new, _ = rule.update(record, leaf)
        return jnp.where(is_taken(record), new, rows.values), {}

    def updated(numbers, values, moments):
        own = dataclasses.replace(rows, values=values, numbers=numbers, companions=moments)
        return rule.update(record, dataclasses.replace(leaf, rows=own))

    kept = rows.values, rows.companions
    plan = _plan(rows)
    # A loop updates what it carries in place. A choice between old and new would hold both.
    if plan is None:
        turns = jnp.where(is_taken(record), 1, 0)
        return jax.lax.fori_loop(0, turns, lambda _, kept: updated(rows.numbers, *kept), kept)

    def body(tile, numbers, kept):
        del tile
        new = updated(numbers, *kept)
        return jax.tree.map(functools.partial(jnp.where, is_taken(record)), new, kept)

    return tiling.over_tiles(plan, body, rows.numbers, kept)


def _plan(rows: Rows) -> tiling.Tiling | None:
    """Tiles of whole rows; None for a leaf that is one, or whose moments can't be parted so."""
    values, moments = rows.values, jax.tree.leaves(rows.companions, is_leaf=is_quantized)
    arrays = jax.tree.leaves((values, rows.companions))
    # Stochastic rounding of moments numbers the rows of what it is given.
    is_parted = all(x.ndim == values.ndim and x.shape[:-1] == values.shape[:-1] for x in arrays)
    is_parted &= not any(is_quantized(x) and x.spec.rounding == "stochastic" for x in moments)
    return row_tiles(values) if is_parted else None


def uncontracted(x: jax.Array, number: jax.Array) -> jax.Array:
    """``x``, which a compiler can't merge into a multiply-add with what comes after.

    Where it did, replaying under another compilation would round differently.

    Args:
      x: float32 or float64.
      number: Any non-negative int32 that is not known when the program is compiled.
    """
    word = jnp.uint64 if x.dtype == jnp.float64 else jnp.uint32
    bits = jax.lax.bitcast_convert_type(x, word) ^ (number < 0).astype(word)
    return jax.lax.bitcast_convert_type(bits, x.dtype)
