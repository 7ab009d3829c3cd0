"""Zeroth-order stochastic gradient descent."""

import optax

from optax_lowbit.zo.directions import Choice
from optax_lowbit.zo.estimators import Central, Estimator, ForwardGradient
from optax_lowbit.zo.noise import Noise, Rademacher
from optax_lowbit.zo.optimizer import ZeroOrderOptimizer
from optax_lowbit.zo.updates import Descend


def zo_sgd(
    learning_rate: optax.ScalarOrSchedule,
    eps: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 1,
    *,
    noise: Noise = Rademacher(),
    estimator: Estimator | ForwardGradient = Central(),
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Choice | None = None,
    trainable: Choice | None = None,
    clip: float | None = None,
    active_probes: optax.Schedule | None = None,
    probe_batch: int = 1,
) -> ZeroOrderOptimizer:
    r"""Descends along random directions: MeZO.

    .. math::
      c_i = \frac{L(\theta + \epsilon z_i) - L(\theta - \epsilon z_i)}{2 \epsilon}, \qquad
      \theta \leftarrow \theta - \frac{\eta}{q} \sum_{i=1}^q c_i z_i - \eta \lambda \theta

    Parameters are not changed to evaluate the loss, and their sum with a direction is rounded to
    their dtype once. Updates of bfloat16 parameters are rounded stochastically. A step whose loss
    is not finite changes nothing.

    **Memory.** Nothing is kept. A step needs what the loss needs, and one perturbed leaf.

    Args:
      learning_rate: :math:`\eta`, a fixed learning rate or a schedule of the count of steps.
      eps: :math:`\epsilon`, how far along a direction the loss is evaluated; or a schedule.
      num_probes: :math:`q`, directions in a step.
      noise: The distribution of directions.
      estimator: How a coefficient :math:`c_i` is made: :class:`Central`, :class:`OneSided`,
        :class:`ForwardGradient`.
      weight_decay: :math:`\lambda`, decoupled; a number or a schedule.
      weight_decay_mask: Which leaves decay: a regular expression that is searched for in a path
        such as ``layers/0/kernel``, or a predicate of path and leaf. None: all.
      trainable: Which float leaves train, in the same way; None: all.
      clip: Coefficients are clipped to ``[-clip, clip]``; None: they are not.
      active_probes: A schedule of how many of the probes are evaluated in a step, from 1 to
        ``num_probes``; the mean is over these, and the others cost nothing. None: all.
      probe_batch: Probes evaluated together: larger matmuls, and as many perturbed leaves at once.

    Returns:
      The corresponding :class:`ZeroOrderOptimizer`.

    Raises:
      TypeError, ValueError: If an argument is impossible.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from optax_lowbit import zo
      >>> opt = zo.zo_sgd(1e-6, num_probes=4)
      >>> state = opt.init({"w": jnp.ones((128, 256))}, jax.random.key(0))
      >>> step = jax.jit(opt.step, static_argnums=0, donate_argnums=(1, 2))

      Then ``params, state, info = step(loss_fn, params, state, batch)``, with so many passes:

      >>> opt.estimator.evaluations(opt.num_probes)
      8

    References:
      Malladi et al, `Fine-Tuning Language Models with Just Forward Passes
      <https://arxiv.org/abs/2305.17333>`_, 2023, Algorithm 1. Differs in that parameters are not
      perturbed in place, which in bfloat16 is a random walk of its own.
    """
    return ZeroOrderOptimizer(
        rule=Descend(), learning_rate=learning_rate, eps=eps, num_probes=num_probes, noise=noise,
        estimator=estimator, weight_decay=weight_decay, weight_decay_mask=weight_decay_mask,
        trainable=trainable, clip=clip, active_probes=active_probes, probe_batch=probe_batch,
    )  # fmt: skip
