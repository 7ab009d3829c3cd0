"""Why a learning rate or an ``eps`` fails: what rounding leaves of probes and of updates."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_lowbit.kernels.reference import widened
from optax_lowbit.zo.estimators import Central, ForwardGradient, OneSided, value_estimator
from optax_lowbit.zo.optimizer import ZeroOrderOptimizer
from optax_lowbit.zo.state import ZeroOrderState


class Diagnosis(NamedTuple):
    """What :func:`diagnose` finds.

    Attributes:
      cosine: By path, float32 ``()``: between a direction and how the rounded parameters were moved
        by it when the loss was evaluated. Under 0.99 ``eps`` is too small for the leaf.
      moved: By path, float32 ``()``: the share of weights that the next step changes.
      moved_to_nearest: The same if it rounded to nearest; near zero, such training stands still.
      signal_to_noise: float32 ``()``: the size of exact slopes over that of the finite differences'
        errors, which come from curvature (a smaller ``eps`` helps) and rounding (a larger). 0 where
        a schedule gives an ``eps`` that is not above 0: the step would not be taken.
      evaluations: How often a step evaluates the loss.
    """

    cosine: dict[str, jax.Array]
    moved: dict[str, jax.Array]
    moved_to_nearest: dict[str, jax.Array]
    signal_to_noise: jax.Array
    evaluations: int


def diagnose(
    opt: ZeroOrderOptimizer,
    loss_fn: Callable[..., jax.Array],
    params: Any,
    state: ZeroOrderState,
    *args: Any,
    num_probes: int = 8,
) -> Diagnosis:
    r"""Measures, for the next step, what rounding leaves of directions and updates.

    With :math:`R` rounding to the dtype of a leaf and :math:`c_i` the finite differences of a step,

    .. math::
      \text{cosine} = \cos\Big(\textstyle\sum_s s (R(\theta + s \epsilon z) - \theta),\ z\Big),
      \qquad \text{signal to noise} =
      \sqrt{\textstyle\sum_i \phi_i'(0)^2 / \sum_i (c_i - \phi_i'(0))^2}

    **Memory.** Three copies of the parameters in float32, for now and then. The exact slopes take a
    forward-mode derivative of the loss.

    Args:
      opt: The optimizer, from :func:`zo_sgd` or a relative.
      loss_fn: ``loss_fn(params, *args)`` gives a float of shape ``()``, and JAX can derive it.
      params: The parameters.
      state: The state. Neither is changed.
      args: What the loss needs beside the parameters.
      num_probes: How many directions the ratio of signal to noise comes from.

    Returns:
      A :class:`Diagnosis`.

    Raises:
      TypeError: If ``opt`` is no :class:`ZeroOrderOptimizer`, or has no ``eps``.

    Examples:
      >>> import functools, jax, jax.numpy as jnp
      >>> from optax_lowbit import zo
      >>> def loss(w):
      ...     return jnp.mean(w.astype(jnp.float32) ** 2)
      >>> w = 0.02 * jax.random.normal(jax.random.key(0), (64, 128)).astype(jnp.bfloat16)
      >>> opt = zo.zo_sgd(1e-6, eps=1e-4)  # about one unit in the last place
      >>> found = jax.jit(functools.partial(zo.diagnose, opt, loss))(w, opt.init(w, 0))
      >>> f"{found.cosine['']:.2f}"
      '0.93'
    """
    if not isinstance(opt, ZeroOrderOptimizer):
        raise TypeError(f"opt must be a ZeroOrderOptimizer, got {type(opt).__name__}")
    if opt.part == "codes" or not opt.spreads_probes:
        raise TypeError(
            f"opt must take steps along slopes of float leaves, as zo_sgd does; got {opt}"
        )
    estimator = value_estimator(opt.estimator)
    record = opt.estimate(loss_fn, params, state, *args).record
    difference = Central() if -1.0 in estimator.signs else OneSided()
    several = dataclasses.replace(opt, num_probes=num_probes, clip=None, estimator=difference)
    found = several.estimate(loss_fn, params, state, *args).coefficients
    several = dataclasses.replace(several, estimator=ForwardGradient())
    exact = several.estimate(loss_fn, params, state, *args).coefficients
    ratio = jnp.linalg.norm(exact) / jnp.linalg.norm(found - exact)
    moved, to_nearest = _moved(opt, params, state, record)
    return Diagnosis(
        _cosines(opt, params, state), moved, to_nearest,
        jnp.where(opt._eps(state) > 0, ratio, 0), estimator.evaluations(opt.num_probes),
    )  # fmt: skip


def _cosines(opt: ZeroOrderOptimizer, params: Any, state: ZeroOrderState) -> dict[str, jax.Array]:
    ours = opt.split(params)
    keys = opt.keys(ours, state)[:1]
    directions = opt._summed(ours, state, keys, jnp.ones(1, jnp.float32))
    eps = opt._eps(state)

    def cosine(leaf, z):
        moved, values = jnp.zeros_like(z), widened(leaf)
        for sign in value_estimator(opt.estimator).signs:
            rounded = (values + jnp.float32(sign) * eps * z).astype(leaf.dtype)
            moved += jnp.float32(sign) * (widened(rounded) - values)
        norms = jnp.sqrt(jnp.sum(moved**2) * jnp.sum(z**2))
        return jnp.sum(moved * z) / jnp.where(norms > 0, norms, 1)

    return {path: cosine(*pair) for path, *pair in zip(ours.paths, ours.leaves, directions)}


def _moved(
    opt: ZeroOrderOptimizer, params: Any, state: ZeroOrderState, record: jax.Array
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The shares of weights that an update changes, as it is and if it rounded to nearest."""
    ours = opt.split(params)
    exact = opt.apply(ours.tree([widened(x) for x in ours.leaves]), state, record)[0]
    results = opt.apply(params, state, record)[0], exact
    shares = [
        {
            path: jnp.mean((new.astype(old.dtype) != old).astype(jnp.float32))
            for path, old, new in zip(ours.paths, ours.leaves, opt.split(tree).leaves)
        }
        for tree in results
    ]
    return shares[0], shares[1]
