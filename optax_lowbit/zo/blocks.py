"""Block-wise steps: each part of the parameters has probes of its own."""

import collections
import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowbit.zo import checks
from optax_lowbit.zo.directions import Choice, Trainable, chooses
from optax_lowbit.zo.noise import Noise, Probe
from optax_lowbit.zo.optimizer import Loss, ZeroOrderOptimizer
from optax_lowbit.zo.rows import Rows
from optax_lowbit.zo.state import StepInfo, ZeroOrderState
from optax_lowbit.zo.updates import Rule, is_taken

Blocks = Sequence[Choice] | Callable[[str], Hashable]


def blockwise(
    opt: ZeroOrderOptimizer, blocks: Blocks, *, simultaneous: bool = False
) -> "BlockwiseOptimizer":
    r"""Estimates and updates one block of the parameters after the other.

    .. math::
      \hat g_b = \frac{1}{q} \sum_{i=1}^q
      \frac{L(\theta + \epsilon z_{b,i}) - L(\theta - \epsilon z_{b,i})}{2 \epsilon} z_{b,i},
      \qquad z_{b,i} = 0 \text{ outside block } b

    The variance of an estimate grows with the number of parameters that are perturbed together, so
    each block's is less. A step evaluates the loss ``B`` times as often. Directions follow from the
    paths of leaves, so those of two blocks are independent, whatever their shapes.

    One estimate is compiled for all blocks, and leaves outside of the block are not perturbed.

    **Memory.** That of ``opt``.

    Args:
      opt: From :func:`zo_sgd` or a relative that is a :class:`ZeroOrderOptimizer`. Moments are kept
        leaf by leaf.
      blocks: One choice of leaves for each block (a regular expression that is searched for in a
        path, or a predicate of path and leaf), in the order of their turns; or a function from a
        path to the name of its block, whose turns come as their names first appear among the
        leaves. Each leaf that trains must be in exactly one.
      simultaneous: Whether all blocks are estimated at the parameters before the step, and updated
        at its end. Default: a block's update is made before the next block is estimated.

    Returns:
      An optimizer with the methods of ``opt`` but for ``ask`` and ``tell``, and the same state. In
      its :class:`StepInfo`, ``loss`` is that of the first block's estimate, ``coefficients`` are
      ``(blocks, num_probes)`` and ``is_taken`` is ``(blocks,)``; ``record`` has what was measured
      of one block after the other, then the settings of one block after the other.

    Raises:
      TypeError: If ``opt`` or a choice is none.
      ValueError: If a choice is no regular expression; at init, if a leaf is in no block or in two,
        or a block has no leaf that trains.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from optax_lowbit import zo
      >>> params = {"a": jnp.ones(3), "b": jnp.ones(3), "c": jnp.ones(3)}
      >>> opt = zo.blockwise(zo.zo_sgd(0.1), ["a", "b|c"])
      >>> step = jax.jit(opt.step, static_argnums=0)
      >>> def loss(params):
      ...     return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
      >>> params, state, info = step(loss, params, opt.init(params, 0))
      >>> info.coefficients.shape
      (2, 1)

    References:
      Zhang et al, `Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning: A
      Benchmark <https://arxiv.org/abs/2402.11592>`_, 2024, section 5. Differs in that blocks of the
      same shapes do not share their directions.
    """
    if not isinstance(opt, ZeroOrderOptimizer):
        raise TypeError(f"opt must be a ZeroOrderOptimizer, got {type(opt).__name__}")
    if not callable(blocks):
        if isinstance(blocks, str) or not blocks:
            raise TypeError(f"blocks must be a sequence of choices or a function, got {blocks!r}")
        blocks = tuple(blocks)
        for number, choice in enumerate(blocks):
            if choice is None:
                raise TypeError(f"blocks[{number}] must choose leaves, got None")
            checks.check_choice(f"blocks[{number}]", choice)
    return BlockwiseOptimizer(opt, blocks, simultaneous)


@dataclasses.dataclass(frozen=True)
class BlockwiseOptimizer:
    """What :func:`blockwise` makes, which says what each field is."""

    opt: ZeroOrderOptimizer
    blocks: Blocks
    simultaneous: bool = False

    def init(self, params: Any, key: jax.Array | int) -> ZeroOrderState:
        """As :meth:`ZeroOrderOptimizer.init`."""
        blocks = max(self.numbers(params)) + 1
        state = self.opt.init(params, key)
        scalars = jax.tree.map(lambda x: jnp.stack([x] * blocks), state.scalars)
        return state._replace(scalars=scalars)

    def step(
        self, loss_fn: Loss, params: Any, state: ZeroOrderState, *args: Any
    ) -> tuple[Any, ZeroOrderState, StepInfo]:
        """As :meth:`ZeroOrderOptimizer.step`."""
        if self.simultaneous:
            info = self.estimate(loss_fn, params, state, *args)
            params, state = self.apply(params, state, info.record)
            return params, state, info
        return self._in_turn(loss_fn, params, state, args)

    def estimate(self, loss_fn: Loss, params: Any, state: ZeroOrderState, *args: Any) -> StepInfo:
        """What a step tells; blocks that are updated in turn are, on the way, but not returned."""
        if not self.simultaneous:
            return self._in_turn(loss_fn, params, state, args)[2]
        ours = self._split(params)
        numbers, state = _numbers(ours, self.blocks), self._prepared(ours, state)

        def turn(block):
            own = state._replace(prepared=(block, state.prepared))
            return self._of_block(block, numbers).estimate(loss_fn, params, own, *args)

        return self._merged(jax.lax.map(turn, _turns(numbers)))

    def apply(
        self, params: Any, state: ZeroOrderState, record: jax.Array
    ) -> tuple[Any, ZeroOrderState]:
        """New parameters and state from the records of all blocks, in one pass."""
        numbers = self.numbers(params)
        opt = dataclasses.replace(self.opt, rule=_RuleOfEach(self.opt.rule, numbers))
        blocks, settings = max(numbers) + 1, self.opt.num_settings(params)
        parts = jnp.split(record, [len(record) - blocks * settings])
        of_each = [part.reshape(blocks, -1) for part in parts]
        return opt.apply(params, state, jnp.concatenate(of_each, axis=1))

    def num_settings(self, params: Any) -> int:
        """As :meth:`ZeroOrderOptimizer.num_settings`."""
        return (max(self.numbers(params)) + 1) * self.opt.num_settings(params)

    def numbers(self, params: Any) -> tuple[int, ...]:
        """The number of its block, for each leaf that trains."""
        return _numbers(self._split(params), self.blocks)

    def _in_turn(self, loss_fn, params, state, args) -> tuple[Any, ZeroOrderState, StepInfo]:
        ours = self._split(params)
        numbers, state = _numbers(ours, self.blocks), self._prepared(ours, state)

        def turn(carry, block):
            leaves, moments, scalars = carry
            now = ours.tree(leaves)
            own = state._replace(
                moments=moments,
                scalars=jax.tree.map(lambda x: x[block], scalars),
                prepared=(block, state.prepared),
            )
            opt = self._of_block(block, numbers)
            info = opt.estimate(loss_fn, now, own, *args)
            now, new = opt.apply(now, own, info.record)
            scalars = jax.tree.map(lambda x, y: x.at[block].set(y), scalars, new.scalars)
            return (self._split(now).leaves, new.moments, scalars), info

        start = ours.leaves, state.moments, state.scalars
        (leaves, moments, scalars), info = jax.lax.scan(turn, start, _turns(numbers))
        state = state._replace(count=state.count + 1, moments=moments, scalars=scalars)
        return ours.tree(leaves), state, self._merged(info)

    def _merged(self, info: StepInfo) -> StepInfo:
        """What a step tells, from what its blocks tell."""
        measured = info.record.shape[1] - self.opt.rule.settings
        parts = [part.reshape(-1) for part in jnp.split(info.record, [measured], axis=1)]
        return StepInfo(info.loss[0], info.coefficients, jnp.concatenate(parts), info.is_taken)

    def _split(self, params: Any) -> Trainable:
        return self.opt.split(params)

    def _prepared(self, ours: Trainable, state: ZeroOrderState) -> ZeroOrderState:
        """With what the noise keeps made ready once, from the parameters before the step."""
        run = state.key[0], state.key[1]
        prepared = self.opt.noise.prepare(state.prepared, ours, run, state.count)
        return state._replace(prepared=prepared)

    def _of_block(self, block: jax.Array, numbers: tuple[int, ...]) -> ZeroOrderOptimizer:
        return dataclasses.replace(
            self.opt,
            noise=_NoiseOfBlock(self.opt.noise, numbers),
            rule=_RuleOfBlock(self.opt.rule, numbers, block),
        )


@dataclasses.dataclass(frozen=True)
class _NoiseOfBlock(Noise):
    """Zero outside of a block, whose number comes first in what is prepared.

    There because it is traced: derivative rules may not close over it.
    """

    noise: Noise
    numbers: tuple[int, ...]

    @property
    def uses(self):
        return self.noise.uses

    def prepare(self, prepared, params, run, step):
        """It has been, for all blocks of the step."""
        return prepared

    def scale(self, probe, keys, leaves):
        """That of the whole direction, of which the block's is a part."""
        return self.noise.scale(_inner(probe), keys, leaves)

    def factors(self, probe, rows):
        """Zero outside of the block."""
        found = self.noise.factors(_inner(probe), rows)
        if found is None:
            return None
        return found._replace(left=self._is_inside(probe, rows).astype(jnp.float32) * found.left)

    def draw(self, probe, rows):
        """Leaves outside of the block cost no random numbers."""
        return jax.lax.cond(
            self._is_inside(probe, rows),
            lambda: self.noise.draw(_inner(probe), rows),
            lambda: jnp.zeros(rows.values.shape, jnp.float32),
        )

    def _is_inside(self, probe: Probe, rows: Rows) -> jax.Array:
        return probe.prepared[0] == self.numbers[rows.leaf]


def _inner(probe: Probe) -> Probe:
    return probe._replace(prepared=probe.prepared[1])


@dataclasses.dataclass(frozen=True)
class _OtherRule:
    """A rule, with another way to update a leaf."""

    rule: Rule
    numbers: tuple[int, ...]

    @property
    def moments(self):
        return self.rule.moments

    def record(self, coefficients, rate, decay):
        return self.rule.record(coefficients, rate, decay)


@dataclasses.dataclass(frozen=True)
class _RuleOfBlock(_OtherRule):
    """Leaves everything outside of a block as it is."""

    block: jax.Array

    def advance(self, scalars, record, count):
        return self.rule.advance(scalars, record, count)

    def update(self, record, leaf):
        return jax.lax.cond(
            self.block == self.numbers[leaf.rows.leaf],
            lambda: self.rule.update(record, leaf),
            lambda: (leaf.rows.values, leaf.rows.companions if self.moments else {}),
        )


@dataclasses.dataclass(frozen=True)
class _RuleOfEach(_OtherRule):
    """Updates each leaf from its own block's record, of ``(blocks, k)``."""

    def advance(self, scalars, record, count):
        def one(scalars, record):
            new = self.rule.advance(scalars, record, count)
            return jax.tree.map(lambda x, y: jnp.where(is_taken(record), x, y), new, scalars)

        return jax.vmap(one)(scalars, record)

    def update(self, record, leaf):
        block = self.numbers[leaf.rows.leaf]
        own = jax.tree.map(lambda x: x[block], dict(leaf.scalars))
        own_leaf = dataclasses.replace(leaf, scalars=own)
        return jax.lax.cond(
            is_taken(record[block]),
            lambda: self.rule.update(record[block], own_leaf),
            lambda: (leaf.rows.values, leaf.rows.companions if self.moments else {}),
        )


def _turns(numbers: tuple[int, ...]) -> jax.Array:
    return jnp.arange(max(numbers) + 1)


def _numbers(ours: Trainable, blocks: Blocks) -> tuple[int, ...]:
    """The number of each leaf's block.

    Raises:
      ValueError: If a leaf is in no block or in two, or a block has no leaf.
    """
    if callable(blocks):
        names = [blocks(path) for path in ours.paths]
        order = {name: number for number, name in enumerate(dict.fromkeys(names))}
        lost = [path for path, name in zip(ours.paths, names) if name is None]
        found = [[order[name]] for name in names]
    else:
        found = [
            [number for number, choice in enumerate(blocks) if chooses(choice, path, leaf)]
            for path, leaf in zip(ours.paths, ours.leaves)
        ]
        lost = [path for path, numbers in zip(ours.paths, found) if not numbers]
    if lost:
        raise ValueError(f"blocks must have every leaf that trains, and these are in none: {lost}")
    double = {path: numbers for path, numbers in zip(ours.paths, found) if len(numbers) > 1}
    if double:
        raise ValueError(f"blocks must not share leaves, and these are in several: {double}")
    sizes = collections.Counter(numbers[0] for numbers in found)
    empty = [] if callable(blocks) else [i for i in range(len(blocks)) if i not in sizes]
    if empty:
        raise ValueError(f"blocks must each have a leaf that trains, and {empty} of them have none")
    return tuple(numbers[0] for numbers in found)
