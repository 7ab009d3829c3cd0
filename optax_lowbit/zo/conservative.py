"""Zeroth-order descent that takes a step only if the loss falls."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from optax_lowbit.zo.directions import Choice
from optax_lowbit.zo.estimators import Central, Estimator, ForwardGradient
from optax_lowbit.zo.noise import Noise, Rademacher
from optax_lowbit.zo.optimizer import ZeroOrderOptimizer
from optax_lowbit.zo.state import StepInfo
from optax_lowbit.zo.updates import Descend, is_taken


def zo_sgd_conservative(
    learning_rate: optax.ScalarOrSchedule,
    eps: optax.ScalarOrSchedule = 1e-3,
    num_probes: int = 1,
    *,
    noise: Noise = Rademacher(),
    estimator: Estimator | ForwardGradient = Central(),
    trainable: Choice | None = None,
    clip: float | None = None,
    active_probes: optax.Schedule | None = None,
    probe_batch: int = 1,
) -> ZeroOrderOptimizer:
    r"""Takes the best of no step, a step down and the same step up: ZO-SGD-Cons.

    .. math::
      u = \frac{\eta}{q} \sum_{i=1}^q c_i z_i, \qquad
      \theta \leftarrow \mathrm{argmin}\ L \ \text{over}\ \{\theta,\ \theta - u,\ \theta + u\}

    on the arguments that the step was given. Of equal losses the first of these is taken. All three
    are evaluated without moving parameters, so a rejected step changes no bit of them. What is
    compared is what is taken, stochastic rounding of bfloat16 parameters included.

    There is no weight decay, which would be rejected as often as it raises the loss: add a penalty
    to the loss.

    **Memory.** Nothing is kept. **Passes.** 3 more than :func:`zo_sgd` with :class:`Central`, 5 in
    all with one probe; 2 more with estimators that evaluate at the parameters themselves.

    Args:
      learning_rate, eps, num_probes: As in :func:`zo_sgd`.
      noise, estimator, trainable, clip, active_probes, probe_batch: As in :func:`zo_sgd`.

    Returns:
      The corresponding :class:`ZeroOrderOptimizer`. The record of a rejected step is 0.

    Raises:
      TypeError, ValueError: If an argument is impossible.

    Examples:
      Too large a step is not taken:

      >>> import jax, jax.numpy as jnp
      >>> from optax_lowbit import zo
      >>> opt = zo.zo_sgd_conservative(100.0)
      >>> params = jnp.ones(3)
      >>> new, state, info = opt.step(lambda x: jnp.sum(x**2), params, opt.init(params, 0))
      >>> new.tolist(), info.record.tolist()
      ([1.0, 1.0, 1.0], [0.0, 0.0])

    References:
      Zhang et al, `Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning
      <https://arxiv.org/abs/2402.11592>`_, 2024, Section 3. The released code moves the parameters
      by three steps of its optimizer and means to come back, which AdamW does not do.
    """
    return ConservativeOptimizer(
        rule=Descend(), learning_rate=learning_rate, eps=eps, num_probes=num_probes, noise=noise,
        estimator=estimator, trainable=trainable, clip=clip, active_probes=active_probes,
        probe_batch=probe_batch,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConservativeOptimizer(ZeroOrderOptimizer):
    """One whose record is that of the best of three steps; see :func:`zo_sgd_conservative`."""

    @property
    def evaluations(self):
        """Refused: where this evaluates the loss depends on what it has found.

        Raises:
          TypeError: Always.
        """
        raise TypeError(
            "zo_sgd_conservative evaluates the loss where earlier evaluations lead it, so it can't "
            "be asked for candidates: give step a loss_fn that JAX can trace"
        )

    def _chosen(self, phi, keys, info):
        is_known = isinstance(self.estimator, ForwardGradient) or self.estimator.uses_base
        here = info.loss if is_known else phi.here()
        rounding = self._rounding(phi.probe, phi.params)
        choices = jnp.array([0, 1, -1], jnp.float32)
        losses = jax.lax.map(
            lambda choice: phi.along(keys, choice * info.record[:-1], rounding), choices[1:]
        )
        losses = jnp.append(here, losses)
        best = jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf))
        slopes, share = jnp.split(info.record, [self.num_probes])
        record = jnp.append(choices[best] * slopes, share)
        return StepInfo(here, info.coefficients, record, is_taken(record))
