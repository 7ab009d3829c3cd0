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

    **Memory.** Nothing is kept, and neither a direction nor a perturbed copy of the parameters is
    ever held: each leaf is perturbed where the loss uses it. A step needs what the loss needs, and
    about one leaf.

    Args:
      learning_rate: A fixed learning rate or a schedule of the count of steps.
      eps: How far parameters are moved to evaluate the loss, or a schedule. Take at least 10 times
        the distance between neighbouring values of a parameter: 1e-3 for bfloat16 weights of .02.
        Where a schedule gives 0 or less nothing is probed and nothing changes:
        :attr:`StepInfo.is_taken`.
      num_probes: Directions :math:`q` in each step; their estimates are averaged.
      noise: The distribution of directions.
      estimator: How a coefficient :math:`c_i` is found: :class:`Central`, of two evaluations a
        probe; :class:`OneSided`, of one, and one more in all; :class:`ForwardGradient`.
      weight_decay: Rate :math:`\lambda` of the decay, scaled by the learning rate, or a schedule.
      weight_decay_mask: Which leaves decay: a regular expression searched for in a leaf's path
        (``layers/0/kernel``), or a predicate of path and leaf; None: all that train.
      trainable: Which float leaves train, chosen in the same way; None: all.
      clip: Largest magnitude of a coefficient :math:`c_i`; None: not clipped.
      active_probes: A schedule of how many of the probes are evaluated in a step, from 1 to
        ``num_probes``; the mean is over these, and the others cost nothing. None: all.
      probe_batch: Probes that are evaluated together, by `jax.vmap`: larger matmuls, and as many
        perturbed leaves at once.

    Returns:
      The optimizer: ``init(params, key)`` and ``step(loss_fn, params, state, *args)``.

    Raises:
      TypeError, ValueError: If an argument is impossible.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from optax_lowbit import zo
      >>> def loss(params, target):
      ...     return jnp.mean((params["w"] - target) ** 2)
      >>> opt = zo.zo_sgd(0.2, num_probes=4)
      >>> params = {"w": jnp.zeros(8)}
      >>> state = opt.init(params, jax.random.key(0))
      >>> step = jax.jit(opt.step, static_argnums=0, donate_argnums=(1, 2))
      >>> for _ in range(100):
      ...     params, state, info = step(loss, params, state, 3.0)
      >>> bool(abs(params["w"] - 3.0).max() < 0.1)
      True

    References:
      Malladi et al, `Fine-Tuning Language Models with Just Forward Passes
      <https://arxiv.org/abs/2305.17333>`_, 2023, Algorithm 1; Zhang et al, `Revisiting Zeroth-Order
      Optimization for Memory-Efficient LLM Fine-Tuning <https://arxiv.org/abs/2402.11592>`_, 2024.
      There directions are Gaussian, and parameters are moved in place and back, which drifts.
    """
    return ZeroOrderOptimizer(
        rule=Descend(), learning_rate=learning_rate, eps=eps, num_probes=num_probes, noise=noise,
        estimator=estimator, weight_decay=weight_decay, weight_decay_mask=weight_decay_mask,
        trainable=trainable, clip=clip, active_probes=active_probes, probe_batch=probe_batch,
    )  # fmt: skip
