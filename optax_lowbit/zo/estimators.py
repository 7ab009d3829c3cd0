"""How far a loss falls along random directions, from a few evaluations of it.

Each estimator gives a coefficient ``c_i`` for each probe ``z_i``; the mean of ``c_i z_i`` estimates
the gradient.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowbit.zo.slices import Slice


@dataclasses.dataclass(frozen=True)
class Estimator:
    """An estimate from values of the loss alone.

    Attributes:
      signs: Where along each direction the loss is evaluated, in units of ``eps``.
      uses_base: Whether it is evaluated at the parameters too, once for all probes.
    """

    signs: tuple[float, ...] = (1.0, -1.0)
    uses_base: bool = False

    def evaluations(self, num_probes: int) -> int:
        """How often the loss is evaluated."""
        return len(self.signs) * num_probes + self.uses_base

    def coefficients(self, base: jax.Array | None, losses: jax.Array, eps: Any) -> jax.Array:
        """From the loss at the parameters and ``(probes, signs)`` losses, float32 ``(probes,)``."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Central(Estimator):
    """``(phi(eps) - phi(-eps)) / (2 eps)``: two evaluations a probe, an error of order ``eps^2``.

    References:
      Malladi et al, `Fine-Tuning Language Models with Just Forward Passes
      <https://arxiv.org/abs/2305.17333>`_, 2023, Definition 1.
    """

    def coefficients(self, base, losses, eps):
        """Half the difference, over ``eps``."""
        del base
        return (losses[:, 0] - losses[:, 1]) / (jnp.float32(2) * eps)


@dataclasses.dataclass(frozen=True)
class OneSided(Estimator):
    """``(phi(eps) - phi(0)) / eps``: one evaluation a probe and one more, an error of order eps."""

    signs: tuple[float, ...] = (1.0,)
    uses_base: bool = True

    def coefficients(self, base, losses, eps):
        """The difference, over ``eps``."""
        return (losses[:, 0] - base) / eps


@dataclasses.dataclass(frozen=True)
class ForwardGradient:
    """``phi'(0)``, exactly, by one forward-mode derivative: no ``eps``.

    References:
      Baydin et al, `Gradients without Backpropagation <https://arxiv.org/abs/2202.08587>`_, 2022.
    """


def measure(
    estimator: Estimator | ForwardGradient,
    phi: Slice,
    keys: jax.Array,
    eps: jax.Array,
    probe_batch: int,
) -> tuple[jax.Array, jax.Array]:
    """The loss and the coefficients.

    Args:
      estimator: Which estimate.
      phi: The loss near the parameters.
      keys: uint32 ``(probes, leaves, 2)``.
      eps: float32 ``()``.
      probe_batch: Probes evaluated together.

    Returns:
      The loss, float32 ``()``: at the parameters if it is evaluated there, or the mean of what was
      evaluated. And float32 ``(probes,)``.
    """
    if isinstance(estimator, ForwardGradient):
        losses, slopes = over_probes(lambda key: derivative(phi, key), keys, probe_batch)
        return losses[0], slopes
    base = phi.here() if estimator.uses_base else None
    signs = jnp.asarray(estimator.signs, jnp.float32)

    def along(key):
        return jax.lax.map(lambda sign: phi.at(key, sign * eps), signs)

    losses = over_probes(along, keys, probe_batch)
    coefficients = estimator.coefficients(base, losses, eps)
    return jnp.mean(losses) if base is None else base, coefficients


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


def over_probes(fun: Callable[[jax.Array], Any], keys: jax.Array, batch: int) -> Any:
    """``fun`` of each key, ``batch`` of them at a time: more memory, and larger matmuls."""
    if len(keys) == 1:
        return jax.tree.map(lambda x: x[None], fun(keys[0]))
    if batch >= len(keys):
        return jax.vmap(fun)(keys)
    return jax.lax.map(fun, keys, batch_size=batch if batch > 1 else None)
