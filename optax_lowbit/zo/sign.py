"""Zeroth-order descent by signs: of each element of the estimate, or of each coefficient."""

import dataclasses

import jax.numpy as jnp
import optax

from optax_lowbit.zo.directions import Choice
from optax_lowbit.zo.estimators import Central, Estimator, ForwardGradient
from optax_lowbit.zo.noise import Gaussian, Noise, Rademacher
from optax_lowbit.zo.optimizer import ZeroOrderOptimizer
from optax_lowbit.zo.updates import Descend, DescendSign


def zo_sgd_sign(
    learning_rate: optax.ScalarOrSchedule,
    eps: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 1,
    *,
    noise: Noise = Rademacher(),
    estimator: Estimator | ForwardGradient = Central(),
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Choice | None = None,
    trainable: Choice | None = None,
    active_probes: optax.Schedule | None = None,
    probe_batch: int = 1,
) -> ZeroOrderOptimizer:
    r"""Descends by the sign of each element of the estimate: ZO-SGD-Sign.

    .. math::
      \theta \leftarrow \theta - \eta \left(\mathrm{sign}\Big(\sum_i c_i z_i\Big) + \lambda
      \theta\right)

    Elements whose sum is 0 stay. With one probe of signs it is :func:`zo_sgd_scalar_sign`.

    **Memory.** Nothing is kept.

    Args:
      learning_rate, eps, num_probes: As in :func:`zo_sgd`.
      noise, estimator, weight_decay, weight_decay_mask, trainable: As in :func:`zo_sgd`.
      active_probes, probe_batch: As in :func:`zo_sgd`.

    Returns:
      The corresponding :class:`ZeroOrderOptimizer`.

    Raises:
      TypeError, ValueError: If an argument is impossible.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_lowbit import zo
      >>> opt = zo.zo_sgd_sign(1e-6, noise=zo.Gaussian())
      >>> opt.init(jnp.ones(3), 0).moments
      {}

    References:
      Liu et al, `signSGD via Zeroth-Order Oracle <https://openreview.net/forum?id=BJe-DsC5Fm>`_,
      2019; Zhang et al, `Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning
      <https://arxiv.org/abs/2402.11592>`_, 2024, Section 3. The released code of the latter has the
      sign of the coefficient instead, and gives it to AdamW.
    """
    return ZeroOrderOptimizer(
        rule=DescendSign(), learning_rate=learning_rate, eps=eps, num_probes=num_probes,
        noise=noise, estimator=estimator, weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask, trainable=trainable, active_probes=active_probes,
        probe_batch=probe_batch,
    )  # fmt: skip


def zo_sgd_scalar_sign(
    learning_rate: optax.ScalarOrSchedule,
    eps: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 1,
    *,
    noise: Noise = Gaussian(),
    estimator: Estimator = Central(),
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Choice | None = None,
    trainable: Choice | None = None,
    active_probes: optax.Schedule | None = None,
    probe_batch: int = 1,
) -> ZeroOrderOptimizer:
    r"""Descends along each direction by the sign of its coefficient.

    .. math::
      \theta \leftarrow \theta - \frac{\eta}{q} \sum_{i=1}^q \mathrm{sign}(c_i) z_i
      - \eta \lambda \theta

    What tells of the loss is whether it falls: one bit a probe. :attr:`StepInfo.coefficients` are
    the signs.

    **Memory.** Nothing is kept.

    Args:
      learning_rate, eps, num_probes: As in :func:`zo_sgd`.
      noise: The distribution of directions.
      estimator: Of which the signs are taken; not :class:`ForwardGradient`.
      weight_decay, weight_decay_mask, trainable: As in :func:`zo_sgd`.
      active_probes, probe_batch: As in :func:`zo_sgd`.

    Returns:
      The corresponding :class:`ZeroOrderOptimizer`.

    Raises:
      TypeError, ValueError: If an argument is impossible.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_lowbit import zo
      >>> opt = zo.zo_sgd_scalar_sign(1e-6)
      >>> opt.estimator.coefficients(None, jnp.array([[2.0, 1.5]]), eps=1e-3).tolist()
      [1.0]

    References:
      The update of the released code of Zhang et al, `Revisiting Zeroth-Order Optimization for
      Memory-Efficient LLM Fine-Tuning <https://arxiv.org/abs/2402.11592>`_, 2024, without the AdamW
      that it was then given to.
    """
    if not isinstance(estimator, Estimator):
        raise TypeError(f"estimator must be one of values of the loss, got {estimator!r}")
    return ZeroOrderOptimizer(
        rule=Descend(), learning_rate=learning_rate, eps=eps, num_probes=num_probes, noise=noise,
        estimator=SignOf(estimator.signs, estimator.uses_base, estimator),
        weight_decay=weight_decay, weight_decay_mask=weight_decay_mask, trainable=trainable,
        active_probes=active_probes, probe_batch=probe_batch,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SignOf(Estimator):
    """The signs of another estimator's coefficients, which evaluates at the same places."""

    inner: Estimator = Central()

    def coefficients(self, base, losses, eps, active=None):
        """1, 0 or -1."""
        return jnp.sign(self.inner.coefficients(base, losses, eps, active))
