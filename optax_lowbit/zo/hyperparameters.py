"""Hyperparameters that live in the state, where they can be read and changed between steps."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_lowbit.zo.optimizer import Loss, value_at
from optax_lowbit.zo.state import StepInfo


class InjectedState(NamedTuple):
    """State of an optimizer that :func:`inject_hyperparams` made.

    Attributes:
      hyperparams: float32 ``()`` by name. Change them between steps; those of schedules are what
        the last step used, and are set anew by the next.
      inner_state: State of the optimizer itself.
    """

    hyperparams: dict[str, jax.Array]
    inner_state: Any

    @property
    def count(self) -> jax.Array:
        """Steps taken."""
        return self.inner_state.count

    @property
    def key(self) -> jax.Array:
        """The run's key."""
        return self.inner_state.key


def inject_hyperparams(
    inner_factory: Callable[..., Any], static_args: str | Iterable[str] = ()
) -> Callable[..., Any]:
    """Keeps the numeric hyperparameters of a zeroth-order optimizer in its state.

    As :func:`optax.inject_hyperparams`: they can be read, and changed between the steps of a jitted
    function without compiling it again. A hyperparameter is an argument whose value is a float, or
    an argument that is annotated as :data:`optax.ScalarOrSchedule` and has a number or a schedule.
    Others are part of the program: numbers of probes, noise, choices of leaves.

    Args:
      inner_factory: :func:`zo_sgd` or another that makes an optimizer of this package; or a
        function of your own that calls one, for instance
        ``lambda learning_rate: zo.hybrid(zo.zo_sgd(learning_rate), tx, "head")``.
      static_args: Names of arguments that are none of these: ``"eps"`` of :func:`zo_sgd_grid`,
        whose directions are compiled for it.

    Returns:
      A function with the factory's arguments. It returns an optimizer with the same methods, whose
      state is an :class:`InjectedState`. Its records end with all hyperparameters, in the order of
      :attr:`InjectedOptimizer.hyperparams`.

    Raises:
      ValueError: If ``static_args`` has a name that is no argument of the factory.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_lowbit import zo
      >>> schedule = optax.linear_schedule(1e-2, 0.0, 10)
      >>> opt = zo.inject_hyperparams(zo.zo_sgd)(schedule, eps=1e-2)
      >>> params = {"w": jnp.ones(3)}
      >>> state = opt.init(params, 0)
      >>> step = jax.jit(opt.step, static_argnums=0)
      >>> def loss(params):
      ...     return jnp.sum(params["w"] ** 2)
      >>> params, state, _ = step(loss, params, state)
      >>> state.hyperparams["eps"] = jnp.float32(1e-3)
      >>> params, state, _ = step(loss, params, state)
      >>> {name: f"{x:.3f}" for name, x in sorted(state.hyperparams.items())}
      {'eps': '0.001', 'learning_rate': '0.009', 'weight_decay': '0.000'}
    """
    signature = inspect.signature(inner_factory)
    static_names = {static_args} if isinstance(static_args, str) else set(static_args)
    if not static_names <= signature.parameters.keys():
        raise ValueError(
            f"static_args must name arguments of {inner_factory!r}, {[*signature.parameters]}, got "
            f"{sorted(static_names)}"
        )

    @functools.wraps(inner_factory)
    def make(*args: Any, **kwargs: Any) -> InjectedOptimizer:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        numeric = {
            name: value
            for name, value in given.items()
            if name not in static_names
            and _is_hyperparameter(value, signature.parameters[name].annotation)
        }
        inner_factory(**given)  # raises now what it would raise later
        static = {name: value for name, value in given.items() if name not in numeric}
        return InjectedOptimizer(functools.partial(inner_factory, **static), numeric)

    return make


def _is_hyperparameter(value: Any, annotation: Any) -> bool:
    if callable(value) or (isinstance(value, int) and not isinstance(value, bool)):
        return annotation == optax.ScalarOrSchedule
    if isinstance(value, np.ndarray | jax.Array):
        return value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.floating)
    return isinstance(value, float | np.floating)


@dataclasses.dataclass(frozen=True)
class InjectedOptimizer:
    """What :func:`inject_hyperparams` makes: the methods of the optimizer, with another state.

    Attributes:
      make: Makes the optimizer, given the hyperparameters.
      hyperparams: Their first values, and schedules, by name.
    """

    make: Callable[..., Any]
    hyperparams: Mapping[str, Any]

    def init(self, params: Any, key: jax.Array | int) -> InjectedState:
        """As :meth:`ZeroOrderOptimizer.init`."""
        values = self._first()
        return InjectedState(values, self.make(**values).init(params, key))

    def step(
        self, loss_fn: Loss, params: Any, state: InjectedState, *args: Any
    ) -> tuple[Any, InjectedState, StepInfo]:
        """As :meth:`ZeroOrderOptimizer.step`."""
        inner, values = self._at(state)
        params, new, info = inner.step(loss_fn, params, state.inner_state, *args)
        return params, InjectedState(values, new), _extended(info, values)

    def estimate(self, loss_fn: Loss, params: Any, state: InjectedState, *args: Any) -> StepInfo:
        """As :meth:`ZeroOrderOptimizer.estimate`."""
        inner, values = self._at(state)
        return _extended(inner.estimate(loss_fn, params, state.inner_state, *args), values)

    def apply(
        self, params: Any, state: InjectedState, record: jax.Array
    ) -> tuple[Any, InjectedState]:
        """As :meth:`ZeroOrderOptimizer.apply`, with the hyperparameters that the record has."""
        record, given = jnp.split(record, [len(record) - len(self.hyperparams)])
        values = dict(zip(self.hyperparams, given, strict=True))
        params, new = self.make(**values).apply(params, state.inner_state, record)
        return params, InjectedState(values, new)

    @property
    def first(self) -> Any:
        """The optimizer with the hyperparameters of the first step."""
        return self.make(**self._first())

    def num_settings(self, params: Any) -> int:
        """As :meth:`ZeroOrderOptimizer.num_settings`."""
        return self.first.num_settings(params) + len(self.hyperparams)

    @property
    def evaluations(self) -> int:
        """As :attr:`ZeroOrderOptimizer.evaluations`."""
        return self.make(**self.hyperparams).evaluations

    def ask(self, params: Any, state: InjectedState, number: jax.typing.ArrayLike) -> Any:
        """As :meth:`ZeroOrderOptimizer.ask`."""
        return self._at(state)[0].ask(params, state.inner_state, number)

    def tell(
        self, params: Any, state: InjectedState, losses: Any
    ) -> tuple[Any, InjectedState, StepInfo]:
        """As :meth:`ZeroOrderOptimizer.tell`."""
        inner, values = self._at(state)
        params, new, info = inner.tell(params, state.inner_state, losses)
        return params, InjectedState(values, new), _extended(info, values)

    def _first(self) -> dict[str, jax.Array]:
        return {
            # A copy: a step may be given the state to write over.
            name: jnp.array(value_at(x, jnp.int32(0)), jnp.float32)
            for name, x in self.hyperparams.items()
        }

    def _at(self, state: InjectedState) -> tuple[Any, dict[str, jax.Array]]:
        """The optimizer of one step, and the values it is made with."""
        values = {}
        for name, first in self.hyperparams.items():
            now: Any = first if callable(first) else state.hyperparams[name]
            values[name] = jnp.asarray(value_at(now, state.count), jnp.float32)
        return self.make(**values), values


def _extended(info: StepInfo, values: Mapping[str, jax.Array]) -> StepInfo:
    """With a record that has the hyperparameters, too."""
    record = jnp.concatenate([info.record, *(value[None] for value in values.values())])
    return info._replace(record=record)
