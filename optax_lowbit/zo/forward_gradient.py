"""Descent by forward-mode derivatives along random directions."""

import optax

from optax_lowbit.zo.directions import Choice
from optax_lowbit.zo.estimators import ForwardGradient
from optax_lowbit.zo.noise import Noise, Rademacher
from optax_lowbit.zo.optimizer import ZeroOrderOptimizer
from optax_lowbit.zo.updates import Descend


def forward_grad(
    learning_rate: optax.ScalarOrSchedule,
    num_probes: int = 1,
    *,
    noise: Noise = Rademacher(),
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Choice | None = None,
    trainable: Choice | None = None,
    clip: float | None = None,
    active_probes: optax.Schedule | None = None,
    probe_batch: int = 1,
) -> ZeroOrderOptimizer:
    r"""Descends along random directions by the exact slope of the loss: Forward-Grad.

    .. math::
      c_i = \frac{d}{ds} L(\theta + s z_i) \Big|_{s=0}, \qquad
      \theta \leftarrow \theta - \frac{\eta}{q} \sum_{i=1}^q c_i z_i - \eta \lambda \theta

    There is no ``eps``, and no rounding of the loss to fear: the choice for bfloat16 where a step
    of ``eps`` is few units in the last place. The loss must have derivatives.

    **Memory.** Nothing is kept. A pass has the tangent of each activation beside it.
    **Passes.** One with tangents a probe.

    Args:
      learning_rate, num_probes: As in :func:`zo_sgd`.
      noise, weight_decay, weight_decay_mask, trainable: As in :func:`zo_sgd`.
      clip, active_probes, probe_batch: As in :func:`zo_sgd`.

    Returns:
      The corresponding :class:`ZeroOrderOptimizer`.

    Raises:
      TypeError, ValueError: If an argument is impossible.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from optax_lowbit import zo
      >>> opt = zo.forward_grad(0.1)
      >>> params = jnp.array([3.0])
      >>> new, state, info = opt.step(lambda x: jnp.sum(x**2), params, opt.init(params, 0))
      >>> f"{new[0]:.2f}"
      '2.40'

    References:
      Baydin et al, `Gradients without Backpropagation <https://arxiv.org/abs/2202.08587>`_, 2022.
      The released code of Zhang et al, 2024 (`arXiv:2402.11592
      <https://arxiv.org/abs/2402.11592>`_) holds a tangent of every parameter; here each is made
      where it is used.
    """
    return ZeroOrderOptimizer(
        rule=Descend(), learning_rate=learning_rate, num_probes=num_probes, noise=noise,
        estimator=ForwardGradient(), weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask, trainable=trainable, clip=clip,
        active_probes=active_probes, probe_batch=probe_batch,
    )  # fmt: skip
