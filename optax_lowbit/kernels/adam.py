"""Adam on moments kept in few bits: the arithmetic that its kernels share."""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Coefficients(NamedTuple):
    r"""What a step of Adam multiplies and adds; float32 scalars.

    With old moments :math:`m, v` and gradient :math:`g`, the step is

    .. math::
      m' = (1-\beta_1) g + \beta_1 m, \quad v' = (1-\beta_2) g^2 + \beta_2 v, \quad
      u = \frac{a m' + b g}{\sqrt{c v' + \bar\varepsilon} + \varepsilon}

    Bias correction and Nesterov's look ahead are in :math:`a, b, c`. They are reciprocals where
    Optax divides, so an update differs from Optax's by up to 4 units in the last place.
    """

    b1: jax.Array
    one_minus_b1: jax.Array
    b2: jax.Array
    one_minus_b2: jax.Array
    # a, b and c of the formula.
    moment: jax.Array
    gradient: jax.Array
    correction: jax.Array
    eps_root: jax.Array
    eps: jax.Array


def coefficients(
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    eps_root: jax.typing.ArrayLike,
    count: jax.Array,
    nesterov: bool,
) -> Coefficients:
    """The coefficients of step number ``count``, from 1; all else as in :func:`optax.adam`."""
    with jax.numpy_dtype_promotion("standard"):
        moment, gradient = 1 / _bias(b1, count), 0.0
        if nesterov:
            moment, gradient = b1 / _bias(b1, count + 1), (1 - b1) / _bias(b1, count)
        # 1 - b2 of Python numbers is exact to float32; of float32 it would be off by 1e-5.
        values = (b1, 1 - b1, b2, 1 - b2, moment, gradient, 1 / _bias(b2, count), eps_root, eps)
        return Coefficients(*(jnp.asarray(value, jnp.float32) for value in values))


@functools.partial(jax.jit, inline=True)
def _bias(decay: jax.typing.ArrayLike, count: jax.Array) -> jax.Array:
    # Compiled, as Optax's: step by step the power would be rounded otherwise.
    return jnp.asarray(1 - decay**count)


def adam_step(
    grad: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    c: Coefficients,
    product: Callable[[jax.Array, jax.Array], jax.Array] = operator.mul,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The update and the new moments; float32 arrays of one shape.

    ``product`` forms what is added, for which a compiler may else take a multiply-add.
    """
    mu = product(c.one_minus_b1, grad) + product(c.b1, mu)
    nu = product(c.one_minus_b2, grad * grad) + product(c.b2, nu)
    return adam_direction(grad, mu, nu, c), mu, nu


def adam_direction(grad: jax.Array, mu: jax.Array, nu: jax.Array, c: Coefficients) -> jax.Array:
    """The update from the new moments, of which ``nu`` may be factored."""
    return (c.moment * mu + c.gradient * grad) / (jnp.sqrt(c.correction * nu + c.eps_root) + c.eps)
