"""A zeroth-order optimizer: probes of a loss, and what becomes of parameters after them.

A step has two halves. The first evaluates the loss and gives a *record*, a few float32 numbers. The
second needs the record alone: it draws the same directions again and updates parameters leaf by
leaf. So a run can be replayed from its records, and the loss may be anything that gives numbers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_lowbit.moments.policy import Policy
from optax_lowbit.moments.storage import init_moment
from optax_lowbit.quant import random_bits
from optax_lowbit.zo import checks
from optax_lowbit.zo.directions import (
    Choice,
    Trainable,
    chooses,
    probe_keys,
    rounding_keys,
    slope_sum,
    split,
)
from optax_lowbit.zo.estimators import Central, Estimator, ForwardGradient, measure
from optax_lowbit.zo.late_perturbation import data_zero, first_element
from optax_lowbit.zo.noise import Noise, Probe, Rademacher
from optax_lowbit.zo.rows import whole
from optax_lowbit.zo.slices import Slice
from optax_lowbit.zo.updates import Leaf, Rule, update_leaf

Loss = Callable[..., jax.Array]


class ZeroOrderState(NamedTuple):
    """State of a zeroth-order optimizer.

    Attributes:
      count: int32 ``()``: steps taken.
      key: uint32 ``(2,)``: the run's key.
      prepared: What the noise keeps between steps.
      moments: By name, a tuple with an array for each leaf that trains.
    """

    count: jax.Array
    key: jax.Array
    prepared: Any
    moments: dict[str, tuple[Any, ...]]


class StepInfo(NamedTuple):
    """What a step tells.

    Attributes:
      loss: float32 ``()``: at the parameters before the step if that was evaluated, else the mean
        of what was.
      coefficients: float32 ``(num_probes,)``: how steeply the loss rises along each direction.
      record: float32 ``(k,)``: all that the update was made from.
    """

    loss: jax.Array
    coefficients: jax.Array
    record: jax.Array


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
    noise: Noise = dataclasses.field(default_factory=Rademacher)
    estimator: Estimator | ForwardGradient = dataclasses.field(default_factory=Central)
    probe_batch: int = 1
    clip: float | None = None
    weight_decay: optax.ScalarOrSchedule = 0.0
    weight_decay_mask: Choice | None = None
    trainable: Choice | None = None
    policy: Policy | None = None

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
        """
        words = jnp.stack(random_bits.key_words(key))
        ours = self._split(params)
        policy = Policy() if self.policy is None else self.policy
        named = dict(zip(ours.paths, ours.leaves, strict=True))
        moments = {
            name: tuple(init_moment(name, moment, named, policy)[path] for path in ours.paths)
            for name, moment in self.rule.moments.items()
        }
        prepared = self.noise.prepare((), ours, _words(words), jnp.int32(0))
        return ZeroOrderState(jnp.int32(0), words, prepared, moments)

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
        ours = self._split(params)
        phi = self._slice(loss_fn, ours, state, args)
        keys = probe_keys(_words(state.key), state.count, self.num_probes, ours.paths)
        eps = jnp.asarray(value_at(self.eps, state.count), jnp.float32)
        loss, coefficients = measure(self.estimator, phi, keys, eps, self.probe_batch)
        return self._info(state, loss, coefficients)

    def apply(
        self, params: Any, state: ZeroOrderState, record: jax.Array
    ) -> tuple[Any, ZeroOrderState]:
        """The second half of a step: new parameters and state, from a record."""
        ours = self._split(params)
        probe = self._probe(ours, state)
        keys = probe_keys(_words(state.key), state.count, self.num_probes, ours.paths)
        rounding = rounding_keys(_words(state.key), state.count, ours.paths)
        zero, results = data_zero(record[0]), []
        for number, (path, values) in enumerate(zip(ours.paths, ours.leaves, strict=True)):
            moments = {name: column[number] for name, column in state.moments.items()}
            leaf = Leaf(
                whole(number, values, moments),
                functools.partial(self._draw, probe, keys, zero),
                tuple(rounding[number]),
                state.count,
                self._decays(path, values),
            )
            results.append(update_leaf(self.rule, record, leaf))
            zero = data_zero(first_element(results[-1][0]))
        new = ours.tree([values for values, _ in results])
        moments = {name: tuple(kept[name] for _, kept in results) for name in self.rule.moments}
        return new, ZeroOrderState(state.count + 1, state.key, probe.prepared, moments)

    def _draw(self, probe, keys, zero, slopes, rows) -> jax.Array:
        return slope_sum(self.noise, probe, keys, slopes, rows, zero)

    def _split(self, params: Any) -> Trainable:
        return split(params, self.trainable)

    def _slice(self, loss_fn, ours, state, args) -> Slice:
        loss = functools.partial(checks.scalar_loss, loss_fn, args)
        return Slice(loss, ours, self.noise, self._probe(ours, state))

    def _probe(self, ours: Trainable, state: ZeroOrderState) -> Probe:
        run = _words(state.key)
        prepared = self.noise.prepare(state.prepared, ours, run, state.count)
        return Probe(run, run, state.count, prepared)

    def _info(self, state: ZeroOrderState, loss: jax.Array, coefficients: jax.Array) -> StepInfo:
        if self.clip is not None:
            coefficients = jnp.clip(coefficients, -self.clip, self.clip)
        rate, decay = (
            jnp.asarray(value_at(x, state.count), jnp.float32)
            for x in (self.learning_rate, self.weight_decay)
        )
        record = self.rule.record(coefficients / self.num_probes, rate, decay)
        # A loss that is not finite says nothing of any direction: the step moves nothing.
        record = jnp.where(jnp.all(jnp.isfinite(record)), record, jnp.zeros_like(record))
        return StepInfo(loss, coefficients, record)

    def _decays(self, path: str, values: jax.Array) -> bool:
        is_off = not callable(self.weight_decay) and checks.is_zero(self.weight_decay)
        mask = self.weight_decay_mask
        return not is_off and (mask is None or chooses(mask, path, values))


def value_at(x: optax.ScalarOrSchedule, count: jax.Array) -> Any:
    """A hyperparameter's value after ``count`` steps."""
    with jax.numpy_dtype_promotion("standard"):
        return x(count) if callable(x) else x


def _words(key: jax.Array) -> random_bits.Key:
    return key[0], key[1]
