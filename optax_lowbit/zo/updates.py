"""What a step makes of a leaf: directions drawn again, parameters written, moments kept."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from optax_lowbit.kernels import tiling
from optax_lowbit.kernels.parameters import Descent, rounded
from optax_lowbit.kernels.reference import Step, widened
from optax_lowbit.kernels.steps import Fused, step_leaf
from optax_lowbit.moments.storage import Moment
from optax_lowbit.quant import random_bits
from optax_lowbit.zo.grid import Grid
from optax_lowbit.zo.rows import Rows

# Leaves of more elements, and more than two axes, are updated one slice of the first axis at a
# time: no more than a slice of an estimate is ever held.
STACK_ELEMENTS = 2**20


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf, or a slice of one, as a step is given it.

    Attributes:
      rows: Its values, and the moments by name as companions.
      draw: ``(slopes, rows) -> sum_i slopes[i] z_i``, float32.
      key: For stochastic rounding of parameters and moments.
      count: int32 ``()``: steps taken before this one.
      decays: Whether weight decay applies.
      grid: Of a leaf of codes: how they are read.
    """

    rows: Rows
    draw: Callable[[jax.Array, Rows], jax.Array]
    key: random_bits.Key
    count: jax.Array
    decays: bool
    grid: Grid | None = None


class Rule(Protocol):
    """How coefficients become new parameters."""

    @property
    def moments(self) -> Mapping[str, Moment]:
        """What is kept for every element, by name."""
        ...

    def record(self, coefficients: jax.Array, rate: jax.Array, decay: jax.Array) -> jax.Array:
        """The numbers that an update is made from: float32 ``(k,)``.

        Args:
          coefficients: float32 ``(n,)``; their sum with the directions estimates the gradient.
          rate: The learning rate.
          decay: The weight decay.
        """
        ...

    def update(self, record: jax.Array, leaf: Leaf) -> tuple[jax.Array, dict[str, Any]]:
        """New values of the leaf, in its dtype, and its new moments."""
        ...


@dataclasses.dataclass(frozen=True)
class Descend:
    """``theta <- (1 - eta lambda) theta - eta sum_i c_i z_i``; nothing is kept.

    The record has ``-eta c_i``, so replaying needs no learning rate, and then ``eta lambda``. With
    signs for ``z`` each product is exact: the result does not depend on how it was compiled.
    """

    moments: Mapping[str, Moment] = dataclasses.field(default_factory=dict, init=False)

    def record(self, coefficients, rate, decay):
        """Slopes, and the share of each parameter that is taken away."""
        return jnp.append(-rate * coefficients, rate * decay)

    def update(self, record, leaf):
        """Adds the directions to what decay leaves."""
        values = widened(leaf.rows.values)
        moved = leaf.draw(record[:-1], leaf.rows)
        if leaf.decays:
            values = values - uncontracted(record[-1] * values, leaf.count)
        return rounded(values + moved, leaf.rows.values.dtype, leaf.key), {}


@dataclasses.dataclass(frozen=True)
class Stepped:
    """A first-order optimizer's own step on the estimate of one leaf's gradient at a time.

    Attributes:
      moments: What it keeps.
      step: Given the number of the step, from 1: what it does to a piece of a leaf in float32.
      fused: The same as the kernels know it.
    """

    moments: Mapping[str, Moment]
    step: Callable[[jax.Array], Step]
    fused: Fused | None = None

    def record(self, coefficients, rate, decay):
        """Coefficients, the learning rate and the weight decay."""
        return jnp.concatenate([coefficients, rate[None], decay[None]])

    def update(self, record, leaf):
        """Estimate, step and descend."""
        rate, decay = record[-2], record[-1]
        stored, key = leaf.rows.companions, leaf.key
        descent = Descent(
            leaf.rows.values, rate, decay if leaf.decays else jnp.float32(0),
            random_bits.fold_in(key, 1),
        )  # fmt: skip
        estimate = leaf.draw(record[:-2], leaf.rows)
        count = leaf.count + 1
        scalars = None if self.fused is None else self.fused.scalars(count)
        return step_leaf(
            self.step(count), self.fused, "auto", scalars, estimate, stored, key, descent=descent
        )


def update_leaf(rule: Rule, record: jax.Array, leaf: Leaf) -> tuple[jax.Array, dict[str, Any]]:
    """The rule on a leaf, slice by slice if it is a large stack."""
    rows = leaf.rows
    arrays = jax.tree.leaves((rows.values, rows.companions))
    is_stack = rows.values.ndim > 2 and rows.values.size > STACK_ELEMENTS and rule.moments
    if not is_stack or any(len(x) != len(rows.values) for x in arrays):
        return rule.update(record, leaf)
    dtypes = jax.tree.map(lambda x: x.dtype, (rows.values, rows.companions))

    def turn(i, state):
        part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), state)
        values, moments = jax.tree.map(tiling.from_bits, part, dtypes)
        number = jax.lax.dynamic_index_in_dim(rows.numbers, i, keepdims=False)
        own = Rows(values, number, moments, rows.leaf)
        key = random_bits.fold_in(leaf.key, i)
        new = rule.update(record, dataclasses.replace(leaf, rows=own, key=key))
        return jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_index_in_dim(x, tiling.as_bits(y), i, 0),
            state, new,
        )  # fmt: skip

    state = jax.tree.map(tiling.as_bits, (rows.values, rows.companions))
    state = jax.lax.fori_loop(0, len(rows.values), turn, state)
    return jax.tree.map(tiling.from_bits, state, dtypes)


def uncontracted(x: jax.Array, number: jax.Array) -> jax.Array:
    """``x``, which a compiler can't merge into a multiply-add with what comes after.

    Where it did, replaying under another compilation would round differently.

    Args:
      x: float32.
      number: Any non-negative int32 that is not known when the program is compiled.
    """
    nothing = (number < 0).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) ^ nothing
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
