"""Estimates of gradients as ordinary trees, for any optax transform."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_lowbit.quant import random_bits
from optax_lowbit.zo.directions import Choice, split
from optax_lowbit.zo.estimators import Central, Estimator, ForwardGradient
from optax_lowbit.zo.noise import Noise, Rademacher
from optax_lowbit.zo.optimizer import ZeroOrderOptimizer
from optax_lowbit.zo.state import ZeroOrderState
from optax_lowbit.zo.updates import Descend


def gradient(
    loss_fn: Callable[..., jax.Array],
    params: Any,
    key: jax.Array | int,
    *args: Any,
    eps: jax.typing.ArrayLike = 1e-3,
    num_probes: int = 1,
    noise: Noise = Rademacher(),
    estimator: Estimator | ForwardGradient = Central(),
    trainable: Choice | None = None,
    probe_batch: int = 1,
) -> Any:
    r"""An estimate of the gradient of a loss, by evaluating it.

    .. math::
      \hat g = \frac{1}{q} \sum_{i=1}^q c_i z_i, \qquad
      c_i = \frac{L(\theta + \epsilon z_i) - L(\theta - \epsilon z_i)}{2 \epsilon}

    Its expectation is the gradient, up to an error of order ``eps^2``; its relative variance is
    about the number of parameters over ``num_probes``. It is the gradient that :func:`zo_sgd`
    descends along, without ever holding it.

    **Memory.** A copy of the parameters, and while the loss is evaluated one perturbed leaf.

    Args:
      loss_fn: ``loss_fn(params, *args)`` gives a float of shape ``()``.
      params: Pytree of arrays.
      key: A `jax.random.key` of Threefry, its data or a seed; another one for each estimate.
      args: What the loss needs beside the parameters.
      eps: How far from the parameters the loss is evaluated.
      num_probes: The number ``q`` of directions.
      noise: Their distribution.
      estimator: How a coefficient is found. :class:`ForwardGradient` needs no ``eps``.
      trainable: Which float leaves have a gradient; None: all.
      probe_batch: Directions evaluated together.

    Returns:
      A tree like ``params``, in its dtypes, as :func:`jax.grad` gives: zeros for leaves that do not
      train and those of integers. Not finite if the loss is not.

    Raises:
      TypeError, ValueError: If an argument is impossible, or no leaf trains.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from optax_lowbit import zo
      >>> params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0), "none": None}
      >>> def loss(params):
      ...     return jnp.sum(params["a"] ** 2) / 2 + params["b"]
      >>> estimate = jax.jit(lambda key: zo.gradient(loss, params, key, eps=0.1, num_probes=4000))
      >>> jax.tree.map(lambda g: g.round(), estimate(0))
      {'a': Array([ 1., -2.], dtype=float32), 'b': Array(1., dtype=float32), 'none': None}

    References:
      Spall, `Multivariate Stochastic Approximation Using a Simultaneous Perturbation Gradient
      Approximation <https://doi.org/10.1109/9.119632>`_, 1992, equation 2.2; with several
      directions Malladi et al, `Fine-Tuning Language Models with Just Forward Passes
      <https://arxiv.org/abs/2305.17333>`_, 2023, Definition 1.

    .. seealso:: :func:`estimate_gradient`
    """
    opt = _probing(eps, num_probes, noise, estimator, trainable, probe_batch)
    words = random_bits.key_words(key)
    prepared = opt.noise.prepare((), opt.split(params), words, jnp.int32(0))
    state = ZeroOrderState(jnp.int32(0), jnp.stack(words), prepared, {}, {})
    return _estimated(opt, loss_fn, params, state, args)


class EstimateGradientState(NamedTuple):
    """State of :func:`estimate_gradient`.

    Attributes:
      count: int32 ``()``: estimates made.
      key: uint32 ``(2,)``: all directions follow from it.
      prepared: What the noise keeps between estimates; nothing for independent elements.
    """

    count: jax.Array
    key: jax.Array
    prepared: Any


def estimate_gradient(
    eps: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 1,
    *,
    noise: Noise = Rademacher(),
    estimator: Estimator | ForwardGradient = Central(),
    trainable: Choice | None = None,
    probe_batch: int = 1,
    key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces updates by an estimate of the gradient: the head of a chain.

    The ``update`` takes ``obj_fn``, the loss as a function of the parameters alone, as transforms
    of :mod:`optax.contrib` that evaluate the loss do. The updates that it is given are not looked
    at, so the parameters may stand for them. Estimates are those of :func:`gradient`, with other
    directions in each step.

    What follows in the chain may be any transform; :func:`optax.MultiSteps` goes around what
    follows, as ``optax.chain(estimate_gradient(), optax.MultiSteps(optax.adam(1e-3), 8))``, and
    there accumulates estimates. Choose leaves by ``trainable``, not by :func:`optax.masked`, which
    would hide the other leaves from the loss. Under :func:`optax.inject_hyperparams`, give
    ``static_args=("num_probes", "probe_batch")``.

    **Memory.** As for :func:`gradient`; :func:`zo_sgd` and its relatives hold no gradient.

    Args:
      eps: How far from the parameters the loss is evaluated, or a schedule; where that gives 0 or
        less the estimate is 0.
      num_probes: Number of directions.
      noise: Their distribution.
      estimator: How a coefficient is found.
      trainable: Which float leaves have a gradient; None: all.
      probe_batch: Directions evaluated together.
      key: A `jax.random.key` of Threefry, its data or a seed.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`, whose state is an
      :class:`EstimateGradientState`.

    Raises:
      TypeError, ValueError: If an argument is impossible; at update, if ``params`` or ``obj_fn`` is
        missing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_lowbit import zo
      >>> tx = optax.chain(zo.estimate_gradient(), optax.clip(1.0), optax.sgd(0.02))
      >>> params = jnp.array([1.0, -2.0])
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state, target):
      ...     def loss(params):
      ...         return jnp.sum((params - target) ** 2)
      ...     updates, state = tx.update(params, state, params, obj_fn=loss)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(300):
      ...     params, state = step(params, state, jnp.array([0.5, 0.5]))
      >>> bool(jnp.abs(params - 0.5).max() < 0.1)
      True

    References:
      Spall, `Multivariate Stochastic Approximation Using a Simultaneous Perturbation Gradient
      Approximation <https://doi.org/10.1109/9.119632>`_, 1992.
    """
    opt = _probing(eps, num_probes, noise, estimator, trainable, probe_batch)
    words = random_bits.key_words(key)

    def init_fn(params):
        count, run = jnp.int32(0), jnp.stack(words)
        # optax asks with a tree that has no leaves, to learn what a state is made of.
        prepared = opt.init(params, run).prepared if jax.tree.leaves(params) else ()
        return EstimateGradientState(count, run, prepared)

    def update_fn(updates, state, params=None, *, obj_fn=None, **extra_args):
        del updates, extra_args
        for name, value in (("params", params), ("obj_fn", obj_fn)):
            if value is None:
                raise ValueError(f"{name} must be given to update: the loss is evaluated there")
        whole = ZeroOrderState(state.count, state.key, state.prepared, {}, {})
        estimate = _estimated(opt, obj_fn, params, whole, ())
        ours = split(params, trainable)
        prepared = noise.prepare(
            state.prepared, ours, random_bits.key_words(state.key), state.count
        )
        count: Any = optax.safe_increment(state.count)
        return estimate, EstimateGradientState(count, state.key, prepared)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _probing(eps, num_probes, noise, estimator, trainable, probe_batch) -> ZeroOrderOptimizer:
    return ZeroOrderOptimizer(
        rule=Descend(), learning_rate=0.0, eps=eps, num_probes=num_probes, noise=noise,
        estimator=estimator, trainable=trainable, probe_batch=probe_batch,
    )  # fmt: skip


def _estimated(opt: ZeroOrderOptimizer, loss_fn, params, state: ZeroOrderState, args) -> Any:
    coefficients = opt.estimate(loss_fn, params, state, *args).coefficients
    return opt.combine(params, state, coefficients / opt.num_probes)
