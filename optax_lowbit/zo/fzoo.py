"""FZOO: several one-sided probes, and a step size from how much their losses differ."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import optax

from optax_lowbit.zo.directions import Choice
from optax_lowbit.zo.estimators import OneSided
from optax_lowbit.zo.noise import Noise, Rademacher
from optax_lowbit.zo.optimizer import ZeroOrderOptimizer
from optax_lowbit.zo.updates import Descend


def fzoo(
    learning_rate: optax.ScalarOrSchedule,
    eps: optax.ScalarOrSchedule = 1e-4,
    num_probes: int = 8,
    *,
    noise: Noise = Rademacher(),
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Choice | None = None,
    trainable: Choice | None = None,
    clip: float | None = None,
    active_probes: optax.Schedule | None = None,
    probe_batch: int = 1,
) -> ZeroOrderOptimizer:
    r"""Descends along random directions at a rate normalized by the spread of the losses: FZOO.

    With :math:`\ell_0` the loss at the parameters, :math:`\ell_i` that at
    :math:`\theta + \epsilon z_i` and :math:`\sigma` the standard deviation of the :math:`\ell_i`,

    .. math::
      c_i = \frac{\ell_i - \ell_0}{\sigma}, \qquad
      \theta \leftarrow \theta - \frac{\eta}{q} \sum_{i=1}^q c_i z_i - \eta \lambda \theta

    ``eps`` cancels to first order, so the learning rate is the size of a step as in normalized SGD:
    5e-5 with an ``eps`` of 1e-4 and 8 probes for full fine-tuning of OPT-13B, says the authors'
    README. :attr:`StepInfo.coefficients` are the :math:`c_i`.

    Where all losses are equal nothing moves. Where ``eps`` is so small that they differ by rounding
    alone, the step is one of full size all the same: see that they do not.

    **Memory.** Nothing is kept. **Passes.** ``num_probes + 1``.

    Args:
      learning_rate, eps, num_probes: As in :func:`zo_sgd`; at least 2 probes.
      noise, weight_decay, weight_decay_mask, trainable: As in :func:`zo_sgd`.
      clip, probe_batch: As in :func:`zo_sgd`.
      active_probes: As in :func:`zo_sgd`, but from 2; the spread is that of those evaluated.

    Returns:
      The corresponding :class:`ZeroOrderOptimizer`.

    Raises:
      TypeError, ValueError: If an argument is impossible.

    Examples:
      >>> from optax_lowbit import zo
      >>> opt = zo.fzoo(5e-5, probe_batch=8)
      >>> opt.estimator.evaluations(opt.num_probes)
      9

    References:
      Dang et al, `FZOO: Fast Zeroth-Order Optimizer for Fine-Tuning Large Language Models towards
      Adam-Scale Speed <https://arxiv.org/abs/2506.09034>`_, 2025. As in the released code, the
      standard deviation is that of the perturbed losses, divided by their number. That code also
      takes half of the losses from the step before; here all are of this step.
    """
    if num_probes == 1:
        raise ValueError("num_probes must be at least 2 for a standard deviation, got 1")
    return ZeroOrderOptimizer(
        rule=Descend(), learning_rate=learning_rate, eps=eps, num_probes=num_probes, noise=noise,
        estimator=Normalized(), weight_decay=weight_decay, weight_decay_mask=weight_decay_mask,
        trainable=trainable, clip=clip, active_probes=active_probes, probe_batch=probe_batch,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Normalized(OneSided):
    """``(phi_i(eps) - phi(0)) / std``, with the standard deviation over probes."""

    least_probes: ClassVar[int] = 2

    def coefficients(self, base, losses, eps, active=None):
        """In units of the spread; 0 where there is none."""
        del eps
        counts = None if active is None else jnp.arange(len(losses)) < active
        rises, spread = losses[:, 0] - base, jnp.std(losses[:, 0], where=counts)
        return jnp.where(spread == 0, jnp.zeros_like(rises), rises / spread)
