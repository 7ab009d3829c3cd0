"""How far a loss falls along random directions, from a few evaluations of it.

Each estimator gives a coefficient ``c_i`` for each probe ``z_i``; the mean of ``c_i z_i`` estimates
the gradient.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from optax_lowbit.zo.slices import Slice


@dataclasses.dataclass(frozen=True)
class Estimator:
    """An estimate from values of the loss alone.

    Attributes:
      signs: Where along each direction the loss is evaluated, in units of ``eps``.
      uses_base: Whether it is evaluated at the parameters too, once for all probes.
      least_probes: How many it takes; above 1, a coefficient depends on the losses of others.
    """

    signs: tuple[float, ...] = (1.0, -1.0)
    uses_base: bool = False
    least_probes: ClassVar[int] = 1

    def evaluations(self, num_probes: int) -> int:
        """How often the loss is evaluated."""
        return len(self.signs) * num_probes + self.uses_base

    def point(self, number: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
        """The probe of an evaluation, and where along it: int32 and float32, ``()``.

        The evaluation at the parameters, if there is one, comes first; then probe by probe.
        """
        place = jnp.asarray(number, jnp.int32) - int(self.uses_base)
        probe, sign = jnp.divmod(jnp.maximum(place, 0), len(self.signs))
        signs = jnp.asarray(self.signs, jnp.float32)
        return probe, jnp.where(place < 0, jnp.float32(0), signs[sign])

    def coefficients(
        self,
        base: jax.Array | None,
        losses: jax.Array,
        eps: Any,
        active: jax.Array | None = None,
    ) -> jax.Array:
        """From the loss at the parameters and ``(probes, signs)`` losses, float32 ``(probes,)``.

        With ``active``, only so many were evaluated, and what is said of others is not looked at.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Central(Estimator):
    """``(phi(eps) - phi(-eps)) / (2 eps)``: two evaluations a probe, an error of order ``eps^2``.

    References:
      Malladi et al, `Fine-Tuning Language Models with Just Forward Passes
      <https://arxiv.org/abs/2305.17333>`_, 2023, Definition 1.
    """

    def coefficients(self, base, losses, eps, active=None):
        """Half the difference, over ``eps``."""
        del base, active
        return (losses[:, 0] - losses[:, 1]) / (jnp.float32(2) * eps)


@dataclasses.dataclass(frozen=True)
class OneSided(Estimator):
    """``(phi(eps) - phi(0)) / eps``: one evaluation a probe and one more, an error of order eps."""

    signs: tuple[float, ...] = (1.0,)
    uses_base: bool = True

    def coefficients(self, base, losses, eps, active=None):
        """The difference, over ``eps``."""
        del active
        assert base is not None
        return (losses[:, 0] - base) / eps


@dataclasses.dataclass(frozen=True)
class ForwardGradient:
    """``phi'(0)``, exactly, by one forward-mode derivative: no ``eps``.

    References:
      Baydin et al, `Gradients without Backpropagation <https://arxiv.org/abs/2202.08587>`_, 2022.
    """

    least_probes: ClassVar[int] = 1


def measure(
    estimator: Estimator | ForwardGradient,
    phi: Slice,
    keys: jax.Array,
    eps: jax.Array,
    probe_batch: int,
    active: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The loss and the coefficients.

    Args:
      estimator: Which estimate.
      phi: The loss near the parameters.
      keys: uint32 ``(probes, leaves, 2)``.
      eps: float32 ``()``.
      probe_batch: Probes evaluated together.
      active: int32 ``()``: only so many are evaluated, at least one; None: all.

    Returns:
      The loss, float32 ``()``: at the parameters if it is evaluated there, or the mean of what was
      evaluated. And float32 ``(probes,)``, with 0 for probes that were not.
    """
    if isinstance(estimator, ForwardGradient):
        losses, slopes = over_probes(lambda key: derivative(phi, key), keys, probe_batch, active)
        return losses[0], slopes
    base = phi.here() if estimator.uses_base else None
    losses = losses_along(estimator.signs, phi, keys, eps, probe_batch, active)
    return reading(estimator, base, losses, eps, active)


def reading(
    estimator: Estimator,
    base: jax.Array | None,
    losses: jax.Array,
    eps: jax.Array,
    active: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The loss and the coefficients, from the values of the loss, 0 where it was not evaluated."""
    coefficients = first(estimator.coefficients(base, losses, eps, active), active)
    mean = jnp.mean(losses)
    if active is not None:
        # Losses that were not evaluated are 0.
        mean = mean * (jnp.float32(len(losses)) / active.astype(jnp.float32))
    return mean if base is None else base, coefficients


def first(values: jax.Array, active: jax.Array | None) -> jax.Array:
    """``(probes, ...)`` values, and zeros after the first ``active``; None: all of them."""
    if active is None:
        return values
    is_active = (jnp.arange(len(values)) < active).reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.where(is_active, values, jnp.zeros_like(values))


def losses_along(
    signs: Sequence[float],
    phi: Slice,
    keys: jax.Array,
    eps: jax.Array,
    probe_batch: int,
    active: jax.Array | None = None,
) -> jax.Array:
    """The losses at ``signs * eps`` along each direction: float32 ``(probes, signs)``."""
    places = jnp.asarray(signs, jnp.float32) * eps
    return over_probes(lambda key: jax.lax.map(phi.line(key), places), keys, probe_batch, active)


def value_estimator(estimator: Estimator | ForwardGradient) -> Estimator:
    """The estimator, of which values of the loss are enough.

    Raises:
      TypeError: If it differentiates the loss.
    """
    if isinstance(estimator, Estimator):
        return estimator
    raise TypeError(
        "estimator must be one of values of the loss, such as Central() or OneSided(), where the "
        f"loss is evaluated apart; got {estimator}, which differentiates it"
    )


def derivative(phi: Slice, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The loss, and ``phi'(0)``."""
    zero, one = jnp.float32(0), jnp.float32(1)
    return jax.jvp(lambda s: phi.tangent(key, s), (zero,), (one,))


def curvature(phi: Slice, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The loss, ``phi'(0)``, and ``phi''(0) = z^T H z``, exactly."""
    zero, one = jnp.float32(0), jnp.float32(1)

    def first(s):
        return jax.jvp(lambda s: phi.tangent(key, s), (s,), (one,))

    (loss, slope), (_, second) = jax.jvp(first, (zero,), (one,))
    return loss, slope, second


def over_probes(
    fun: Callable[[jax.Array], Any],
    keys: jax.Array,
    batch: int,
    active: jax.Array | None = None,
) -> Any:
    """``fun`` of each key, ``batch`` of them at a time: more memory, and larger matmuls.

    With ``active``, of the first so many, and then zeros.
    """
    if len(keys) == 1:
        return jax.tree.map(lambda x: x[None], fun(keys[0]))
    batch = min(batch, len(keys))
    if active is not None:
        return _over_first(fun, keys, batch, active)
    if batch == len(keys):
        return jax.vmap(fun)(keys)
    return jax.lax.map(fun, keys, batch_size=batch if batch > 1 else None)


def _over_first(fun, keys, batch, active) -> Any:
    shapes = jax.eval_shape(fun, keys[0])
    zeros = jax.tree.map(lambda x: jnp.zeros((len(keys), *x.shape), x.dtype), shapes)

    def turn(i, results):
        # Where fewer than a batch are left, both slices begin earlier.
        some = jax.lax.dynamic_slice_in_dim(keys, i * batch, batch)
        new = jax.vmap(fun)(some) if batch > 1 else jax.tree.map(lambda x: x[None], fun(some[0]))
        return jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, i * batch, 0), results, new
        )

    results = jax.lax.fori_loop(0, (active + (batch - 1)) // batch, turn, zeros)
    return jax.tree.map(lambda x: first(x, active), results)
