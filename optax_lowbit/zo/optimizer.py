"""A zeroth-order optimizer: probes of a loss, and what becomes of parameters after them.

A step has two halves. The first evaluates the loss and gives a *record*, a few float32 numbers. The
second needs the record alone: it draws the same directions again and updates parameters leaf by
leaf. So a run can be replayed from its records, and the loss may be anything that gives numbers.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.core
import jax.numpy as jnp
import optax

from optax_lowbit.kernels.ordering import data_zero, first_element
from optax_lowbit.kernels.reference import widened
from optax_lowbit.moments.policy import Policy
from optax_lowbit.moments.storage import init_moment
from optax_lowbit.quant import random_bits
from optax_lowbit.zo import checks, precision
from optax_lowbit.zo.directions import (
    Choice,
    Part,
    Trainable,
    chooses,
    directions_of,
    probe_keys,
    rounding_keys,
    split,
)
from optax_lowbit.zo.estimators import (
    Central,
    Estimator,
    ForwardGradient,
    first,
    measure,
    reading,
    value_estimator,
)
from optax_lowbit.zo.noise import Noise, Probe, Rademacher
from optax_lowbit.zo.parallel import spread_probes
from optax_lowbit.zo.rows import whole
from optax_lowbit.zo.slices import Slice
from optax_lowbit.zo.state import StepInfo, ZeroOrderState
from optax_lowbit.zo.sums import summed
from optax_lowbit.zo.updates import Leaf, Rule, is_taken, update_leaf

Loss = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroOrderOptimizer:
    """Probes and steps; made by :func:`zo_sgd` and its relatives, which say what each field is.

    All methods can be jitted. ``loss_fn(params, *args)`` gives a float ``()`` and may be anything
    that JAX can trace; it must give the same value for the same arguments, so random numbers
    (dropout) come from a key among ``args``.
    """

    rule: Rule
    learning_rate: optax.ScalarOrSchedule
    eps: optax.ScalarOrSchedule = 1e-3
    num_probes: int = 1
    active_probes: optax.Schedule | None = None
    noise: Noise = dataclasses.field(default_factory=Rademacher)
    estimator: Estimator | ForwardGradient = dataclasses.field(default_factory=Central)
    probe_batch: int = 1
    probe_axis: str | None = None
    clip: float | None = None
    weight_decay: optax.ScalarOrSchedule = 0.0
    weight_decay_mask: Choice | None = None
    trainable: Choice | None = None
    part: Part = "floats"
    policy: Policy | None = None

    # Whether devices may evaluate a share of the probes each.
    spreads_probes: ClassVar[bool] = True

    def __post_init__(self):
        checks.check_optimizer(self)

    def init(self, params: Any, key: jax.Array | int) -> ZeroOrderState:
        """The state before the first step.

        Args:
          params: Pytree of arrays, of which float leaves train.
          key: A `jax.random.key` of Threefry, its data, or a seed: all directions follow from it.

        Raises:
          TypeError: If ``key`` is no key.
          ValueError: If it is one of another generator, or no leaf trains.

        Warns:
          UserWarning: If ``eps`` is too small for the weights of a bfloat16 or float16 leaf.
        """
        words = jnp.stack(random_bits.key_words(key))
        ours = self.split(params)
        if self._uses_eps:
            precision.warn_of_small_eps(ours, value_at(self.eps, jnp.int32(0)))
        policy = Policy() if self.policy is None else self.policy
        named = dict(zip(ours.paths, ours.leaves, strict=True))
        moments = {
            name: tuple(init_moment(name, moment, named, policy)[path] for path in ours.paths)
            for name, moment in self.rule.moments.items()
        }
        prepared = self.noise.prepare((), ours, _words(words), jnp.int32(0))
        scalars = {name: jnp.array(first) for name, first in self.rule.scalars.items()}
        return ZeroOrderState(jnp.int32(0), words, prepared, moments, scalars)

    def step(
        self, loss_fn: Loss, params: Any, state: ZeroOrderState, *args: Any
    ) -> tuple[Any, ZeroOrderState, StepInfo]:
        """One step: new parameters, new state, and what happened.

        Jit it with ``jax.jit(opt.step, static_argnums=0, donate_argnums=(1, 2))``: parameters and
        moments are then updated in place.
        """
        info = self.estimate(loss_fn, params, state, *args)
        params, state = self.apply(params, state, info.record)
        return params, state, info

    def estimate(self, loss_fn: Loss, params: Any, state: ZeroOrderState, *args: Any) -> StepInfo:
        """The first half of a step: evaluates the loss and leaves the parameters alone."""
        phi, keys = self._probed(loss_fn, params, state, args)
        measured = functools.partial(
            measure, self.estimator, phi, eps=self._eps(state), probe_batch=self.probe_batch,
            active=self._active(state),
        )  # fmt: skip
        loss, coefficients = spread_probes(measured, keys, self.probe_axis)
        return self._chosen(phi, keys, self._info(state, loss, coefficients))

    def apply(
        self, params: Any, state: ZeroOrderState, record: jax.Array
    ) -> tuple[Any, ZeroOrderState]:
        """The second half of a step: new parameters and state, from a record."""
        ours = self.split(params)
        decays = [self.decays(path, leaf) for path, leaf in zip(ours.paths, ours.leaves)]
        new, state = self.apply_to_leaves(ours, decays, state, record)
        return ours.tree(new), state

    def apply_to_leaves(
        self, ours: Trainable, decays: Sequence[bool], state: ZeroOrderState, record: jax.Array
    ) -> tuple[list[jax.Array], ZeroOrderState]:
        """What :meth:`apply` makes of the leaves that train, of which some decay."""
        probe = self._probe(ours, state)
        keys = self.keys(ours, state)
        rounding = self._rounding(probe, ours)
        directions = directions_of(self.noise, probe, keys, ours.leaves, self._active(state))
        checks.check_moments(state.moments, len(ours.leaves))
        zero, results = data_zero(first_element(record)), []
        scalars = self.rule.advance(state.scalars, record, state.count)
        scalars = jax.tree.map(
            lambda new, old: jnp.where(is_taken(record), new, old), scalars, state.scalars
        )
        for number, (values, is_decayed) in enumerate(zip(ours.leaves, decays, strict=True)):
            moments = {name: column[number] for name, column in state.moments.items()}
            leaf = Leaf(
                whole(number, values, moments),
                directions,
                zero,
                tuple(rounding[number]),
                state.count,
                is_decayed,
                scalars,
                grid=ours.grids[number],
            )
            results.append(update_leaf(self.rule, record, leaf))
            zero = data_zero(first_element(results[-1][0]))
        new = [values for values, _ in results]
        moments = {name: tuple(kept[name] for _, kept in results) for name in self.rule.moments}
        return new, ZeroOrderState(state.count + 1, state.key, probe.prepared, moments, scalars)

    @property
    def evaluations(self) -> int:
        """How many candidates :meth:`ask` has in a step, and losses :meth:`tell` takes."""
        return value_estimator(self.estimator).evaluations(self.num_probes)

    def ask(self, params: Any, state: ZeroOrderState, number: jax.typing.ArrayLike) -> Any:
        """One of the parameter trees whose loss a step needs, for a loss that is no JAX function.

        Args:
          params: Pytree of arrays.
          state: The state.
          number: Which one, from 0 to ``evaluations - 1``; an int or an int32 ``()``.

        Returns:
          A tree like ``params``, in its dtypes: as much memory again.

        Raises:
          TypeError: If the estimator differentiates the loss.
          ValueError: If there is no such candidate, as far as that is known.

        Examples:
          >>> import jax, jax.numpy as jnp
          >>> from optax_lowbit import zo
          >>> opt = zo.zo_sgd(0.02, eps=0.5)
          >>> ask, tell = jax.jit(opt.ask), jax.jit(opt.tell)
          >>> params = {"w": jnp.zeros(4)}
          >>> state = opt.init(params, 0)
          >>> def errors(params):  # 1 - accuracy, minus a reward, ...
          ...     return sum(abs(x - 1) for x in params["w"].tolist())
          >>> for _ in range(300):
          ...     losses = [errors(ask(params, state, i)) for i in range(opt.evaluations)]
          ...     params, state, info = tell(params, state, losses)
          >>> errors(params) < 1
          True
        """
        last = self.evaluations - 1
        if not isinstance(number, jax.core.Tracer) and not 0 <= jnp.asarray(number).item() <= last:
            raise ValueError(f"number must be from 0 to {last}, got {number}")
        ours = self.split(params)
        probe, sign = value_estimator(self.estimator).point(number)
        keys = self.keys(ours, state)[probe]
        slope = sign * self._eps(state)
        moves = self._summed(ours, state, keys[None], slope[None])
        return ours.tree(
            [
                (widened(x) + by).astype(x.dtype) if grid is None else grid.moved(x, by)
                for x, grid, by in zip(ours.leaves, ours.grids, moves)
            ]
        )

    def tell(
        self, params: Any, state: ZeroOrderState, losses: Any
    ) -> tuple[Any, ZeroOrderState, StepInfo]:
        """What :meth:`step` gives, from the losses of all candidates.

        Args:
          params: What the candidates were made from.
          state: Likewise.
          losses: ``(evaluations,)`` floats, in the order of their numbers; less is better.

        Raises:
          TypeError: If the estimator differentiates the loss.
          ValueError: If there are more or fewer losses.
        """
        info = self._read(state, losses)
        params, state = self.apply(params, state, info.record)
        return params, state, info

    def combine(self, params: Any, state: ZeroOrderState, slopes: jax.Array) -> Any:
        """``sum_i slopes[i] z_i`` over the directions of a step, as a tree: a copy of parameters.

        With the mean of the coefficients for slopes, it is the estimate of the gradient.

        Args:
          params: Pytree of arrays.
          state: The state.
          slopes: float32 ``(num_probes,)``.

        Returns:
          A tree like ``params``, in its dtypes; zeros where nothing trains.

        Raises:
          TypeError: If codes train, of which there is no gradient.
        """
        if self.part == "codes":
            raise TypeError("combine needs float leaves, and these steps are of codes")
        ours = self.split(params)
        keys = self.keys(ours, state)
        leaves = self._summed(ours, state, keys, slopes)
        zeros = jax.tree.map(jnp.zeros_like, params)
        return self.split(zeros).tree([x.astype(p.dtype) for x, p in zip(leaves, ours.leaves)])

    def _summed(self, ours, state, keys, slopes) -> list[jax.Array]:
        directions = directions_of(self.noise, self._probe(ours, state), keys, ours.leaves)
        return summed(directions, ours, slopes, self.companions(ours, state))

    def _read(self, state: ZeroOrderState, losses: Any) -> StepInfo:
        estimator, losses = value_estimator(self.estimator), jnp.asarray(losses, jnp.float32)
        if losses.shape != (self.evaluations,):
            raise ValueError(f"losses must be of shape ({self.evaluations},), got {losses.shape}")
        base = losses[0] if estimator.uses_base else None
        others = losses[estimator.uses_base :].reshape(self.num_probes, -1)
        active = self._active(state)
        others = first(others, active)
        return self._info(state, *reading(estimator, base, others, self._eps(state), active))

    def _chosen(self, phi: Slice, keys: jax.Array, info: StepInfo) -> StepInfo:
        """What becomes of a step that could be taken; ``keys`` has all directions."""
        del phi, keys
        return info

    def split(self, params: Any) -> Trainable:
        """The leaves that train, and the rest."""
        return split(params, self.trainable, self.part)

    def keys(self, ours: Trainable, state: ZeroOrderState) -> jax.Array:
        """Of this step's directions: uint32 ``(num_probes, leaves, 2)``."""
        return probe_keys(_words(state.key), state.count, self.num_probes, ours.paths)

    def _probed(self, loss_fn, params, state, args) -> tuple[Slice, jax.Array]:
        """The loss near the parameters, and the keys of this step's directions."""
        ours = self.split(params)
        return self._slice(loss_fn, ours, state, args), self.keys(ours, state)

    def _slice(self, loss_fn, ours, state, args) -> Slice:
        loss = functools.partial(checks.scalar_loss, loss_fn, args)
        companions = self.companions(ours, state)
        return Slice(loss, ours, self.noise, self._probe(ours, state), companions)

    def companions(self, ours: Trainable, state: ZeroOrderState) -> list[dict[str, Any]]:
        """What the noise is given of each leaf's moments."""
        used = {name: state.moments[name] for name in self.noise.uses}
        return [{name: x[i] for name, x in used.items()} for i in range(len(ours.leaves))]

    def _eps(self, state: ZeroOrderState) -> jax.Array:
        return jnp.asarray(value_at(self.eps, state.count), jnp.float32)

    def _active(self, state: ZeroOrderState) -> jax.Array | None:
        """How many probes count, int32 ``()``; None: all."""
        if self.active_probes is None:
            return None
        with jax.numpy_dtype_promotion("standard"):
            number = jnp.asarray(self.active_probes(state.count))
        return jnp.clip(number, self.estimator.least_probes, self.num_probes).astype(jnp.int32)

    def _averaged(self, state: ZeroOrderState) -> jax.Array | int:
        """How many probes the mean of a step is over."""
        active = self._active(state)
        return self.num_probes if active is None else active.astype(jnp.float32)

    def _rounding(self, probe: Probe, ours: Trainable) -> jax.Array:
        """Keys of stochastic rounding in this step: uint32 ``(leaves, 2)``."""
        return rounding_keys(probe.run, probe.step, ours.paths)

    def _probe(self, ours: Trainable, state: ZeroOrderState) -> Probe:
        run = _words(state.key)
        prepared = self.noise.prepare(state.prepared, ours, run, state.count)
        return Probe(run, run, state.count, prepared)

    def _info(self, state: ZeroOrderState, loss: jax.Array, coefficients: jax.Array) -> StepInfo:
        coefficients, is_known = self._known(state, loss, coefficients)
        if self.clip is not None:
            coefficients = jnp.clip(coefficients, -self.clip, self.clip)
        rate, decay = (
            jnp.asarray(value_at(x, state.count), jnp.float32)
            for x in (self.learning_rate, self.weight_decay)
        )
        record = self.rule.record(coefficients / self._averaged(state), rate, decay)
        record = finite_or_none(record, is_known)
        return StepInfo(loss, coefficients, record, is_taken(record))

    def _known(
        self, state: ZeroOrderState, loss: jax.Array, coefficients: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The coefficients, and whether they tell anything, before a clip makes numbers of them."""
        is_known = jnp.isfinite(loss) & jnp.all(jnp.isfinite(coefficients))
        if not self._uses_eps:
            return coefficients, is_known
        is_probed = self._eps(state) > 0
        return jnp.where(is_probed, coefficients, jnp.float32(0)), is_known & is_probed

    @property
    def _uses_eps(self) -> bool:
        return isinstance(self.estimator, Estimator)

    def num_settings(self, params: Any) -> int:
        """How many of a record's numbers, the last ones, were given and not measured."""
        del params
        return self.rule.settings

    def decays(self, path: str, values: jax.Array) -> bool:
        """Whether weight decay applies to a leaf."""
        is_off = not callable(self.weight_decay) and checks.is_zero(self.weight_decay)
        mask = self.weight_decay_mask
        return not is_off and (mask is None or chooses(mask, path, values))


def finite_or_none(record: jax.Array, is_finite: jax.Array) -> jax.Array:
    """The record, or that of no step: a loss that is not finite says nothing of any direction."""
    is_finite &= jnp.all(jnp.isfinite(record))
    return jnp.where(is_finite, record, jnp.zeros_like(record))


def value_at(x: optax.ScalarOrSchedule, count: jax.Array) -> Any:
    """A hyperparameter's value after ``count`` steps."""
    with jax.numpy_dtype_promotion("standard"):
        return x(count) if callable(x) else x


def _words(key: jax.Array) -> random_bits.Key:
    return key[0], key[1]
